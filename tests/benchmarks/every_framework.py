"""One language model and one classifier by every backend, in a fresh clone with empty caches: bytes, quality, latency, memory.

    python tests/benchmarks/every_framework.py [--keep FOLDER]

Clones the repository's last commit, installs edgebuild's core alone, makes every toolchain (`edgebuild toolchain install --all`:
llama.cpp is compiled, which takes minutes), builds the example targets by doit, and has each language model say something in its
own runtime, from its bundle, by the Python of its toolchain. All figures are read from the evidence. With `--keep`, what an
earlier run has made in that folder is used. Exits 1 where a target was not built or a model says nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (
    *("android-phi3", "server-phi3", "generic-phi3", "desktop-phi3", "ios-phi3"),
    *("web-digits", "server-digits", "desktop-digits"),
)
PROMPT = "Once upon a time"
GENAI = """
import onnxruntime_genai as og
model = og.Model("model"); tokenizer = og.Tokenizer(model); params = og.GeneratorParams(model)
params.set_search_options(max_length=32); generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode({prompt!r}))
while not generator.is_done(): generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
# Target → the lock in whose environment its runtime lies, and what is run in the folder of its bundle.
SAYING = {
    "android-phi3": (
        "llamacpp",
        "import glob, llama_cpp\nmodel = llama_cpp.Llama(glob.glob('**/*.gguf', recursive=True)[0], verbose=False)\n"
        "print({prompt!r}, model({prompt!r}, max_tokens=24)['choices'][0]['text'].strip())",
    ),
    "server-phi3": (
        "openvino-lm",
        "import openvino_genai\npipe = openvino_genai.LLMPipeline('model', 'CPU')\n"
        "print({prompt!r}, str(pipe.generate({prompt!r}, max_new_tokens=24, apply_chat_template=False)).strip())",
    ),
    "generic-phi3": ("onnxruntime-lm", GENAI),
    "desktop-phi3": ("olive", GENAI),
    "ios-phi3": (
        "mlx",
        "import glob, mlx_lm\nfolder = glob.glob('**/config.json', recursive=True)[0].rpartition('/')[0]\n"
        "model, tokenizer = mlx_lm.load(folder)\nprint({prompt!r}, mlx_lm.generate(model, tokenizer, {prompt!r}, max_tokens=24).strip())",
    ),
}


def clone(folder: Path) -> tuple[Path, Mapping[str, str]]:
    """A clone with a Python that has edgebuild's core alone; → its root, and an environment with empty caches."""
    root = folder / "edgebuild"
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "ORT_DISABLE_TELEMETRY": "1",
        "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}",
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH"):
        environment.pop(name, None)
    if not root.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
        subprocess.run([sys.executable, "-m", "venv", str(root / ".venv")], check=True)
        subprocess.run([str(root / ".venv/bin/pip"), "install", "-q", "-e", "."], cwd=root, env=environment, check=True)
    return root, environment


def timed(words: list[str], root: Path, environment: Mapping[str, str]) -> int:
    """→ its exit status."""
    start = time.monotonic()
    status = subprocess.run(words, cwd=root, env=environment, check=False).returncode
    print(f"$ {' '.join(words)}: {time.monotonic() - start:.0f} s, status {status}", flush=True)
    return status


def says(target: str, root: Path, environment: Mapping[str, str]) -> str:
    """What the model in a bundle goes on with, in its own runtime; empty where it fails."""
    lock, code = SAYING[target]
    where = (
        "from edgebuild import environment, toolchain; import sys; print(environment.python(toolchain.read(sys.argv[1]).digest))"
    )
    python = subprocess.run(
        [str(root / ".venv/bin/python"), "-c", where, lock], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    code = code.replace("{prompt!r}", repr(PROMPT))
    done = subprocess.run(
        [python, "-c", code], cwd=root / "dist" / target, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{target}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return " ".join(done.stdout.split()) if done.returncode == 0 else ""


def row(evidence: Mapping[str, Any]) -> Iterator[str]:
    """What stands in the evidence of the candidate as it is judged, beside its baseline where there is one."""
    rows = [one for one in evidence["measurements"] if one.get("part") != "choosing"]
    found = {(one["name"], one["of"]): one["value"] for one in sorted(rows, key=lambda one: bool(one["judged"]))}

    def pair(name: str, scale: float, form: str) -> str:
        values = [found.get((name, of)) for of in ("baseline", "candidate")]
        return " → ".join("–" if value is None else form.format(value * scale) for value in values)

    quality = [(name, found.get((name, "candidate"))) for name in ("kl_mean", "same_top", "accuracy", "quality", "flip_rate")]
    yield evidence["target"]
    yield evidence["choice"]["framework"]
    yield pair("artifact_bytes", 1e-6, "{:.3f}")
    yield ", ".join(f"{name} {value:.4g}" for name, value in quality if value is not None)
    yield pair("latency_p50", 1e3, "{:.3f}")
    yield pair("peak_memory", 1e-6, "{:.0f}")
    yield evidence["bundle"]["level"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work there, and leave all there")
    options = parser.parse_args()
    table = Table(title="baseline → candidate", box=None, pad_edge=False)
    for column in ("target", "by", "MB", "quality", "p50, ms", "memory, MB", "level"):
        table.add_column(column, no_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        root, environment = clone(options.keep or Path(scratch))
        status = timed(["edgebuild", "toolchain", "install", "--all"], root, environment)
        timed(["edgebuild", "toolchain", "list"], root, environment)
        status |= timed(["doit", *(f"build:{name}" for name in TARGETS)], root, environment)
        for name in TARGETS:
            path = root / "dist" / f"{name}.evidence.json"
            if path.exists():
                table.add_row(*row(json.loads(path.read_text(encoding="utf-8"))))
        Console(width=180).print(table)
        for name in SAYING:
            text = says(name, root, environment)
            print(f"{name}: {text or 'says nothing'}")
            status |= not text
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
