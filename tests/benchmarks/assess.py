"""Headers of large models: `edgebuild assess` and `recommend` of sparse files, whose weights take no room on the disk.

    python tests/benchmarks/assess.py [--runs 5] [--gigabytes 10]

A safetensors file, a Hugging Face folder of four shards with 32 layers' names, and a GGUF with a vocabulary of 128,000 and as
many merges. Exits 1 where one takes more than a second of a processor (the median; the clock's stands beside it, and is that of a
machine that may be busy), or more than 100 MB at its peak. `edgebuild --version` reads nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from measuring import Figures, command, cost, memory, middle

from tests.sweeps.malformed_models import blob, headed, key, text, texts

SECONDS, MEGABYTES = 1.0, 100.0
LAYERS, SHARDS, HIDDEN, NAMES = 32, 4, 4096, 9  # NAMES: tensors of a layer
PHI = Path(__file__).resolve().parents[2] / "targets/models/tiny-phi3"


def safetensors(path: Path, names: list[str], size: int) -> None:
    """`size` bytes of BF16 in as many matrices as there are names."""
    rows = size // len(names) // (2 * HIDDEN)
    each = rows * HIDDEN * 2
    header = {
        name: {"dtype": "BF16", "shape": [rows, HIDDEN], "data_offsets": [number * each, (number + 1) * each]}
        for number, name in enumerate(names)
    }
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written)
    os.truncate(path, 8 + len(written) + each * len(names))


def folder(path: Path, size: int) -> None:
    path.mkdir()
    for small in PHI.iterdir():
        if small.suffix == ".json":
            (path / small.name).write_bytes(small.read_bytes())
    names = [f"model.layers.{layer}.self_attn.part{number}.weight" for layer in range(LAYERS) for number in range(NAMES)]
    for shard in range(SHARDS):
        safetensors(path / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors", names[shard::SHARDS], size // SHARDS)


def gguf(path: Path, size: int) -> None:
    vocabulary = [text(b"a token of %d" % number) for number in range(128_000)]
    keys = [key(b"general.architecture", 8, text(b"phi3"))]
    keys += [key(b"tokenizer.ggml." + name, 9, texts(len(vocabulary)) + b"".join(vocabulary)) for name in (b"tokens", b"merges")]
    rows = size // (LAYERS * NAMES) // (2 * HIDDEN)
    each = rows * HIDDEN * 2
    tensors = [blob(b"blk.%d.part" % number, (HIDDEN, rows), 30, number * each) for number in range(LAYERS * NAMES)]
    header = headed(keys, tensors, 0)
    path.write_bytes(header)
    os.truncate(path, -(-len(header) // 32) * 32 + each * len(tensors))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=10)
    options = parser.parse_args()
    size, figures = int(options.gigabytes * 1e9), Figures()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        safetensors(root / "m.safetensors", ["a", "b"], size)
        folder(root / "model", size)
        gguf(root / "m.gguf", size)
        words = {
            "nothing: edgebuild --version": "edgebuild --version",
            "assess, safetensors": "edgebuild assess m.safetensors",
            "assess, Hugging Face folder": "edgebuild assess model",
            "assess, GGUF": "edgebuild assess m.gguf",
            "recommend, Hugging Face folder": "edgebuild recommend model --platform macos",
        }
        for name, line in words.items():
            limits = (SECONDS, MEGABYTES) if "--version" not in line else (None, None)
            found = middle([cost(command(line), root) for _ in range(options.runs)])
            figures.state(
                f"{name}, {options.gigabytes:g} GB", found.processor, "s", limits[0], f"{found.seconds:.3f} s of the clock"
            )
            figures.state(f"{name}: memory", memory(command(line), root), "MB", limits[1])
        taken = sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())
        figures.state("on the disk: all of it", taken / 1e6, "MB")
    return figures.status


if __name__ == "__main__":
    sys.exit(main())
