"""How a language model's rotary positions are scaled, as its config.json says it, and what is known of those who compute them otherwise.

Names and defaults are transformers' own (modeling_rope_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgebuild.errors import shown

RENAMED = {"su": "longrope"}  # of a kind's older name
UNSCALED = ("default", "mrope")
LARGEST = 1e12  # of a number that means anything here


def of_config(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map of `rope_type` and numbers for each kind of layers whose positions are scaled, without an `attention_factor` that is the default."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")  # in this order, as transformers 5 does
    if not isinstance(rope, dict):
        return []
    found: list[dict[str, Any]] = []
    for one in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        kind = shown(str(one.get("rope_type") or one.get("type") or "default"))
        if kind not in UNSCALED:
            numbers = {key: value for key, value in one.items() if _is_number(value) or _are_numbers(value)}
            if _is_default(numbers.get("attention_factor"), numbers.get("factor")):
                del numbers["attention_factor"]
            found.append({**numbers, "rope_type": RENAMED.get(kind, kind)})
    return found


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says `type` too, which onnxruntime-genai's model builder reads, and transformers 5 does not write."""
    new = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict) and rope.get("rope_type"):
            new[key] = {"type": rope["rope_type"], **rope}
    return new


def refuse(scaled: Sequence[Mapping[str, Any]], kinds: Sequence[str], who: str) -> str:
    """Why `who`, that computes these kinds, cannot be given a model, in one sentence, else empty."""
    wrong = sorted({str(one["rope_type"]) for one in scaled} - set(kinds))
    return f"its positions are scaled by {wrong[0]}, which {who} does not compute; name another framework" if wrong else ""


def refuse_yarn(scaled: Sequence[Mapping[str, Any]], who: str, *, truncates: bool) -> str:
    """As `refuse`, of who computes YaRN with the default attention factor alone, and rounds its bounds always, or never."""
    for one in scaled:
        if one["rope_type"] != "yarn":
            continue
        if "attention_factor" in one:
            return f"its positions are scaled by yarn with an attention_factor, which {who} does not read; name another framework"
        if bool(one.get("truncate", True)) != truncates:
            rounds = "always" if truncates else "never"
            return f"its positions are scaled by yarn, whose bounds {who} {rounds} rounds (truncate); name another framework"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_default(attention: Any, factor: Any) -> bool:
    """Whether that is the attention factor which YaRN has of itself: 0.1 ln(factor) + 1 (arXiv 2309.00071, §3.4)."""
    if not (_is_number(attention) and _is_number(factor)):
        return False
    return math.isclose(attention, 0.1 * math.log(max(factor, 1)) + 1, rel_tol=1e-4)
