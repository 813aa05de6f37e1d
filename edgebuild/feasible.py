"""What cannot pass, known before any work: budgets and gates against what is expected; and the largest model that would fit.

An estimate is about right: what fails only within its margin may not pass; what fails beyond it cannot.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgebuild.backend import Backend, Estimate, ModelFacts
from edgebuild.forecast import DEPENDS, ESTIMATED, GIVEN, MEASURED, RESTORE, RUN, Amount, Choice, Forecast, Need, Prospect
from edgebuild.project import Project
from edgebuild.provide import OFFLINE, offline
from edgebuild.resources import Memory, existing, free, memory
from edgebuild.units import human

SIZE_MARGIN = 0.05  # of an estimated size
LIMIT, AVAILABLE = "limits.memory", "memory available"  # what a step's memory is held against
_REMEDIES = {
    LIMIT: "raise limits.memory, or take a smaller model",
    AVAILABLE: "free memory, take a smaller model, or build on a larger machine",
}
# Memory estimates of conversions from 0.6 to 3.8 billion parameters were up to 1.24 times what was used, and never far under it.
OVER, UNDER, ASIDE = 1.25, 1.15, 500_000_000
TIMED = ("latency_ratio", "consistency", "peak_memory")
BOUNDS = {"same_top": (0, 1), "cosine": (-1, 1), "flip_rate": (0, 1), "consistency": (1, math.inf)}  # of values; p95/p50 is ≥ 1
GROUPS = (32, 64, 128)  # group sizes that some backend has


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """`subject`: the key, step or resource that it speaks of. `certain`: it cannot pass; else it may not."""

    subject: str
    certain: bool
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A file system that will be written to: one path on it, bytes that this takes at the most, and bytes free."""

    path: str
    writes: int
    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    memory: Memory
    disks: tuple[Disk, ...]


def room(project: Project, found: Forecast) -> Room:
    """What this machine has for what is expected. Objects go to the store; bundles are copied to dist/ beside that."""
    paths = existing(project.store.root), os.getcwd()
    store, root = (os.stat(path).st_dev for path in paths)
    places = {root: paths[1], store: paths[0]}
    most = writes(found.prospects, store, root)
    disks = (Disk(path=places[device], writes=most[device], free=free(places[device])) for device in dict.fromkeys((store, root)))
    return Room(memory=memory(), disks=tuple(disks))


def writes(prospects: Sequence[Prospect], store: int, root: int) -> dict[int, int]:
    """Device → bytes that these steps take there at the most, one after the other, where store and project lie on these devices."""
    taken, most = Counter[int](), Counter[int]()
    for step in prospects:
        amount = step.makes.bytes or 0
        if step.will in (RUN, DEPENDS):
            taken[store] += amount
            most[store] = max(most[store], taken[store] + (step.scratch.bytes or 0))
        if step.will in (RUN, DEPENDS, RESTORE) and (
            store != root or step.verb == "package"
        ):  # apart, build/ takes copies, not links
            taken[root] += amount
        most |= taken
    return most


def findings(found: Forecast, here: Room) -> list[Finding]:
    """What cannot or may not pass, certain ones first."""
    parts = (_refusals(found), _toolchains(found), _weights(found), _gates(found), _memory(found, here), _disks(here))
    return sorted((finding for part in parts for finding in part), key=lambda finding: not finding.certain)


def largest(found: Forecast, here: Room) -> tuple[int, str] | None:
    """(parameters, what binds) of the largest model of this shape that every limit leaves room for; None where none fits."""
    facts, choice = found.facts, found.choice
    if facts is None or not sum(facts.parameters.values()):
        return None
    limits = [
        (here.memory.available, f"{human(here.memory.available)} of memory available", _peak),
        (
            here.disks[0].free,
            f"{human(here.disks[0].free)} free on the disk",
            lambda b, c: b.artifact + c.artifact + _packing(choice, c),
        ),
    ]
    if choice.weights_limit:
        limits.append(
            (
                choice.weights_limit,
                f"package.limits.weights {human(choice.weights_limit)}",
                lambda b, c: choice.copies.bundle * c.artifact,
            )
        )
    if choice.memory_limit:
        limits.append((choice.memory_limit, f"limits.memory {human(choice.memory_limit)}", _peak))
    factor, binds = min((_largest_factor(facts, choice, limit, takes), name) for limit, name, takes in limits)
    return (int(sum(facts.parameters.values()) * factor), binds) if factor else None


