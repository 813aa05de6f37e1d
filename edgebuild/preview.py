"""`edgebuild plan`: what a build would do, make and need, and what of it cannot pass, for people or as JSON (schemas/plan.json)."""

import json
import os
from dataclasses import asdict
from typing import Any

from edgebuild.errors import FAILED, OK
from edgebuild.feasible import Finding, Room, about, count, findings, largest, room
from edgebuild.fit import written
from edgebuild.forecast import BLOCKED, DEPENDS, NOTHING, RESTORE, RUN, Amount, Forecast, Prospect, forecast
from edgebuild.project import Project
from edgebuild.units import human

WIDTH = 80  # of a reason; explain has all of it
MAYBE = "run?"
_SHOWN = {NOTHING: "fresh", RESTORE: "restore", RUN: "run", DEPENDS: "run", BLOCKED: "blocked"}


def preview(project: Project, target: str, as_json: bool) -> tuple[str, int]:
    """→ (what to print, exit status: 0 where all may pass, 1 where something cannot)."""
    found = forecast(project, target)
    here = room(project, found)
    problems = findings(found, here)
    biggest = largest(found, here)
    status = FAILED if any(problem.certain for problem in problems) else OK
    if as_json:
        return json.dumps(_json(found, here, problems, biggest), indent=1, ensure_ascii=False), status
    return "\n".join([*_steps(found), "", *_summary(found, here, biggest), *_problems(problems)]), status


def _json(found: Forecast, here: Room, problems: list[Finding], biggest: tuple[int, str] | None) -> dict[str, Any]:
    parameters = sum(found.facts.parameters.values()) if found.facts else None
    return {
        "target": found.target,
        "framework": found.choice.framework,
        "scheme": found.choice.scheme,
        "parameters": parameters,
        "unknown": found.unknown,
        "steps": [asdict(step) for step in found.prospects],
        "toolchains": [asdict(one) for one in found.toolchains],
        "weights": {"baseline": asdict(found.baseline), "candidate": asdict(found.candidate)},
        "room": asdict(here),
        "largest": {"parameters": biggest[0], "binds": biggest[1]} if biggest else None,
        "findings": [asdict(problem) for problem in problems],
        "passes": not any(problem.certain for problem in problems),
    }


def _steps(found: Forecast) -> list[str]:
    lines = [f"{'':<32} {'':<8} {'makes':<14} {'memory':<14}".rstrip()]
    for one in found.toolchains:
        if one.will == RUN:
            reason = f"{one.packages} packages of its lock, once for you"
            lines.append(f"{f'toolchain:{one.name}':<32} {'run':<8} {'':<14} {'':<14} {reason}")
    for step in found.prospects:
        small = step.will in (NOTHING, RESTORE, BLOCKED)
        needs = "" if small else _amount(step.memory)
        reason = step.reason if len(step.reason) <= WIDTH else step.reason[: WIDTH - 1] + "…"
        lines.append(f"{step.name:<32} {_shown(step):<8} {_amount(step.makes):<14} {needs:<14} {reason}".rstrip())
    if any(_shown(step) == MAYBE for step in found.prospects):
        lines.append(f"{MAYBE} it runs, unless what it waits for comes out as before")
    return lines


def _shown(step: Prospect) -> str:
    return MAYBE if step.will == DEPENDS and step.ran else _SHOWN[step.will]


def _amount(amount: Amount) -> str:
    return "" if amount.bytes is None else about(amount)


def _summary(found: Forecast, here: Room, biggest: tuple[int, str] | None) -> list[str]:
    facts, choice = found.facts, found.choice
    if choice.rungs:
        settings = f"{choice.scheme} by the first of {', '.join(choice.rungs)} that holds"
    else:
        settings = written(choice.backend, choice.scheme, choice.parameters)
    if facts is None:
        return [f"{choice.framework}, {settings}; sizes and memory: {found.unknown}"]
    model = f"{facts.architecture}, {sum(facts.parameters.values()):,} parameters; {choice.framework}, {settings}"
    lines = [f"{model}: {about(found.baseline)} → {about(found.candidate)}"]
    room = f"{human(here.memory.available)} of memory available; " + "; ".join(
        f"about {human(disk.writes)} to write, {human(disk.free)} free on the disk of {_near(disk.path)}" for disk in here.disks
    )
    lines.append(room)
    if biggest:
        lines.append(f"the largest model of this shape that would fit: about {count(biggest[0])} parameters, by {biggest[1]}")
    else:
        lines.append("no model of this shape would fit")
    return lines


def _near(path: str) -> str:
    inside = os.path.relpath(path)
    return path if inside.startswith("..") else inside


def _problems(problems: list[Finding]) -> list[str]:
    if not problems:
        return ["nothing known beforehand keeps it from passing"]
    return [
        f"{'cannot pass' if problem.certain else 'may not pass'}: {problem.subject}: {problem.message}" for problem in problems
    ]
