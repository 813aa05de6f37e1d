"""The `gate` step: measurements against limits. The only module that gives verdicts; it needs no numpy and measures nothing.

A verdict looks at the whole interval: what the data do not decide is INCONCLUSIVE, neither PASS nor FAIL.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome
from edgebuild.units import human

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"


def run(action: Action) -> Outcome:
    """Output `verdicts`. `refused` where an unwaived gate fails, or is INCONCLUSIVE and required, or the run is strict."""
    measurements: list[Mapping[str, Any]] = []
    for role, path in sorted(action.inputs.items()):
        if role.startswith("measurements/"):
            measurements += _read(path)
    verdicts = [judge(name, limit, measurements) for name, limit in sorted(action.params["gates"].items())]
    text = json.dumps(verdicts, indent=1, ensure_ascii=False, allow_nan=False)
    action.outputs["verdicts"].write_text(text + "\n", encoding="utf-8")
    stopping = [sentence for verdict in verdicts if (sentence := _stops(verdict, bool(action.params["strict"])))]
    refused = "; ".join([*stopping, "nothing was packed"]) if stopping else ""
    return Outcome(summary=", ".join(map(_shown, verdicts)) or "no gates", refused=refused)


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepFailed(f"{path.name}: the measurements cannot be read ({str(error)[:120]}); measure again") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) and "name" in row for row in found):
        raise StepFailed(f"{path.name}: holds no list of measurements; measure again")
    return found


def judge(name: str, limit: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict on one metric, as it stands in the evidence: the measurement marked `judged` counts."""
    row, reason = _judged(name, measurements)
    verdict = INCONCLUSIVE
    if not reason:
        verdict, reason = _compare(row, limit.get("min"), limit.get("max"))
    return {
        "name": name,
        "verdict": verdict,
        "value": _number(row.get("value")),
        "limit": ", ".join(
            f"{key} {_amount(limit[key], row, [limit[key]])}" for key in ("min", "max") if limit.get(key) is not None
        ),
        "baseline": row.get("baseline"),
        "reason": reason,
        "waived": limit.get("waive"),
        "interval": _interval(row),
        "n": row.get("n"),
        "unit": row.get("unit"),
        "required": bool(limit.get("required")),
    }


def _judged(name: str, measurements: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """The measurement to judge, and why there is nothing to judge (else empty)."""
    rows = [row for row in measurements if row["name"] == name]
    marked = [row for row in rows if row.get("judged")]
    if not rows:
        return {}, "not measured"
    if len(marked) > 1 or (not marked and len(rows) > 1):
        return {}, f"measured {len(rows)} times, and {len(marked) or 'none'} of them marked as the one to judge"
    row = (marked or rows)[0]
    if _number(row.get("value")) is None:
        return row, str(row.get("reason") or "not measured")
    return row, ""


def _compare(row: Mapping[str, Any], least: float | None, most: float | None) -> tuple[str, str]:
    """Verdict and reason. An exact value (bytes) has no interval; a sampled one without cannot be judged."""
    value, interval = float(row["value"]), _interval(row)
    bounds = [bound for bound in (least, most) if bound is not None]

    def text(number: float) -> str:
        return _amount(number, row, bounds)

    found = text(value) if interval is None else f"{text(value)} ({text(interval[0])}–{text(interval[1])})"
    if interval is None and row.get("confidence") is not None:
        return INCONCLUSIVE, f"{found} comes of too few samples (n={row.get('n')}) for an interval: more data would decide"
    low, high = interval or (value, value)
    if least is not None and high < least:
        return FAIL, f"{found} < min {text(least)}"
    if most is not None and low > most:
        return FAIL, f"{found} > max {text(most)}"
    for bound in bounds:
        if (bound == least and low < bound) or (bound == most and high > bound):
            held = f"the interval {text(low)}–{text(high)} holds the limit {text(bound)}"
            return INCONCLUSIVE, f"{held}: more data would decide"
    signs = [f" ≥ {text(least)}"] if least is not None else []
    signs += [f" ≤ {text(most)}"] if most is not None else []
    return PASS, found + "".join(signs)


def _stops(verdict: Mapping[str, Any], strict: bool) -> str:
    """Why nothing may be packed, else empty."""
    if verdict["waived"] or verdict["verdict"] == PASS:
        return ""
    against = f" against {verdict['baseline']}" if verdict["baseline"] else ""
    if verdict["verdict"] == FAIL:
        return f"gate {verdict['name']} FAIL: {verdict['reason']}{against}"
    if verdict["required"] or strict:
        why = "it is required" if verdict["required"] else "the run is strict"
        return f"gate {verdict['name']} INCONCLUSIVE, and {why}: {verdict['reason']}"
    return ""


def _shown(verdict: Mapping[str, Any]) -> str:
    """One verdict for the terminal: `kl_mean PASS 0.0065 ≤ 0.05`."""
    waived = ", waived" if verdict["waived"] and verdict["verdict"] != PASS else ""
    return f"{verdict['name']} {verdict['verdict']}{waived} {verdict['reason']}"


def _amount(value: float, row: Mapping[str, Any], bounds: Sequence[float]) -> str:
    """Bytes in their unit, anything else in about three digits; in more where those would show it on another side of a bound.

    A bound itself is shown as it was written.
    """
    if row.get("unit") == "B":
        rounded = human(value)
        return f"{value:,.0f} B" if any(human(bound) == rounded and bound != value for bound in bounds) else rounded
    if value in bounds:
        return f"{value:.12g}"
    for digits in (3, 4, 6, 9):
        shown = float(f"{value:.{digits}{'f' if 0.1 <= abs(value) < 10 else 'g'}}")
        if all((shown < bound, shown > bound) == (value < bound, value > bound) for bound in bounds):
            return f"{shown:.12g}"
    return repr(value)


def _number(value: Any) -> float | None:
    """A finite number, else None: what is no number was not measured."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _interval(row: Mapping[str, Any]) -> list[float] | None:
    bounds = row.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2 or any(_number(bound) is None for bound in bounds):
        return None
    return [float(bounds[0]), float(bounds[1])]