def _packing(choice: Choice, candidate: Estimate) -> int:
    """Bytes of disk that packing takes at the most, with what it delivers."""
    makes, scratch = choice.packed(candidate.artifact)
    return makes + max(makes, scratch)


def _peak(baseline: Estimate, candidate: Estimate) -> int:
    return int(max(baseline.making, baseline.running, candidate.making, candidate.running) * UNDER) + ASIDE


def _largest_factor(facts: ModelFacts, choice: Choice, limit: int, takes: Callable[[Estimate, Estimate], int]) -> float:
    """By how much every dimension-dependent number of the facts may grow; 0 where nothing is small enough. By bisection."""

    def fits(factor: float) -> bool:
        return takes(*choice.estimates(_scaled(facts, factor))) <= limit

    high = 1.0
    while fits(high):
        high *= 2
    low = 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _scaled(facts: ModelFacts, factor: float) -> ModelFacts:
    """The same shape with `factor` times the elements; tokenizer, vocabulary and graph stay."""
    return replace(
        facts,
        parameters={dtype: int(count * factor) for dtype, count in facts.parameters.items()},
        weights={reader: int(count * factor) for reader, count in facts.weights.items()},
        bytes=int(facts.bytes * factor),
        largest=int(facts.largest * factor),
    )


# -- findings -----------------------------------------------------------------------------------------------------------
def _refusals(found: Forecast) -> Iterator[Finding]:
    if found.refused:
        yield Finding(subject="model.source", certain=True, message=found.unknown)
    choice, facts = found.choice, found.facts
    quantized = {"scheme": choice.scheme, **choice.parameters}
    asked: dict[str, Mapping[str, Any]] = {"convert": {}, "quantize": quantized, "choose": quantized}
    for step in found.prospects:
        if (
            facts
            and step.will in (RUN, DEPENDS)
            and step.verb in asked
            and (reason := choice.backend.refuse(facts, asked[step.verb]))
        ):
            yield Finding(subject=step.name, certain=True, message=f"{choice.framework} refuses this model: {reason}")
            break
    for step in found.prospects:
        if step.refused:
            yield Finding(subject=step.name, certain=True, message=f"these very measurements were judged already: {step.refused}")


def _toolchains(found: Forecast) -> Iterator[Finding]:
    for wanted in found.toolchains if offline() else ():
        if wanted.will != RUN:
            continue
        message = f"it is not installed, and nothing may be downloaded ({OFFLINE}=1); with a network: edgebuild toolchain install {wanted.name}"
        yield Finding(subject=f"toolchain:{wanted.name}", certain=True, message=message)


def _weights(found: Forecast) -> Iterator[Finding]:
    choice, limit = found.choice, found.choice.weights_limit
    if limit is None or found.candidate.bytes is None:
        return
    expected = replace(found.candidate, bytes=found.candidate.bytes * choice.copies.bundle)
    low, high = _span(expected)
    if high <= limit:
        return
    twice = f" ({choice.copies.bundle} formats)" if choice.copies.bundle > 1 else ""
    message = f"the weights in the bundle{twice}, {about(expected)}, against a limit of {human(limit)}"
    yield Finding(subject="package.limits.weights", certain=low > limit, message=f"{message}: {_instead(found, limit)}")


