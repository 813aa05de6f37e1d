"""`edgebuild completion`: what is offered, and typed with a TAB in real shells on a terminal of their own."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edgebuild.completion import SCRIPTS
from edgebuild.files import sealed, unsealed
from tests.conftest import TARGET, Lab
from tests.test_cli import BIN, run


def offered(lab: Lab, *words: str) -> set[str]:
    result = run(lab, "completion", "--words", *words, program="edgebuild")
    assert result.returncode == 0
    assert result.stderr == ""
    return set(result.stdout.split())


def test_what_is_offered(lab: Lab) -> None:
    (lab.root / "targets" / "other.yaml").write_text(TARGET)
    assert {"plan", "doctor", "build:one", "quantize:other", "list", "--strict"} <= offered(lab, "")
    assert offered(lab, "build:o") == {"build:one", "build:other"}
    assert offered(lab, "o", "--offline", "plan") == {"one", "other"}
    assert offered(lab, "build:", "build:one") == {"build:other"}
    assert offered(lab, "o", "plan") == {"one", "other"}
    assert offered(lab, "--", "plan") == {"--help", "--json"}
    assert offered(lab, "", "completion") >= {"bash", "zsh", "fish"}
    assert offered(lab, "pack", "list") == {"package:one", "package:other"}


def test_names_come_of_the_plan_and_of_younger_files(lab: Lab) -> None:
    """No YAML is read for an answer: several targets of one file are known by the plan that was made of it."""
    run(lab)
    cache = lab.root / ".edgebuild" / "plan.json"
    cache.write_bytes(sealed(unsealed(cache.read_bytes()).replace(b'"targets":{"one":', b'"targets":{"one-web":{},"one":')))
    (lab.root / "targets" / "new.yaml").write_text("not: [yaml")
    os.utime(lab.root / "targets" / "new.yaml", (time.time() + 5, time.time() + 5))
    assert offered(lab, "", "plan") == {"one", "one-web", "new", "--help", "--json", "-h"}
    cache.write_text("torn")
    assert offered(lab, "o", "plan") == {"one"}


@pytest.mark.parametrize("planned", [False, True])
def test_what_cannot_be_a_name_is_not_offered(lab: Lab, planned: bool) -> None:
    for name in ("$(touch gone)", "x;y", "a b", "*", "new\nline", "esc\x1b[31m", "\udcff", "con"):
        (lab.root / "targets" / f"{name}.yaml").write_text(TARGET)
    if planned:
        assert run(lab, "list").returncode == 0
    assert offered(lab, "", "plan") == {"one", "--help", "--json", "-h"}


def test_outside_a_project_and_in_a_broken_one_it_is_silent(lab: Lab, tmp_path: Path) -> None:
    nowhere = subprocess.run(
        [str(BIN / "edgebuild"), "completion", "--words", "pl"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (nowhere.stdout, nowhere.stderr) == ("plan\n", "")
    (lab.root / "targets" / "bad.yaml").write_text("\0")
    assert offered(lab, "build:b") == {"build:bad"}


def test_only_a_known_shell(lab: Lab) -> None:
    assert run(lab, "completion", program="edgebuild").returncode == 3
    assert "invalid choice" in run(lab, "completion", "tcsh", program="edgebuild").stderr
    for shell, script in SCRIPTS.items():
        assert run(lab, "completion", shell, program="edgebuild").stdout == script


STARTS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; "),
}
TYPED = [
    ("edgebuild build:on", "edgebuild build:one"),
    ("edgebuild quantize:on", "edgebuild quantize:one"),
    ("edgebuild plan on", "edgebuild plan one"),
    ("edgebuild remea", "edgebuild remeasure"),
    ("edgebuild plan --js", "edgebuild plan --json"),
    ("edgebuild --strict build:o", "edgebuild --strict build:one"),
    ("edgebuild list dodo", "edgebuild list dodo.py"),  # nothing of ours: a file name
]


@pytest.mark.parametrize("shell", list(STARTS))
@pytest.mark.parametrize(("typed", "becomes"), TYPED)
def test_typed_with_a_tab(lab: Lab, shell: str, typed: str, becomes: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    program, before = STARTS[shell]
    load = f'{before}eval "$(edgebuild completion {shell})"'
    screen = _type(lab, program, [f"{load}; echo READ''Y\n", f"{typed}\t", "\x01echo '[' \x05 ']'\n", "exit\n"])
    assert f"[ {becomes} ]" in " ".join(screen.split()), screen


@pytest.mark.parametrize(("typed", "becomes"), TYPED)
def test_asked_of_fish(lab: Lab, typed: str, becomes: str) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed here")
    script = f"edgebuild completion fish | source; complete --do-complete '{typed}'"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(lab.root)}
    asked = subprocess.run(
        ["fish", "--no-config", "-c", script], cwd=lab.root, capture_output=True, text=True, env=environment, check=True
    )
    assert [line.split("\t")[0] for line in asked.stdout.splitlines()] == [becomes.split()[-1]]


def test_bash_that_does_not_break_words_at_colons(lab: Lab) -> None:
    lines = ["COMP_WORDBREAKS=${COMP_WORDBREAKS//:}; eval \"$(edgebuild completion bash)\"; echo READ''Y\n"]
    screen = _type(lab, STARTS["bash"][0], [*lines, "edgebuild build:on\t", "\x01echo '[' \x05 ']'\n", "exit\n"])
    assert "[ edgebuild build:one ]" in " ".join(screen.split()), screen


def _type(lab: Lab, program: list[str], lines: list[str]) -> str:
    """Type lines at a shell on a terminal, each when the one before is answered; → all that it showed."""
    parent, child = pty.openpty()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TERM": "dumb",
        "PS1": "$ ",
        "HOME": str(lab.root),
        "LINES": "50",
    }
    process = subprocess.Popen(
        program, cwd=lab.root, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True, close_fds=True
    )
    os.close(child)
    shown = ""
    try:
        for number, line in enumerate(lines):
            os.write(parent, line.encode())
            shown += _read(parent, until="READY" if number == 0 else "", quiet=1.5)
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    return shown


def _read(terminal: int, until: str, quiet: float, most: float = 30.0) -> str:
    """What comes until it holds a word, or for as long as something comes."""
    shown, end = "", time.monotonic() + most
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], most if until and until not in shown else quiet)
        if not ready:
            break
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            break
    return shown
