"""`framework: auto`: which frameworks are preferred, in which order, by the rows of preferences.yaml. Knows no backend.

What cannot be of what is preferred, `fit` finds out. Nothing depends on what is installed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
_PLACES = ("second choice", "third choice", "later choice")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """For which hardware, kinds of models and numbers of parameters it holds; empty: for all of them.

    `because` speaks of its first framework, of all where they are `equal`.
    """

    name: str
    frameworks: Sequence[str]
    because: str
    hardware: Sequence[str] = ()
    kinds: Sequence[str] = ()
    above: int = 0
    equal: bool = False

    def candidates(self) -> Iterator["Candidate"]:
        for place, framework in enumerate(self.frameworks):
            because = self.because if self.equal or not place else _PLACES[min(place, len(_PLACES)) - 1]
            yield Candidate(framework=framework, row=self.name, because=because)

    def applies(self, hardware: str, kind: str, parameters: int) -> bool:
        fits = (not self.hardware or hardware in self.hardware) and (not self.kinds or kind in self.kinds)
        return fits and (not self.above or parameters > self.above)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is so of a framework: its name, the hardware and the kinds of models that it runs, and why it runs no others."""

    name: str
    runs: Sequence[str]
    kinds: Sequence[str] = ()
    only: str = ""
    elsewhere: str = "there is no runtime for it"
    never: Mapping[str, str] = field(default_factory=dict)

    def contradict(self, hardware: str, kind: str) -> str:
        """Why what the framework makes cannot run there, else empty."""
        if hardware not in self.runs:
            return self.never.get(hardware, self.elsewhere)
        return self.only if self.kinds and kind not in self.kinds else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A framework, the row that names it, and the reason which that gives."""

    framework: str
    row: str
    because: str

    @property
    def reason(self) -> str:
        return f"{self.because} ({self.row})" if self.row else self.because


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A framework that a row names, and why it was not taken."""

    framework: str
    row: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which framework, why, and which would have been next (empty where there is none); `note` is said of the hardware."""

    framework: str
    reason: str
    runner_up: str = ""
    runner_up_reason: str = ""
    refused: Sequence[Refused] = ()
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "framework": self.framework,
            "reason": f"{self.reason}; {self.note}" if self.note else self.reason,
            "runner_up": self.runner_up,
            "refused": [{"framework": one.framework, "row": one.row, "reason": one.reason} for one in self.refused],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """preferences.yaml: `tasks` is task → kind of model, `prefer` word → groups of equals, best first."""

    rows: Sequence[Row]
    tasks: Mapping[str, str]
    prefer: Mapping[str, Sequence[Sequence[str]]]
    schemes: Mapping[str, Sequence[Mapping[str, Any]]]
    frameworks: Mapping[str, Facts]
    notes: Mapping[str, str]

    def kind(self, task: str) -> str:
        return self.tasks.get(task, "other")

    def candidates(self, hardware: str, task: str, prefer: str, parameters: int) -> list[Candidate]:
        """Every framework that a row names which applies, once, the first row's first; what is preferred before all that."""
        kind = self.kind(task)
        named = [one for row in self.rows if row.applies(hardware, kind, parameters) for one in row.candidates()]
        if prefer:
            ranks = {framework: rank for rank, group in enumerate(self.prefer[prefer]) for framework in group}
            named += [Candidate(framework=framework, row="", because="") for framework in ranks]
            named.sort(key=lambda one: ranks.get(one.framework, len(ranks)))
            named = [_preferred(one, prefer) if one.framework in ranks else one for one in named]
        return _once(named)

    def settings(self, framework: str, task: str) -> list[dict[str, Any]]:
        """What `quantize: {scheme: auto}` may mean for a framework, best first."""
        kind = self.kind(task)
        return [
            {key: value for key, value in one.items() if key != "kinds"}
            for one in self.schemes.get(framework, ())
            if kind in one.get("kinds", (kind,))
        ]


def _preferred(one: Candidate, prefer: str) -> Candidate:
    because = f"preferred for {prefer}" + (f", and {one.because}" if one.because else "")
    return Candidate(framework=one.framework, row=one.row or "requirements matrix", because=because)


def _once(named: Iterable[Candidate]) -> list[Candidate]:
    """The first of each framework."""
    found: dict[str, Candidate] = {}
    for one in named:
        found.setdefault(one.framework, one)
    return list(found.values())


def preferences(document: Mapping[str, Any]) -> Preferences:
    """From preferences.yaml as it is read. Raises TypeError and KeyError where it is not as it should be."""
    return Preferences(
        rows=tuple(Row(**row) for row in document["rows"]),
        tasks={task: kind for kind, tasks in document["kinds"].items() for task in tasks},
        prefer=document["prefer"],
        schemes=document["schemes"],
        frameworks={name: Facts(**facts) for name, facts in document["frameworks"].items()},
        notes=document["notes"],
    )
