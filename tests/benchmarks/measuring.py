"""What the benchmarks share: figures with their limits, timed commands, and projects of any size on the fake backend."""

import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as anywhere

from tests.conftest import TARGET, Lab, make_lab, write_model

BIN = Path(sys.executable).parent
STEPS = 9  # of a target on the fake backend, as the last line of a run counts them


class Figures:
    """Prints figures with their limits as they are found; `status` is 1 where one was not met."""

    def __init__(self) -> None:
        self.status = 0

    def state(self, name: str, value: float, unit: str, limit: float | None = None, beside: str = "") -> None:
        """`limit` is the most that `value` may be; None where the figure only explains others."""
        met = limit is None or value <= limit
        self.status |= not met
        bound = "" if limit is None else f"≤ {limit:g}" if met else f"over {limit:g}"
        print(f"{name:<46} {value:9.3f} {unit:<4} {bound:<12} {beside}".rstrip(), flush=True)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def command(name: str) -> list[str]:
    return [str(BIN / word) if number == 0 else word for number, word in enumerate(name.split())]


def timed(words: Sequence[str], folder: Path) -> float:
    """Seconds that a command takes. Raises CalledProcessError, and shows what was printed, where it fails."""
    start = time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return seconds


def last_line(words: Sequence[str], folder: Path) -> str:
    """The last line that a command prints: what ran, what was restored."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def sha256_seconds(path: Path) -> float:
    """Seconds that one sha256 of a file takes, in a process that runs already."""
    start = time.perf_counter()
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256").hexdigest()
    return time.perf_counter() - start


def project(root: Path, targets: int, *, models: bool = False) -> Lab:
    """A project of that many targets that differ in their version, or in their model too; nothing is built yet."""
    lab = make_lab(root)
    for number in range(1, targets):
        text = TARGET + f"package: {{version: 1.0.{number}}}\n"
        if models:
            write_model(root / f"model{number}.gguf", f"model {number}")
            text = text.replace("model.gguf", f"model{number}.gguf")
        (root / "targets" / f"t{number}.yaml").write_text(text)
    return lab


def settle(folder: Path) -> None:
    """Build until the plan cache and the verdict are written: what was just edited is racy for a moment."""
    for _ in range(3):
        subprocess.run(command("doit"), cwd=folder, capture_output=True, check=True)
        time.sleep(0.05)


def stay() -> str:
    """This folder, to come back to: a Lab builds in its own."""
    return os.getcwd()
