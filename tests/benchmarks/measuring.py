"""What the benchmarks share: figures with their limits, timed commands, and projects of any size on the fake backend."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a command took: seconds of the clock, and of a processor, which other programs change less."""

    seconds: float
    processor: float

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s, {self.processor:.3f} s of a processor"


def cost(words: Sequence[str], folder: Path) -> Cost:
    """Raises CalledProcessError, and shows what was printed, where the command fails."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=folder, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            print(said.read(), file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, words)
    return Cost(seconds=seconds, processor=used.ru_utime + used.ru_stime)


def memory(words: Sequence[str], folder: Path) -> float:
    """MB at a command's peak. Asked of a small process between: what it starts begins with its starter's peak."""
    ask = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=2, check=True); "
    ask += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-ISc", ask, *words], cwd=folder, capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6


def middle(costs: Sequence[Cost]) -> Cost:
    """The medians of each."""
    return Cost(
        seconds=median([one.seconds for one in costs]),
        processor=median([one.processor for one in costs]),
    )


def sha256(path: Path) -> Cost:
    """What one sha256 of a file takes in a new process, its start apart; read as edgebuild reads, which is quicker than file_digest."""
    code = (
        "import sys, time\nfrom edgebuild.digest import of_file\nstart, used = time.perf_counter(), time.process_time()\n"
        "of_file(sys.argv[1])\nprint(time.perf_counter() - start, time.process_time() - used)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, processor = map(float, said.split())
    return Cost(seconds=seconds, processor=processor)


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


def build(lab: Lab) -> None:
    """Everything, in this process and without a sync: what is measured comes later, and nothing of it is kept."""
    home, sync = os.getcwd(), os.fsync
    os.fsync = lambda handle: None
    try:
        lab.build()
    finally:
        os.fsync = sync
        os.chdir(home)
    settle(lab.root)


def settle(folder: Path) -> None:
    """Build until the plan cache and the verdict are written: what was just edited is racy for a moment."""
    for _ in range(3):
        subprocess.run(command("doit"), cwd=folder, capture_output=True, check=True)
        time.sleep(0.05)
