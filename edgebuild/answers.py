"""What a model answers, as the `evaluate` step notes it: measurements, the baseline's answers in a file, and how like two are.

A converted model is held against its source where it is opened for the first time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgebuild import machine, onnxsource
from edgebuild.backend import Backend, ModelFacts, Session, facts_from_json
from edgebuild.errors import StepFailed
from edgebuild.intervals import CONFIDENCE, Interval, bootstrap
from edgebuild.likeness import cosines
from edgebuild.step import Action

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SNR = 150.0  # dB; float32 resolves 2⁻²⁴, 144 dB: what is equal has this, as infinity is no number in JSON
MAX_ANSWERS = 4 * 2**30  # bytes
BASELINE = "the unquantized model in the same runtime"
SOURCE = "source/"  # roles of the files that a converted model was made of


@dataclass(kw_only=True)
class Rows:
    """The measurements of one session: what they share, and the list that they go to."""

    phase: str
    of: str  # "baseline" or "candidate"
    data: str
    runtime: str
    judged: bool = True  # whether the gates look at this phase
    part: str = ""  # of the data, where a recipe is chosen on one and judged on the other
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, value: float | None, unit: str, n: int, interval: Interval, *, compared: bool = True, reason: str = ""
    ) -> None:
        """`compared`: the value speaks of candidate and baseline, else of one model alone."""
        self.rows.append(
            {
                "name": name,
                "phase": self.phase,
                "of": self.of,
                "value": value,
                "unit": unit,
                "n": n,
                "interval": None if interval is None else [min(interval[0], value or 0.0), max(interval[1], value or 0.0)],
                "confidence": CONFIDENCE,
                "baseline": BASELINE if compared else None,
                "data": self.data,
                "runtime": self.runtime,
                "machine": machine.isa(),
                "judged": self.judged and self.of == "candidate",
                **({"part": self.part} if self.part else {}),
                **({"reason": reason} if value is None else {}),
            }
        )


@contextmanager
def opened(action: Action, backend: Backend, view: str) -> Iterator[Session]:
    facts = _facts(action) if "held" in action.outputs else None
    with ExitStack() as stack:
        with onnxsource.converting(facts) if facts else nullcontext():
            session = stack.enter_context(closing(backend.open(action.inputs["model"], view)))
            if facts:
                _hold(action, backend, session, facts)
        yield session


def _facts(action: Action) -> ModelFacts:
    return facts_from_json(json.loads(action.inputs["facts"].read_text(encoding="utf-8")))


def _hold(action: Action, backend: Backend, session: Session, facts: ModelFacts) -> None:
    """Output `held`. Raises StepFailed where the converted model is not its source's."""
    source = {role.removeprefix(SOURCE): path for role, path in action.inputs.items() if role.startswith(SOURCE)}
    report = {**backend.hold(session, source, facts), "runtime": session.runtime}
    action.outputs["held"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")


class Answers:
    """The baseline's answers, read as they are asked for. Raises StepFailed where they answer something else.

    `kept`: of the `count` samples or windows that they answer, those that are asked for; None: all.
    """

    def __init__(self, path: Path, kind: str, data: str, kept: NDArray[np.intp] | None, count: int) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = cast("Any", safe_open(path, framework="numpy"))
            about = json.loads((self._file.metadata() or {})["about"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StepFailed(f"the baseline's answers cannot be read: {error}") from error
        self.held = frozenset(str(key) for key in self._file.keys())  # noqa: SIM118 - safe_open is no mapping
        self._read: dict[str, NDArray[Any]] = {}
        self._kept, self._count = kept, count
        if (about.get("kind"), about.get("data")) != (kind, data):
            other = f"{about.get('kind')}: {about.get('data')}"
            raise StepFailed(f"the baseline answered other data ({other}) than the candidate ({kind}: {data})")

    def __getitem__(self, key: str) -> Any:
        if key not in self.held:
            raise StepFailed(f"the baseline's answers lack {key}; evaluate it again")
        if key not in self._read:
            self._read[key] = self._only(self._file.get_tensor(key))
        return self._read[key]

    def _only(self, array: NDArray[Any]) -> NDArray[Any]:
        """Rows [count × k, …], k of each sample → those of the samples that are kept."""
        if self._kept is None:
            return array
        if len(array) % self._count:
            raise StepFailed(f"the baseline answered {len(array)} rows for {self._count} samples; evaluate it again")
        return array.reshape(self._count, -1, *array.shape[1:])[self._kept].reshape(-1, *array.shape[1:])


def write(
    path: Path, arrays: Mapping[str, NDArray[Any]], kind: str, data: str, runtime: str, outputs: Sequence[str] = ()
) -> None:
    """One metadata key alone: safetensors writes several in another order each time, and the bytes are a key's input.

    `outputs`: the model's, in its own order, which the file does not keep.
    """
    from safetensors.numpy import save_file

    about = json.dumps({"kind": kind, "data": data, "runtime": runtime, "outputs": list(outputs)}, sort_keys=True)
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, metadata={"about": about})


def likeness(rows: Rows, pairs: Sequence[tuple[str, NDArray[np.float32], NDArray[np.float32]]]) -> str:
    """Cosine and signal-to-noise ratio of all outputs of a sample, taken together."""
    n = len(pairs[0][2])
    dot, signal, square, noise = np.zeros((4, n))
    for name, expected, found in pairs:
        if expected.shape != found.shape:
            shapes = f"{list(found.shape[1:])} for a sample, but {list(expected.shape[1:])} in the baseline"
            raise StepFailed(f"the output {name} has the shape {shapes}")
        for i in range(n):  # one sample at a time: outputs may be large, and float64 doubles them
            a, b = expected[i].ravel().astype(np.float64), found[i].ravel().astype(np.float64)
            dot[i] += a @ b
            signal[i] += a @ a
            square[i] += b @ b
            noise[i] += (a - b) @ (a - b)
    alike = cosines(dot, signal, square)
    interval = bootstrap(alike, np.ones(n))
    rows.add("cosine", float(alike.mean()), "cosine", n, interval)
    decibels, bounds = None, None
    if signal.sum() > 0:
        decibels = snr(float(noise.sum() / signal.sum()))
        drawn = bootstrap(noise, np.maximum(signal, 1e-300))
        bounds = drawn and (snr(drawn[1]), snr(drawn[0]))
    rows.add("snr", decibels, "dB", n, bounds, reason="every output of the baseline is 0")
    ratio = "no SNR" if decibels is None else f"SNR {decibels:.1f} dB"
    return f"cosine {alike.mean():.4f}{shown(interval, 4)}, {ratio}"


def snr(ratio: float) -> float:
    """Noise over signal, as energies, in dB of signal over noise, at most 150."""
    return MAX_SNR if ratio <= 10 ** (-MAX_SNR / 10) else -10 * math.log10(ratio)


def finite(what: str, value: NDArray[np.float32]) -> None:
    if not np.isfinite(value).all():
        count = int((~np.isfinite(value)).sum())
        raise StepFailed(f"{what}: {count:,} of {value.size:,} values are not finite; the model overflows or is damaged")


def shown(interval: Interval, digits: int) -> str:
    return "" if interval is None else f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})"