def _instead(found: Forecast, limit: int) -> str:
    """What of this backend would fit, the largest of it; and a model that would."""
    choice, facts = found.choice, found.facts
    if facts is None:
        return "choose a smaller scheme or model, or raise the limit"
    fitting = [
        f"quantize: {{{text}}} would fit (about {human(size)})"
        for size, text in _sizes(choice, facts)
        if size * (1 + SIZE_MARGIN) <= limit
    ]
    parts = [fitting[-1] if fitting else f"no scheme of {choice.framework} fits"]
    factor = _largest_factor(facts, choice, limit, lambda baseline, candidate: candidate.artifact * choice.copies.bundle)
    if parameters := int(sum(facts.parameters.values()) * factor):
        parts.append(f"a model of about {count(parameters)} parameters fits as it is quantized now")
    return "; ".join([*parts, "or raise the limit"])


def _sizes(choice: Choice, facts: ModelFacts) -> list[tuple[int, str]]:
    """(bytes in the bundle, how it is written) of every scheme and group size of the backend, ascending."""
    found = []
    for scheme, group, parameters in settings(choice.backend, choice.parameters, choice.calibrated):
        size = choice.backend.estimate(facts, scheme, parameters, choice.available).artifact * choice.copies.bundle
        found.append((size, f"scheme: {scheme}" + (f", group_size: {group}" if group else "")))
    return sorted(found)


def settings(backend: Backend, kept: Mapping[str, Any], calibrated: bool) -> Iterator[tuple[str, int | None, Mapping[str, Any]]]:
    """(scheme, group size, parameters) of every scheme and group size of a backend, as far as `kept` parameters have a meaning."""
    for scheme, keys in backend.SCHEMES.items():
        given = {key: value for key, value in kept.items() if key in keys and key != "group_size"}
        for group in (None, *(GROUPS if "group_size" in keys else ())):
            try:
                parameters = backend.parameters(scheme, given if group is None else {**given, "group_size": group}, calibrated)
            except ValueError:
                continue  # not one of this backend's
            if group is not None or "group_size" not in parameters:  # a default group is one of those that follow
                yield scheme, group, parameters


def _gates(found: Forecast) -> Iterator[Finding]:
    for metric, gate in sorted(found.choice.gates.items()):
        if gate.get("waive"):
            continue
        subject = f"gates.{metric}"
        least, most = gate.get("min"), gate.get("max")
        low, high = BOUNDS.get(metric, (-math.inf, math.inf))
        if (least is not None and least > high) or (most is not None and most < low):
            bound = f"min {least:g}" if least is not None and least > high else f"max {most:g}"
            edge = f"at most {high:g}" if bound.startswith("min") else f"at least {low:g}"
            yield Finding(
                subject=subject, certain=True, message=f"{bound} cannot be reached: its values are {edge}; change the gate"
            )
        elif metric in TIMED and found.choice.not_measured:
            stops = ", and it is required: nothing would be packed" if gate.get("required") else ""
            message = f"will be INCONCLUSIVE{stops}: {found.choice.not_measured}; remove the gate, or build for a platform that is measured"
            yield Finding(subject=subject, certain=bool(gate.get("required")), message=message)
        elif metric == "weights_ratio":
            yield from _ratio(found, least, most)
        elif metric == "peak_memory" and most is not None and found.candidate.bytes and most < _span(found.candidate)[0]:
            message = f"max {human(most)} is below the weights alone, {about(found.candidate)}; raise it, or choose a smaller scheme or model"
            yield Finding(subject=subject, certain=True, message=message)


