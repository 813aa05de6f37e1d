"""safetensors headers: 8 bytes of little-endian length, then JSON (github.com/huggingface/safetensors, "Format").

Bounds beside the format's own 100 MB: duplicate names, overlaps, holes and overflow are refused before a library that
trusts the header sees the file.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

AGAIN = "; copy or download it again"
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64  # a product of a million large numbers takes hours
MAX_TENSORS = 200_000  # a million zero-size tensors cost the reference reader a gigabyte
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """`tensors`: name → (dtype, shape)."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str] = field(default_factory=dict)


def looks_like(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= length <= size


def read(path: str) -> Header:
    """Raises ValueError with one sentence where the header or the file's size is wrong, OSError where unreadable."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER or length + 8 > size:
            raise ValueError(f"its header claims {length} bytes in a file of {size}: truncated or damaged{AGAIN}")
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is not UTF-8 text (byte {error.start}): damaged{AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no valid JSON ({str(error)[:80]}): damaged{AGAIN}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"its header is no JSON map: damaged{AGAIN}")
    metadata = entries.pop("__metadata__", {})
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"its header lists {len(entries)} tensors, more than {MAX_TENSORS}; save it in shards")
    spans, tensors = [], {}
    for name, entry in entries.items():
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors overlap or leave holes: damaged{AGAIN}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors need {end} bytes, the file has {size - 8 - length}: truncated or damaged{AGAIN}")
    return Header(tensors=tensors, metadata={str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {})


def write(
    path: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Iterable[memoryview], metadata: Mapping[str, str]
) -> None:
    """A file of `tensors`, whose bytes `data` gives one after the other: the library's own writer wants all of them in memory at once.

    Raises ValueError where one has not as many bytes as its dtype and shape say, OSError where the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end, sizes = 0, []
    for name, (dtype, shape) in tensors.items():
        sizes.append((prod(shape) * BITS[dtype] + 7) // 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end := end + sizes[-1])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size, one in zip(tensors, sizes, data, strict=True):
            if one.nbytes != size:
                raise ValueError(f"tensor {name!r} has {one.nbytes} bytes, not {size}")
            file.write(one)
            one.release()  # what it shows may be let go


def _tensor(name: str, entry: object) -> tuple[tuple[str, tuple[int, ...]], tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        whole = len(shape) <= MAX_DIMENSIONS and all(type(one) is int and 0 <= one < 2**63 for one in (*shape, start, stop))
        bits = BITS.get(dtype)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"tensor {name[:80]!r} has no dtype, shape and data_offsets: damaged{AGAIN}") from error
    if bits is None or not whole or stop < start or (prod(shape) * bits + 7) // 8 != stop - start:
        raise ValueError(f"tensor {name[:80]!r}: shape, dtype and offsets do not agree: damaged{AGAIN}")
    return (dtype, shape), (start, stop)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result
