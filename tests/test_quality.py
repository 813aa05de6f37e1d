"""Formulas against published and hand-computed numbers, and the evaluate step on small real models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgebuild import answers, intervals, language, likeness, quality, samples
from edgebuild.backend import WINDOW, Backend
from edgebuild.backends import onnxruntime
from edgebuild.errors import StepFailed
from edgebuild.step import Action

# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    """R. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), table I, method 3."""
    assert intervals.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_tango_gives_the_published_interval() -> None:
    """Airway hyper-responsiveness (Bentur 2009): 1, 1, 7, 12 of 21; M. Fagerland et al., Statistical Analysis of Contingency Tables."""
    assert intervals.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_gives_what_r_gives() -> None:
    """PropCIs::scoreci.mp(25, 28, 618) at 90 %."""
    assert intervals.tango(28, 25, 618, 0.9) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


def test_tango_by_hand_where_no_pair_or_every_pair_is_discordant() -> None:
    """The constrained estimate is 0 and (1 - Δ)/2 there, so the score equations are nΔ/(1 - Δ) = z² and n(1 - Δ)/(1 + Δ) = z²."""
    z2 = 1.959963984540054**2
    assert intervals.tango(0, 0, 597) == pytest.approx((-z2 / (597 + z2), z2 / (597 + z2)))
    assert intervals.tango(50, 0, 50) == pytest.approx(((50 - z2) / (50 + z2), 1.0))


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 9), (3, 1, 40), (1, 3, 40), (0, 5, 30), (10, 10, 25)])
def test_tango_against_the_likelihood(gained: int, lost: int, n: int) -> None:
    """At each bound, the difference is z deviations from the estimate, with the deviation of the most likely model of that bound."""
    for bound in intervals.tango(gained, lost, n):
        least = max(0.0, -bound)
        shares = np.linspace(least + 1e-9, (1 - abs(bound)) / 2 + least - 1e-9, 400_001)  # of the lost
        likely = gained * np.log(shares + bound + 1e-300) + lost * np.log(shares + 1e-300)
        likely += (n - gained - lost) * np.log(np.maximum(1 - 2 * shares - bound, 1e-300))
        share = shares[likely.argmax()]
        deviation = math.sqrt(n * (2 * share + bound - bound**2))
        assert abs(gained - lost - n * bound) / deviation == pytest.approx(1.96, abs=2e-3)


def test_tango_is_symmetric() -> None:
    low, high = intervals.tango(7, 2, 90)
    assert intervals.tango(2, 7, 90) == pytest.approx((-high, -low))


def test_divergence_by_hand() -> None:
    """½ ln 2 + ½ ln ⅔, and ¼ ln ½ + ¾ ln 3/2 the other way round."""
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert likeness.divergence(p, q).tolist() == [pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))]
    assert likeness.divergence(q, p).tolist() == [pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))]
    assert likeness.divergence(p, p).tolist() == [0.0]


def test_divergence_survives_float16() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 3, (200, 5000))
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = likeness.divergence(exact.astype(np.float16), exact)
    assert found.mean() < 2e-6
    assert likeness.divergence(exact.astype(np.float16), exact.astype(np.float16)).max() == 0


def test_snr_by_hand() -> None:
    assert answers.snr(1 / 25) == pytest.approx(13.9794, abs=1e-4)
    assert answers.snr(0.0) == answers.snr(1e-30) == 150.0


def test_the_bootstrap_covers_what_it_says() -> None:
    """95 in 100 intervals of 16 units hold the mean; of those of the plain percentiles 92 do (3,000 trials)."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        values = generator.exponential(1.0, 16) * 0.5 + generator.normal(0, 0.5, 16)
        low, high = cast("tuple[float, float]", intervals.bootstrap(values, np.ones(16)))
        held += low <= 0.5 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_bootstrap_has_no_interval_of_one_unit() -> None:
    assert intervals.bootstrap(np.ones(1), np.ones(1)) is None


# --- models with named outputs ----------------------------------------------------------------------------------------


def linear(path: Path, weights: Any, *, batch: int | str = "N", extra: list[Any] | None = None) -> Path:
    """y = x · weights, or what `extra` nodes make of it."""
    rows, columns = weights.shape
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if not extra else "h"]), *(extra or [])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, columns] if not extra else None)],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.astype(np.float32).tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


