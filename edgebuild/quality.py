"""The `evaluate` step: how well a model answers, and how far a candidate's answers are from the unquantized model's.

The unquantized one is first held against its source. Imported in workers only.
"""

import json

from edgebuild import language, reference, tensors
from edgebuild.backend import Backend
from edgebuild.step import Action, Outcome


def run(action: Action, backend: Backend) -> Outcome:
    """Output `measurements`; of the baseline also `answers`, which its candidates are held against, or those alone; and `held`.

    That is the report of how it was held against its source, the inputs `source/…`. Raises StepFailed.
    """
    views = list(backend.VIEWS) or [""]
    data = action.inputs.get("data")
    if action.params["task"] == "text-generation":
        rows, summary = (
            language.on_text(action, backend, views, data) if data else language.on_golden_tokens(action, backend, views)
        )
    else:
        rows, summary = tensors.on_samples(action, backend, views[0], data)
    if "measurements" in action.outputs:
        text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
        action.outputs["measurements"].write_text(text + "\n", encoding="utf-8")
    if "held" in action.outputs:
        summary += f", {reference.verdict(json.loads(action.outputs['held'].read_text(encoding='utf-8')))}"
    return Outcome(summary=summary)
