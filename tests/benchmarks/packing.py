"""A weight file of gigabytes packed: the memory that it takes, and its time beside `cp` of the same bytes.

    python tests/benchmarks/packing.py [--runs 3] [--megabytes 2000]

The package step's own action, kind `folder`, in a process of its own: it writes the bundle and its archive, which is twice the
weights, hashes what the bundle holds and looks once more whether checking it changed it. `cp` writes the same bytes, twice. Peak
memory: RssAnon, sampled every 0.02 s; and of the same process with a model of 64 bytes. Exits 1 where the weights take more than
16 MB of memory.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measuring import Figures, median

from edgebuild.process import _anonymous

MEMORY = 16.0  # MB: buffers of a copy, a hash and an archive
PACK = "import sys; from pathlib import Path; from tests.bundles.packing import pack; pack('folder', Path(sys.argv[1]), limits={'shell': None, 'weights': None})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=2000)
    options = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        small, large = (made(Path(folder, name), size) for name, size in (("small", 64), ("large", options.megabytes * 10**6)))
        _, least = packed(small)
        seconds, peaks, copies = [], [], []
        for _ in range(options.runs):
            took, peak = packed(large)
            seconds.append(took)
            peaks.append(peak)
            copies.append(copied(large))
        ours, plain = median(seconds), median(copies)
        name = f"{options.megabytes} MB of weights"
        figures.state(f"{name}: memory beyond that of 64 bytes", (median(peaks) - least) / 1e6, "MB", MEMORY)
        figures.state(f"{name}: packed : `cp` twice", ours / plain, "×", None, f"{ours:.1f} : {plain:.1f} s")
    return figures.status


def made(place: Path, size: int) -> Path:
    """A model of random bytes in `artifact`."""
    (place / "artifact").mkdir(parents=True)
    with (place / "artifact" / "weights.bin").open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - start)))
    return place


def packed(place: Path) -> tuple[float, int]:
    """Pack it; → (seconds, bytes at the peak)."""
    shutil.rmtree(place / "out", ignore_errors=True)
    os.sync()
    start, peak = time.perf_counter(), 0
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", PACK, str(place)], env={**os.environ, "PYTHONPATH": str(root)}) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _anonymous(watched))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit("it was not packed")
    return time.perf_counter() - start, peak


def copied(place: Path) -> float:
    shutil.rmtree(place / "out", ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    for name in ("a", "b"):
        subprocess.run(["cp", "-r", "--reflink=never", str(place / "artifact"), str(place / "out") + name], check=True)
    took = time.perf_counter() - start
    for name in ("a", "b"):
        shutil.rmtree(str(place / "out") + name)
    return took


if __name__ == "__main__":
    sys.exit(main())