class Case:
    """One baseline and one candidate, evaluated one after the other."""

    def __init__(self, folder: Path, backend: Any, task: str, data: Path | None) -> None:
        self.folder, self.backend, self.task = folder, cast("Backend", backend), task
        self.inputs = {"data": data} if data else {}
        self.summaries: list[str] = []

    def baseline(self, model: Path) -> dict[str, Any]:
        return self._run("baseline", {"model": model}, {"answers": self.folder / "answers.safetensors"})

    def candidate(self, model: Path) -> dict[str, Any]:
        return self._run("candidate", {"model": model, "baseline": self.folder / "answers.safetensors"}, {})

    def _run(self, role: str, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> dict[str, Any]:
        path = self.folder / f"{role}.json"
        params = {"task": self.task, "role": role}
        action = Action(
            verb="evaluate",
            backend="test",
            params=params,
            inputs={**inputs, **self.inputs},
            outputs={"measurements": path, **outputs},
        )
        self.summaries.append(quality.run(action, self.backend).summary)
        rows = json.loads(path.read_text())
        assert all((row["value"] is None) == ("reason" in row) for row in rows)
        return {(row["name"] if row["phase"] != "rounded" else "rounded " + row["name"]): row for row in rows}


DIAGONAL = np.eye(3) * 2


def labelled(path: Path, wrong: int = 0) -> Path:
    """30 samples of three classes that DIAGONAL tells apart, the first `wrong` of them labelled falsely."""
    labels = np.arange(30) % 3
    x = np.eye(3, dtype=np.float32)[labels]
    labels[:wrong] = (labels[:wrong] + 1) % 3
    np.savez(path, x=x, labels=labels)
    return path


def test_a_classifier_that_keeps_every_answer(tmp_path: Path) -> None:
    case = Case(tmp_path, onnxruntime, "image-classification", labelled(tmp_path / "eval.npz", wrong=3))
    baseline = case.baseline(linear(tmp_path / "a.onnx", DIAGONAL))
    assert baseline["accuracy"]["value"] == 0.9
    assert not baseline["accuracy"]["judged"]
    found = case.candidate(linear(tmp_path / "b.onnx", DIAGONAL * 0.9))
    z2 = 1.959963984540054**2
    assert found["quality"]["value"] == 1.0
    assert found["quality"]["interval"] == [pytest.approx(1 - z2 / (30 + z2) / 0.9), pytest.approx(1 + z2 / (30 + z2) / 0.9)]
    assert found["quality"]["n"] == 30
    assert found["quality"]["judged"]
    assert found["flip_rate"]["value"] == 0.0
    assert found["flip_rate"]["interval"] == [0.0, pytest.approx(z2 / (30 + z2))]
    assert found["cosine"]["value"] == pytest.approx(1.0)
    assert found["snr"]["value"] == pytest.approx(20.0, abs=1e-4)  # a tenth of the amplitude
    assert found["accuracy"]["runtime"].startswith("onnxruntime")
    assert case.summaries == [
        "accuracy 90.0 % of 30",
        "accuracy 90.0 % of 30 (baseline 90.0 %), retention 1.000 (0.874–1.126), 0 flips",
    ]


def test_a_classifier_that_loses_a_class(tmp_path: Path) -> None:
    case = Case(tmp_path, onnxruntime, "image-classification", labelled(tmp_path / "eval.npz"))
    case.baseline(linear(tmp_path / "a.onnx", DIAGONAL))
    found = case.candidate(linear(tmp_path / "b.onnx", np.diag([2.0, 2.0, 0.0]) + 1e-3 * np.eye(3, k=2).T))
    assert found["flip_rate"]["value"] == pytest.approx(1 / 3)
    assert found["accuracy"]["value"] == found["quality"]["value"] == pytest.approx(2 / 3)
    low, high = intervals.tango(0, 10, 30)
    assert found["quality"]["interval"] == [pytest.approx(1 + low), pytest.approx(1 + high)]


def test_the_same_model_is_alike_in_all(tmp_path: Path) -> None:
    case = Case(tmp_path, onnxruntime, "other", None)
    model = linear(tmp_path / "a.onnx", DIAGONAL, batch=1)
    assert case.baseline(model) == {}
    found = case.candidate(model)
    assert (found["cosine"]["value"], found["snr"]["value"]) == (pytest.approx(1.0), 150.0)
    assert found["cosine"]["data"] == "golden inputs, seed 20"
    assert found["cosine"]["n"] == 32
    assert found["quality"]["reason"] == "evaluate.data is not given, so there are no labels"


def test_answers_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = linear(tmp_path / "a.onnx", DIAGONAL)
    data = labelled(tmp_path / "eval.npz")
    made = set()
    for _ in range(3):
        Case(tmp_path, onnxruntime, "image-classification", data).baseline(model)
        made.add((tmp_path / "answers.safetensors").read_bytes() + (tmp_path / "baseline.json").read_bytes())
    assert len(made) == 1


def test_batches_and_single_samples_agree(tmp_path: Path) -> None:
    data = labelled(tmp_path / "eval.npz", wrong=1)
    found = []
    for batch in ("N", 1, 4):
        case = Case(tmp_path, onnxruntime, "image-classification", data)
        case.baseline(linear(tmp_path / "a.onnx", DIAGONAL, batch=batch))
        found.append(case.candidate(linear(tmp_path / "b.onnx", DIAGONAL * 1.5, batch=batch)))
    assert found[0] == found[1] == found[2]


def test_whole_number_outputs_are_classes(tmp_path: Path) -> None:
    extra = [helper.make_node("ArgMax", ["h"], ["y"], axis=1, keepdims=0)]
    model = linear(tmp_path / "a.onnx", DIAGONAL, extra=extra)
    loaded = onnx.load(model)
    loaded.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(loaded, model)
    case = Case(tmp_path, onnxruntime, "tabular-classification", labelled(tmp_path / "eval.npz", wrong=3))
    assert case.baseline(model)["accuracy"]["value"] == 0.9
    assert case.candidate(model)["quality"]["value"] == 1.0


def test_labels_that_no_baseline_answer_matches(tmp_path: Path) -> None:
    case = Case(tmp_path, onnxruntime, "image-classification", labelled(tmp_path / "eval.npz", wrong=30))
    model = linear(tmp_path / "a.onnx", DIAGONAL)
    case.baseline(model)
    found = case.candidate(model)
    assert found["quality"]["value"] is None
    assert "right in none of 30 samples" in found["quality"]["reason"]


def test_other_labels_than_the_models(tmp_path: Path) -> None:
    path = tmp_path / "eval.npz"
    x = np.zeros((4, 3), np.float32)
    model = linear(tmp_path / "a.onnx", DIAGONAL)
    for labels, expected in (
        (np.array([0, 1, 2, 3]), r"eval.npz: labels run from 0 to 3, but the model tells 3 classes apart: 0…2"),
        (np.array([0, -1, 2, 1]), r"labels run from -1 to 2"),
        (np.zeros((4, 3), int), r"labels are int64 \[4, 3\], but classes are whole numbers \[4\]; labels.argmax"),
        (np.zeros(4), r"labels are float64 \[4\], but classes are whole numbers"),
    ):
        np.savez(path, x=x, labels=labels)
        with pytest.raises(StepFailed, match=expected):
            Case(tmp_path, onnxruntime, "image-classification", path).baseline(model)


def test_labels_for_a_model_without_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=np.ones((4, 3), np.float32), labels=np.zeros(4, int))
    model = linear(tmp_path / "a.onnx", np.ones((3, 1)))
    with pytest.raises(StepFailed, match=r"first output y has the shape \[1\] for a sample, which is no row of class scores"):
        Case(tmp_path, onnxruntime, "image-classification", tmp_path / "eval.npz").baseline(model)


