"""Golden examples: small, exact to read, and a wrong answer is told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import golden
from edgebuild.errors import StepFailed
from tests.bundles.packing import Counting, Doubling, Stub


def make(session: Any) -> dict[str, Any]:
    return golden.make(Stub(session), Path("/"))


def hold(example: dict[str, Any], session: Any) -> str:
    return golden.hold(json.loads(golden.dumps(example)), Stub(session), Path("/"))


class Shaped(Doubling):
    def __init__(self, dtype: str, shape: list[Any], answer: Any = None) -> None:
        self.inputs = [{"name": "x", "dtype": dtype, "shape": shape}]
        self._answer = answer

    def infer(self, feeds: Any) -> Any:
        return {"y": feeds["x"] if self._answer is None else self._answer}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "int8", "bool"])
def test_arrays_of_every_type_read_back(dtype: str) -> None:
    example = make(Shaped(dtype, ["N", 3]))
    assert [one["dtype"] for one in example["inputs"]] == [dtype]
    assert example["inputs"][0]["shape"] == [1, 3]
    assert hold(example, Shaped(dtype, ["N", 3])) == "doubling 1"


def test_floats_are_short_and_exact() -> None:
    example = make(Doubling())
    assert all(len(str(value)) <= 5 for value in example["inputs"][0]["data"])
    values = np.array([0.1, -3.4e38, 1e-45, 16777217, 0.30000001192092896], np.float32)
    written = golden._array("y", values, 1)["data"]
    assert np.array_equal(np.array(json.loads(json.dumps(written)), np.float32), values)
    assert written[0] == 0.1


def test_large_outputs_are_sampled() -> None:
    example = make(Shaped("float32", ["N", 10_000]))
    kept = example["outputs"][0]
    assert kept["stride"] == 3
    assert len(kept["data"]) == 3334
    assert len(golden.dumps(example)) < 200_000
    hold(example, Shaped("float32", ["N", 10_000]))


def test_a_difference_beyond_the_tolerance_is_told() -> None:
    example = make(Doubling())
    hold(example, Doubling())

    class Off(Doubling):
        factor = 1.0

        def infer(self, feeds: Any) -> Any:
            return {"y": 2 * feeds["x"] * self.factor}

    almost, off = Off(), Off()
    almost.factor, off.factor = 1.0005, 1.01
    hold(example, almost)
    with pytest.raises(StepFailed, match="misses its golden output y, by"):
        hold(example, off)
    off.factor = float("nan")
    with pytest.raises(StepFailed, match="misses its golden output y"):
        hold(example, off)
    with pytest.raises(StepFailed, match=r"has no output y of shape \[1, 4\]"):
        hold(example, Shaped("float32", ["N", 4], np.zeros((1, 5))))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_artifact_that_gives_no_numbers(value: float) -> None:
    with pytest.raises(StepFailed, match="not finite for a plain input: the artifact is not usable"):
        make(Shaped("float32", ["N", 4], np.array([[value]])))


def test_outputs_that_cannot_be_held() -> None:
    with pytest.raises(StepFailed, match="y is object, which a golden example cannot hold"):
        make(Shaped("float32", ["N", 4], np.array([["text"]], dtype=object)))
    with pytest.raises(StepFailed, match="x has 3,000,000 elements, too many"):
        make(Shaped("float32", [1, 3_000_000]))


def test_tokens() -> None:
    example = make(Counting())
    assert example["prompt"] == list(range(golden.PROMPT))
    assert example["continuation"] == list(range(24, 32))
    assert example["certain"] == golden.CONTINUATION
    assert example["top"][0] == {"token": 24, "logit": 8.0}
    assert hold(example, Counting()) == "counting 1"
    skipping = Counting()
    skipping.step = 2
    with pytest.raises(StepFailed, match="misses its golden logits"):
        hold(example, skipping)
    example["continuation"][5] = 0
    with pytest.raises(StepFailed, match="with token 29 at step 6, not 0"):
        hold(example, Counting())


def test_near_ties_are_not_certain() -> None:
    class Unsure(Counting):
        """From token 26 on a second choice is as good."""

        def logits(self, tokens: Any) -> Any:
            logits = super().logits(tokens)
            unsure = tokens >= 26
            logits[unsure, 60] = 7.9
            return logits

    example = make(Unsure())
    assert example["certain"] == 3
    assert len(example["continuation"]) == 8
    example["continuation"][3:] = [0, 0, 0, 0, 0]
    assert hold(example, Unsure()) == "counting 1"


def test_the_kernels_have_the_last_word() -> None:
    """The first view drafts; where the last one says otherwise, the continuation ends with what that one says."""

    class Kernels(Counting):
        def logits(self, tokens: Any) -> Any:
            logits = super().logits(tokens)
            logits[tokens == 27] = 0
            logits[tokens == 27, 50] = 8
            return logits

    class Two(Stub):
        VIEWS: Mapping[str, str] = {"draft": "", "kernels": ""}

        def open(self, model: Path, view: str = "") -> Any:
            return Kernels() if view == "kernels" else Counting()

    example = golden.make(Two(Counting()), Path("/"))
    assert example["continuation"] == [24, 25, 26, 27, 50]
    assert example["certain"] == 5
    golden.hold(example, Two(Counting()), Path("/"))


def test_golden_json_is_json_with_a_line_for_each_array() -> None:
    example = make(Doubling())
    text = golden.dumps(example)
    assert json.loads(text) == example
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) < 200