def _ratio(found: Forecast, least: float | None, most: float | None) -> Iterator[Finding]:
    if not found.baseline.bytes or found.candidate.bytes is None:
        return
    ratio = found.candidate.bytes / found.baseline.bytes
    exact = found.candidate.basis == found.baseline.basis == MEASURED
    low, high = (ratio, ratio) if exact else (ratio * (1 - SIZE_MARGIN), ratio * (1 + SIZE_MARGIN))
    shown = f"{'' if exact else 'about '}{ratio:.3g} ({about(found.candidate)} of {about(found.baseline)})"
    if most is not None and high > most:
        message = f"this scheme reaches {shown}, against max {most:g}: choose a smaller scheme, or raise max"
        yield Finding(subject="gates.weights_ratio", certain=low > most, message=message)
    if least is not None and low < least:
        message = f"this scheme reaches {shown}, against min {least:g}: choose a larger scheme, or lower min"
        yield Finding(subject="gates.weights_ratio", certain=high < least, message=message)


def _memory(found: Forecast, here: Room) -> Iterator[Finding]:
    running = [step for step in found.prospects if step.will in (RUN, DEPENDS) and step.memory.bytes]
    worst = max(running, key=lambda step: step.memory.bytes or 0, default=None)
    if worst is None or worst.memory.bytes is None:
        return
    least, most = bounds(worst.memory)
    wanted = Need(choice=found.choice, facts=found.facts, amount=worst.memory)
    for subject, limit in ((LIMIT, found.choice.memory_limit), (AVAILABLE, here.memory.available)):
        if limit is not None and most > limit:
            yield Finding(subject=subject, certain=least > limit, message=lacking(worst.name, wanted, subject, limit))


def bounds(peak: Amount) -> tuple[int, int]:
    """What a step takes at the least, so that it cannot run with less; and at the most."""
    assert peak.bytes is not None
    exact = peak.basis in (MEASURED, GIVEN)
    return (peak.bytes, peak.bytes) if exact else (int(peak.bytes / OVER), int(peak.bytes * UNDER) + ASIDE)


def lacking(name: str, wanted: Need, subject: str, limit: int) -> str:
    """That a step does not fit into a limit on memory, and what would."""
    estimated = wanted.amount.basis == ESTIMATED
    margin = f" (with a margin {human(bounds(wanted.amount)[1])})" if estimated else ""
    stem = name.partition(":")[0]
    parts = [
        f"{name} needs {about(wanted.amount)} at its peak{margin}, against {human(limit)}"
        f"{' available' if subject == AVAILABLE else ''}: {_REMEDIES[subject]}{remedy(wanted, limit)}"
    ]
    if estimated:
        parts.append(
            f"where the estimate is wrong, limits.estimates: {{{'quantize' if stem == 'choose' else stem}: SIZE}} says better"
        )
    return "; ".join(parts)


def remedy(wanted: Need, limit: int) -> str:
    """` (about 2.1 billion parameters fit)`: of the largest model of this shape whose every step fits; empty where that says nothing."""
    count_ = sum(wanted.facts.parameters.values()) if wanted.facts else 0
    if not wanted.facts or not count_ or wanted.amount.basis != ESTIMATED:
        return ""
    factor = _largest_factor(wanted.facts, wanted.choice, limit, _peak)
    return f" (about {count(count_ * factor)} parameters fit)" if 0 < factor < 1 else ""


def _disks(here: Room) -> Iterator[Finding]:
    for disk in here.disks:
        if disk.writes * (1 + SIZE_MARGIN) > disk.free:
            message = f"about {human(disk.writes)} will be written to the disk of {disk.path}, which has {human(disk.free)} free: free space, or set EDGEBUILD_STORE to another disk"
            yield Finding(subject="disk", certain=disk.writes * (1 - SIZE_MARGIN) > disk.free, message=message)


def _span(size: Amount) -> tuple[float, float]:
    assert size.bytes is not None
    margin = 0 if size.basis == MEASURED else SIZE_MARGIN
    return size.bytes * (1 - margin), size.bytes * (1 + margin)


def about(amount: Amount) -> str:
    """An amount for people: `about 2.5 GB` where it is an estimate."""
    if amount.bytes is None:
        return "unknown"
    return human(amount.bytes) if amount.basis in (MEASURED, GIVEN) else f"about {human(amount.bytes)}"


def count(number: float) -> str:
    """A number of parameters for people."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
