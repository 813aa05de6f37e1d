"""What an action leaves as it was: put in place by whoever ran it, not hashed again, and never other bytes than its digest's."""

import time
from pathlib import Path

import pytest

from edgebuild import digest
from edgebuild.store import Store
from tests.conftest import Lab, write_model

MADE = "build/one/convert/model/source.gguf"


@pytest.fixture
def keeping(lab: Lab) -> Lab:
    write_model(lab.root / "model.gguf", "!kept first")
    time.sleep(0.05)  # what is younger than a tick of the kernel's clock is hashed again
    return lab


def test_it_is_there_with_the_sources_bytes_and_was_not_hashed(keeping: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], digest.of_file

    def counted(path: str) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(digest, "of_file", counted)
    assert set(keeping.build().values()) == {"ran"}
    assert (keeping.root / MADE).read_bytes() == (keeping.root / "model.gguf").read_bytes()
    assert (keeping.root / MADE).stat().st_mode & 0o777 == 0o444
    assert [path for path in hashed if ".edgebuild/tmp/" in path and path.endswith("payload.json")]
    assert not [path for path in hashed if ".edgebuild/tmp/" in path and path.endswith("source.gguf")]
    (named,) = {sha256 for sha256, _ in stored(keeping) if sha256 == real(str(keeping.root / "model.gguf"))}
    assert named == real(MADE)


def stored(lab: Lab) -> list[tuple[str, Path]]:
    """Every object that the store holds: what its name says, and where it lies."""
    return [(path.parent.name + path.name, path) for path in (lab.root / ".edgebuild" / "objects").glob("*/*")]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_source_that_is_edited_while_it_is_copied(when: str, keeping: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs again on what is there now; no object holds other bytes than its name says."""
    source, copy, edits = keeping.root / "model.gguf", Store._copy, ["!kept second"]

    def edited(self: Store, *given: object) -> None:
        def edit() -> None:
            if str(given[1]).endswith("source.gguf") and edits:
                write_model(source, edits.pop())

        if when == "before":
            edit()
        copy(self, *given)  # type: ignore[arg-type]
        if when == "after":
            edit()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_copy", edited)
        outcomes = keeping.build()
    assert not edits
    assert {"failed"} & set(outcomes.values()) or set(outcomes.values()) == {"ran"}
    keeping.build()
    assert set(keeping.build().values()) == {"fresh"}
    assert (keeping.root / MADE).read_bytes() == source.read_bytes()
    for sha256, path in stored(keeping):
        if not path.read_bytes().startswith(b"[["):  # the listing of a folder
            assert digest.of_file(str(path)) == sha256


def test_a_revert_restores_it(keeping: Lab) -> None:
    keeping.build()
    first = (keeping.root / MADE).read_bytes()
    write_model(keeping.root / "model.gguf", "!kept second")
    keeping.build()
    assert (keeping.root / MADE).read_bytes() != first
    write_model(keeping.root / "model.gguf", "!kept first")
    assert keeping.ran() == set()
    assert (keeping.root / MADE).read_bytes() == first
