"""The `evaluate` step: how well a model answers, and how far a candidate's answers are from the unquantized model's.

The unquantized one is first held against its source.

The only module that knows the quality metrics and their intervals. Imported in workers only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgebuild import digest, machine, reference, samples
from edgebuild.backend import Backend, Session, facts_from_json
from edgebuild.errors import StepFailed
from edgebuild.intervals import CONFIDENCE, Interval, bootstrap, retention, wilson
from edgebuild.likeness import cosines, divergence
from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN = 32  # made-up inputs for a model without data
SECOND_VIEW_TOKENS = 512
SECOND_VIEW_WORK = 25e9  # bytes of model times tokens: a minute of MLX's int4 kernels on a Linux CPU
FEW_WINDOWS = 8  # with fewer, the bootstrap draws blocks of about 32 tokens: two windows have three distinct resamples
MAX_SNR = 150.0  # dB; float32 resolves 2⁻²⁴, 144 dB: what is equal has this, as infinity is no number in JSON
MAX_ANSWERS = 4 * 2**30  # bytes
BASELINE = "the unquantized model in the same runtime"
NO_TEXT = "evaluate.data names no text to measure it on"
SOURCE = "source/"  # roles of the files that a converted model was made of


@dataclass(kw_only=True)
class _Rows:
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


def run(action: Action, backend: Backend) -> Outcome:
    """Output `measurements`; of the baseline also `answers`, which its candidates are held against, or those alone; and `held`.

    That is the report of how it was held against its source, the inputs `source/…`. Raises StepFailed.
    """
    views = list(backend.VIEWS) or [""]
    data = action.inputs.get("data")
    if action.params["task"] == "text-generation":
        if data and samples.is_npz(data):
            raise StepFailed(f"{data.name}: a text-generation model is evaluated on UTF-8 text, but this is an archive")
        rows, summary = _text(action, backend, views, data) if data else _golden_text(action, backend, views)
    else:
        rows, summary = _tensors(action, backend, views[0], data)
    if "measurements" in action.outputs:
        text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
        action.outputs["measurements"].write_text(text + "\n", encoding="utf-8")
    if "held" in action.outputs:
        summary += f", {reference.verdict(json.loads(action.outputs['held'].read_text(encoding='utf-8')))}"
    return Outcome(summary=summary)


@contextmanager
def _opened(action: Action, backend: Backend, view: str) -> Iterator[Session]:
    session = backend.open(action.inputs["model"], view)
    try:
        if "held" in action.outputs:
            _hold(action, backend, session)
        yield session
    finally:
        session.close()


def _hold(action: Action, backend: Backend, session: Session) -> None:
    """Output `held`. Raises StepFailed where the converted model is not its source's."""
    facts = facts_from_json(json.loads(action.inputs["facts"].read_text(encoding="utf-8")))
    source = {role.removeprefix(SOURCE): path for role, path in action.inputs.items() if role.startswith(SOURCE)}
    report = {**backend.hold(session, source, facts), "runtime": session.runtime}
    action.outputs["held"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")


def _phase(views: Sequence[str], view: str) -> str:
    return view if len(views) > 1 else "inference"


# --- language models on text -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Distance:
    """Per scored token, all [windows, tokens]: KL(baseline‖candidate) in nats, same top token, both negative log-likelihoods."""

    kl: NDArray[np.float64]
    same: NDArray[np.float64]
    nll: NDArray[np.float64]
    baseline_nll: NDArray[np.float64]
    first: NDArray[np.float16]  # the candidate's log-probabilities in the first windows, for a second view of it


def _text(action: Action, backend: Backend, views: list[str], data: Path) -> tuple[list[dict[str, Any]], str]:
    origin = digest.of_file(str(data))
    role = action.params["role"]
    with _opened(action, backend, views[0]) as session:
        windows = samples.windows(data, session)
        part = action.params.get("part", "")
        rows = _Rows(phase=_phase(views, views[0]), of=role, data=origin, runtime=session.runtime, part=part)
        if role == "baseline":
            summary = _baseline_text(action, session, windows, rows)
            return rows.rows, summary
        kept = samples.part(part, len(windows), samples.FOURTH)
        answers = _Answers(action.inputs["baseline"], "text", origin, kept, len(windows))
        windows = windows if kept is None else windows[kept]
        if not np.array_equal(answers["windows"], windows):
            raise StepFailed("the candidate's tokenizer makes other tokens of the evaluation text than the baseline's")
        distance = _distance(session, windows, answers)
    summary = _text_rows(rows, distance)
    if len(views) > 1 and part != "choosing":
        rows.rows += _second_view(action, backend, views, windows, answers, distance, origin)
    return rows.rows, summary


def _baseline_text(action: Action, session: Session, windows: NDArray[np.int32], rows: _Rows) -> str:
    scored = windows.shape[1] - 1
    nll = np.empty((len(windows), scored), np.float32)
    parts, tops = [], []
    for index, window in enumerate(windows):
        logprobs = _logprobs(session, window)[:scored]
        if index == 0 and logprobs.nbytes // 2 * len(windows) > MAX_ANSWERS:
            raise StepFailed(f"the answers to this text would take more than {MAX_ANSWERS // 2**30} GiB; give a shorter text")
        nll[index] = -logprobs[np.arange(scored), window[1:]]
        tops.append(logprobs.argmax(-1).astype(np.int32))
        parts.append(logprobs.astype(np.float16))
    arrays = {"logprobs": np.concatenate(parts), "top": np.concatenate(tops), "nll": nll, "windows": windows}
    _write_answers(action.outputs["answers"], arrays, "text", rows.data, session.runtime)
    _add_perplexity(rows, nll.astype(np.float64))
    return f"perplexity {rows.rows[-1]['value']:.4g}, {nll.size:,} tokens"


def _logprobs(session: Session, window: NDArray[np.int32]) -> NDArray[np.float32]:
    """log-probabilities [T, V] of the next token. Raises StepFailed."""
    logits = np.asarray(session.logits(window), dtype=np.float32)
    if logits.ndim != 2 or len(logits) != len(window):
        raise StepFailed(f"the model gives logits of shape {list(logits.shape)} for {len(window)} tokens")
    _finite("logits", logits)
    shifted = logits - logits.max(-1, keepdims=True)
    total: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return total


def _distance(session: Session, windows: NDArray[np.int32], answers: _Answers) -> _Distance:
    """How far a session's answers to the first windows are from the baseline's. Raises StepFailed."""
    scored = windows.shape[1] - 1
    found = np.empty((3, len(windows), scored))
    first = []
    for index, window in enumerate(windows):
        logprobs = _logprobs(session, window)[:scored]
        tokens = slice(index * scored, (index + 1) * scored)
        reference = answers["logprobs"][tokens]
        if reference.shape != logprobs.shape:
            has, had = logprobs.shape[1], reference.shape[1]
            raise StepFailed(f"the candidate has a vocabulary of {has:,} tokens, the baseline one of {had:,}")
        found[0, index] = divergence(reference, logprobs)
        found[1, index] = logprobs.argmax(-1) == answers["top"][tokens]
        found[2, index] = -logprobs[np.arange(scored), window[1:]]
        if index < SECOND_VIEW_TOKENS // windows.shape[1]:
            first.append(logprobs.astype(np.float16))
    before = answers["nll"][: len(windows)].astype(np.float64)
    return _Distance(kl=found[0], same=found[1], nll=found[2], baseline_nll=before, first=np.concatenate(first))


def _text_rows(rows: _Rows, distance: _Distance) -> str:
    n = distance.kl.size
    kl, same = float(distance.kl.mean()), float(distance.same.mean())
    ratio = math.exp(distance.nll.mean() - distance.baseline_nll.mean())
    interval = bootstrap(*_units(distance.kl))
    rows.add("kl_mean", kl, "nats/token", n, interval)
    # Tokens are not independent, so windows are drawn.
    bounds = _wider(bootstrap(*_units(distance.same)), wilson(int(distance.same.sum()), n))
    rows.add("same_top", same, "share of tokens", n, bounds)
    change = bootstrap(*_units(distance.nll - distance.baseline_nll))
    rows.add("perplexity_ratio", ratio, "ratio", n, change and (math.exp(change[0]), math.exp(change[1])))
    judged, rows.judged = rows.judged, False
    _add_perplexity(rows, distance.nll)
    rows.judged = judged
    return f"KL {kl:.4f}{_shown(interval, 4)}, same top {same:.1%}, perplexity ×{ratio:.3f}, {n:,} tokens".replace("%,", " %,")


def _add_perplexity(rows: _Rows, nll: NDArray[np.float64]) -> None:
    interval = bootstrap(*_units(nll))
    bounds = interval and (math.exp(interval[0]), math.exp(interval[1]))
    rows.add("perplexity", math.exp(nll.mean()), "perplexity", nll.size, bounds, compared=False)


def _units(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the bootstrap draws of [windows, tokens]: windows, or blocks of a window where there are few; their sums and sizes."""
    parts = [values] if len(values) >= FEW_WINDOWS else np.array_split(values, 8, axis=1)
    sums = np.concatenate([part.sum(1) for part in parts])
    sizes = np.concatenate([np.full(len(part), part.shape[1], np.float64) for part in parts])
    return sums, sizes


def _second_view(
    action: Action,
    backend: Backend,
    views: list[str],
    windows: NDArray[np.int32],
    answers: _Answers,
    first: _Distance,
    origin: str,
) -> list[dict[str, Any]]:
    """The same artifact on the first windows as its second view runs it; shown beside the view that is judged."""
    size = sum(path.stat().st_size for path in action.inputs["model"].rglob("*"))
    few = windows[: min(SECOND_VIEW_TOKENS, int(SECOND_VIEW_WORK / max(size, 1))) // windows.shape[1]]
    if not len(few):
        rows = _Rows(phase=views[1], of="candidate", data=origin, runtime="", judged=False)
        reason = f"not measured: these kernels would take longer than a minute for {windows.shape[1]} tokens on this processor"
        rows.add("kl_views", None, "nats/token", 0, None, reason=reason)
        return rows.rows
    with _opened(action, backend, views[1]) as session:
        rows = _Rows(phase=views[1], of="candidate", data=origin, runtime=session.runtime, judged=False)
        distance = _distance(session, few, answers)
    _text_rows(rows, distance)
    between = divergence(first.first, distance.first).reshape(distance.kl.shape)
    rows.add("kl_views", float(between.mean()), "nats/token", between.size, bootstrap(*_units(between)))
    rows.rows[-1]["baseline"] = f"the same artifact, {views[0]}"
    return rows.rows


# --- without text: made-up tokens ------------------------------------------------------------------------------------


def _golden_text(action: Action, backend: Backend, views: list[str]) -> tuple[list[dict[str, Any]], str]:
    role = action.params["role"]
    with _opened(action, backend, views[0]) as session:
        tokens = samples.golden_tokens(session)
        logits = np.asarray(session.logits(tokens), dtype=np.float32)
        _finite("logits", logits)
        origin, part = f"golden text, {len(tokens)} tokens", action.params.get("part", "")
        rows = _Rows(phase=_phase(views, views[0]), of=role, data=origin, runtime=session.runtime, part=part)
    if role == "baseline":
        arrays = {"tokens": tokens, "output/logits": logits}
        _write_answers(action.outputs["answers"], arrays, "golden text", rows.data, rows.runtime)
        return [], f"answers to {len(tokens)} golden tokens"
    kept = samples.part(part, len(tokens), samples.THIRD)
    answers = _Answers(action.inputs["baseline"], "golden text", rows.data, kept, len(tokens))
    if kept is not None:
        tokens, logits = tokens[kept], logits[kept]
    if not np.array_equal(answers["tokens"], tokens):
        raise StepFailed("the candidate's tokenizer makes other tokens of a plain text than the baseline's")
    summary = _likeness(rows, [("logits", answers["output/logits"], logits)])
    for name in ("kl_mean", "same_top", "perplexity_ratio"):
        rows.add(name, None, "", 0, None, reason=NO_TEXT)
    return rows.rows, f"{summary}, {len(tokens)} golden tokens"


# --- models with named inputs and outputs ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a model gave for N samples: outputs [N, …] in the model's order, the predicted classes [N] where it has any.

    Where a sample is a sequence, outputs are [N, steps, …] and classes [N, steps].
    """

    outputs: Mapping[str, NDArray[np.float32]]
    predicted: NDArray[np.int64] | None
    classes: int | None  # how many it tells apart, where its outputs say so


def _tensors(action: Action, backend: Backend, view: str, data: Path | None) -> tuple[list[dict[str, Any]], str]:
    role = action.params["role"]
    with _opened(action, backend, view) as session:
        state = action.params.get("state", {})
        whole = samples.read(data, session.inputs, state=state) if data else samples.golden_samples(session.inputs, GOLDEN)
        part = action.params.get("part", "")
        kept = samples.part(part, len(whole), samples.THIRD)
        given = whole.only(kept)
        rows = _Rows(phase="inference", of=role, data=given.origin, runtime=session.runtime, part=part)
        made = _infer(session, given, action.params["task"])
    if made.predicted is not None and made.predicted.ndim > 1 and given.labels is not None and given.labels.ndim == 1:
        made = replace(made, predicted=made.predicted[:, -1])  # a class for a sequence: what is said at its end
    labels = _labels(data.name if data else "", given, made, action.params["task"])
    if role == "baseline":
        return rows.rows, _baseline_tensors(action, rows, made, labels, len(given))
    answers = _Answers(action.inputs["baseline"], "tensors", given.origin, kept, len(whole))
    pairs = _pairs(answers, made)
    summary = _likeness(rows, pairs)
    if labels is None:
        why = "evaluate.data holds no labels of classes" if data else "evaluate.data is not given, so there are no labels"
        rows.add("quality", None, "ratio", 0, None, reason=why)
        _add_flips(rows, answers, made, data is not None and _tells_classes(action.params["task"]), why)
        return rows.rows, f"{summary}, {len(given):,} {'samples' if data else 'golden inputs'}"
    return rows.rows, _classes(rows, answers, made, labels)


def _tells_classes(task: str) -> bool:
    return task.endswith("-classification") or task == "voice-activity-detection"


def _infer(session: Session, given: samples.Samples, task: str) -> _Given:
    """Every sample through the model, one at a time wherever it takes one; sequences step by step. Raises StepFailed."""
    made = given.steps(session.infer) if given.state else ((feed, session.infer(feed)) for feed in given.feeds())
    gathered: dict[str, list[NDArray[np.float32]]] = {}
    predicted: list[NDArray[np.int64]] = []
    classes: int | None = None
    size = 0
    for index, (_, outputs) in enumerate(made):
        if not outputs:
            raise StepFailed("the model has no outputs to compare")
        for position, (name, value) in enumerate(outputs.items()):
            per_sample = _per_sample(name, np.asarray(value), given)
            if position == 0 and (found := _predict(per_sample, _tells_classes(task))):
                predicted.append(found[0])
                classes = found[1]
            kept = gathered.setdefault(name, [])
            kept.append(_floats(name, per_sample, index * given.batch))
            if kept[0].shape[1:] != kept[-1].shape[1:]:
                shapes = f"{list(kept[0].shape[1:])} for one sample and {list(kept[-1].shape[1:])} for another"
                raise StepFailed(f"the output {name} has the shape {shapes}; no metric here compares those")
            size += kept[-1].nbytes
        if size > MAX_ANSWERS:
            raise StepFailed(f"the outputs of {index} samples take over {MAX_ANSWERS // 2**30} GiB; give fewer samples")
    count = len(given) * (given.length if given.state else 1)
    joined = {name: np.concatenate(kept)[:count] for name, kept in gathered.items()}
    classed = np.concatenate(predicted)[:count] if predicted and sum(map(len, predicted)) >= count else None
    if given.state:
        shape = (len(given), given.length)
        joined = {name: array.reshape(*shape, *array.shape[1:]) for name, array in joined.items()}
        classed = None if classed is None else classed.reshape(shape)
    return _Given(outputs=joined, predicted=classed, classes=classes)


def _per_sample(name: str, value: NDArray[Any], given: samples.Samples) -> NDArray[Any]:
    """An output with the samples of its feed as its first axis."""
    if given.batch > 1:
        if value.ndim == 0 or len(value) != given.batch:
            shape = f"the shape {list(value.shape)} for a batch of {given.batch}"
            raise StepFailed(f"the output {name} has {shape}: its first axis is not the sample")
        return value
    return value if not given.whole and value.ndim and len(value) == 1 else value[None]


def _floats(name: str, value: NDArray[Any], index: int) -> NDArray[np.float32]:
    if value.dtype.kind not in "fiubV":
        raise StepFailed(f"the output {name} is {value.dtype.name}; only numbers can be compared: export the model without it")
    made: NDArray[np.float32] = value.astype(np.float32)
    _finite(f"the output {name} of sample {index}", made)
    return made


def _finite(what: str, value: NDArray[np.float32]) -> None:
    if not np.isfinite(value).all():
        count = int((~np.isfinite(value)).sum())
        raise StepFailed(f"{what}: {count:,} of {value.size:,} values are not finite; the model overflows or is damaged")


def _predict(value: NDArray[Any], classes: bool) -> tuple[NDArray[np.int64], int | None] | None:
    """The class of each row: where it is largest, or the one whole number that it is; None where it is neither.

    Where the task is to tell `classes`, a lone probability is of the second of two.
    """
    rows = value.reshape(len(value), -1)
    if value.dtype.kind in "iu" and rows.shape[1] == 1:
        return rows[:, 0].astype(np.int64), None
    if classes and value.dtype.kind == "f" and rows.shape[1] == 1 and ((rows >= 0) & (rows <= 1)).all():
        return (rows[:, 0] >= 0.5).astype(np.int64), 2
    if value.ndim < 2 or value.shape[-1] < 2 or rows.shape[1] != value.shape[-1]:
        return None
    return rows.argmax(-1).astype(np.int64), rows.shape[1]


def _labels(name: str, given: samples.Samples, made: _Given, task: str) -> NDArray[np.int64] | None:
    """The right classes [N], where the data hold any. Raises StepFailed where they cannot be this model's."""
    labels = given.labels
    if labels is None:
        return None
    expected = (len(given),) if made.predicted is None else made.predicted.shape
    if labels.dtype.kind not in "iub" or labels.size != math.prod(expected):
        if not _tells_classes(task):
            return None
        shape = list(labels.shape)
        raise StepFailed(
            f"{name}: labels are {labels.dtype.name} {shape}, but classes are whole numbers {list(expected)}; "
            "labels.argmax(-1) would do for one-hot rows"
        )
    if made.predicted is None:
        output, value = next(iter(made.outputs.items()))
        shape = list(value.shape[1:])
        raise StepFailed(
            f"{name} holds labels, but the model's first output {output} has the shape {shape} for a sample, which is no row of "
            "class scores; take the labels out of the data, or export the model with its scores as the first output"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (made.classes is not None and high >= made.classes):
        classes = "" if made.classes is None else f", but the model tells {made.classes} classes apart: 0…{made.classes - 1}"
        raise StepFailed(f"{name}: labels run from {low} to {high}{classes}")
    return labels.reshape(made.predicted.shape).astype(np.int64)


def _baseline_tensors(action: Action, rows: _Rows, made: _Given, labels: NDArray[np.int64] | None, n: int) -> str:
    arrays: dict[str, NDArray[Any]] = {f"output/{name}": value for name, value in made.outputs.items()}
    if made.predicted is not None:
        arrays["predicted"] = made.predicted
    if labels is not None:
        arrays["labels"] = labels
    _write_answers(action.outputs["answers"], arrays, "tensors", rows.data, rows.runtime, list(made.outputs))
    if labels is None or made.predicted is None:
        return f"answers to {n:,} {'golden inputs' if rows.data.startswith('golden') else 'samples'}"
    right = made.predicted == labels
    rows.add("accuracy", float(right.mean()), "share of samples", right.size, _share(right), compared=False)
    return f"accuracy {100 * right.mean():.1f} % of {right.size:,}"


def _pairs(answers: _Answers, made: _Given) -> list[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    expected = {key.removeprefix("output/") for key in answers.held if key.startswith("output/")}
    if expected != set(made.outputs):
        has, had = ", ".join(sorted(made.outputs)), ", ".join(sorted(expected))
        raise StepFailed(f"the candidate's outputs ({has}) are not the baseline's ({had})")
    return [(name, answers[f"output/{name}"], value) for name, value in made.outputs.items()]


def _likeness(rows: _Rows, pairs: Sequence[tuple[str, NDArray[np.float32], NDArray[np.float32]]]) -> str:
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
    shown = "no SNR" if decibels is None else f"SNR {decibels:.1f} dB"
    return f"cosine {alike.mean():.4f}{_shown(interval, 4)}, {shown}"


def snr(ratio: float) -> float:
    """Noise over signal, as energies, in dB of signal over noise, at most 150."""
    return MAX_SNR if ratio <= 10 ** (-MAX_SNR / 10) else -10 * math.log10(ratio)


def _add_flips(rows: _Rows, answers: _Answers, made: _Given, classes: bool, reason: str) -> int:
    """The share of samples whose class changed; → how many."""
    if made.predicted is None or "predicted" not in answers.held or not classes:
        rows.add("flip_rate", None, "share of samples", 0, None, reason=reason)
        return 0
    flips = made.predicted != answers["predicted"]
    rows.add("flip_rate", float(flips.mean()), "share of samples", flips.size, _share(flips))
    return int(flips.sum())


def _share(found: NDArray[np.bool_]) -> Interval:
    """The interval of a share. Steps of a sequence are not independent, so sequences are drawn."""
    bounds = wilson(int(found.sum()), found.size)
    if found.ndim == 1:
        return bounds
    return _wider(bootstrap(found.sum(1, dtype=np.float64), np.full(len(found), found.shape[1], np.float64)), bounds)


def _wider(drawn: Interval, least: tuple[float, float]) -> Interval:
    """Both intervals: where all units agree those that are drawn cannot vary, and the other one still says something."""
    return drawn and (min(drawn[0], least[0]), max(drawn[1], least[1]))


def _classes(rows: _Rows, answers: _Answers, made: _Given, labels: NDArray[np.int64]) -> str:
    """Accuracy of both, what the candidate keeps of it, and how many answers changed."""
    assert made.predicted is not None  # _labels has seen to it
    n = labels.size
    before, after = answers["predicted"] == labels, made.predicted == labels
    baseline, candidate = int(before.sum()), int(after.sum())
    rows.add("accuracy", candidate / n, "share of samples", n, _share(after), compared=False)
    kept, interval = None, None
    if baseline:
        kept = candidate / baseline
        interval = retention(int((after & ~before).sum()), int((before & ~after).sum()), n, baseline / n)
        if labels.ndim > 1:
            interval = _wider(bootstrap(after.sum(1, dtype=np.float64), np.maximum(before.sum(1), 1e-300)), interval)
    why = f"the baseline is right in none of {n:,} samples: are these labels this model's?"
    rows.add("quality", kept, "ratio", n, interval, reason=why)
    flips = _add_flips(rows, answers, made, True, "")
    shown = "no retention" if kept is None else f"retention {kept:.3f}{_shown(interval, 3)}"
    accuracy = f"accuracy {100 * candidate / n:.1f} % of {n:,} (baseline {100 * baseline / n:.1f} %)"
    return f"{accuracy}, {shown}, {flips:,} flip{'' if flips == 1 else 's'}"


# --- answers of the baseline -----------------------------------------------------------------------------------------


class _Answers:
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


def _write_answers(
    path: Path, arrays: Mapping[str, NDArray[Any]], kind: str, data: str, runtime: str, outputs: Sequence[str] = ()
) -> None:
    """One metadata key alone: safetensors writes several in another order each time, and the bytes are a key's input.

    `outputs`: the model's, in its own order, which the file does not keep.
    """
    from safetensors.numpy import save_file

    about = json.dumps({"kind": kind, "data": data, "runtime": runtime, "outputs": list(outputs)}, sort_keys=True)
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, metadata={"about": about})


def _shown(interval: Interval, digits: int) -> str:
    return "" if interval is None else f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})"
