"""Every bad target gives one message without a traceback; its exact text stands beside it in targets_bad/NAME.txt.

`EDGEBUILD_REWRITE=1 pytest tests/test_bad_targets.py` writes the texts anew; read the difference before you commit it.
"""

import os
import time
from pathlib import Path

import pytest

from edgebuild.project import Project
from tests.conftest import TARGET, Lab

FOLDER = Path(__file__).parent / "targets_bad"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def message(lab: Lab, content: bytes, name: str = "bad") -> str:
    (lab.root / "targets" / f"{name}.yaml").write_bytes(content)
    (lab.root / "nothing").mkdir(exist_ok=True)
    os.chdir(lab.root)
    return Project().problems.get(name, "no problem")


@pytest.mark.parametrize("name", NAMES)
def test_message(name: str, lab: Lab) -> None:
    start = time.process_time()
    text = message(lab, (FOLDER / f"{name}.yaml").read_bytes())
    assert time.process_time() - start < 5
    assert "Traceback" not in text
    assert all(line.startswith(("targets/bad.yaml", "platforms/")) for line in text.splitlines())
    expected = FOLDER / f"{name}.txt"
    if os.environ.get("EDGEBUILD_REWRITE"):
        expected.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == expected.read_text(encoding="utf-8")
    assert not (lab.root / "pwned").exists()


def test_too_large(lab: Lab) -> None:
    assert "larger than 256 KiB" in message(lab, b"# " + b"x" * 300_000)


def test_too_many_values(lab: Lab) -> None:
    assert "more than 20000 values" in message(lab, b"a: [" + b"1," * 30_000 + b"1]\n")


def test_a_number_of_many_digits_costs_no_time(lab: Lab) -> None:
    start = time.process_time()
    text = message(lab, TARGET.encode() + b"default: " + b"1" * 200_000)
    assert time.process_time() - start < 5
    assert "YAML versions read" in text
    assert len(text) < 500


@pytest.mark.parametrize("name", ["-x", "x", "a..b", "con", "x.tar", "x.evidence.json", "Upper", "a b", "a" * 80, "ünï"])
def test_names(name: str, lab: Lab) -> None:
    assert "rename it" in message(lab, TARGET.encode(), name)


def test_names_that_differ_in_case_only(lab: Lab) -> None:
    assert "rename" in message(lab, TARGET.encode(), "One")


def test_a_bad_target_fails_alone(lab: Lab) -> None:
    message(lab, b"nonsense: 1\n")
    assert set(lab.build().values()) == {"ran"}


def test_a_step_of_one_target_that_is_a_step_of_another(lab: Lab) -> None:
    message(lab, TARGET.encode(), "one.baseline")
    assert "is a step of the target" in Project().problems["one"]