def test_regression_is_judged_by_its_outputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=np.ones((4, 3), np.float32), labels=np.zeros(4))
    case = Case(tmp_path, onnxruntime, "tabular-regression", tmp_path / "eval.npz")
    case.baseline(linear(tmp_path / "a.onnx", np.ones((3, 1))))
    found = case.candidate(linear(tmp_path / "b.onnx", np.ones((3, 1)) * 1.01))
    assert found["snr"]["value"] == pytest.approx(40.0, abs=1e-3)
    assert found["quality"]["reason"] == "evaluate.data holds no labels of classes"


def test_outputs_that_are_not_finite(tmp_path: Path) -> None:
    model = linear(tmp_path / "a.onnx", DIAGONAL, extra=[helper.make_node("Log", ["h"], ["y"])])
    with pytest.raises(StepFailed, match=r"the output y of sample 0: 2 of 3 values are not finite"):
        Case(tmp_path, onnxruntime, "other", labelled(tmp_path / "eval.npz")).baseline(model)


def test_outputs_of_other_shapes(tmp_path: Path) -> None:
    case = Case(tmp_path, onnxruntime, "other", None)
    case.baseline(linear(tmp_path / "a.onnx", DIAGONAL))
    with pytest.raises(StepFailed, match=r"the output y has the shape \[1, 2\] for a sample, but \[1, 3\] in the baseline"):
        case.candidate(linear(tmp_path / "b.onnx", DIAGONAL[:, :2]))
    positive = [helper.make_node("NonZero", ["h"], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT)]
    np.savez(tmp_path / "e.npz", x=np.array([[1, 0, 0], [1, 1, 0]], np.float32))
    model = linear(tmp_path / "c.onnx", DIAGONAL, extra=positive)
    with pytest.raises(StepFailed, match=r"the output y has the shape .* for one sample and .* for another"):
        Case(tmp_path, onnxruntime, "other", tmp_path / "e.npz").baseline(model)


