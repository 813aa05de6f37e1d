"""The `benchmark` step: bytes, times and memory of a candidate and its baseline, in alternation on this machine.

The parent keeps the clock of the experiment; each artifact runs in a fresh child, `python -m edgebuild.bench`, which
speaks JSON lines. Imported in workers only. Intervals speak of this one pair of processes, at this time.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgebuild import machine, samples
from edgebuild.backend import Backend, Session
from edgebuild.errors import EdgebuildError, StepFailed, said
from edgebuild.intervals import CONFIDENCE
from edgebuild.meter import POWERCAP, Energy, Memory
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The least calls and seconds for each of the two (the classes of MLPerf Mobile: rapid, quick, normal).
PROFILES: Mapping[str, tuple[int, float]] = {"rapid": (64, 6.0), "quick": (128, 10.0), "release": (1024, 60.0)}
PERCENTILES = {"latency_p50": 0.5, "latency_p90": 0.9, "latency_p95": 0.95, "latency_p99": 0.99}
RESAMPLES = 1000
BLOCK_SECONDS = 0.2  # short beside what disturbs a machine, so that a disturbance meets both
LEAST_PAIRS = 8  # of blocks: a bootstrap of fewer says too little, so there is no interval
KEPT = 200  # order statistics by which a block stands in the bootstrap: enough for its p99, and little work
PREFILL = 32  # tokens
# After 3 calls of OpenVINO's those in the next 50 ms took 1 to 2 % longer than later ones; from 0.2 s on what differs is chance, up to 0.9 %
# (medians of 8 processes).
WARM_CALLS, WARM_SECONDS = 3, 0.2
LEAST_ENERGY_SECONDS = 10.0  # RAPL counts the whole package: over less, what else ran decides
NOISY = 1.25  # p95/p50 of a fixed loop: above it the machine, not the model, makes the spread
SPINS, SPIN_LOOPS = 100, 20_000
# One process each: on a tiny model another pair of processes gave a ratio 1 % off, where the interval was 0.2 % wide.
BASELINE = "the unquantized model in the same runtime on the same machine, in alternation, one process each"
NO_RAPL = "unavailable: no RAPL counters here (virtual machine, container or no permission)"
ROLES = ("baseline", "candidate")


def run(action: Action, name: str, backend: Backend, profiles: Mapping[str, tuple[int, float]] = PROFILES) -> Outcome:
    """Output `measurements`. Raises StepFailed where a session cannot run.

    `name` is the backend's, for the children. An artifact runs as its last view does: the one nearest to the device.
    """
    sizes = {role: _bytes(action.inputs[_input(role)]) for role in ROLES}
    rows, shown = _size_rows(sizes)
    if reason := action.params["not_measured"]:
        rows += _unmeasured(reason)
        shown = f"{shown}; {reason}"
    else:
        calls, seconds = profiles[action.params["profile"]]
        view = (list(backend.VIEWS) or [""])[-1]
        language = action.params["task"] == "text-generation"
        timing = _time(action, name, view, language, calls, seconds)
        made, times = _timed_rows(timing, language)
        rows += made
        shown = f"{times}, {shown}"
    text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
    action.outputs["measurements"].write_text(text + "\n", encoding="utf-8")
    return Outcome(summary=shown)


def _input(role: str) -> str:
    return "model" if role == "candidate" else role


def _row(name: str, value: float | None, unit: str, *, of: str, phase: str, n: int = 1, **others: Any) -> dict[str, Any]:
    """One measurement; what is not given is null, and what is judged is the candidate's."""
    row = {
        "name": name,
        "phase": phase,
        "of": of,
        "value": value,
        "unit": unit,
        "n": n,
        "interval": None,
        "confidence": None,
        "baseline": None,
        "data": None,
        "runtime": None,
        "machine": None,
        "judged": of == "candidate",
        **others,
    }
    if value is not None:
        row.pop("reason", None)
    return row


# --- bytes: exact, on every machine ----------------------------------------------------------------------------------


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def _size_rows(sizes: Mapping[str, int]) -> tuple[list[dict[str, Any]], str]:
    ratio = sizes["candidate"] / sizes["baseline"] if sizes["baseline"] else None
    rows = [_row("artifact_bytes", sizes[role], "B", of=role, phase="size") for role in ROLES]
    versus: dict[str, Any] = {"baseline": "the unquantized model's files", "reason": "the baseline has no bytes"}
    rows.append(_row("weights_ratio", ratio, "ratio", of="candidate", phase="size", **versus))
    shown = "" if ratio is None else f" (×{ratio:.3f})"
    return rows, f"{human(sizes['baseline'])} → {human(sizes['candidate'])}{shown}"


