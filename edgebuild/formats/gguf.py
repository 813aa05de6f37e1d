"""GGUF headers (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts. Counts are bounded by the file's size,
because readers that trust them hang on a file of 49 bytes.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    version: int
    tensors: int
    keys: int


def read(path: str) -> Header:
    """Raises ValueError with one sentence where the header is wrong, OSError where unreadable."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24:
        raise ValueError("it ends within its header: truncated")
    version, tensors, keys = (int.from_bytes(head[a:b], "little") for a, b in ((4, 8), (8, 16), (16, 24)))
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; known are 2 and 3")
    _check_counts(tensors, keys, size)
    return Header(version=version, tensors=tensors, keys=keys)


def _check_counts(tensors: int, keys: int, size: int) -> None:
    if tensors * 24 > size or keys * 12 > size:
        raise ValueError(f"its header claims {tensors} tensors and {keys} keys in a file of {size} bytes: damaged")
