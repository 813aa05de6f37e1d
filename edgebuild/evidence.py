"""What was measured, judged and packed, in one file: `build/NAME/evidence.json`, and the same beside the bundle.

A view over what the steps made; it measures nothing. Its form is in schemas/evidence.json.
"""

import json
from pathlib import Path
from typing import Any

from edgebuild.step import Action, Outcome
from edgebuild.units import human


def run(action: Action) -> Outcome:
    """Outputs `evidence` and `delivered`, with the same content. Where no bundle was packed, its part says why."""
    measurements: list[Any] = []
    for role in sorted(action.inputs):
        if role.startswith("measurements/"):
            measurements += _read(action.inputs[role])
    verdicts = _optional(action, "verdicts") or []
    params, held = action.params, _optional(action, "report/held")
    content = {
        "edgebuild": 1,
        "target": params["target"],
        "version": params["version"],
        "source": params["source"],
        "platform": params["platform"],
        "choice": params["choice"],
        "toolchain": params["toolchain"],
        "isa": params["isa"],
        "model": _read(action.inputs["facts"]),
        "conversion": held and {**(_optional(action, "report/convert") or {}), **held},
        "quantization": _optional(action, "report/quantize"),
        "measurements": measurements,
        "gates": verdicts,
        "bundle": _bundle(action, verdicts),
        "steps": _steps(action),
    }
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    for path in action.outputs.values():
        path.write_text(text, encoding="utf-8")
    return Outcome(summary=_summary(content))


def _bundle(action: Action, verdicts: list[Any]) -> dict[str, Any]:
    if "made/report" in action.inputs:
        report: dict[str, Any] = _read(action.inputs["made/report"])
        return report
    stopped = [gate["name"] for gate in verdicts if gate["verdict"] != "PASS" and not gate.get("waived")]
    unquantized = (_optional(action, "report/quantize") or {}).get("reason")  # no recipe held
    reason = (
        f"not packed: gate {', '.join(stopped)}" if stopped else f"not packed: {unquantized}" if unquantized else "not packed"
    )
    return {"kind": action.params["kind"], "level": None, "files": None, "bytes": None, "reason": reason}


def _steps(action: Action) -> list[dict[str, Any]]:
    """Which keys the evidence speaks of, and the digests of what they made: the steps' receipts."""
    found = []
    for role, path in sorted(action.inputs.items()):
        if role.startswith("receipt/"):
            receipt = _read(path)
            verb, dot, rest = role.removeprefix("receipt/").partition(".")
            name = f"{verb}:{action.params['target']}{dot}{rest}"
            found.append(
                {"name": name, "key": receipt["key"], "outputs": {key: made[1] for key, made in receipt["outputs"].items()}}
            )
    return found


def _optional(action: Action, role: str) -> Any:
    return _read(action.inputs[role]) if role in action.inputs else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _summary(content: dict[str, Any]) -> str:
    bundle = content["bundle"]
    if bundle["bytes"] is None:
        return f"{content['target']}: {bundle['reason']}"
    signed = "; test key: not for release" if bundle["test_key"] else ""
    packed = f"{bundle['kind']} bundle, {bundle['files']} files, {human(bundle['bytes'])}, proven to {bundle['level']}"
    return f"dist/{content['target']}: {packed}{signed}"
