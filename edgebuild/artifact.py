"""What steps make and what a step leaves behind: artifacts, receipts, records. Plain data, no I/O.

Receipts and records are canonical JSON with a seal at its end, the digest of all before it: one that was damaged is none. It
holds against accidents, not against somebody who writes a seal too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgebuild import digest

SEAL = len(',"seal":""}') + 64  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One output of a step. `tree` tells a directory from a file; `size` is in bytes, of all its files."""

    digest: str
    tree: bool
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """`build/TARGET/STEP.json`: the key that a step last ran under, and what it made, where."""

    key: str
    outputs: Mapping[str, tuple[str, str]]  # name -> (path, digest)
    refused: str = ""  # why what follows must not run (a gate that fails), else empty

    def to_bytes(self) -> bytes:
        outputs = {name: list(made) for name, made in self.outputs.items()}
        return _sealed("receipt", {"key": self.key, "outputs": outputs, "refused": self.refused})


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """In the store, by key: what a step made and how it came about.

    `components` are the parts of the key (recipe and input digests), so that `explain` can name what differs.
    """

    key: str
    name: str
    outputs: Mapping[str, Artifact]
    components: Mapping[str, Any]
    summary: str = ""
    refused: str = ""
    seconds: float = 0.0
    peak_memory: int | None = None  # bytes, RssAnon of the largest process of the worker
    toolchain: Mapping[str, str] = field(default_factory=dict)
    host: Mapping[str, str] = field(default_factory=dict)
    log: str = ""  # sha256 of the worker's log

    @property
    def stored(self) -> dict[str, Artifact]:
        """The outputs that are in the store: what a fetch brought of a repository stays in the Hugging Face cache."""
        recipe = self.components["recipe"]
        elsewhere = recipe["verb"] == "fetch" and "repository" in recipe["params"]
        return {name: made for name, made in self.outputs.items() if not (elsewhere and name == "model")}

    def to_bytes(self) -> bytes:
        outputs = {name: {"digest": made.digest, "tree": made.tree, "size": made.size} for name, made in self.outputs.items()}
        content = {
            "key": self.key,
            "name": self.name,
            "outputs": outputs,
            "components": dict(self.components),
            "summary": self.summary,
            "refused": self.refused,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "toolchain": dict(self.toolchain),
            "host": dict(self.host),
            "log": self.log,
        }
        return _sealed("record", content)


def receipt_from_bytes(sealed: bytes) -> Receipt:
    """Raises KeyError, TypeError, ValueError or AttributeError where that is no receipt, whole: then there is none."""
    data = _unsealed("receipt", sealed)
    outputs = {str(name): (str(made[0]), str(made[1])) for name, made in data["outputs"].items()}
    return Receipt(key=str(data["key"]), outputs=outputs, refused=str(data["refused"]))


def record_from_bytes(sealed: bytes) -> Record:
    """Raises KeyError, TypeError, ValueError or AttributeError where that is no record, whole: then there is none."""
    data = _unsealed("record", sealed)
    outputs = {
        str(name): Artifact(digest=str(made["digest"]), tree=bool(made["tree"]), size=int(made["size"]))
        for name, made in data["outputs"].items()
    }
    return Record(
        key=str(data["key"]),
        name=str(data["name"]),
        outputs=outputs,
        components=dict(data["components"]),
        summary=str(data["summary"]),
        refused=str(data["refused"]),
        seconds=float(data["seconds"]),
        peak_memory=None if data["peak_memory"] is None else int(data["peak_memory"]),
        toolchain=dict(data["toolchain"]),
        host=dict(data["host"]),
        log=str(data["log"]),
    )


def _sealed(kind: str, content: dict[str, Any]) -> bytes:
    text = digest.canonical(content)
    return text[:-1] + _seal(kind, text)


def _unsealed(kind: str, sealed: bytes) -> Any:
    text = sealed[:-SEAL] + b"}"
    if sealed[-SEAL:] != _seal(kind, text):
        raise ValueError(f"a {kind} that was damaged")
    return json.loads(text)


def _seal(kind: str, text: bytes) -> bytes:
    """What stands in place of the brace that ends `text`."""
    return b',"seal":"%s"}' % digest.of_bytes(kind.encode() + b"\0" + text).encode()
