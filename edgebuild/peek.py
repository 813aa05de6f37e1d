"""A repository's files without their weights: small ones whole, of the others the header, and a hole of the right size behind it.

So whoever reads headers reads them as he would on this disk. Of ONNX, whose weights lie among its graph, the whole file comes.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from edgebuild import hub
from edgebuild.errors import StepFailed, shown
from edgebuild.formats import gguf, safetensors
from edgebuild.step import Download

WHOLE = ("config.json", "*.index.json", "README.md", "LICEN[CS]E*", "COPYING*")
HOLE = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
LARGEST = 2**50  # bytes of any file; the hub itself takes none of more than 500 GB
SMALL = 50_000_000  # bytes of a file that comes whole
FIRST, MOST = 1 << 18, 1 << 28  # bytes of a header: asked for first, and at most


def peek(repository: str, commit: str, path: str, out: Path) -> dict[str, Path]:
    """role → path, as `source.files` gives them, in the folder `out`. Raises StepFailed with one sentence."""
    if path.lower().endswith(".onnx"):
        hub.fetch(repository, commit, path, Download(url="", partial=out, moved=lambda here, total: None), out / "model.onnx")
        return {"model": out / "model.onnx"}
    sizes = _sizes(repository, commit)
    if path:
        if path not in sizes:
            raise StepFailed(f"hf:{repository} has no file {path} at this commit; check the name")
        _brought(repository, commit, path, sizes[path], out / Path(path).name)
        return {"model": out / Path(path).name}
    wanted = [name for name in sizes if "/" not in name and any(fnmatch(name, pattern) for pattern in (*WHOLE, *HOLE))]
    for name in wanted:
        _brought(repository, commit, name, sizes[name], out / name)
    return {f"model/{name}": out / name for name in sorted(wanted)}


def _sizes(repository: str, commit: str) -> dict[str, int]:
    """A hub may say anything. Raises StepFailed for what no file is."""
    sizes = hub.sizes(repository, commit)
    for name, size in sizes.items():
        if not name.isprintable() or type(size) is not int or not 0 <= size <= LARGEST:
            raise StepFailed(
                f"hf:{repository}: the hub says that its file {shown(name)} has {str(size)[:30]} bytes; check HF_ENDPOINT"
            )
    return sizes


def _brought(repository: str, commit: str, name: str, size: int, to: Path) -> None:
    def part(start: int, length: int) -> bytes:
        return hub.part(repository, commit, name, start, length) if length > 0 else b""

    data = b""
    if any(fnmatch(name, pattern) for pattern in WHOLE) and size <= SMALL:
        data = part(0, size)
    elif name.endswith(".safetensors"):
        data = part(0, min(size, FIRST))
        length = 8 + min(int.from_bytes(data[:8], "little"), safetensors.MAX_HEADER)
        data += part(len(data), min(length, size) - len(data))
    elif name.lower().endswith(".gguf"):
        _gguf(part, size, to)
        return
    _sparse(to, data, size)


def _gguf(part: Callable[[int, int], bytes], size: int, to: Path) -> None:
    """Its header has no length of its own: four times as much, until all of it is here."""
    data, wanted = b"", min(size, FIRST)
    while True:
        data += part(len(data), wanted - len(data))
        _sparse(to, data, size)
        if len(data) >= min(size, MOST) or len(data) < wanted:
            return
        try:
            if gguf.read(str(to)).end <= len(data):
                return
        except ValueError:
            pass  # what is not here yet reads as zeros
        wanted = min(size, 4 * wanted)


def _sparse(to: Path, data: bytes, size: int) -> None:
    with to.open("wb") as file:
        file.write(data)
        file.truncate(size)