def _unmeasured(reason: str) -> list[dict[str, Any]]:
    rows = [_row(name, None, "s", of="candidate", phase="inference", n=0, reason=reason) for name in PERCENTILES]
    for name, unit, phase in (
        ("latency_ratio", "ratio", "inference"),
        ("consistency", "ratio", "inference"),
        ("first_inference", "s", "load"),
        ("load_time", "s", "load"),
        ("peak_memory", "B", "memory"),
        ("energy", "J/call", "inference"),
    ):
        rows.append(_row(name, None, unit, of="candidate", phase=phase, n=0, reason=reason))
    return rows


# --- the parent ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Timing:
    """What was timed: by role what the child said of itself, and its blocks of latencies in seconds, in order."""

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: {role: [] for role in ROLES})
    joules: dict[str, list[float | None]] = field(default_factory=lambda: {role: [] for role in ROLES})  # of each block
    noise: float = 0.0  # p95/p50 of the spin loop
    load: float | None = None


def _time(action: Action, name: str, view: str, language: bool, calls: int, seconds: float) -> _Timing:
    """Both artifacts in fresh children, one block of calls of each in turn."""
    timing = _Timing()
    order = {"backend": name, "view": view, "language": language}
    with _Child("baseline", action.inputs[_input("baseline")], {**order, "modules": None}) as scout:
        order["modules"] = scout.answer()["modules"]
    with ExitStack() as stack:
        children = {role: stack.enter_context(_Child(role, action.inputs[_input(role)], order)) for role in ROLES}
        for child in children.values():
            child.answer()  # both import at once; each is alone while it loads
        stack.enter_context(action.alone())
        timing.about = {role: child.ask({"load": True}) for role, child in children.items()}
        timing.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        probes = _spin()
        _alternate(children, timing, calls, seconds)
        probes = np.concatenate([probes, _spin()])
    timing.noise = float(np.quantile(probes, 0.95) / np.median(probes))
    return timing


def _alternate(children: Mapping[str, _Child], timing: _Timing, calls: int, seconds: float) -> None:
    """Blocks of the two in turn, until each has the least calls and seconds, and enough blocks for an interval."""
    sizes = {role: max(1, round(BLOCK_SECONDS / timing.about[role]["call"])) for role in ROLES}
    energy = Energy(POWERCAP)
    spent, done = dict.fromkeys(ROLES, 0.0), dict.fromkeys(ROLES, 0)
    while any(done[role] < calls or spent[role] < seconds or len(timing.blocks[role]) < LEAST_PAIRS for role in ROLES):
        for role in ROLES:
            energy.start()
            block = children[role].block(sizes[role])
            timing.joules[role].append(energy.stop())
            timing.blocks[role].append(block)
            spent[role] += float(block.sum())
            done[role] += len(block)


def _spin() -> NDArray[np.float64]:
    """How long a fixed loop takes, over and over: what this machine adds to a time by itself."""
    taken = []
    for _ in range(SPINS):
        start = time.perf_counter_ns()
        for _ in range(SPIN_LOOPS):
            pass
        taken.append(time.perf_counter_ns() - start)
    return np.array(taken, dtype=np.float64)


