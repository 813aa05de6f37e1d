"""Models with named inputs and outputs in the `evaluate` step: classes where there are labels, else how like outputs are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebuild import samples
from edgebuild.answers import MAX_ANSWERS, Answers, Rows, finite, likeness, opened, shown, write
from edgebuild.backend import Backend, Session
from edgebuild.errors import StepFailed
from edgebuild.intervals import Interval, bootstrap, retention, wider, wilson
from edgebuild.step import Action

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN = 32  # made-up inputs for a model without data


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a model gave for N samples: outputs [N, …] in the model's order, the predicted classes [N] where it has any.

    Where a sample is a sequence, outputs are [N, steps, …] and classes [N, steps].
    """

    outputs: Mapping[str, NDArray[np.float32]]
    predicted: NDArray[np.int64] | None
    classes: int | None  # how many it tells apart, where its outputs say so


def on_samples(action: Action, backend: Backend, view: str, data: Path | None) -> tuple[list[dict[str, Any]], str]:
    role = action.params["role"]
    with opened(action, backend, view) as session:
        state = action.params.get("state", {})
        whole = samples.read(data, session.inputs, state=state) if data else samples.golden_samples(session.inputs, GOLDEN)
        part = action.params.get("part", "")
        kept = samples.part(part, len(whole), samples.THIRD)
        given = whole.only(kept)
        rows = Rows(phase="inference", of=role, data=given.origin, runtime=session.runtime, part=part)
        made = _infer(session, given, action.params["task"])
    if made.predicted is not None and made.predicted.ndim > 1 and given.labels is not None and given.labels.ndim == 1:
        made = replace(made, predicted=made.predicted[:, -1])  # a class for a sequence: what is said at its end
    labels = _labels(data.name if data else "", given, made, action.params["task"])
    if role == "baseline":
        return rows.rows, _baseline_tensors(action, rows, made, labels, len(given))
    answers = Answers(action.inputs["baseline"], "tensors", given.origin, kept, len(whole))
    pairs = _pairs(answers, made)
    summary = likeness(rows, pairs)
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
    finite(f"the output {name} of sample {index}", made)
    return made


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


def _baseline_tensors(action: Action, rows: Rows, made: _Given, labels: NDArray[np.int64] | None, n: int) -> str:
    arrays: dict[str, NDArray[Any]] = {f"output/{name}": value for name, value in made.outputs.items()}
    if made.predicted is not None:
        arrays["predicted"] = made.predicted
    if labels is not None:
        arrays["labels"] = labels
    write(action.outputs["answers"], arrays, "tensors", rows.data, rows.runtime, list(made.outputs))
    if labels is None or made.predicted is None:
        return f"answers to {n:,} {'golden inputs' if rows.data.startswith('golden') else 'samples'}"
    right = made.predicted == labels
    rows.add("accuracy", float(right.mean()), "share of samples", right.size, _share(right), compared=False)
    return f"accuracy {100 * right.mean():.1f} % of {right.size:,}"


def _pairs(answers: Answers, made: _Given) -> list[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    expected = {key.removeprefix("output/") for key in answers.held if key.startswith("output/")}
    if expected != set(made.outputs):
        has, had = ", ".join(sorted(made.outputs)), ", ".join(sorted(expected))
        raise StepFailed(f"the candidate's outputs ({has}) are not the baseline's ({had})")
    return [(name, answers[f"output/{name}"], value) for name, value in made.outputs.items()]


def _add_flips(rows: Rows, answers: Answers, made: _Given, classes: bool, reason: str) -> int:
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
    return wider(bootstrap(found.sum(1, dtype=np.float64), np.full(len(found), found.shape[1], np.float64)), bounds)


def _classes(rows: Rows, answers: Answers, made: _Given, labels: NDArray[np.int64]) -> str:
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
            interval = wider(bootstrap(after.sum(1, dtype=np.float64), np.maximum(before.sum(1), 1e-300)), interval)
    why = f"the baseline is right in none of {n:,} samples: are these labels this model's?"
    rows.add("quality", kept, "ratio", n, interval, reason=why)
    flips = _add_flips(rows, answers, made, True, "")
    held = "no retention" if kept is None else f"retention {kept:.3f}{shown(interval, 3)}"
    accuracy = f"accuracy {100 * candidate / n:.1f} % of {n:,} (baseline {100 * baseline / n:.1f} %)"
    return f"{accuracy}, {held}, {flips:,} flip{'' if flips == 1 else 's'}"
