"""A step and this machine's memory, while builds run: refused where it cannot fit, waiting for others that it does not fit beside.

What it takes is what `plan` says. Steps of which nothing is estimated, and small ones, take part in nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgebuild.errors import OutOfMemory, StepFailed
from edgebuild.files import user_cache
from edgebuild.project import Project
from edgebuild.resources import memory
from edgebuild.step import Step
from edgebuild.units import human

if TYPE_CHECKING:
    from edgebuild.forecast import Need

WAITS = "waits for memory that other steps hold"
# A model of so few bytes needs no estimate, which costs 50 ms of imports: every backend's constants, and ten times the model,
# are less than what is heavy. Language models keep a text's logits, and their frameworks take more.
LIGHT = 20_000_000


@contextmanager
def admitted(project: Project, step: Step, waits: Callable[[], None]) -> Iterator[None]:
    """Its worker may run in here. Raises StepFailed with the estimate where it cannot fit, or was ended for its memory."""
    try:
        if _light(project, step):
            yield
            return
        with _room(project, step, waits):
            yield
    except OutOfMemory as error:
        raise StepFailed(_told(project, step, error)) from error


def _light(project: Project, step: Step) -> bool:
    """Known by little reading; False where that does not tell, or where the target has a word to say in it."""
    if step.verb in ("fetch", "assess", "agree"):
        return True
    owner = project.owner(step)
    target = project.targets[owner]
    if target["memory"] or target["estimates"]:
        return False
    try:
        with open(project.steps[f"assess:{owner}"].outputs["facts"], encoding="utf-8") as file:
            facts = json.load(file)
        return bool(facts["format"] != "huggingface" and facts["bytes"] <= LIGHT and not facts["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _room(project: Project, step: Step, waits: Callable[[], None]) -> Iterator[None]:
    from edgebuild.feasible import ASIDE, AVAILABLE, LIMIT, bounds, lacking
    from edgebuild.forecast import need
    from edgebuild.reserve import NoRoom, reserved

    wanted: Need = need(project, step)
    if wanted.amount.bytes is None:
        yield
        return
    least, most = bounds(wanted.amount)
    limit = wanted.choice.memory_limit
    if limit is not None and least > limit:
        raise StepFailed(lacking(step.name, wanted, LIMIT, limit))
    if wanted.amount.bytes < ASIDE:
        yield
        return
    try:
        with reserved(f"{user_cache()}/memory", least, most, lambda: memory().available, waits):
            yield
    except NoRoom as error:
        raise StepFailed(lacking(step.name, wanted, AVAILABLE, error.available)) from error


def _told(project: Project, step: Step, error: OutOfMemory) -> str:
    """What happened, what had been expected, what there is, and what to try."""
    from edgebuild.feasible import remedy
    from edgebuild.forecast import GIVEN, need

    wanted, available = need(project, step), memory().available
    if wanted.amount.bytes is None:
        return str(error)
    said = "said to be enough" if wanted.amount.basis == GIVEN else "expected"
    limit = wanted.choice.memory_limit
    parts = [
        f"{error.what}; {human(wanted.amount.bytes)} were {said}, and {human(available)} are available now",
        f"{error.advice}{remedy(wanted, limit or available)}",
    ]
    if limit is None:
        name = "evaluate" if step.verb == "answer" else step.stem.split(".")[0] if step.on_demand else step.stem
        parts.append(f"or say by limits.estimates: {{{name}: SIZE}} what it takes, and it waits until that is free")
    return "; ".join(parts) + error.more
