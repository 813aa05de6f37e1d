"""GGUF headers (github.com/ggml-org/ggml, docs/gguf.md): keys, and the names, types and shapes of tensors, over a memory map.

Every count is bounded before it is believed: readers that believe them hang on a file of 49 bytes.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod

MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS, MAX_NESTING = 100_000, 200_000, 4, 4
MAX_TEXTS = 4_000_000  # in arrays; tokenizers have a million, and a sparse file of zeros has an empty one in every 8 bytes
MAX_NAME, MAX_NAMES, MAX_KEPT = 65_535, 64 * 2**20, 1_000  # bytes of a name (the format's own), of all names, of a text kept
MAX_ALIGNMENT = 2**20
# Type → (name, elements of a block, bytes of a block): ggml.h and ggml-common.h of the same repository.
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)}
TYPES |= {24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)}
TYPES |= {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)}
TYPES |= {10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)}
TYPES |= {14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74)}
TYPES |= {18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110)}
TYPES |= {22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54)}
TYPES |= {35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
Value = int | float | bool | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """`values`: key → a number, or a text cut to MAX_KEPT bytes; of an array `lengths` has the length alone.

    `tensors`: name → (type, shape), the fastest dimension first. `quantized`: the types among them that are of blocks.
    `end`: bytes that the header takes.
    """

    version: int
    values: dict[str, Value]
    lengths: dict[str, int]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    quantized: tuple[str, ...]
    end: int


def read(path: str) -> Header:
    """Raises ValueError with one sentence where the header or the file's size is wrong, OSError where unreadable."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(24)
        if len(head) < 24:
            raise ValueError("it ends within its header: truncated; copy or download it again")
        version, tensors, keys = struct.unpack("<4xIQQ", head)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; known are 2 and 3; make it again with a llama.cpp of today")
        _check_counts(tensors, keys, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                return _Reader(view, size).header(version, tensors, keys)
            except (struct.error, OverflowError) as error:
                raise ValueError("it ends within its header: truncated or damaged; copy or download it again") from error
            except UnicodeDecodeError as error:
                raise ValueError("its header holds a name that is no UTF-8 text: damaged; copy or download it again") from error


def _check_counts(tensors: int, keys: int, size: int) -> None:
    if tensors * 24 > size or keys * 12 > size or tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(
            f"its header claims {tensors} tensors and {keys} keys in a file of {size} bytes: damaged; copy or download it again"
        )


class _Reader:
    """Reads what stands at `position`, and goes on. Raises struct.error or OverflowError beyond the end."""

    def __init__(self, view: mmap.mmap, size: int) -> None:
        self._view, self._size, self._position = view, size, 24
        self._texts = self._names = 0

    def header(self, version: int, count: int, keys: int) -> Header:
        values: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(keys):
            name, kind = self._name(), self._number("I")
            if name in values or name in lengths:
                raise ValueError(f"the key {name[:80]!r} stands twice: damaged; copy or download it again")
            if kind == _ARRAY:
                lengths[name] = self._array(0)
            else:
                values[name] = self._value(kind)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        quantized: set[str] = set()
        needed = 0
        for _ in range(count):
            name, shape, kind, offset = self._tensor()
            if name in tensors:
                raise ValueError(f"the tensor {name[:80]!r} stands twice: damaged; copy or download it again")
            label, block, width = TYPES.get(kind, (f"type {kind}", 1, 0))
            if width and shape and shape[0] % block:
                raise ValueError(
                    f"tensor {name[:80]!r}: its rows are no multiple of {label}'s blocks of {block}: damaged; copy or download it again"
                )
            tensors[name] = (label, shape)
            quantized |= {label} if block > 1 or not width else set()
            needed = max(needed, offset + prod(shape) // block * width)
        self._check_data(needed, values.get("general.alignment", 32))
        return Header(
            version=version,
            values=values,
            lengths=lengths,
            tensors=tensors,
            quantized=tuple(sorted(quantized)),
            end=self._position,
        )

    def _check_data(self, needed: int, alignment: Value) -> None:
        """The tensors lie behind the header, from the next multiple of the alignment."""
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
            raise ValueError("its general.alignment is no number from 1 to 2²⁰: damaged; copy or download it again")
        start = -(-self._position // alignment) * alignment
        if needed and start + needed > self._size:
            raise ValueError(
                f"its tensors end at byte {start + needed}, the file at {self._size}: truncated; copy or download it again"
            )

    def _number(self, code: str) -> int:
        number: int
        (number,) = struct.unpack_from("<" + code, self._view, self._position)
        self._position += struct.calcsize("<" + code)
        return number

    def _bytes(self, most: int) -> bytes:
        """A text, cut to `most` bytes."""
        length = self._number("Q")
        start, self._position = self._position, self._position + length
        if self._position > self._size:
            raise struct.error
        return self._view[start : start + min(length, most)]

    def _name(self) -> str:
        name = self._bytes(MAX_NAME + 1)
        self._names += len(name)
        if len(name) > MAX_NAME or self._names > MAX_NAMES:
            raise ValueError("its header holds a name, or names, longer than any model has: damaged; copy or download it again")
        return name.decode("utf-8")

    def _value(self, kind: int) -> Value:
        if kind == _TEXT:
            return self._bytes(MAX_KEPT).decode("utf-8", "replace")
        if kind not in _SCALARS:
            raise ValueError(
                f"its header holds a value of type {kind}, which GGUF does not have: damaged; copy or download it again"
            )
        return self._number(_SCALARS[kind])

    def _array(self, depth: int) -> int:
        """Go past an array; → its length."""
        kind, length = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._position += length * struct.calcsize("<" + _SCALARS[kind])
        elif kind not in (_TEXT, _ARRAY) or depth == MAX_NESTING:
            raise ValueError("its header holds an array of what GGUF does not have: damaged; copy or download it again")
        else:
            self._texts += length
            if self._texts > MAX_TEXTS:
                raise ValueError(f"its arrays hold more than {MAX_TEXTS} texts: damaged; copy or download it again")
            if kind == _ARRAY:
                for _ in range(length):
                    self._array(depth + 1)
            else:
                self._skip_texts(length)
        if self._position > self._size:
            raise struct.error
        return length

    def _skip_texts(self, count: int) -> None:
        """The one loop that is long: a tokenizer's vocabulary and merges."""
        view, position, unpack = self._view, self._position, _LENGTH.unpack_from
        for _ in range(count):
            position += 8 + unpack(view, position)[0]
        self._position = position

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, offset."""
        name, count = self._name(), self._number("I")
        if count > MAX_DIMENSIONS:
            raise ValueError(
                f"tensor {name[:80]!r} has {count} dimensions; GGUF has at most {MAX_DIMENSIONS}: damaged; copy or download it again"
            )
        shape = tuple(self._number("Q") for _ in range(count))
        if any(length >= 2**63 for length in shape) or prod(shape) >= 2**63:
            raise ValueError(f"tensor {name[:80]!r} has dimensions that no memory holds: damaged; copy or download it again")
        return name, shape, self._number("I"), self._number("Q")
