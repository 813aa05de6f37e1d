"""Verdicts: what an interval decides, what it does not, what is said of it, and what stops a build."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebuild import gates
from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome

AGAINST = "the unquantized model in the same runtime"


def measured(name: str, value: float | None, interval: list[float] | None = None, **others: Any) -> dict[str, Any]:
    exact = interval is None
    row = {"name": name, "value": value, "interval": interval, "unit": "ratio", "n": 1 if exact else 4080, "judged": True}
    return {**row, "confidence": None if exact else 0.95, "baseline": AGAINST, "phase": "inference", **others}


def limit(**others: Any) -> dict[str, Any]:
    return {"min": None, "max": None, "required": False, "waive": None, **others}


def run(folder: Path, limits: dict[str, Any], rows: list[dict[str, Any]], strict: bool = False) -> tuple[list[Any], Outcome]:
    inputs = {}
    for index, part in enumerate((rows[:1], rows[1:])):
        inputs[f"measurements/{index}"] = folder / f"{index}.json"
        inputs[f"measurements/{index}"].write_text(json.dumps(part))
    output = folder / "verdicts.json"
    action = Action(
        verb="gate", backend="", params={"gates": limits, "strict": strict}, inputs=inputs, outputs={"verdicts": output}
    )
    outcome = gates.run(action)
    return json.loads(output.read_text()), outcome


def test_everything_holds(tmp_path: Path) -> None:
    limits = {"same_top": limit(min=0.88), "kl_mean": limit(max=0.05), "weights_ratio": limit(max=0.35)}
    rows = [
        measured("kl_mean", 0.0065, [0.0061, 0.007]),
        measured("same_top", 0.921, [0.915, 0.927]),
        measured("weights_ratio", 0.3),
    ]
    verdicts, outcome = run(tmp_path, limits, rows)
    assert outcome.refused == ""
    assert outcome.summary == (
        "kl_mean PASS 0.0065 (0.0061–0.007) ≤ 0.05, same_top PASS 0.921 (0.915–0.927) ≥ 0.88, weights_ratio PASS 0.3 ≤ 0.35"
    )
    assert verdicts[0] == {
        "name": "kl_mean",
        "verdict": "PASS",
        "value": 0.0065,
        "limit": "max 0.05",
        "baseline": AGAINST,
        "reason": "0.0065 (0.0061–0.007) ≤ 0.05",
        "waived": None,
        "interval": [0.0061, 0.007],
        "n": 4080,
        "unit": "ratio",
        "required": False,
    }


def test_a_failing_gate_stops_the_build(tmp_path: Path) -> None:
    verdicts, outcome = run(tmp_path, {"kl_mean": limit(max=0.05)}, [measured("kl_mean", 0.083, [0.079, 0.088])])
    assert verdicts[0]["verdict"] == "FAIL"
    assert outcome.refused == f"gate kl_mean FAIL: 0.083 (0.079–0.088) > max 0.05 against {AGAINST}; nothing was packed"


def test_two_failing_gates_are_both_told(tmp_path: Path) -> None:
    rows = [measured("cosine", 0.5, [0.4, 0.6]), measured("weights_ratio", 0.9)]
    _, outcome = run(tmp_path, {"cosine": limit(min=0.99), "weights_ratio": limit(max=0.35)}, rows)
    assert outcome.refused.count(" FAIL: ") == 2
    assert outcome.refused.endswith("; nothing was packed")


def test_an_interval_that_holds_the_limit_decides_nothing(tmp_path: Path) -> None:
    rows = [measured("same_top", 0.885, [0.87, 0.89])]
    verdicts, outcome = run(tmp_path, {"same_top": limit(min=0.88)}, rows)
    assert verdicts[0]["verdict"] == "INCONCLUSIVE"
    assert verdicts[0]["reason"] == "the interval 0.87–0.89 holds the limit 0.88: more data would decide"
    assert outcome.refused == ""
    for limits, strict, why in (
        (limit(min=0.88), True, "the run is strict"),
        (limit(min=0.88, required=True), False, "it is required"),
    ):
        _, outcome = run(tmp_path, {"same_top": limits}, rows, strict)
        assert outcome.refused == (
            f"gate same_top INCONCLUSIVE, and {why}: the interval 0.87–0.89 holds the limit 0.88: more data would decide; "
            "nothing was packed"
        )


@pytest.mark.parametrize("strict", [False, True])
def test_a_waived_gate_keeps_its_verdict(strict: bool, tmp_path: Path) -> None:
    waive = {"reason": "known, see 12", "until": "2027-01-31"}
    limits = {"kl_mean": limit(max=0.05, waive=waive, required=True), "quality": limit(min=0.98, waive=waive)}
    verdicts, outcome = run(tmp_path, limits, [measured("kl_mean", 0.083, [0.079, 0.088])], strict)
    assert [verdict["verdict"] for verdict in verdicts] == ["FAIL", "INCONCLUSIVE"]
    assert verdicts[0]["waived"] == waive
    assert outcome.summary.startswith("kl_mean FAIL, waived 0.083")
    assert outcome.refused == ""


def test_what_was_not_measured(tmp_path: Path) -> None:
    why = "not measured on the target: a phone"
    rows = [measured("latency_ratio", None, reason=why)]
    verdicts, outcome = run(tmp_path, {"latency_ratio": limit(max=1), "flip_rate": limit(max=0.05)}, rows)
    assert [(verdict["verdict"], verdict["reason"]) for verdict in verdicts] == [
        ("INCONCLUSIVE", "not measured"),
        ("INCONCLUSIVE", why),
    ]
    assert outcome.refused == ""
    _, outcome = run(tmp_path, {"flip_rate": limit(max=0.05, required=True)}, rows)
    assert outcome.refused == "gate flip_rate INCONCLUSIVE, and it is required: not measured; nothing was packed"


def test_the_judged_measurement_counts() -> None:
    rows = [
        measured("kl_mean", 0.2, [0.1, 0.3], judged=False, phase="kernels"),
        measured("kl_mean", 0.01, [0.009, 0.011], phase="dequantized"),
    ]
    assert gates.judge("kl_mean", limit(max=0.05), rows)["verdict"] == "PASS"
    unmarked = [{**row, "judged": False} for row in rows]
    assert gates.judge("kl_mean", limit(max=0.05), unmarked[:1])["verdict"] == "FAIL"
    verdict = gates.judge("kl_mean", limit(max=0.05), unmarked)
    assert (verdict["verdict"], verdict["reason"]) == (
        "INCONCLUSIVE",
        "measured 2 times, and none of them marked as the one to judge",
    )


def test_a_sampled_value_without_an_interval_is_not_judged() -> None:
    row = measured("cosine", 0.9999, None, confidence=0.95, n=1)
    verdict = gates.judge("cosine", limit(min=0.99), [row])
    assert verdict["verdict"] == "INCONCLUSIVE"
    assert "too few samples (n=1)" in verdict["reason"]


def test_bytes_are_shown_in_their_unit() -> None:
    row = measured("peak_memory", 50_000_001, unit="B")
    assert gates.judge("peak_memory", limit(max=100e6), [row])["reason"] == "50 MB ≤ 100 MB"
    assert gates.judge("peak_memory", limit(max=50e6), [row])["reason"] == "50,000,001 B > max 50 MB"


def test_rounding_never_hides_a_verdict() -> None:
    assert gates.judge("quality", limit(min=0.98), [measured("quality", 0.97996)])["reason"] == "0.97996 < min 0.98"
    assert gates.judge("kl_mean", limit(max=0.05), [measured("kl_mean", 0.0500004)])["reason"] == "0.0500004 > max 0.05"


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{}")
    action = Action(
        verb="gate",
        backend="",
        params={"gates": {}, "strict": False},
        inputs={"measurements/x": tmp_path / "m.json"},
        outputs={"verdicts": tmp_path / "v.json"},
    )
    with pytest.raises(StepFailed, match=r"m\.json: holds no list of measurements"):
        gates.run(action)
    (tmp_path / "m.json").write_text("[")
    with pytest.raises(StepFailed, match=r"m\.json: the measurements cannot be read"):
        gates.run(action)


def test_no_numpy_is_needed() -> None:
    code = "import sys, edgebuild.gates\nprint('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


finite = st.floats(0, 1e6, allow_nan=False)


@given(
    bounds=st.lists(finite, min_size=2, max_size=2).map(sorted),
    limits=st.lists(finite, min_size=2, max_size=2).map(sorted),
    data=st.data(),
)
def test_a_verdict_is_about_the_whole_interval(bounds: list[float], limits: list[float], data: st.DataObject) -> None:
    """PASS: every value of the interval is allowed. FAIL: none is. Else INCONCLUSIVE. A value alone is its own interval."""
    low, high = bounds
    least, most = data.draw(st.sampled_from([(limits[0], limits[1]), (limits[0], None), (None, limits[1])]))
    value = data.draw(st.floats(low, high))
    exact = data.draw(st.booleans())
    if exact:
        low = high = value
    verdict = gates.judge("m", limit(min=least, max=most), [measured("m", value, None if exact else [low, high])])["verdict"]
    floor, ceiling = (least if least is not None else 0.0), (most if most is not None else float("inf"))
    all_allowed, none_allowed = floor <= low and high <= ceiling, high < floor or low > ceiling
    assert verdict == ("PASS" if all_allowed else "FAIL" if none_allowed else "INCONCLUSIVE")
    if exact:
        assert verdict != "INCONCLUSIVE"


@given(value=st.floats(0.01, 1e5), offset=st.floats(-0.01, 0.01))
def test_what_is_shown_lies_on_its_side_of_the_limit(value: float, offset: float) -> None:
    bound = value * (1 + offset)
    found = gates.judge("m", limit(max=bound), [measured("m", value)])
    shown, _, limited = found["reason"].replace("max ", "").partition(" > " if found["verdict"] == "FAIL" else " ≤ ")
    assert float(limited) == pytest.approx(bound, rel=1e-11)
    assert (float(shown) > float(limited)) == (value > bound) or value == pytest.approx(bound, rel=1e-8)
