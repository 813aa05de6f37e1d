"""Model files by their first bytes, never by their names; one reader a format, each of headers only.

`READERS` is the list: format → the module that reads its header.
"""

import os
import zipfile

from edgebuild.formats import gguf, onnx, safetensors

READERS = {"onnx": onnx, "safetensors": safetensors, "gguf": gguf}
CONVERT_PICKLE = (
    "a pickle runs code when it is loaded; save the weights as safetensors "
    "(transformers: model.save_pretrained(DIR, safe_serialization=True)) and give that folder"
)


def detect(path: str) -> str:
    """`onnx`, `safetensors`, `gguf`, `pickle`, `zip`, `hdf5`, `tflite`, `text`, `empty` or `unknown`, by content.

    Raises OSError where the file cannot be read.
    """
    size = os.path.getsize(path)
    if size == 0:
        return "empty"
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(b"PK\x03\x04"):
        return "pickle" if _zip_holds_pickle(path) else "zip"
    if safetensors.looks_like(head, size):
        return "safetensors"
    if _is_pickle(head):
        return "pickle"
    if onnx.looks_like(path):
        return "onnx"
    return "text" if _is_text(head) else "unknown"


def _is_pickle(head: bytes) -> bool:
    """Protocols 2 to 5 begin with PROTO and end their first opcode alike; 0 and 1 begin with these opcodes."""
    if head[:1] == b"\x80" and len(head) > 2 and 2 <= head[1] <= 5:
        return True
    return head.startswith(
        (b"(dp", b"(lp", b"(ip", b"ccopy_reg\n", b"cposix\n", b"cos\n", b"c__builtin__\n", b"cbuiltins\n", b"}q\x00", b"]q\x00")
    )


def _zip_holds_pickle(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True  # a damaged archive may hold anything


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut at the end of what was read
    return True
