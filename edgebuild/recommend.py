"""`edgebuild recommend`: which framework a platform's target of a model gets, and why; for people, or JSON (schemas/recommend.json).

It is what `framework: auto` does, without a target file: the same rows, the same refusals.
"""

import json
from dataclasses import dataclass
from typing import Any

from edgebuild.accelerators import Accelerators, accelerators
from edgebuild.assessment import look
from edgebuild.backend import ModelFacts
from edgebuild.backends import BACKENDS
from edgebuild.bundles import BUNDLES, unfit
from edgebuild.errors import FAILED, OK, UserError, did_you_mean, shown
from edgebuild.fit import Fit, Misfit, Wanted, choose, written
from edgebuild.load import platform, preferred, tasks
from edgebuild.select import AUTO
from edgebuild.target import Platform
from edgebuild.units import size

# What a class of a Hugging Face model ends with (huggingface.co/docs/transformers, "Auto Classes") → the task that it is for.
TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForObjectDetection": "object-detection",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
}
# Hardware whose runtimes leave operators to the CPU → the kind of accelerator that doctor looks for.
DEVICES = {
    "nvidia": "NVIDIA GPU",
    "npu": "NPU of the system (accel)",
    "apple": "Apple GPU (Metal)",
    "intel": "GPU of the system (DRI)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A model's name, the platform, the task and what is preferred; `task` is guessed from the model where it is empty."""

    model: str
    platform: str
    task: str = ""
    prefer: str = ""


def recommend(asked: Asked, root: str, as_json: bool) -> tuple[str, int]:
    """→ (what to print, exit status: 1 where no framework takes the model). `root` may hold platforms of the project's own."""
    try:
        found = platform(root, asked.platform)
    except ValueError as error:
        raise UserError(str(error)) from error
    for word, known in ((asked.task, tasks()), (asked.prefer, tuple(preferred().prefer))):
        if word and word not in known:
            raise UserError(f'"{shown(word)}" is none of: {", ".join(known)}.{did_you_mean(word, known)}')
    facts = look(asked.model)
    task = asked.task or _task(facts)
    wanted = _wanted(found, facts, task, asked.prefer)
    try:
        fit = choose(wanted, preferred(), BACKENDS)
    except Misfit as error:
        if as_json:
            return json.dumps(_refused(asked, task, str(error)), indent=1, ensure_ascii=False), FAILED
        return f"none: {error}", FAILED
    fallback = _fallback(found.hardware)
    if as_json:
        return json.dumps(_json(asked, task, fit, fallback), indent=1, ensure_ascii=False), OK
    return "\n".join(_lines(task, found, fit, fallback)), OK


def _task(facts: ModelFacts) -> str:
    """GGUF holds language models; a class of transformers says its task by its name; of ONNX nothing is known."""
    if facts.format == "gguf":
        return "text-generation"
    return next((task for end, task in TASKS.items() if facts.architecture.endswith(end)), "other")


def _wanted(found: Platform, facts: ModelFacts, task: str, prefer: str) -> Wanted:
    """As `plan` asks for a target that names nothing but model and platform; the platform's framework is what is in question."""
    quantize = dict(found.defaults.get("quantize", {}))
    package = found.defaults.get("package", {})
    kind = package.get("kind", "folder")
    bundle = BUNDLES[kind]
    weights = package.get("limits", {}).get("weights")

    def kind_refuses(framework: str) -> str:
        return bundle.refuse(framework, task)

    def misfits(framework: str, scheme: str) -> str:
        return unfit(kind, found.facts, framework, scheme, lambda: facts)

    return Wanted(
        framework=AUTO,
        task=task,
        format=facts.format,
        facts=facts,
        hardware=found.hardware,
        prefer=prefer or found.defaults.get("prefer", ""),
        scheme=quantize.pop("scheme", "none"),
        quantize=quantize,
        kind_refuses=kind_refuses,
        unfit=misfits,
        copies=bundle.COPIES.bundle,
        memory=found.memory,
        weights=size(weights) if weights else None,
    )


def _fallback(hardware: str) -> str:
    """Which operators would run on the CPU: the runtime's own answer, where there is a device to ask."""
    if hardware not in DEVICES:
        return ""
    found = next((one for one in accelerators() if one.kind == DEVICES[hardware]), None)
    if found is None or not found.found:
        return f"not asked: no such device here ({_why(found)})"
    return f"not asked: edgebuild has no backend that runs on {found.found[0]}"


def _why(found: Accelerators | None) -> str:
    return found.unavailable if found else "of a kind that edgebuild does not look for"


def _json(asked: Asked, task: str, fit: Fit, fallback: str) -> dict[str, Any]:
    choice = fit.choice
    return {
        **_refused(asked, task, ""),
        "choice": {**choice.to_json(), "runner_up_reason": choice.runner_up_reason},
        "quantize": {"scheme": fit.scheme, **fit.parameters},
        "fallback": fallback,
    }


def _refused(asked: Asked, task: str, reason: str) -> dict[str, Any]:
    return {
        "model": asked.model,
        "platform": asked.platform,
        "task": task,
        "none": reason,
        "choice": None,
        "quantize": None,
        "fallback": "",
    }


def _lines(task: str, found: Platform, fit: Fit, fallback: str) -> list[str]:
    choice = fit.choice
    rows = [
        ("choice", f"{choice.framework}: {choice.to_json()['reason']}"),
        ("quantize", written(BACKENDS[choice.framework], fit.scheme, fit.parameters)),
        ("runner-up", f"{choice.runner_up}: {choice.runner_up_reason}" if choice.runner_up else "none"),
        *(("refused", f"{one.framework}: {one.reason} ({one.row})") for one in choice.refused),
        ("on the CPU", fallback and f"operators that fall back: {fallback}"),
    ]
    named = found.defaults.get("framework", AUTO)
    if named != AUTO:
        rows.append(("platform", f"{found.name} names {named}: a target gets it, unless it says framework: auto"))
    head = f"for {task} on {found.name} ({found.hardware})"
    return [head, *(f"{name:<11} {text}" for name, text in rows if text)]
