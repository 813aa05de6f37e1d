"""`ios-phi3-mini` built from a random-weight model of Phi-3-mini's shapes, and its peak memory beside mlx-lm called directly.

    python tests/benchmarks/phi3_mini.py [--layers 4] [--task build] [--keep DIR]

Makes the model (bfloat16, 1.8 GB shards, `auto_map` and Python files that end whoever runs them) in a temporary folder, serves
it on 127.0.0.1 as microsoft/Phi-3-mini-4k-instruct, and builds the repository's own target from it with `doit`. Then runs
`mlx_lm.convert` on the same folder, without and with quantizing, in processes of their own. Peak memory: RssAnon of the largest
process, sampled every 0.1 s, for both. Exits 1 where a step needs more than 1.05 times what mlx-lm does.
With random weights int4 is far from its source: the gates are left open, because quality is not what is measured here.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgebuild.process import _anonymous
from tests.conftest import ROOT
from tests.loopback import COMMIT, serve

BIN = Path(sys.executable).parent
HIDDEN, INTERMEDIATE, VOCABULARY = 3072, 8192, 32064  # huggingface.co/microsoft/Phi-3-mini-4k-instruct, config.json
LIMIT = 1.05
DIRECT = "import sys, mlx.core as mx, mlx_lm; mx.set_default_device(mx.Device(mx.cpu)); mlx_lm.convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3] == 'q', q_bits=4, q_group_size=64)"


def make(folder: Path, layers: int) -> int:
    """→ parameters. Tensors are written one at a time: safetensors is a length, a JSON header, and raw little-endian data."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        shutil.copyfile(ROOT / "targets/models/tiny-phi3" / name, folder / name)
    config = json.loads((ROOT / "targets/models/tiny-phi3/config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    config |= {"original_max_position_embeddings": 4096, "sliding_window": 2047}
    config |= {"tie_word_embeddings": False, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("modeling_phi3.py", "configuration_phi3.py"):
        (folder / name).write_text("import os\nos._exit(77)\n")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.input_layernorm.weight": (HIDDEN,), f"{here}.post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= {f"{here}.self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN), f"{here}.self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
        shapes |= {
            f"{here}.mlp.gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN),
            f"{here}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for tensor, shape in shapes.items():
        if sum(2 * int(np.prod(other)) for other in shards[-1].values()) + 2 * int(np.prod(shape)) > 1.83e9:
            shards.append({})
        shards[-1][tensor] = shape
    names = {}
    rng = np.random.default_rng(0)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        names |= dict.fromkeys(shard, name)
        _write(folder / name, shard, rng)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(np.full(shape, 0x3F80, "<u2").tobytes())  # 1.0
                continue
            for rows in np.array_split(np.arange(shape[0]), max(1, shape[0] // 4096)):
                values = rng.standard_normal((len(rows), shape[1]), dtype=np.float32) * np.float32(0.02)
                file.write((values.view("<u4") >> 16).astype("<u2").tobytes())  # a bfloat16 is the upper half of a float32


def build(project: Path, address: str, task: str) -> dict[str, dict[str, float]]:
    """→ verb → seconds and peak memory in bytes, from the store's records."""
    for name in ("targets", "dodo.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, project / name)
    target = project / "targets/ios-phi3-mini.yaml"
    text = target.read_text()
    assert COMMIT in text
    target.write_text(
        text.replace(
            "{kl_mean: {max: 0.05}, same_top: {min: 0.88}}",
            "{kl_mean: {max: 99}, same_top: {min: 0}, perplexity_ratio: {max: 1000000}}",
        )
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(project / "hf"), "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    status = subprocess.run([BIN / "doit", f"{task}:ios-phi3-mini"], cwd=project, env=environment, check=False).returncode
    print(f"doit {task}:ios-phi3-mini: exit {status}, {time.monotonic() - start:.0f} s", flush=True)
    found = {}
    for path in (project / ".edgebuild/records").rglob("*"):
        if path.is_file():
            record = json.loads(path.read_text())
            found[record["name"].replace(":ios-phi3-mini", "")] = {
                "seconds": record["seconds"],
                "peak": record["peak_memory"] or 0,
            }
    return found


def direct(source: Path, out: Path, how: str) -> dict[str, float]:
    import psutil

    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", DIRECT, source, out, how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, _anonymous(psutil.Process(process.pid)))
        except psutil.Error:
            break
        time.sleep(0.1)
    assert process.wait() == 0
    return {"seconds": time.monotonic() - start, "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the real model's 32")
    parser.add_argument(
        "--task", default="build", choices=("build", "quantize"), help="all of it, or as far as memory is compared"
    )
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        here = options.keep or Path(temporary)
        source = here / "source"
        if not source.exists():
            total = make(source, options.layers)
            print(f"{options.layers} of 32 layers, {total:,} parameters", flush=True)
        project = here / "project"
        shutil.rmtree(project, ignore_errors=True)
        project.mkdir(parents=True)
        with serve(source) as (_, address):
            steps = build(project, address, options.task)
        for name, step in steps.items():
            print(f"{name:<20} {step['seconds']:8.1f} s  {step['peak'] / 1e9:6.2f} GB")
        weights = here / "source-without-code"
        shutil.rmtree(weights, ignore_errors=True)
        shutil.copytree(source, weights, copy_function=os.link, ignore=shutil.ignore_patterns("*.py", "config.json"))
        config = json.loads((source / "config.json").read_text())
        del config["auto_map"]
        (weights / "config.json").write_text(json.dumps(config))
        failed = False
        for verb, how, of in (("convert", "n", weights), ("quantize", "q", project / "build/ios-phi3-mini/convert/model")):
            shutil.rmtree(here / "direct", ignore_errors=True)
            plain = direct(of, here / "direct", how)
            ratio = steps[verb]["peak"] / plain["peak"]
            failed |= ratio > LIMIT
            print(
                f"{verb:<9} peak memory {steps[verb]['peak'] / 1e9:.2f} GB, mlx_lm.convert {plain['peak'] / 1e9:.2f} GB: {ratio:.3f} × (limit {LIMIT}); "
                f"{steps[verb]['seconds']:.0f} s, {plain['seconds']:.0f} s"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
