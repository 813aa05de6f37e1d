"""The walk of `quantize.method: auto`: recipes are tried one after the other until the quality and size gates hold.

The only module that selects by what was measured. It looks at values, not at their intervals, and never at a time: a verdict
is the gate's, on data that had no part in the choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgebuild import gates
from edgebuild.errors import Refused

# What decides. Of the gates that a target has, the others (times, memory) are measured for the chosen recipe alone.
QUALITY = ("quality", "flip_rate", "cosine", "snr", "kl_mean", "same_top", "perplexity_ratio")
DECIDING = (*QUALITY, "weights_ratio")
CONVOLUTIONS = ("Conv", "ConvTranspose")
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


def walk(params: Mapping[str, Any], facts: Mapping[str, Any], attempt: Callable[[str], Made]) -> Walk:
    """Try the rungs in `params` (as plan writes them) on a model of these facts. Raises what `attempt` raises but Refused."""
    rows: list[dict[str, Any]] = []
    chosen = ""
    reports: dict[str, Mapping[str, Any]] = {}
    for name in params["order"]:
        row: dict[str, Any] = {"name": name, "held": None, "values": {}, "bytes": None}
        rows.append(row)
        if unsuited := _unsuited(params["rungs"][name], facts):
            row["reason"] = f"not tried: {unsuited}"
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


def _unsuited(rung: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Why a rung makes no sense for this model; empty where it does."""
    needs, weights = rung["operators"], facts["weights"]
    if needs and not set(needs) & set(facts["operators"]):
        return f"the model has no {' or '.join(needs)}"
    convolved = sum(weights.get(name, 0) for name in CONVOLUTIONS) / max(sum(weights.values()), 1)
    if convolved > rung["convolutions"]:
        return f"{100 * convolved:.1f} % of the model's weights are of convolutions, which it leaves as they are"
    return ""


def _try(
    name: str, wanted: Mapping[str, Mapping[str, Any]], attempt: Callable[[str], Made], reports: dict[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One rung: whether it held, and why or why not. What was not measured does not decide."""
    try:
        made = attempt(name)
    except Refused as error:
        return {"held": False, "reason": str(error).partition("\n")[0]}  # a second line says where its log lies
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
