"""The two deliverables that ship with the repository, through doit and the real frameworks, as a user builds them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from tests.bundles.packing import self_tested
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SHORT = 5000  # characters of evaluation text: enough for a verdict on faults, and a fraction of the time


def copy_project(folder: Path, *targets: str, short: bool = True) -> Path:
    """The repository's targets in a folder of their own; `short` evaluation text keeps MLX's slow CPU kernels short."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "dodo.py", folder)
    shutil.copytree(ROOT / "targets", folder / "targets", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in (folder / "targets").glob("*.yaml"):
        if path.stem not in targets:
            path.unlink()
    text = folder / "targets" / "data" / "eval.txt"
    if short:
        text.write_text(text.read_text(encoding="utf-8")[:SHORT], encoding="utf-8")
    return folder


def doit(folder: Path, *words: str, umask: str = "022") -> "subprocess.CompletedProcess[str]":
    command = f"umask {umask}; exec {BIN / 'doit'} {' '.join(words)}"
    return subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600)


def outcomes(folder: Path) -> dict[str, str]:
    steps = json.loads((folder / ".edgebuild" / "last-run.json").read_text())["steps"]
    return {step["name"]: step["outcome"] for step in steps}


def ran(folder: Path, *words: str) -> set[str]:
    """Build, and tell which verbs really ran."""
    result = doit(folder, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    return {name.split(":")[0] for name, outcome in outcomes(folder).items() if outcome == "ran"}


def explained(folder: Path, name: str) -> str:
    return subprocess.run(
        [str(BIN / "edgebuild"), "explain", name], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def tree(folder: Path) -> dict[str, tuple[str, bytes]]:
    return {
        str(path.relative_to(folder)): (oct(path.stat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both examples, built."""
    folder = copy_project(tmp_path_factory.mktemp("both") / "project", "ios-phi3", "web-digits")
    result = doit(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_bundles_are_the_same_in_another_folder_under_another_umask(both: Path, tmp_path: Path) -> None:
    other = copy_project(tmp_path / "a much longer name" / "elsewhere", "ios-phi3", "web-digits")
    assert doit(other, "package:ios-phi3", "package:web-digits", umask="077").returncode == 0
    for name in ("ios-phi3", "web-digits"):
        assert tree(both / "dist" / name) == tree(other / "dist" / name)
        assert (both / "dist" / f"{name}.tar").read_bytes() == (other / "dist" / f"{name}.tar").read_bytes()
        manifest = json.loads((both / "dist" / name / "manifest.json").read_text())
        jsonschema.validate(manifest, json.loads((ROOT / "schemas" / "manifest.json").read_text()))
        assert manifest["isa"]


@pytest.mark.parametrize("name", ["ios-phi3", "web-digits"])
def test_evidence_receipts_and_records_are_what_the_schemas_say(both: Path, name: str) -> None:
    def check(schema: str, path: Path) -> None:
        jsonschema.validate(json.loads(path.read_text()), json.loads((ROOT / "schemas" / f"{schema}.json").read_text()))

    check("evidence", both / "dist" / f"{name}.evidence.json")
    assert (both / "dist" / f"{name}.evidence.json").read_bytes() == (both / "build" / name / "evidence.json").read_bytes()
    for path in (both / "build" / name).glob("*.json"):
        if path.name != "evidence.json":
            check("receipt", path)
    for path in (both / ".edgebuild" / "records").rglob("*"):
        if path.is_file():
            check("record", path)


def test_ios_says_what_was_not_measured(both: Path) -> None:
    evidence = json.loads((both / "dist" / "ios-phi3.evidence.json").read_text())
    latency = [one for one in evidence["measurements"] if one["name"] == "latency_p50"]
    assert latency
    assert all(one["value"] is None and "not measured on the target" in one["reason"] for one in latency)
    assert {one["phase"] for one in evidence["measurements"] if one["name"] == "kl_mean"} == {"dequantized", "kernels"}
    assert evidence["conversion"]["verified"] is True


def test_a_second_build_does_nothing(both: Path) -> None:
    assert ran(both) == set()


def test_the_ios_payload_gives_its_golden_output(both: Path) -> None:
    """mlx-lm loads the model folder from the bundle, in a process that knows nothing of edgebuild."""
    bundle = both / "dist" / "ios-phi3"
    golden = json.loads(next(bundle.rglob("golden.json")).read_text())
    model = next(path.parent for path in bundle.rglob("config.json"))
    code = (
        "import sys, json, mlx.core as mx\nfrom mlx_lm import load\n"
        "mx.set_default_device(mx.cpu)\nmodel, tokenizer = load(sys.argv[1])\n"
        "tokens = json.loads(sys.argv[2])\nmade = []\n"
        "for _ in range(int(sys.argv[3])):\n    logits = model(mx.array([tokens + made]))[0, -1]\n    made.append(int(mx.argmax(logits)))\n"
        "print(json.dumps(made))"
    )
    prompt, expected = golden["prompt"], golden["continuation"][: golden["certain"]]  # behind them are near ties
    assert expected
    result = subprocess.run(
        [sys.executable, "-c", code, str(model), json.dumps(prompt), str(len(expected))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout.splitlines()[-1]) == expected


# -- never stale, on the real backends ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("digits") / "project", "web-digits")
    assert doit(folder).returncode == 0
    return folder


def test_digits_are_the_same_when_rebuilt_apart_and_their_store_is_right(digits: Path) -> None:
    done = {}
    for words in ("verify web-digits", "verify --store", "gc"):
        result = subprocess.run([str(BIN / "edgebuild"), *words.split()], cwd=digits, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        done[words] = result.stdout
    assert [line.split()[1] for line in done["verify web-digits"].splitlines() if line.startswith("equal")] == [
        "build/web-digits/fetch/source.json",
        "build/web-digits/assess/facts.json",
        "build/web-digits/convert/model",
        "build/web-digits/choose/model",
        "dist/web-digits",
        "dist/web-digits.tar",
    ]
    assert " 12 records, 0 damaged" in done["verify --store"]
    assert "removed   0 records, 0 objects: 0 B" in done["gc"]
    assert ran(digits) == set()


def test_digits_by_openvino_run_as_measured_and_are_the_same_when_rebuilt(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "project", "server-digits")
    assert ran(folder) == set()  # it is built by name only
    assert ran(folder, "build:server-digits") >= {"convert", "quantize", "evaluate", "benchmark", "package"}
    evidence = json.loads((folder / "dist" / "server-digits.evidence.json").read_text())
    jsonschema.validate(evidence, json.loads((ROOT / "schemas" / "evidence.json").read_text()))
    assert evidence["bundle"]["level"] == "L4"
    runtimes = {one["runtime"] for one in evidence["measurements"] if one["phase"] == "inference"}
    assert len(runtimes) == 1
    assert runtimes.pop().endswith("CPU, f32, 1 thread")
    verified = subprocess.run([str(BIN / "edgebuild"), "verify", "server-digits"], cwd=folder, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for change, status in ((0.0, 0), (0.01, 1)):
        golden = json.loads((folder / "dist" / "server-digits" / "golden.json").read_text())
        golden["outputs"][0]["data"][3] += change
        (folder / "dist" / "server-digits" / "golden.json").write_text(json.dumps(golden))
        alone = subprocess.run(
            [sys.executable, "-B", "selftest.py"], cwd=folder / "dist" / "server-digits", capture_output=True, text=True
        )
        assert alone.returncode == status, alone.stdout + alone.stderr
        assert self_tested(alone.stdout.splitlines()[-1])["verdict"] == ("FAIL" if status else "PASS")


def test_digits_one_byte_of_the_model(digits: Path) -> None:
    import onnx

    path = digits / "targets" / "models" / "digits.onnx"
    before = path.read_bytes()
    model = onnx.load_from_string(before)
    weights = model.graph.initializer[0]
    assert weights.raw_data
    weights.raw_data = bytes([weights.raw_data[0] ^ 1]) + weights.raw_data[1:]
    path.write_bytes(model.SerializeToString())
    assert "fetch:web-digits                 stale       input model: " in explained(digits, "web-digits")
    assert ran(digits) >= {"fetch", "assess", "convert", "quantize", "evaluate", "benchmark", "package"}
    path.write_bytes(before)
    assert ran(digits) == set()


def test_digits_calibration_and_evaluation_data(digits: Path) -> None:
    for name, key, expected in (
        ("digits-calibration.npz", "calibration", {"quantize", "choose", "evaluate", "benchmark", "gate", "package"}),
        ("digits-eval.npz", "data", {"choose", "evaluate", "gate"}),
    ):
        path = digits / "targets" / "data" / name
        before = path.read_bytes()
        arrays = dict(np.load(path))
        arrays["pixels"] = arrays["pixels"] * np.float32(0.9)
        np.savez(path, **arrays)
        assert f"input {key}: " in explained(digits, "web-digits")
        assert ran(digits) == expected
        path.write_bytes(before)
        assert ran(digits) == set()


def test_digits_external_data(digits: Path, tmp_path: Path) -> None:
    """One byte of the external data alone; the graph file stays as it is."""
    import onnx

    folder = copy_project(tmp_path / "project", "web-digits")
    path = folder / "targets" / "models" / "digits.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="digits.bin")
    assert doit(folder).returncode == 0
    data = folder / "targets" / "models" / "digits.bin"
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)
    assert "input model.data/digits.bin: " in explained(folder, "web-digits")
    assert "quantize" in ran(folder)


# -- planted conversion faults --------------------------------------------------------------------------------------------
@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "project", "ios-phi3")


def test_phi3_one_byte_of_a_weight_and_of_the_tokenizer(phi3: Path) -> None:
    assert ran(phi3, "quantize:ios-phi3") == {"fetch", "assess", "convert", "evaluate", "quantize"}
    path = phi3 / "targets" / "models" / "tiny-phi3" / "model.safetensors"
    with path.open("r+b") as file:  # the lowest bit of one bf16 weight
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert "input model/model.safetensors: " in explained(phi3, "ios-phi3")
    assert ran(phi3, "quantize:ios-phi3") == {"fetch", "assess", "convert", "evaluate", "quantize"}
    with (phi3 / "targets" / "models" / "tiny-phi3" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert "input model/tokenizer.json: " in explained(phi3, "ios-phi3")
    assert "convert" in ran(phi3, "quantize:ios-phi3")


@pytest.mark.parametrize("fault", ["rope theta", "transposed weight", "another tokenizer"])
def test_a_planted_fault_fails_the_build(phi3: Path, fault: str) -> None:
    model = phi3 / "targets" / "models" / "tiny-phi3"
    if fault == "rope theta":
        config = json.loads((model / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 500000.0
        (model / "config.json").write_text(json.dumps(config))
    elif fault == "transposed weight":
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        try:
            weights = load_file(model / "model.safetensors")
        except TypeError:
            pytest.fail("safetensors reads no bf16 here")
        with safe_open(model / "model.safetensors", "np") as file:
            metadata = file.metadata()
        name = next(key for key in sorted(weights) if key.endswith("o_proj.weight"))
        weights[name] = np.ascontiguousarray(weights[name].T)
        save_file(weights, model / "model.safetensors", metadata)
    else:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][500:]
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = doit(phi3)
    assert result.returncode == 1
    assert outcomes(phi3)["evaluate:ios-phi3.baseline"] == "failed"
    assert "golden.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (phi3 / "dist").exists()


def test_a_pickle_is_refused_whatever_its_name(phi3: Path) -> None:
    import pickle

    model = phi3 / "targets" / "models" / "tiny-phi3"
    (model / "extra.json").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    result = doit(phi3)
    assert result.returncode == 1
    assert "extra.json is a pickle" in result.stderr
    assert "safetensors" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "digits.onnx is empty"),
        (b"half", "digits.onnx is of no known model format"),
        (b"\x80\x04\x95", "is a pickle"),
        (b"GGUF" + bytes(20), "takes a source of format onnx and huggingface, but this one is gguf"),
        (None, "truncated"),
    ],
)
def test_a_bad_model_is_one_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = copy_project(tmp_path / "project", "web-digits")
    path = folder / "targets" / "models" / "digits.onnx"
    path.write_bytes(path.read_bytes()[:300_000] if content is None else content)
    result = doit(folder)
    assert result.returncode == 3
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["names", "shape", "dtype", "truncated", "pickled"])
def test_bad_data_are_one_message(tmp_path: Path, kind: str) -> None:
    folder = copy_project(tmp_path / "project", "web-digits")
    path = folder / "targets" / "data" / "digits-calibration.npz"
    pixels = np.load(path)["pixels"]
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        arrays = {
            "names": {"pixel": pixels},
            "shape": {"pixels": pixels[:, :, :4]},
            "dtype": {"pixels": pixels.astype("float64")},
            "pickled": {"pixels": np.array([{"a": 1}], dtype=object)},
        }[kind]
        np.savez(path, **arrays)
    result = doit(folder, "quantize:web-digits")
    assert result.returncode == 1
    assert "digits-calibration.npz" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Built from the repository, installed beside the frameworks of this environment, and used from elsewhere."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", ".edgebuild", "*_cache", "node_modules")
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    shutil.rmtree(source)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import edgebuild, sys; assert 'site' in edgebuild.__file__, edgebuild.__file__; from edgebuild.cli import main; sys.exit(main(sys.argv[1:]))"
    made = subprocess.run(
        [sys.executable, "-c", code, "init", "new"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "new", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "new" / "dist" / "web-digits" / "manifest.json").exists()
