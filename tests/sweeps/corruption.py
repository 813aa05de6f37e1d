"""What edgebuild keeps, damaged in every way that leaves a file system valid: nothing wrong is ever served.

    python -m tests.sweeps.corruption [--count N] [--seed N] [--only KIND] [--by DAMAGE] [--without GUARD]

After each damage: a build, an edit of the target or of its data with a build, the edit undone with a build; each must end well,
without a traceback, with what a clean build makes. One trial in ten goes through the real command, one in four has two damages.
"""

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgebuild import cli
from edgebuild.errors import EdgebuildError
from edgebuild.files import remove_tree
from edgebuild.noop import NOTE
from tests.conftest import TARGET, Lab, make_lab
from tests.sweeps.audit import Contents, contents, leftovers
from tests.sweeps.trust import GUARDS

BIN = Path(sys.executable).parent
GATES = "gates: {cosine: {min: 0.9}}\n"
STATES = (  # of the target, and of its evaluation data: an edit of either must be seen
    (GATES, 0),
    (f"quantize: {{group_size: 64}}\n{GATES}", 0),
    ("gates: {cosine: {min: 1}, weights_ratio: {max: 0.0001}}\n", 0),  # fails, so that nothing is delivered
    (GATES, 1),
)
FAILS = 2
DATA = "evaluate: {data: data.npz}\n"
PLACES: Mapping[str, tuple[str, ...]] = {  # kind of victim -> where its files lie
    "object": (".edgebuild/objects/*/*",),
    "record": (".edgebuild/records/*/*",),
    "receipt": ("build/one/*.json",),
    "memo": (".edgebuild/memo.json",),
    "plan": (".edgebuild/plan.json", ".edgebuild/recipes.json", ".edgebuild/before/*/*"),
    "no-op": (".edgebuild/noop.json",),
    "output": ("build/one/*/*", "build/one/*/*/*", "build/one/evidence.json"),
    "delivered": ("dist/*", "dist/one/*", "dist/one/*/*"),
}


@dataclass(kw_only=True)
class Report:
    """What a sweep saw: trials by (victim, damage), and what was wrong, a line each."""

    trials: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    commands: int = 0
    seconds: float = 0.0


# -- damages: each leaves `path` other than it was; `others` are files of the same kind -------------------------------------
def flip(path: Path, others: list[Path], rng: random.Random) -> None:
    """One bit in place: through a hard link, the object and what was linked from it alike."""
    _in_place(path, _flipped(path.read_bytes(), rng))


def flip_unseen(path: Path, others: list[Path], rng: random.Random) -> None:
    """One bit in place, with size, mode and time of modification as they were."""
    found = path.stat()
    _in_place(path, _flipped(path.read_bytes(), rng))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def flip_apart(path: Path, others: list[Path], rng: random.Random) -> None:
    """One bit in a file that takes the place of this one: its hard links stay as they are."""
    data = _flipped(path.read_bytes(), rng)
    path.unlink()
    path.write_bytes(data)


def executable(path: Path, others: list[Path], rng: random.Random) -> None:
    """What lies in `build/` may share its file, and so its mode, with the store. Of a file in a folder: a lone one has no mode."""
    if "build" in (path.parents[1].name, path.parents[2].name) or path.parent.name == "dist":
        raise ValueError("not in a folder that a step made")
    path.chmod(path.stat().st_mode | 0o111)


def truncate(path: Path, others: list[Path], rng: random.Random) -> None:
    path.chmod(0o644)
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def empty(path: Path, others: list[Path], rng: random.Random) -> None:
    _in_place(path, b"")


