"""A conversion as a build makes it: converted by one step, and held by the next."""

import json
import shutil
from pathlib import Path

from edgebuild import reference
from edgebuild.backend import ModelFacts
from edgebuild.backends import BACKENDS
from edgebuild.step import Action, Outcome


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """`action`: of the conversion; a `reference` among its inputs is for holding it. Both reports in one, as evidence has them."""
    backend = BACKENDS[action.backend]
    outcome = backend.convert(action, facts)
    report: Path = action.outputs["report"]
    for place, role in outcome.kept.items():
        shutil.copyfile(action.inputs[role], action.outputs["model"].parent / place)
    session = backend.open(action.outputs["model"], next(iter(backend.VIEWS), ""))
    try:
        held = {**backend.hold(session, action.inputs, facts), "runtime": session.runtime}
    finally:
        session.close()
    report.write_text(json.dumps({**json.loads(report.read_text(encoding="utf-8")), **held}), encoding="utf-8")
    return Outcome(summary=f"{outcome.summary}, {reference.verdict(held)}")
