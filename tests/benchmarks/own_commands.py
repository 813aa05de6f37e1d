"""A language model of Phi-3-mini's shapes by every backend, beside the framework's own call for the same job: time and peak memory.

    python tests/benchmarks/own_commands.py [--layers 4] [--runs 3] [--keep DIR] [mlx llamacpp openvino onnxruntime olive]

Makes a random-weight model (as `phi3_mini.py` does) and lets edgebuild convert it and quantize it to int4. Beside each step, in
turn, a script of a few lines does the same job by the framework alone, in the same toolchain: from the same folder, into a new one.
A step's seconds are from its key to its receipt: it also hashes and syncs what it made, which no framework does; what that takes of
the framework's own output, one after the other, is stated beside. A backend's time is that of both steps, where both can be compared.
Peak memory: RssAnon of the largest process, looked at every 5 ms for both, the median of the runs. Toolchains are made first where
they are not there yet.

Exits 1 where a backend takes more than 1.1 times the time of the framework's own calls, or a step 1.05 times its memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import phi3_mini
import psutil
from measuring import Figures, command, median

from edgebuild import digest, environment, toolchain
from edgebuild.process import _anonymous
from edgebuild.step import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
TIME, MEMORY = 1.1, 1.05  # × the framework's own call
TARGET = """edgebuild: 1
model: {{source: source, task: text-generation}}
platform: generic-cpu
framework: {backend}
quantize: {quantize}
package: {{kind: folder, archive: false}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """The framework's own calls, as scripts on (source, out); `lock`: the toolchain that holds it, none: this environment."""

    lock: str
    quantize: str  # as in a target
    conversion: str
    quantization: str


MLX = "import sys, mlx.core as mx, mlx_lm; mx.set_default_device(mx.Device(mx.cpu)); mlx_lm.convert(sys.argv[1], sys.argv[2]{})"
OLIVE = """
import json, shutil, sys, tempfile
from olive.workflows import run
with tempfile.TemporaryDirectory() as scratch:
    run({{"input_model": {model}, "systems": {{"local": {{"type": "LocalSystem", "accelerators": [{{"device": "cpu",
         "execution_providers": ["CPUExecutionProvider"]}}]}}}}, "host": "local", "target": "local", "passes": {{"pass": {one}}},
         "output_dir": sys.argv[2], "cache_dir": scratch, "log_severity_level": 3}})
"""
OWN = {
    "mlx": Own(
        lock="",
        quantize="{scheme: int4, group_size: 64}",
        conversion=MLX.format(""),
        quantization=MLX.format(", quantize=True, q_bits=4, q_group_size=64"),
    ),
    "llamacpp": Own(
        lock="llamacpp",
        quantize="{scheme: q4_k_m}",
        conversion="",  # its converter is a script in llama.cpp's repository, and in no package
        quantization="""
import ctypes, glob, os, sys, llama_cpp
os.makedirs(sys.argv[2])
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, len(os.sched_getaffinity(0))
source = glob.glob(sys.argv[1] + "/**/*.gguf", recursive=True)[0] if os.path.isdir(sys.argv[1]) else sys.argv[1]
sys.exit(llama_cpp.llama_model_quantize(source.encode(), (sys.argv[2] + "/model.gguf").encode(), ctypes.byref(options)))
""",
    ),
    "openvino": Own(
        lock="openvino-lm",
        quantize="{scheme: int4, group_size: 64}",
        conversion="""
import sys
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
words = {"task": "text-generation-with-past", "library_name": "transformers", "convert_tokenizer": True}
main_export(sys.argv[1], sys.argv[2], ov_config=OVConfig(), **words)
""",
        quantization="""
import sys, nncf, openvino
model = openvino.Core().read_model(sys.argv[1] + "/openvino_model.xml")
model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=64)
openvino.save_model(model, sys.argv[2] + "/openvino_model.xml")
""",
    ),
    "onnxruntime": Own(
        lock="onnxruntime-lm",
        quantize="{scheme: int4, group_size: 64}",
        conversion="""
import sys, tempfile
from onnxruntime_genai.models.builder import create_model, parse_extra_options
with tempfile.TemporaryDirectory() as scratch:
    words = ("", sys.argv[1], sys.argv[2], "fp32", "cpu", scratch)
    create_model(*words, **parse_extra_options(*words, ["hf_token=false"]))
""",
        quantization="""
import os, sys, onnx, onnx_ir
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
os.makedirs(sys.argv[2])
tool = MatMulNBitsQuantizer(onnx.load(sys.argv[1] + "/model.onnx"), block_size=64)
tool.process()
onnx.save_model(tool.model.model, sys.argv[2] + "/model.onnx", save_as_external_data=True, location="model.onnx.data")
""",
    ),
    "olive": Own(
        lock="olive",
        quantize="{scheme: int4, group_size: 32}",
        conversion=OLIVE.format(
            model='{"type": "HfModel", "model_path": sys.argv[1], "task": "text-generation"}',
            one='{"type": "ModelBuilder", "precision": "fp32"}',
        ),
        quantization=OLIVE.format(
            model='{"type": "ONNXModel", "model_path": sys.argv[1], "onnx_file_name": "model.onnx"}',
            one='{"type": "OnnxBlockWiseRtnQuantization", "bits": 4, "block_size": 32}',
        ),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """`keeping`: seconds to hash and sync what was made, where that is no part of the rest."""

    seconds: float
    peak: float  # bytes
    keeping: float = 0.0


def model(folder: Path, layers: int) -> Path:
    """A project with the model at `source`, without the code that the real one names."""
    project = folder / "project"
    if not (project / "source").exists():
        total = phi3_mini.make(project / "source", layers)
        print(f"{layers} of 32 layers, {total:,} parameters", flush=True)
        for code in (project / "source").glob("*.py"):
            code.unlink()
        path = project / "source/config.json"
        config = json.loads(path.read_text())
        del config["auto_map"]
        path.write_text(json.dumps(config))
    (project / "targets").mkdir(exist_ok=True)
    for backend, own in OWN.items():
        (project / f"targets/{backend}.yaml").write_text(TARGET.format(backend=backend, quantize=own.quantize))
    shutil.copyfile(ROOT / "dodo.py", project / "dodo.py")
    return project


def python(lock: str) -> str:
    """The interpreter that has this framework."""
    return environment.python(toolchain.read(lock).digest) if lock else sys.executable


def step(project: Path, name: str) -> Took:
    """By edgebuild, as a first build. Ends the program where it fails."""
    verb, _, target = name.partition(":")
    forget(project, project / f"build/{target}/{verb}.json")
    process = subprocess.Popen(
        [*command("doit"), name, f"again={name}"], cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    peak = watched(process)
    if process.returncode:
        sys.exit(f"{name} failed")
    said = {one["name"]: one for one in json.loads((project / ".edgebuild/last-run.json").read_text())["steps"]}
    return Took(seconds=said[name]["seconds"], peak=peak)


def watched(process: "subprocess.Popen[bytes]") -> int:
    """→ the peak in bytes of the largest of it and what it starts, when all has ended. Peaks are short: a converter's last 20 ms."""
    one, peak, searched = psutil.Process(process.pid), 0, 0.0
    family = [one]
    while process.poll() is None:
        try:
            if time.monotonic() - searched > 0.1:
                family, searched = [one, *one.children(recursive=True)], time.monotonic()
            peak = max(peak, *map(_anonymous, family))
        except psutil.Error:
            pass
        time.sleep(0.005)
    return peak


def record_of(project: Path, receipt: Path) -> Path:
    key = json.loads(receipt.read_text())["key"]
    return project / f".edgebuild/records/{key[:2]}/{key[2:]}"


def forget(project: Path, receipt: Path) -> None:
    """What an earlier run made goes: removing gigabytes takes a second, and a first build, as the framework's own, removes none."""
    if not receipt.exists():
        return
    place = project / ".edgebuild/objects"
    for made in json.loads(record_of(project, receipt).read_text())["outputs"].values():
        listing = place / made["digest"][:2] / made["digest"][2:]
        for _, _, sha256, size in json.loads(listing.read_text()) if made["tree"] else ():
            if size > 1_000_000:  # smaller ones may be another step's too
                (place / sha256[:2] / sha256[2:]).unlink()
    shutil.rmtree(receipt.with_suffix(""))
    receipt.unlink()


def own(code: str, lock: str, source: Path, out: Path) -> Took:
    """By the framework alone. Ends the program where it fails."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(
            [python(lock), "-c", code, source, out],
            stdout=log,
            stderr=log,
            env={**os.environ, **ENVIRONMENT},
            cwd=out.parent,
        )
        peak = watched(process)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{log.read().decode()}\n{lock or 'mlx'} failed by itself")
    seconds = time.monotonic() - start
    return Took(seconds=seconds, peak=peak, keeping=_kept(out))


def _kept(out: Path) -> float:
    start = time.monotonic()
    for path in (path for path in out.rglob("*") if path.is_file()):
        digest.of_file(str(path))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.monotonic() - start


def compare(figures: Figures, project: Path, backend: str, runs: int) -> None:
    one = OWN[backend]
    mine_all = its_all = kept_all = 0.0
    if one.lock:
        subprocess.run(
            [*command("edgebuild"), "toolchain", "install", one.lock], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
        )
    for verb, code, source in (
        ("convert", one.conversion, project / "source"),
        ("quantize", one.quantization, project / f"build/{backend}/convert/model"),
    ):
        ours: list[Took] = []
        theirs: list[Took] = []
        for _ in range(runs):
            ours.append(step(project, f"{verb}:{backend}"))
            if code:
                plain = project.parent / "plain"  # onnx refuses files that have a second name, as links into a store have
                shutil.rmtree(plain, ignore_errors=True)
                shutil.copytree(source, plain)
                theirs.append(own(code, one.lock, plain, project.parent / "own"))
        mine = Took(seconds=median([took.seconds for took in ours]), peak=median([took.peak for took in ours]))
        if not theirs:
            print(
                f"{verb}:{backend} beside its own: unavailable, {backend} has none in a package; {mine.seconds:.1f} s, {mine.peak / 1e9:.2f} GB"
            )
            continue
        its = Took(seconds=median([took.seconds for took in theirs]), peak=median([took.peak for took in theirs]))
        keeping = median([took.keeping for took in theirs])
        shown = f"{mine.seconds:.1f} : {its.seconds:.1f} s, and {keeping:.1f} s to hash and sync what that made"
        figures.state(f"{verb}:{backend}, time", mine.seconds / its.seconds, "×", None, shown)
        mine_all, its_all, kept_all = mine_all + mine.seconds, its_all + its.seconds, kept_all + keeping
        shown = f"{mine.peak / 1e9:.2f} : {its.peak / 1e9:.2f} GB"
        figures.state(f"{verb}:{backend}, memory", mine.peak / its.peak, "×", MEMORY, shown)
    figures.state(f"{backend}, time", mine_all / its_all, "×", TIME, f"{mine_all:.1f} : {its_all:.1f} s")
    figures.state("… of what is hashed and synced too", mine_all / (its_all + kept_all), "×", None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the real model's 32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    parser.add_argument("backends", nargs="*", help=f"{', '.join(OWN)}; all by default")
    options = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory() as scratch:
        project = model(options.keep or Path(scratch), options.layers)
        for backend in options.backends or OWN:
            compare(figures, project, backend, options.runs)
    return figures.status


if __name__ == "__main__":
    sys.exit(main())
