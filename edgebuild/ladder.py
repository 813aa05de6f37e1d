"""The walk of `quantize.method: auto`: recipes are tried one after the other until the quality and size gates hold.

The only module that selects by what was measured. It looks at values, not at their intervals, and never at a time: a verdict
is the gate's, on data that had no part in the choice.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgebuild import gates
from edgebuild.errors import Refused

# What decides. Of the gates that a target has, the others (times, memory) are measured for the chosen recipe alone.
QUALITY = ("quality", "flip_rate", "cosine", "snr", "kl_mean", "same_top", "perplexity_ratio")
DECIDING = (*QUALITY, "weights_ratio")
UNQUANTIZED = "leave this model unquantized (quantize: {scheme: none})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a rung's steps made: the quantizer's report, measurements of the choosing part, sizes of baseline and candidate in bytes."""

    report: Mapping[str, Any]
    measurements: Sequence[Mapping[str, Any]]
    baseline: int
    candidate: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """`chosen`: a rung's name, empty where none holds; `why` it holds, or what to do. `report`: all of it, for the evidence."""

    chosen: str
    why: str
    report: Mapping[str, Any]


def limits(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a target's gates those that decide: their bounds. A waived one packs whatever its verdict, so it decides nothing."""
    return {
        metric: {"min": limit["min"], "max": limit["max"]}
        for metric, limit in wanted.items()
        if metric in DECIDING and not limit.get("waive")
    }


def walk(params: Mapping[str, Any], operators: Collection[str], attempt: Callable[[str], Made]) -> Walk:
    """Try the rungs in `params` (as plan writes them) on a model that has these operators. Raises what `attempt` raises but Refused."""
    rows: list[dict[str, Any]] = []
    chosen = ""
    reports: dict[str, Mapping[str, Any]] = {}
    for name in params["order"]:
        needs = params["rungs"][name]["operators"]
        row: dict[str, Any] = {"name": name, "held": None, "values": {}, "bytes": None}
        rows.append(row)
        if needs and not set(needs) & set(operators):
            row["reason"] = f"not tried: the model has no {' or '.join(needs)}"
        elif chosen:
            row["reason"] = f"not tried: {chosen} holds"
        else:
            row |= _try(name, params["gates"], attempt, reports)
            chosen = name if row["held"] else ""
    if chosen:
        why = next(row["reason"] for row in rows if row["held"])
        return Walk(chosen=chosen, why=why, report={**reports[chosen], "rung": chosen, "rungs": rows})
    refused = _refusal(params["gates"], rows)
    return Walk(chosen="", why=refused, report={"rung": None, "rungs": rows, "reason": refused})


def _try(
    name: str, wanted: Mapping[str, Mapping[str, Any]], attempt: Callable[[str], Made], reports: dict[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One rung: whether it held, and why or why not. What was not measured does not decide."""
    try:
        made = attempt(name)
    except Refused as error:
        return {"held": False, "reason": str(error)}
    reports[name] = made.report
    measured = _points(made)
    verdicts = [gates.judge(metric, limit, measured) for metric, limit in sorted(wanted.items())]
    failing = [f"{one['name']} {one['reason']}" for one in verdicts if one["verdict"] == gates.FAIL]
    holding = [f"{one['name']} {one['reason']}" for one in verdicts if one["verdict"] == gates.PASS]
    return {
        "held": not failing,
        "reason": ", ".join(failing or holding) or "no gate decides",
        "values": {row["name"]: row["value"] for row in measured if row["value"] is not None},
        "bytes": made.candidate,
    }


def _points(made: Made) -> list[dict[str, Any]]:
    """The measurements that count, without their intervals; and the size, as the benchmark measures it."""
    rows = [
        {**row, "interval": None, "confidence": None} for row in made.measurements if row["name"] in QUALITY and row.get("judged")
    ]
    ratio = made.candidate / made.baseline if made.baseline else None
    return [*rows, {"name": "weights_ratio", "value": ratio, "unit": "ratio", "judged": True}]


def _refusal(wanted: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Why no rung holds, those with one reason together."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["held"] is False:
            reasons.setdefault(row["reason"], []).append(row["name"])
    found = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    gated = f"{'all of ' if len(wanted) > 1 else ''}{', '.join(sorted(wanted))}"
    kept = f"no recipe keeps {gated}" if wanted else "no recipe works"
    refused = f"{kept}: {found or 'none is for a model of these operators'}"
    return refused if UNQUANTIZED in refused else f"{refused}; {UNQUANTIZED}"  # a reason may say so already
