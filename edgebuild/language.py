"""Language models in the `evaluate` step: on text, window by window, or on made-up tokens where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebuild import digest, samples
from edgebuild.answers import MAX_ANSWERS, Answers, Rows, finite, likeness, opened, shown, write
from edgebuild.backend import Backend, Session
from edgebuild.errors import StepFailed
from edgebuild.intervals import bootstrap, wider, wilson
from edgebuild.likeness import divergence
from edgebuild.step import Action

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECOND_VIEW_TOKENS = 512
SECOND_VIEW_WORK = 25e9  # bytes of model times tokens: a minute of MLX's int4 kernels on a Linux CPU
FEW_WINDOWS = 8  # with fewer, the bootstrap draws blocks of about 32 tokens: two windows have three distinct resamples
NO_TEXT = "evaluate.data names no text to measure it on"


@dataclass(frozen=True, kw_only=True)
class _Distance:
    """Per scored token, all [windows, tokens]: KL(baseline‖candidate) in nats, same top token, both negative log-likelihoods."""

    kl: NDArray[np.float64]
    same: NDArray[np.float64]
    nll: NDArray[np.float64]
    baseline_nll: NDArray[np.float64]
    first: NDArray[np.float16]  # the candidate's log-probabilities in the first windows, for a second view of it


def on_text(action: Action, backend: Backend, views: list[str], data: Path) -> tuple[list[dict[str, Any]], str]:
    origin = digest.of_file(str(data))
    role = action.params["role"]
    with opened(action, backend, views[0]) as session:
        windows = samples.windows(data, session)
        part = action.params.get("part", "")
        rows = Rows(phase=_phase(views, views[0]), of=role, data=origin, runtime=session.runtime, part=part)
        if role == "baseline":
            summary = _baseline_text(action, session, windows, rows)
            return rows.rows, summary
        kept = samples.part(part, len(windows), samples.FOURTH)
        answers = Answers(action.inputs["baseline"], "text", origin, kept, len(windows))
        windows = windows if kept is None else windows[kept]
        if not np.array_equal(answers["windows"], windows):
            raise StepFailed("the candidate's tokenizer makes other tokens of the evaluation text than the baseline's")
        distance = _distance(session, windows, answers)
    summary = _text_rows(rows, distance)
    if len(views) > 1 and part != "choosing":
        rows.rows += _second_view(action, backend, views, windows, answers, distance, origin)
    return rows.rows, summary


def _baseline_text(action: Action, session: Session, windows: NDArray[np.int32], rows: Rows) -> str:
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
    write(action.outputs["answers"], arrays, "text", rows.data, session.runtime)
    _add_perplexity(rows, nll.astype(np.float64))
    return f"perplexity {rows.rows[-1]['value']:.4g}, {nll.size:,} tokens"


def _logprobs(session: Session, window: NDArray[np.int32]) -> NDArray[np.float32]:
    """log-probabilities [T, V] of the next token. Raises StepFailed."""
    logits = np.asarray(session.logits(window), dtype=np.float32)
    if logits.ndim != 2 or len(logits) != len(window):
        raise StepFailed(f"the model gives logits of shape {list(logits.shape)} for {len(window)} tokens")
    finite("logits", logits)
    shifted = logits - logits.max(-1, keepdims=True)
    total: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return total


def _distance(session: Session, windows: NDArray[np.int32], answers: Answers) -> _Distance:
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


def _text_rows(rows: Rows, distance: _Distance) -> str:
    n = distance.kl.size
    kl, same = float(distance.kl.mean()), float(distance.same.mean())
    ratio = math.exp(distance.nll.mean() - distance.baseline_nll.mean())
    interval = bootstrap(*_units(distance.kl))
    rows.add("kl_mean", kl, "nats/token", n, interval)
    # Tokens are not independent, so windows are drawn.
    bounds = wider(bootstrap(*_units(distance.same)), wilson(int(distance.same.sum()), n))
    rows.add("same_top", same, "share of tokens", n, bounds)
    change = bootstrap(*_units(distance.nll - distance.baseline_nll))
    rows.add("perplexity_ratio", ratio, "ratio", n, change and (math.exp(change[0]), math.exp(change[1])))
    judged, rows.judged = rows.judged, False
    _add_perplexity(rows, distance.nll)
    rows.judged = judged
    return f"KL {kl:.4f}{shown(interval, 4)}, same top {same:.1%}, perplexity ×{ratio:.3f}, {n:,} tokens".replace("%,", " %,")


def _add_perplexity(rows: Rows, nll: NDArray[np.float64]) -> None:
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
    answers: Answers,
    first: _Distance,
    origin: str,
) -> list[dict[str, Any]]:
    """The same artifact on the first windows as its second view runs it; shown beside the view that is judged."""
    size = sum(path.stat().st_size for path in action.inputs["model"].rglob("*"))
    few = windows[: min(SECOND_VIEW_TOKENS, int(SECOND_VIEW_WORK / max(size, 1))) // windows.shape[1]]
    if not len(few):
        rows = Rows(phase=views[1], of="candidate", data=origin, runtime="", judged=False)
        reason = f"not measured: these kernels would take longer than a minute for {windows.shape[1]} tokens on this processor"
        rows.add("kl_views", None, "nats/token", 0, None, reason=reason)
        return rows.rows
    with opened(action, backend, views[1]) as session:
        rows = Rows(phase=views[1], of="candidate", data=origin, runtime=session.runtime, judged=False)
        distance = _distance(session, few, answers)
    _text_rows(rows, distance)
    between = divergence(first.first[: len(distance.first)], distance.first).reshape(distance.kl.shape)
    rows.add("kl_views", float(between.mean()), "nats/token", between.size, bootstrap(*_units(between)))
    rows.rows[-1]["baseline"] = f"the same artifact, {views[0]}"
    return rows.rows


def on_golden_tokens(action: Action, backend: Backend, views: list[str]) -> tuple[list[dict[str, Any]], str]:
    role = action.params["role"]
    with opened(action, backend, views[0]) as session:
        tokens = samples.golden_tokens(session)
        logits = np.asarray(session.logits(tokens), dtype=np.float32)
        finite("logits", logits)
        origin, part = f"golden text, {len(tokens)} tokens", action.params.get("part", "")
        rows = Rows(phase=_phase(views, views[0]), of=role, data=origin, runtime=session.runtime, part=part)
    if role == "baseline":
        arrays = {"tokens": tokens, "output/logits": logits}
        write(action.outputs["answers"], arrays, "golden text", rows.data, rows.runtime)
        return [], f"answers to {len(tokens)} golden tokens"
    kept = samples.part(part, len(tokens), samples.THIRD)
    answers = Answers(action.inputs["baseline"], "golden text", rows.data, kept, len(tokens))
    if kept is not None:
        tokens, logits = tokens[kept], logits[kept]
    if not np.array_equal(answers["tokens"], tokens):
        raise StepFailed("the candidate's tokenizer makes other tokens of a plain text than the baseline's")
    summary = likeness(rows, [("logits", answers["output/logits"], logits)])
    for name in ("kl_mean", "same_top", "perplexity_ratio"):
        rows.add(name, None, "", 0, None, reason=NO_TEXT)
    return rows.rows, f"{summary}, {len(tokens)} golden tokens"


def _phase(views: Sequence[str], view: str) -> str:
    return view if len(views) > 1 else "inference"
