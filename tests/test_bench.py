"""Real runs of tiny models in real children, small in calls and seconds; the arithmetic of percentiles and counters."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from edgebuild import bench, machine, meter
from edgebuild.backend import Backend
from edgebuild.backends import onnxruntime
from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome
from tests.conftest import ROOT

BACKEND = cast("Backend", onnxruntime)
PROFILES = {"rapid": (64, 1.7)}
WEIGHTS = 4096 * 2048 * 4  # bytes


def model(path: Path, size: int) -> Path:
    """A folder with y = x · w, w of [size, 2048]."""
    path.mkdir()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2048])],
        [helper.make_tensor("w", TensorProto.FLOAT, (size, 2048), np.ones((size, 2048), np.float32).tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path / "model.onnx")
    return path


def run(folder: Path, candidate: Path, baseline: Path, *, not_measured: str = "") -> tuple[dict[tuple[str, str], Any], Outcome]:
    params = {"task": "other", "not_measured": not_measured, **({} if not_measured else {"profile": "rapid"})}
    action = Action(
        verb="benchmark",
        backend="onnxruntime",
        params=params,
        inputs={"model": candidate, "baseline": baseline},
        outputs={"measurements": folder / "measurements.json"},
    )
    outcome = bench.run(action, "onnxruntime", BACKEND, PROFILES)
    rows = json.loads((folder / "measurements.json").read_text())
    assert len({(row["name"], row["of"]) for row in rows}) == len(rows)
    assert all((row["value"] is None) == ("reason" in row) for row in rows)
    return {(row["name"], row["of"]): row for row in rows}, outcome


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_real_run(tmp_path: Path) -> None:
    """The candidate has an eighth of the weights, so it is smaller, quicker and takes less memory."""
    rows, outcome = run(tmp_path, model(tmp_path / "small", 512), model(tmp_path / "large", 4096))
    assert rows["artifact_bytes", "baseline"]["value"] == (tmp_path / "large" / "model.onnx").stat().st_size
    assert rows["weights_ratio", "candidate"]["value"] == pytest.approx(1 / 8, rel=1e-3)
    assert rows["weights_ratio", "candidate"]["confidence"] is None
    ratio = rows["latency_ratio", "candidate"]
    p50 = {role: rows["latency_p50", role] for role in bench.ROLES}
    assert ratio["value"] == pytest.approx(p50["candidate"]["value"] / p50["baseline"]["value"])
    assert ratio["interval"][0] <= ratio["value"] <= ratio["interval"][1] < 1
    assert ratio["judged"]
    assert ratio["baseline"] == bench.BASELINE
    for role, row in p50.items():
        assert row["n"] >= 64
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert row["phase"] == "inference"
        assert row["data"] == "golden inputs, seed 20"
        assert row["runtime"].startswith("onnxruntime")
        assert row["machine"] == ", ".join(machine.fingerprint().values())
        assert row["value"] <= rows["latency_p95", role]["value"]
        assert row["judged"] == (role == "candidate")
        assert row["n"] * row["value"] > 0.5
    assert WEIGHTS <= rows["peak_memory", "baseline"]["value"] <= 4 * WEIGHTS
    assert rows["peak_memory", "candidate"]["value"] < rows["peak_memory", "baseline"]["value"]
    assert 0 < rows["load_time", "candidate"]["value"] < 10
    assert rows["first_inference", "candidate"]["value"] > 0
    assert rows["host_noise", "host"]["value"] >= 1
    assert ("carbon", "candidate") not in rows
    if not meter.POWERCAP.exists():
        assert rows["energy", "candidate"]["reason"] == bench.NO_RAPL
    assert outcome.summary.startswith("inference p50 ")
    assert outcome.summary.endswith("33.6 MB → 4.19 MB (×0.125)")


def test_what_is_not_measured_says_why(tmp_path: Path) -> None:
    why = "not measured on the target: this machine says nothing about a phone"
    rows, outcome = run(tmp_path, model(tmp_path / "small", 8), model(tmp_path / "large", 16), not_measured=why)
    assert rows["weights_ratio", "candidate"]["value"] < 1
    for name in ("latency_p50", "latency_ratio", "consistency", "peak_memory", "energy", "load_time"):
        assert rows[name, "candidate"]["value"] is None
        assert rows[name, "candidate"]["reason"] == why
    assert all(row["machine"] is None for row in rows.values())
    assert outcome.summary.endswith(f"; {why}")


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    broken = model(tmp_path / "broken", 8)
    (broken / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(StepFailed, match=r"benchmark of the candidate: ONNX Runtime does not load model\.onnx"):
        run(tmp_path, broken, model(tmp_path / "large", 16))


def test_a_runtime_that_is_not_there(tmp_path: Path) -> None:
    order = {"backend": "nowhere", "view": "", "language": False, "modules": []}
    with (
        bench._Child("baseline", tmp_path, order) as child,
        pytest.raises(StepFailed, match=r"benchmark of the baseline: unexpected ModuleNotFoundError"),
    ):
        child.answer()


def test_a_child_that_dies(tmp_path: Path) -> None:
    order = {"backend": "onnxruntime", "view": "", "language": False, "modules": []}
    with bench._Child("candidate", model(tmp_path / "m", 8), order) as child:
        child.answer()
        assert child.ask({"load": True})["warm_calls"] >= bench.WARM_CALLS
        assert len(child.block(5)) == 5
        os.kill(child._process.pid, signal.SIGKILL)
        with pytest.raises(StepFailed, match=r"benchmark of the candidate: its process died of signal 9"):
            child.block(5)


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    order = {"backend": "onnxruntime", "view": "", "language": False, "modules": []}
    with bench._Child("candidate", model(tmp_path / "m", 8), order) as child:
        assert child._process.stdin
        child._process.stdin.close()
        assert child._process.wait(timeout=20) == 0


def test_a_child_waits_for_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers, by which MLX tokenizes, imports it where it is installed."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))))
    order = {"backend": "mlx", "view": "", "language": True, "modules": None}
    with bench._Child("baseline", ROOT / "targets/models/tiny-phi3", order) as scout:
        assert "transformers" in scout.answer()["modules"]


def test_language_models_run_32_tokens() -> None:
    class Tokens:
        runtime = "test"
        inputs: tuple[Any, ...] = ()
        seen: Any = None

        def infer(self, feeds: Any) -> Any:
            raise NotImplementedError

        def logits(self, tokens: Any) -> Any:
            self.seen = tokens
            return np.zeros((len(tokens), 4), np.float32)

        def tokens(self, text: str) -> Any:
            return np.zeros(len(text.split()), np.int32)

        def close(self) -> None: ...

    session = Tokens()
    bench._call(session, True)()
    assert session.seen.shape == (32,)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_percentiles_need_their_calls() -> None:
    assert [bench.least_calls(share) for share in (0.9, 0.95, 0.99, 0.999)] == [29, 59, 299, 2995]


def blocks(seconds: float, count: int = 20, size: int = 5, jitter: float = 0.0) -> list[Any]:
    generator = np.random.default_rng(2)
    return [seconds * (1 + jitter * generator.random(size)) for _ in range(count)]


def rows_of(timing: bench._Timing) -> dict[tuple[str, str], Any]:
    about = {"runtime": "r", "load": 1.0, "first": 1.0, "warm": 1.0, "warm_calls": 3}
    about |= {"peak": None, "anonymous": None, "memory_reason": "not measured: this system has no /proc/self/status"}
    timing.about = dict.fromkeys(bench.ROLES, about)
    return {(row["name"], row["of"]): row for row in bench._timed_rows(timing, False)[0]}


def test_too_few_calls_for_a_percentile() -> None:
    timing = bench._Timing(blocks={"baseline": blocks(2e-3), "candidate": blocks(1e-3, size=2)}, noise=1.0)
    timing.joules = {role: [None] * 20 for role in bench.ROLES}
    rows = rows_of(timing)
    assert rows["latency_ratio", "candidate"]["value"] == pytest.approx(0.5)
    assert rows["latency_p90", "candidate"]["value"] == pytest.approx(1e-3)
    assert rows["latency_p95", "candidate"]["reason"] == "n=40 < 59"
    assert rows["latency_p95", "baseline"]["value"] == pytest.approx(2e-3)
    assert rows["latency_p99", "baseline"]["reason"] == "n=100 < 299"
    assert rows["consistency", "candidate"]["reason"] == "p95 is not known: n=40 < 59"
    assert rows["consistency", "baseline"]["value"] == pytest.approx(1.0)
    assert rows["peak_memory", "candidate"]["reason"] == "not measured: this system has no /proc/self/status"


def test_a_noisy_machine_has_no_consistency() -> None:
    timing = bench._Timing(blocks={role: blocks(1e-3) for role in bench.ROLES}, noise=1.6)
    timing.joules = {role: [None] * 20 for role in bench.ROLES}
    assert "too noisy: p95/p50 of a fixed loop is 1.60" in rows_of(timing)["consistency", "candidate"]["reason"]


def test_few_blocks_give_no_interval() -> None:
    timing = bench._Timing(blocks={role: blocks(1e-3, count=3, size=50) for role in bench.ROLES}, noise=1.0)
    timing.joules = {role: [None] * 3 for role in bench.ROLES}
    row = rows_of(timing)["latency_ratio", "candidate"]
    assert (row["value"], row["interval"], row["confidence"]) == (1.0, None, 0.95)


def test_intervals_follow_blocks_not_calls() -> None:
    """Ten blocks of 1 ms and ten of 3 ms: whatever the number of calls, the median may be either."""
    slow_and_fast = blocks(1e-3, count=10, size=500, jitter=0.01) + blocks(3e-3, count=10, size=500, jitter=0.01)
    low, high = cast("list[float]", bench._Bootstrap(dict.fromkeys(bench.ROLES, slow_and_fast)).interval("candidate", 0.5))
    assert low < 1.1e-3
    assert high > 2.9e-3


def test_energy_is_counted_a_call() -> None:
    timing = bench._Timing(blocks={role: blocks(0.5, count=8, size=4) for role in bench.ROLES}, noise=1.0)
    timing.joules = {"baseline": [8.0] * 8, "candidate": [4.0] * 7 + [None]}
    rows = rows_of(timing)
    assert rows["energy", "baseline"]["value"] == 2.0
    assert rows["energy", "baseline"]["unit"] == "J/call"
    assert rows["energy", "candidate"]["reason"] == bench.NO_RAPL
    timing.blocks["baseline"] = blocks(0.1, count=8, size=4)
    assert rows_of(timing)["energy", "baseline"]["reason"] == "3.2 s < 10 s; benchmark.profile: quick or release"


def zone(root: Path, name: str, now: int, top: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{now}\n")
    (folder / "max_energy_range_uj").write_text(f"{top}\n")
    return folder


def test_energy_counters_of_all_packages_and_round_their_end(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 100)
    zone(tmp_path, "intel-rapl:0:1", 5)  # a part of the first
    zone(tmp_path, "intel-rapl:1", 990)
    energy = meter.Energy(tmp_path)
    energy.start()
    zone(tmp_path, "intel-rapl:0", 350)
    zone(tmp_path, "intel-rapl:0:1", 900)
    zone(tmp_path, "intel-rapl:1", 9)
    assert energy.stop() == pytest.approx((250 + 20) * 1e-6)


def test_no_counters_no_energy(tmp_path: Path) -> None:
    energy = meter.Energy(tmp_path)
    energy.start()
    assert energy.stop() is None
    unreadable = zone(tmp_path, "intel-rapl:0", 1)
    (unreadable / "energy_uj").unlink()
    energy = meter.Energy(tmp_path)
    energy.start()
    assert energy.stop() is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_memory_is_what_came_on_top() -> None:
    """Of a process of its own, as a benchmark's is: another's allocator may hold what others freed, and give that again."""
    script = """
import json, os
import numpy
from edgebuild import meter
ballast = bytearray(os.urandom(1024)) * 64 * 1024  # a peak before, which is not counted
del ballast
memory = meter.Memory()
block = numpy.ones(5_000_000)
del block
print(json.dumps(memory.above()))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=60, check=True).stdout)
    assert 39e6 < found["peak"] < 50e6
    assert found["anonymous"] < 20e6


def test_the_probe_of_the_machine_is_short() -> None:
    start = time.perf_counter()
    taken = bench._spin()
    assert len(taken) == bench.SPINS
    assert taken.min() > 0
    assert time.perf_counter() - start < 5
