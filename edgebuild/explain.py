"""Which part of a key changed, in a sentence: what `explain` prints and what last-run.json gives as a reason."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgebuild.artifact import Receipt
from edgebuild.fresh import Fresh, read_receipt, stored
from edgebuild.project import Project
from edgebuild.step import Step

_NAMES = {
    "params": "parameter",
    "toolchain": "version of",
    "code": "code of edgebuild/",
    "machine": "machine",
    "environment": "environment",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A step as it stands: `fresh`, `stale`, `restorable` (it would be taken from the store) or `waiting`, and why."""

    name: str
    state: str
    reason: str


def explain(project: Project, target: str) -> list[State]:
    """The state of every step of a target, in order; of those on demand only what has run here: no build need run the others."""
    fresh = Fresh(project)
    return [
        _state(project, fresh, step)
        for step in project.of(target)
        if not step.on_demand or read_receipt(step.receipt) is not None
    ]


def show(states: list[State], as_json: bool) -> str:
    """For people, a line each; or as JSON: {"steps": [{"name", "state", "reason"}]}."""
    if as_json:
        return json.dumps({"steps": [asdict(state) for state in states]}, indent=1, ensure_ascii=False)
    return "\n".join(f"{state.name:<32} {state.state:<11} {state.reason}".rstrip() for state in states)


def _state(project: Project, fresh: Fresh, step: Step) -> State:
    if fresh(step):
        return State(name=step.name, state="fresh", reason="")
    waits = [name for name in step.after if not fresh(project.steps[name])]
    try:
        inputs = {role: project.memo.of(path) for role, path in step.inputs.items()}
    except OSError as error:
        return State(name=step.name, state="waiting", reason=f"for {', '.join(waits) or error.filename}")
    receipt = read_receipt(step.receipt)
    changed = receipt is None or receipt.key != step.key(inputs)
    if waits and not changed:
        return State(name=step.name, state="waiting", reason=f"for {', '.join(waits)}")
    reason = why(project, step, receipt, inputs)
    if waits:
        return State(name=step.name, state="waiting", reason=f"for {', '.join(waits)}; {reason}")
    return State(name=step.name, state="restorable" if stored(project, step, step.key(inputs)) else "stale", reason=reason)


def why(project: Project, step: Step, receipt: Receipt | None, inputs: Mapping[str, str]) -> str:
    """Why a step must run, against the receipt of its last run: every component that differs, old → new."""
    if receipt is None or not receipt.key:
        return "it has not run here before"
    key = step.key(inputs)
    if receipt.key == key:
        return receipt.refused or "what it made was changed or removed"
    old = project.store.record(receipt.key)
    if old is None:
        return "its key changed; the record of its last run is no longer in the store, so edgebuild cannot name the part"
    new = {"recipe": project.recipes[step.recipe], "inputs": dict(inputs)}
    return "; ".join(differences(old.components, new)) or "its key changed"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Sentences such as `parameter scheme: int8 → int4` or `input model/config.json: 1f2e3d4c → 5b6a7988`."""
    found = [
        f"input {role}: {_short(before)} → {_short(after)}"
        for role, before, after in _pairs(old.get("inputs", {}), new.get("inputs", {}))
    ]
    for kind, before, after in _pairs(old.get("recipe", {}), new.get("recipe", {})):
        if isinstance(before, dict) and isinstance(after, dict):
            found.extend(_inside(_NAMES.get(kind, kind), before, after))
        else:
            found.append(f"{_NAMES.get(kind, kind)}: {_short(before)} → {_short(after)}")
    return found


def _inside(kind: str, old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, before, after in _pairs(old, new):
        name = f"{path}.{key}" if path else key
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _inside(kind, before, after, name)
        elif kind.endswith("/"):
            yield f"{kind}{name.replace('.', '/')}.py: {_short(before)} → {_short(after)}"
        else:
            yield f"{kind} {name}: {_short(before)} → {_short(after)}"


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:8]
    return text if len(text) <= 60 else text[:57] + "..."