def folder(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def remove(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()


def link_to_nothing(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def link_to_another(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(others).resolve())


def copy_of_another(path: Path, others: list[Path], rng: random.Random) -> None:
    _in_place(path, rng.choice(others).read_bytes())


def swap(path: Path, others: list[Path], rng: random.Random) -> None:
    other = rng.choice(others)
    aside = path.with_name(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def file_for_its_folder(path: Path, others: list[Path], rng: random.Random) -> None:
    """The folder that it lies in, gone, and a file in that place."""
    shutil.rmtree(path.parent)
    path.parent.write_text("x")


def another_meaning(path: Path, others: list[Path], rng: random.Random) -> None:
    """JSON of the right shape that says something else: another digest that exists, another path, parameter, verdict."""
    text = path.read_text()
    value = json.loads(text)
    steps = value[1].get("steps") if isinstance(value, list) else None  # of a plan: what else it holds makes it another plan's
    words = _words(steps or value) or ["e"]
    if '"refused":""' in text and rng.random() < 0.2:
        changed = text.replace('"refused":""', '"refused":"no"')
    elif '"refused":"' in text and '"refused":""' not in text:
        value["refused"] = ""
        changed = json.dumps(value, separators=(",", ":"))
    else:
        word = rng.choice(words)
        pool = words if steps or not others else _words(json.loads(rng.choice([path, *others]).read_text()))
        alike = [other for other in pool if len(other) == len(word) and other != word]
        other = rng.choice(alike) if alike else word[:-1] + ("0" if word[-1] != "0" else "1")
        changed = other.join(text.rsplit(word, 1))
    _in_place(path, changed.encode())


DAMAGES: Mapping[str, Callable[[Path, list[Path], random.Random], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        flip,
        flip_unseen,
        flip_apart,
        executable,
        truncate,
        empty,
        folder,
        remove,
        link_to_nothing,
        link_to_itself,
        link_to_another,
        copy_of_another,
        swap,
        file_for_its_folder,
        another_meaning,
    )
}
NEEDS_ANOTHER = ("link to another", "copy of another", "swap")
ONLY = {
    "executable": ("output", "delivered"),
    "file for its folder": ("object", "record"),
    "another meaning": ("record", "receipt", "memo", "plan", "no-op"),
}


def sweep(count: int, seed: int, only: str = "", by: str = "", first: bool = False, commands: bool = True) -> Report:
    """`count` trials. `only`: one kind of victim; `by`: one kind of damage; `first`: end at the first wrong one; `commands`: some through processes."""
    rng, report, start = random.Random(seed), Report(), time.monotonic()
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        clean = [_clean(Path(place) / f"clean{number}", number) for number in range(len(STATES))]
        lab, state = _fresh_lab(Path(place) / "project", 0), 0
        for number in range(len(STATES)):
            _build(lab, number, False)
        for trial in range(count):
            _build(lab, state, False)
            time.sleep(0.03)  # caches are written when no edit is so young that another could hide behind it
            _build(lab, state, False)
            done = [damage(lab.root, rng, only, by) for _ in range(1 + (rng.random() < 0.25))]
            report.trials.update(done)
            if "plan" in str(done):
                remove_tree(str(lab.root / NOTE))  # while a no-op is remembered nobody asks the plan
            by_command = commands and rng.random() < 0.1
            report.commands += by_command
            other = rng.choice([number for number in range(len(STATES)) if number != state])
            first_now = [("the build", state)] if rng.random() < 0.5 else []  # or the first build is after an edit
            for what, now in (*first_now, ("an edit", other), ("the edit undone", state)):
                problems = [*_build(lab, now, by_command), *_compare(lab.root, clean[now])]
                report.wrong += [f"seed {seed} trial {trial}: {done}: after {what}: {line}" for line in problems[:3]]
            if report.wrong and first:
                break
            if problems:  # what follows begins from a sound project
                shutil.rmtree(lab.root)
                lab = _fresh_lab(lab.root, state)
            state = other
        os.chdir(home)
    report.seconds = time.monotonic() - start
    return report


def damage(root: Path, rng: random.Random, only: str = "", by: str = "") -> tuple[str, str]:
    """Damage one file of a kind, in one way. → (victim, damage)"""
    for _ in range(1000):
        victim = only or rng.choice(list(PLACES))
        paths = sorted(path for pattern in PLACES[victim] for path in root.glob(pattern) if path.is_file())
        how = by or rng.choice([name for name in DAMAGES if victim in ONLY.get(name, PLACES)])
        if not paths:
            continue
        path = rng.choice(paths)
        others = [other for other in paths if other != path]
        if victim in ("memo", "no-op"):  # their like: other files that edgebuild keeps in one piece
            others = sorted(other for other in (root / ".edgebuild").glob("*.json") if other != path)
        if how in NEEDS_ANOTHER and not others:
            continue
        try:
            DAMAGES[how](path, others, rng)
        except (ValueError, OSError):
            continue  # damaged by the damage before: no JSON any more
        return victim, how
    raise SystemExit(f"nothing to damage: {only} by {by}")


def _fresh_lab(root: Path, state: int) -> Lab:
    lab = make_lab(root)
    if problems := _build(lab, state, False):
        raise SystemExit(f"a clean build fails: {problems}")
    return lab


def _clean(root: Path, state: int) -> Contents:
    _fresh_lab(root, state)
    return contents(root)


def _build(lab: Lab, state: int, by_command: bool) -> list[str]:
    """Build as this state is. → what went wrong."""
    path, (text, seed) = lab.root / "targets" / "one.yaml", STATES[state]
    if path.read_text() != TARGET + DATA + text:
        path.write_text(TARGET + DATA + text)
    _set_data(lab.root / "data.npz", seed)
    passes = state != FAILS
    if by_command:
        ended = subprocess.run([str(BIN / "edgebuild")], cwd=lab.root, capture_output=True, text=True, timeout=120)
        said = ended.stdout + ended.stderr
        bad = ended.returncode != (0 if passes else 1) or "Traceback" in said or "unexpected" in said
        return [f"edgebuild ended with {ended.returncode}: {said[-300:]}"] if bad else []
    os.chdir(lab.root)
    try:
        if cli._nothing_to_do(strict=False, start=time.monotonic()):  # as the command asks first
            return []
        outcomes = lab.build(remembers=True)
    except EdgebuildError as error:
        return [f"no build: {error}"]
    except Exception as error:
        return [f"traceback: {type(error).__name__}: {error}"]
    failed = {name for name, outcome in outcomes.items() if outcome in ("failed", "blocked")}
    expected = set() if passes else {"gate:one", "package:one", "build:one"}
    return [f"failed: {sorted(failed)}"] if failed != expected else []


def _set_data(path: Path, seed: int) -> None:
    """Other values in the same number of bytes, at what seems the same time: only the ctime tells."""
    made = io.BytesIO()
    np.savez(made, x=np.random.default_rng(seed).standard_normal((16, 4)).astype(np.float32))
    if not path.exists() or path.read_bytes() != made.getvalue():
        path.write_bytes(made.getvalue())
        os.utime(path, ns=(0, 0))


def _compare(root: Path, clean: Contents) -> list[str]:
    now = contents(root)
    differ = sorted(path for path in now.keys() | clean.keys() if now.get(path) != clean.get(path))
    return [f"{path} is {'missing' if path not in now else 'not what a clean build makes'}" for path in differ] + list(
        leftovers(root)
    )


def _in_place(path: Path, data: bytes) -> None:
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    with path.open("r+b") as file:
        file.truncate()
        file.write(data)
    path.chmod(mode)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"x"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _words(value: Any) -> list[str]:
    """Every text in a JSON value that is long enough to name something."""
    if isinstance(value, str):
        return [value] if len(value) > 2 and value.isascii() and '"' not in value else []
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [word for part in inside for word in _words(part)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(PLACES), default="")
    parser.add_argument("--by", choices=list(DAMAGES), default="")
    parser.add_argument("--without", choices=list(GUARDS), help="a negative control: ends at the first wrong trial")
    given = parser.parse_args()
    if given.without:
        GUARDS[given.without]()
    report = sweep(given.count, given.seed, given.only, given.by, first=bool(given.without), commands=not given.without)
    for line in report.wrong:
        print(line)
    by_victim: Counter[str] = Counter()
    for (victim, _), times in report.trials.items():
        by_victim[victim] += times
    print(", ".join(f"{victim} {times}" for victim, times in sorted(by_victim.items())))
    print(
        f"{sum(report.trials.values())} damages of {len(report.trials)} kinds in {given.count} trials "
        f"({report.commands} by command), {len(report.wrong)} wrong, {report.seconds:.0f} s"
    )
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