class _Child:
    """A process with one artifact. What it is ordered and asked, and what it answers, `_serve` says."""

    def __init__(self, role: str, path: Path, order: Mapping[str, Any]) -> None:
        self._role, self._order = role, {**order, "model": str(path.absolute())}

    def __enter__(self) -> _Child:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        known = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgebuild.bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(known))},
            text=True,
            encoding="utf-8",
        )
        try:
            self.order(self._order)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def block(self, calls: int) -> NDArray[np.float64]:
        """Latencies of `calls` calls, in seconds."""
        return np.array(self.ask({"calls": calls})["latencies"], dtype=np.float64) * 1e-9

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self.order(order)
        return self.answer()

    def order(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise StepFailed(f"benchmark of the {self._role}: {_ended(self._process)}") from error

    def answer(self) -> dict[str, Any]:
        """To what it was ordered last. Raises StepFailed."""
        assert self._process.stdout
        try:
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise StepFailed(f"benchmark of the {self._role}: {_ended(self._process)}") from error
        if "error" in answer:
            raise StepFailed(f"benchmark of the {self._role}: {answer['error']}")
        return answer

    def _end(self) -> None:
        """Killed, not asked: it holds nothing that is worth a goodbye, and may hang."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream:
                    stream.close()
            except OSError:  # what was not yet written to a dead child
                pass


def _ended(process: subprocess.Popen[str]) -> str:
    try:
        status = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "its process answered nothing that can be read"
    if status < 0:
        return f"its process died of signal {-status}: a crash in the framework, or too little memory"
    return f"its process ended with status {status} and no answer"


# --- from latencies to measurements ----------------------------------------------------------------------------------


def least_calls(share: float) -> int:
    """The calls that bound a percentile: with n ≥ ln(0.05) / ln(p) the slowest lies above the p-th with 95 % confidence.

    29 for p90, 59 for p95, 299 for p99.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def _timed_rows(timing: _Timing, language: bool) -> tuple[list[dict[str, Any]], str]:
    phase = f"prefill {PREFILL} tokens" if language else "inference"
    here = ", ".join(machine.fingerprint().values())
    data = f"golden text, {PREFILL} tokens" if language else f"golden inputs, seed {samples.SEED}"
    shared = {role: {"data": data, "runtime": timing.about[role]["runtime"], "machine": here} for role in ROLES}
    drawn = _Bootstrap(timing.blocks)
    rows: list[dict[str, Any]] = []
    for role in ROLES:
        rows += _latency_rows(drawn, role, phase, timing.noise, shared[role])
        rows += _load_rows(timing.about[role], role, shared[role])
        rows.append(_energy_row(timing, role, phase, shared[role]))
    ratio, interval = drawn.ratio()
    pairs = len(timing.blocks["candidate"])
    sampled = {"interval": interval, "confidence": CONFIDENCE, "baseline": BASELINE}
    rows.append(_row("latency_ratio", ratio, "ratio", of="candidate", phase=phase, n=pairs, **sampled, **shared["candidate"]))
    noise: dict[str, Any] = {"phase": "host", "of": "host", "machine": here}
    rows.append(_row("host_noise", timing.noise, "p95/p50 of a fixed loop", n=2 * SPINS, **noise))
    rows.append(_row("load_average", timing.load, "1 min", reason="this system has no load average", **noise))
    p50 = {role: drawn.value(role, 0.5) for role in ROLES}
    shown = "" if interval is None else f" ({interval[0]:.2f}–{interval[1]:.2f})"
    return rows, f"{phase} p50 {_seconds(p50['candidate'])} (baseline {_seconds(p50['baseline'])}), ×{ratio:.2f}{shown}"


def _latency_rows(drawn: _Bootstrap, role: str, phase: str, noise: float, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    n = drawn.calls[role]
    rows = []
    for name, share in PERCENTILES.items():
        enough = n >= least_calls(share) or share == 0.5
        value, interval = (drawn.value(role, share), drawn.interval(role, share)) if enough else (None, None)
        reason = f"n={n:,} < {least_calls(share)}"
        sampled = {"interval": interval, "confidence": CONFIDENCE, "reason": reason, **shared}
        rows.append(_row(name, value, "s", of=role, phase=phase, n=n, **sampled))
    spread, interval, reason = None, None, ""
    if n < least_calls(0.95):
        reason = f"p95 is not known: n={n:,} < {least_calls(0.95)}"
    elif noise > NOISY:
        reason = f"this machine is too noisy: p95/p50 of a fixed loop is {noise:.2f}, over {NOISY}"
    else:
        spread, interval = drawn.spread(role)
    sampled = {"interval": interval, "confidence": CONFIDENCE, "reason": reason, **shared}
    rows.append(_row("consistency", spread, "p95/p50", of=role, phase=phase, n=n, **sampled))
    return rows


def _load_rows(about: Mapping[str, Any], role: str, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        _row("load_time", about["load"], "s", of=role, phase="load", **shared),
        _row("first_inference", about["first"], "s", of=role, phase="load", **shared),
        _row("warm_up", about["warm"], "s", of=role, phase="load", n=about["warm_calls"], **shared),
    ]
    for name, key in (("peak_memory", "peak"), ("peak_memory_anonymous", "anonymous")):
        others = {"reason": about["memory_reason"], "baseline": "the runtime loaded, without a model", **shared}
        rows.append(_row(name, about[key], "B", of=role, phase="memory", **others))
    return rows


def _energy_row(timing: _Timing, role: str, phase: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Joules a call of all processor packages, idle power included."""
    seconds = float(sum(block.sum() for block in timing.blocks[role]))
    calls = sum(map(len, timing.blocks[role]))
    counted = [joules for joules in timing.joules[role] if joules is not None]
    missing = len(counted) < len(timing.joules[role])
    value = None if missing or seconds < LEAST_ENERGY_SECONDS else sum(counted) / calls
    reason = NO_RAPL if missing else f"{seconds:.1f} s < {LEAST_ENERGY_SECONDS:.0f} s; benchmark.profile: quick or release"
    return _row("energy", value, "J/call", of=role, phase=phase, n=calls, reason=reason, **shared)


class _Bootstrap:
    """Percentiles of all latencies, and their intervals: resamples of pairs of blocks, as times within a block are alike."""

    def __init__(self, blocks: Mapping[str, Sequence[NDArray[np.float64]]]) -> None:
        self._all = {role: np.concatenate(blocks[role]) for role in ROLES}
        self.calls = {role: len(self._all[role]) for role in ROLES}
        pairs = len(blocks["baseline"])
        kept = {role: np.stack([_order_statistics(block) for block in blocks[role]]) for role in ROLES}
        shares = list(PERCENTILES.values())
        self._drawn = {role: np.empty((RESAMPLES if pairs >= LEAST_PAIRS else 0, len(shares))) for role in ROLES}
        generator = np.random.default_rng(0)
        for i in range(len(self._drawn["baseline"])):
            chosen = generator.integers(0, pairs, pairs)
            for role in ROLES:
                self._drawn[role][i] = np.quantile(kept[role][chosen], shares)
        self._column = {share: column for column, share in enumerate(shares)}

    def value(self, role: str, share: float) -> float:
        return float(np.quantile(self._all[role], share))

    def interval(self, role: str, share: float) -> list[float] | None:
        return _between(self._drawn[role][:, self._column[share]], self.value(role, share))

    def ratio(self) -> tuple[float, list[float] | None]:
        """p50 of the candidate over p50 of the baseline."""
        value = self.value("candidate", 0.5) / self.value("baseline", 0.5)
        return value, _between(self._drawn["candidate"][:, 0] / self._drawn["baseline"][:, 0], value)

    def spread(self, role: str) -> tuple[float, list[float] | None]:
        """p95 over p50."""
        value = self.value(role, 0.95) / self.value(role, 0.5)
        return value, _between(self._drawn[role][:, self._column[0.95]] / self._drawn[role][:, 0], value)


def _order_statistics(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """A block by at most 200 of its sorted times, each the middle of an equal share; blocks of one run are equally long."""
    kept = min(len(block), KEPT)
    picked: NDArray[np.float64] = np.sort(block)[((np.arange(kept) + 0.5) / kept * len(block)).astype(int)]
    return picked


def _between(drawn: NDArray[np.float64], value: float) -> list[float] | None:
    """The 95 % percentile interval; it holds the value, which comes of all times where the resamples have order statistics."""
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [min(float(low), value), max(float(high), value)]


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


# --- the child -------------------------------------------------------------------------------------------------------


def _serve(order: Mapping[str, Any], commands: IO[str], answer: Callable[[Mapping[str, Any]], None]) -> None:
    """Import, and say so; where a line asks for it load, warm up, and say so; then time as many calls as each line asks for.

    `modules` are those that a first child needed for the same, which is asked for them by null, and loads at once: imported
    before the model they are the idle runtime, and what memory is used beyond it is the model's.
    """
    backend: Backend = importlib.import_module(f"edgebuild.backends.{order['backend']}")
    before = set(sys.modules)
    for module in order["modules"] or ():
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001 - a framework's own module; where it does not load, it counts as the model's
            continue
    if order["modules"] is not None:
        answer({"imported": True})
        if not commands.readline():
            return
    idle = Memory()
    start = time.perf_counter_ns()
    session = backend.open(Path(order["model"]), order["view"])
    loaded = time.perf_counter_ns()
    call = _call(session, order["language"])
    first = _clock(call)
    if order["modules"] is None:
        answer({"modules": [module for module in sys.modules if module not in before and module != "__main__"]})
        return
    warm: list[int] = []
    end = time.perf_counter_ns() + WARM_SECONDS * 1e9
    while len(warm) < WARM_CALLS or time.perf_counter_ns() < end:
        warm.append(_clock(call))
    found = {
        "runtime": session.runtime,
        "load": (loaded - start) * 1e-9,
        "first": first * 1e-9,
        "warm": sum(warm) * 1e-9,
        "warm_calls": len(warm),
        "call": max(float(np.median(warm)) * 1e-9, 1e-9),
        **idle.above(),
    }
    answer(found)
    for line in commands:
        answer({"latencies": [_clock(call) for _ in range(json.loads(line)["calls"])]})
    session.close()


def _call(session: Session, language: bool) -> Callable[[], object]:
    if language:
        tokens = samples.golden_tokens(session, PREFILL)
        return lambda: session.logits(tokens)
    feed = samples.golden(session.inputs)
    return lambda: session.infer(feed)


def _clock(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def main() -> int:
    """The child: an order and then commands on standard input, answers on standard output, until the input ends."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as in a worker that only runs an artifact
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a framework prints is no answer

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        _serve(json.loads(sys.stdin.readline()), sys.stdin, answer)
    except EdgebuildError as error:
        answer({"error": str(error)})
    except Exception as error:  # noqa: BLE001 - the outer edge of this process: a framework may raise anything
        answer({"error": f"unexpected {type(error).__name__}: {said(error)}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
