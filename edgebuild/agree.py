"""The `agree` step: what every artifact of one model answered to the same inputs, held against each other's; and its table.

Answers were written by each artifact's own runtime, in its own toolchain, so that runtimes that cannot share an environment are
compared too. numpy is imported where a worker compares, not where a table is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 256  # of a language model's answers, looked at at once
SUMS = 1e-3  # how far from 1 a row of probabilities may sum
TEXTS = ("text", "golden text")
METRICS = ("same_top", "cosine", "max_abs", "kl")


def run(action: Action) -> Outcome:
    """Inputs `answers/ROW` → output `matrix`, as schemas/agree.json says."""
    rows = [dict(row) for row in action.params["rows"]]
    answers = {row["name"]: _Answers(action.inputs[f"answers/{row['name']}"]) for row in rows}
    for row in rows:
        row["runtime"] = answers[row["name"]].about["runtime"]
        row["data"] = answers[row["name"]].about["data"]
    pairs = [
        {
            "row": one["name"],
            "column": other["name"],
            **_pair(answers[one["name"]], answers[other["name"]], action.params["task"]),
        }
        for one in rows
        for other in rows
        if one is not other
    ]
    found = {"model": action.params["model"], "source": action.params["source"], "artifacts": rows, "pairs": pairs}
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    action.outputs["matrix"].write_text(text + "\n", encoding="utf-8")
    return Outcome(summary=_summary(found))


def show(found: Mapping[str, Any]) -> str:
    """The matrix for people: a table a metric, rows against columns."""
    names = [row["name"] for row in found["artifacts"]]
    pairs = {(pair["row"], pair["column"]): pair for pair in found["pairs"]}
    wide = max(12, *(len(name) for name in names)) + 2
    lines = [f"{found['model']}: {len(names)} artifacts on the same inputs ({_data(found)})"]
    for metric, title in zip(METRICS, _titles(found), strict=True):
        if all(pair[metric] is None for pair in found["pairs"]):
            continue
        lines += ["", f"{title:<{wide}}" + "".join(f"{name:>{wide}}" for name in names)]
        for row in names:
            cells = ("" if row == column else _cell(pairs[row, column], metric) for column in names)
            lines.append((f"{row:<{wide}}" + "".join(f"{cell:>{wide}}" for cell in cells)).rstrip())
    reasons = {f"{pair['row']} and {pair['column']}: {pair['reason']}" for pair in found["pairs"] if pair["reason"]}
    return "\n".join([*lines, *([""] if reasons else []), *sorted(reasons)])


def _titles(found: Mapping[str, Any]) -> tuple[str, ...]:
    what = "log-probabilities" if any(pair["of"] == "log-probabilities" for pair in found["pairs"]) else "outputs"
    return "same top", f"cosine of {what}", f"max abs of {what}", "KL(row‖column)"


def _cell(pair: Mapping[str, Any], metric: str) -> str:
    value = pair[metric]
    if value is None:
        return "–"
    return f"{value:.2%}".replace("%", " %") if metric == "same_top" else f"{value:.6f}" if metric == "cosine" else f"{value:.3g}"


def _data(found: Mapping[str, Any]) -> str:
    counts = {f"{pair['n']:,} {pair['unit']}" for pair in found["pairs"] if pair["n"]}
    return " or ".join(sorted(counts)) or "none that two of them answer"


def _summary(found: Mapping[str, Any]) -> str:
    compared = [pair for pair in found["pairs"] if not pair["reason"]]
    shown = f"{len(found['artifacts'])} artifacts"
    for metric, least, words in (("same_top", True, "same top"), ("cosine", True, "cosine"), ("kl", False, "KL")):
        values = [pair[metric] for pair in compared if pair[metric] is not None]
        if values:
            worst = min(values) if least else max(values)
            text = f"{worst:.1%}".replace("%", " %") if metric == "same_top" else f"{worst:.4g}"
            shown += f", {words} {'at least' if least else 'at most'} {text}"
    return shown + (
        f", {len(found['pairs']) - len(compared)} pairs cannot be compared" if len(compared) < len(found["pairs"]) else ""
    )


class _Answers:
    """What one artifact answered, read as it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = cast("Any", safe_open(path, framework="numpy"))
            self.about: dict[str, Any] = json.loads((self._file.metadata() or {})["about"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StepFailed(f"{path.parent.name}: its answers cannot be read ({error}); run it again") from error
        self.held = frozenset(str(key) for key in self._file.keys())  # noqa: SIM118 - safe_open is no mapping

    def get(self, key: str) -> NDArray[Any]:
        found: NDArray[Any] = self._file.get_tensor(key)
        return found

    def shape(self, key: str) -> list[int]:
        return list(self._file.get_slice(key).get_shape())

    def part(self, key: str, begin: int, end: int) -> NDArray[Any]:
        found: NDArray[Any] = self._file.get_slice(key)[begin:end]
        return found

    @property
    def outputs(self) -> list[str]:
        """In the model's own order; of a classifier the first one is its scores."""
        return [str(name) for name in self.about.get("outputs", ())]


def _pair(one: _Answers, other: _Answers, task: str) -> dict[str, Any]:
    """One row held against one column; where that cannot be, why."""
    if one.about["kind"] != other.about["kind"] or one.about["data"] != other.about["data"]:
        return _nothing("they answered other inputs")
    if one.about["kind"] in TEXTS:
        return _texts(one, other)
    return _tensors(one, other, task)


def _nothing(reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(METRICS), "n": 0, "unit": "", "of": "", "reason": reason}


def _texts(one: _Answers, other: _Answers) -> dict[str, Any]:
    """Language models: log-probabilities of the next token, behind each token of the same text."""
    import numpy as np

    from edgebuild.likeness import cosines, divergence

    asked, key = ("windows", "logprobs") if one.about["kind"] == "text" else ("tokens", "output/logits")
    if not np.array_equal(one.get(asked), other.get(asked)):
        return _nothing("their tokenizers make other tokens of the same text")
    shape = one.shape(key)
    if shape != other.shape(key):
        return _nothing(f"vocabularies of {shape[1]:,} and {other.shape(key)[1]:,} tokens")
    same, kl, largest, cosine = 0, 0.0, 0.0, 0.0
    for begin in range(0, shape[0], ROWS):
        a, b = (_logprobs(answers.part(key, begin, min(begin + ROWS, shape[0]))) for answers in (one, other))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        kl += float(divergence(a, b).sum())
        largest = max(largest, float(np.abs(a - b).max()))
        cosine += float(cosines(*_products(a, b)).sum())
    return {
        "same_top": _short(same / shape[0]),
        "cosine": _short(cosine / shape[0]),
        "max_abs": _short(largest),
        "kl": _short(kl / shape[0]),
        "n": shape[0],
        "unit": "tokens",
        "of": "log-probabilities",
        "reason": "",
    }


def _logprobs(found: NDArray[Any]) -> NDArray[np.float64]:
    """Of logits, or of log-probabilities, which the same makes sum to 1 again where they were rounded."""
    from edgebuild.likeness import log_softmax

    return log_softmax(found)


def _tensors(one: _Answers, other: _Answers, task: str) -> dict[str, Any]:
    """Models with named inputs and outputs: all outputs of a sample taken together; classes by the first of them."""
    import numpy as np

    from edgebuild.likeness import cosines

    named = list(_named(one, other))
    if not named:
        return _nothing(f"their outputs have other names ({', '.join(one.outputs)}; {', '.join(other.outputs)})")
    n = len(one.get(f"output/{named[0][0]}"))
    largest, products = 0.0, np.zeros((3, n))
    for mine, theirs in named:
        a, b = one.get(f"output/{mine}"), other.get(f"output/{theirs}")
        if a.shape != b.shape:
            return _nothing(f"the output {mine} has the shapes {list(a.shape[1:])} and {list(b.shape[1:])} for a sample")
        largest = max(largest, float(np.abs(a.astype(np.float64) - b).max(initial=0.0)))
        products += _products(a.reshape(n, -1), b.reshape(n, -1))
    same, kl = None, None
    if task.endswith("-classification") and {"predicted"} <= one.held & other.held:
        same = float((one.get("predicted") == other.get("predicted")).mean())
        kl = _classes(one.get(f"output/{named[0][0]}"), other.get(f"output/{named[0][1]}"))
    return {
        "same_top": None if same is None else _short(same),
        "cosine": _short(float(cosines(*products).mean())),
        "max_abs": _short(largest),
        "kl": None if kl is None else _short(kl),
        "n": n,
        "unit": "samples",
        "of": "outputs",
        "reason": "",
    }


def _named(one: _Answers, other: _Answers) -> Iterator[tuple[str, str]]:
    """Outputs that answer to one another: by name, or where each has one alone."""
    if set(one.outputs) == set(other.outputs):
        yield from ((name, name) for name in one.outputs)
    elif len(one.outputs) == len(other.outputs) == 1:
        yield one.outputs[0], other.outputs[0]


def _classes(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """The mean KL divergence of class probabilities: rows that sum to 1 as they are, others by a softmax; None where they are neither."""
    import numpy as np

    from edgebuild.likeness import divergence, log_softmax

    if a.ndim < 2 or a.shape[-1] < 2:
        return None
    rows = [found.reshape(-1, found.shape[-1]).astype(np.float64) for found in (a, b)]
    if all((found >= 0).all() and (np.abs(found.sum(-1) - 1) < SUMS).all() for found in rows):
        rows = [np.log(np.maximum(found, 1e-12)) for found in rows]
    first, second = map(log_softmax, rows)
    return float(divergence(first, second).mean())


def _products(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """a·b, a·a and b·b of each row."""
    import numpy as np

    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])


def _short(value: float) -> float:
    """Six digits: what lies behind them differs from one processor to another."""
    return float(f"{value:.6g}")