def test_answers_to_other_data(tmp_path: Path) -> None:
    model = linear(tmp_path / "a.onnx", DIAGONAL)
    Case(tmp_path, onnxruntime, "other", None).baseline(model)
    with pytest.raises(StepFailed, match="the baseline answered other data"):
        Case(tmp_path, onnxruntime, "other", labelled(tmp_path / "eval.npz")).candidate(model)
    (tmp_path / "answers.safetensors").write_bytes(b"nothing")
    with pytest.raises(StepFailed, match="the baseline's answers cannot be read"):
        Case(tmp_path, onnxruntime, "other", None).candidate(model)


# --- language models --------------------------------------------------------------------------------------------------


class Bigram:
    """A language model of 128 letters: the logits of the next one are a row of a table."""

    inputs: tuple[Any, ...] = ()

    def __init__(self, model: Path, view: str = "") -> None:
        table = np.load(model)
        self.runtime = f"bigram, {view}"
        self._table = table.round(1) if view == "rounded" else table

    def infer(self, feeds: Any) -> Any:
        raise StepFailed("a language model")

    def logits(self, tokens: Any) -> Any:
        return self._table[tokens].astype(np.float32)

    def tokens(self, text: str) -> Any:
        return np.array([ord(letter) % 128 for letter in text], dtype=np.int32)

    def close(self) -> None: ...


def table(path: Path, noise: float = 0.0) -> Any:
    generator = np.random.default_rng(5)
    found = generator.normal(0, 2, (128, 128)) + noise * generator.normal(0, 1, (128, 128))
    np.save(path, found.astype(np.float32))
    return found.astype(np.float32).astype(float)


