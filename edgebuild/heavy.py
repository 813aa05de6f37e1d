"""A step and this machine's memory, while builds run: refused where it cannot fit, waiting for others that it does not fit beside.

What it takes is what `plan` says. Steps of which nothing is estimated, and small ones, take part in nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgebuild.errors import OutOfMemory, StepFailed
from edgebuild.feasible import ASIDE, AVAILABLE, LIMIT, bounds, lacking, remedy
from edgebuild.files import user_cache
from edgebuild.forecast import GIVEN, Need, need
from edgebuild.project import Project
from edgebuild.reserve import NoRoom, reserved
from edgebuild.resources import memory
from edgebuild.step import Step
from edgebuild.units import human

WAITS = "waits for memory that other steps hold"


@contextmanager
def admitted(project: Project, step: Step, waits: Callable[[], None]) -> Iterator[None]:
    """Its worker may run in here. Raises StepFailed with the estimate where it cannot fit, or was ended for its memory."""
    wanted = need(project, step)
    try:
        with _room(step.name, wanted, waits):
            yield
    except OutOfMemory as error:
        if wanted.amount.bytes is None:
            raise
        told = "given for it" if wanted.amount.basis == GIVEN else "expected"
        limit = wanted.choice.memory_limit
        parts = [
            f"{error.what}; {human(wanted.amount.bytes)} were {told}, and {human(memory().available)} are available now",
            f"{error.advice}{remedy(wanted, limit or memory().available)}",
        ]
        if limit is None:
            name = step.stem.split(".")[0] if step.on_demand else step.stem
            parts.append(f"or say by limits.estimates: {{{name}: SIZE}} what it takes, and it waits until that is free")
        raise StepFailed("; ".join(parts) + error.more) from error


@contextmanager
def _room(name: str, wanted: Need, waits: Callable[[], None]) -> Iterator[None]:
    if wanted.amount.bytes is None:
        yield
        return
    least, most = bounds(wanted.amount)
    limit = wanted.choice.memory_limit
    if limit is not None and least > limit:
        raise StepFailed(lacking(name, wanted, LIMIT, limit))
    if wanted.amount.bytes < ASIDE:
        yield
        return
    folder = f"{user_cache()}/memory"
    try:
        with reserved(folder, least, most, lambda: memory().available, waits):
            yield
    except NoRoom as error:
        raise StepFailed(lacking(name, wanted, AVAILABLE, error.available)) from error