def log_probabilities(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


TEXT = "".join(chr(32 + (i * i + i // 7) % 90) for i in range(256 * 12 + 5))
ONE_VIEW = SimpleNamespace(VIEWS={"native": ""}, open=Bigram)
TWO_VIEWS = SimpleNamespace(VIEWS={"exact": "", "rounded": ""}, open=Bigram)


def test_language_models_against_formulas_written_out(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text(TEXT)
    before, after = log_probabilities(table(tmp_path / "a.npy")), log_probabilities(table(tmp_path / "b.npy", 0.3))
    case = Case(tmp_path, ONE_VIEW, "text-generation", tmp_path / "eval.txt")
    baseline = case.baseline(tmp_path / "a.npy")
    found = case.candidate(tmp_path / "b.npy")
    tokens = np.array([ord(letter) for letter in TEXT])[: 256 * 12].reshape(12, 256)
    seen, following = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    kl = (np.exp(before[seen]) * (before[seen] - after[seen])).sum(-1)
    assert found["kl_mean"]["value"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["same_top"]["value"] == (before[seen].argmax(-1) == after[seen].argmax(-1)).mean()
    ratio = math.exp(before[seen, following].mean() - after[seen, following].mean())
    assert found["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-5)
    assert baseline["perplexity"]["value"] == pytest.approx(math.exp(-before[seen, following].mean()), rel=1e-5)
    for name in ("kl_mean", "same_top", "perplexity_ratio"):
        row = found[name]
        assert row["interval"][0] < row["value"] < row["interval"][1]
        assert row["n"] == 12 * 255
        assert row["judged"]
        assert row["phase"] == "inference"
        assert row["data"] == baseline["perplexity"]["data"]
    assert not found["perplexity"]["judged"]
    assert case.summaries[0].endswith(", 3,060 tokens")
    assert case.summaries[1].startswith(f"KL {kl.mean():.4f} (")


@pytest.mark.parametrize(("work", "scored"), [(language.SECOND_VIEW_WORK, 510), (300, 255)])  # of a model of some bytes
def test_a_second_view_is_shown_and_not_judged(work: float, scored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SECOND_VIEW_WORK", work)
    (tmp_path / "eval.txt").write_text(TEXT)
    table(tmp_path / "a.npy")
    case = Case(tmp_path, TWO_VIEWS, "text-generation", tmp_path / "eval.txt")
    case.baseline(tmp_path / "a.npy")
    found = case.candidate(tmp_path / "a.npy")
    assert found["kl_mean"]["value"] < 1e-6
    assert found["kl_mean"]["phase"] == "exact"
    assert found["same_top"]["interval"] == [pytest.approx(intervals.wilson(3060, 3060)[0]), 1.0]
    for name in ("kl_mean", "same_top", "perplexity_ratio", "kl_views"):
        row = found[f"rounded {name}"]
        assert row["n"] == scored
        assert not row["judged"]
        assert row["interval"][0] < row["interval"][1]
    assert found["rounded kl_views"]["value"] == pytest.approx(found["rounded kl_mean"]["value"], rel=0.02)
    assert found["rounded kl_views"]["value"] > 1e-4
    assert found["rounded kl_views"]["baseline"] == "the same artifact, exact"


def test_a_model_that_is_too_large_for_its_second_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SECOND_VIEW_WORK", 100)
    (tmp_path / "eval.txt").write_text(TEXT)
    table(tmp_path / "a.npy")
    case = Case(tmp_path, TWO_VIEWS, "text-generation", tmp_path / "eval.txt")
    case.baseline(tmp_path / "a.npy")
    row = case.candidate(tmp_path / "a.npy")["rounded kl_views"]
    assert row["value"] is None
    assert row["reason"].startswith("not measured: these kernels would take longer than a minute for 256 tokens")


def test_language_models_without_a_text(tmp_path: Path) -> None:
    table(tmp_path / "a.npy")
    table(tmp_path / "b.npy", 0.1)
    case = Case(tmp_path, ONE_VIEW, "text-generation", None)
    assert case.baseline(tmp_path / "a.npy") == {}
    found = case.candidate(tmp_path / "b.npy")
    assert found["cosine"]["n"] == 64
    assert found["snr"]["value"] == pytest.approx(20 * math.log10(2 / 0.1), abs=1)
    assert found["kl_mean"]["value"] is None
    assert found["kl_mean"]["reason"] == "evaluate.data names no text to measure it on"


def test_language_models_that_are_no_one_model(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text(TEXT)
    table(tmp_path / "a.npy")
    np.save(tmp_path / "wide.npy", np.zeros((128, 130), np.float32))
    np.save(tmp_path / "nan.npy", np.full((128, 128), np.nan, np.float32))
    case = Case(tmp_path, ONE_VIEW, "text-generation", tmp_path / "eval.txt")
    case.baseline(tmp_path / "a.npy")
    with pytest.raises(StepFailed, match="the candidate has a vocabulary of 130 tokens, the baseline one of 128"):
        case.candidate(tmp_path / "wide.npy")
    with pytest.raises(StepFailed, match=r"logits: 32,768 of 32,768 values are not finite"):
        case.candidate(tmp_path / "nan.npy")


def test_a_language_model_wants_text(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=np.zeros(1))
    table(tmp_path / "a.npy")
    with pytest.raises(StepFailed, match=r"eval\.npz: a language model takes UTF-8 text, and this is an archive"):
        Case(tmp_path, ONE_VIEW, "text-generation", tmp_path / "eval.npz").baseline(tmp_path / "a.npy")
    (tmp_path / "eval.txt").write_text(TEXT)
    with pytest.raises(StepFailed, match=r"eval\.txt: is no \.npz file"):
        Case(tmp_path, onnxruntime, "other", tmp_path / "eval.txt").baseline(linear(tmp_path / "a.onnx", DIAGONAL))


def test_the_limit_on_text_is_kept_by_the_second_view() -> None:
    assert language.SECOND_VIEW_TOKENS <= 1000
    assert language.SECOND_VIEW_TOKENS // WINDOW == samples.MIN_WINDOWS
