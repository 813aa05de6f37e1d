"""What a target's wishes come to: the framework that it names, or the first that rows prefer and that really takes its model.

A row is refused by what is so of its framework, by a backend that edgebuild does not have, by the backend's own refusal, and
by the target's scheme, bundle kind and limits. Pure, and the same on every machine.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgebuild.backend import Backend, ModelFacts
from edgebuild.errors import did_you_mean
from edgebuild.select import AUTO, Candidate, Choice, Preferences, Refused
from edgebuild.units import human

Recipes = Mapping[str, Mapping[str, Any]]
SIZE_MARGIN = 0.05  # of an estimated size


class Misfit(ValueError):
    """`key`: of the target file, to which the sentence belongs; `reason` is the sentence without advice for who named it."""

    def __init__(self, key: str, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.key, self.reason = key, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a target asks for, as far as its framework has a say in it.

    `facts` are None where they are not known, or not asked for: then a named framework's refusal is left to the worker.
    `written`: the quantize keys of the target itself, not its platform's. `kind_refuses`: framework → why the bundle kind does
    not take its artifacts, else empty; `unfit`: framework, scheme → why the model cannot go on the device. `memory` and `weights` are the device's and the bundle's limits, in bytes.
    """

    framework: str
    task: str
    format: str
    facts: ModelFacts | None
    hardware: str
    prefer: str = ""
    scheme: str = "none"
    quantize: Mapping[str, Any] = field(default_factory=dict)
    written: Collection[str] = ()
    calibrated: bool = False
    kind_refuses: Callable[[str], str] = lambda framework: ""
    unfit: Callable[[str, str], str] = lambda framework, scheme: ""
    copies: int = 1  # of the weights in the bundle
    memory: int | None = None
    weights: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A framework with its reason, and what is quantized how.

    `recipes`: rung of the ladder → quantize parameters with the backend's defaults filled in; where there is one recipe alone its
    name is empty, and there is none for the scheme none.
    """

    choice: Choice
    scheme: str
    recipes: Recipes

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Those of the first recipe."""
        return _first(self.recipes)


def choose(wanted: Wanted, preferences: Preferences, backends: Mapping[str, Backend]) -> Fit:
    """Raises Misfit where the named framework, or every one that a row names, does not fit."""
    if wanted.format == "safetensors":
        advice = "give the folder that holds its config.json and tokenizer"
        raise Misfit("model.source", "it is a lone file of weights", advice)
    if wanted.framework == AUTO:
        return _preferred(wanted, preferences, backends)
    if wanted.framework not in backends:
        known = sorted(name for name in backends if name != "fake")
        hint = did_you_mean(wanted.framework, known)
        raise Misfit("framework", f'no framework "{wanted.framework}"; there are: {", ".join(known)}, auto.{hint}')
    scheme, recipes = _quantized(wanted, wanted.framework, backends[wanted.framework], preferences)
    choice = Choice(framework=wanted.framework, reason="named by the target or its platform")
    return Fit(choice=choice, scheme=scheme, recipes=recipes)


def written(backend: Backend, scheme: str, parameters: Mapping[str, Any]) -> str:
    """`int8, method static`: as a target could say it, without what is off or empty, and without settings that no target has."""
    said = {key: parameters[key] for key in backend.SCHEMES.get(scheme, ()) if parameters.get(key)}
    return ", ".join([scheme, *(key if value is True else f"{key} {_word(value)}" for key, value in said.items())])


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_word, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A candidate that can be built; `tight`: why it is too large, else empty."""

    candidate: Candidate
    scheme: str
    recipes: Recipes
    tight: str


def _preferred(wanted: Wanted, preferences: Preferences, backends: Mapping[str, Backend]) -> Fit:
    """What is too large is taken only where nothing else is left: its limit then says so, with what would fit."""
    count = sum(wanted.facts.parameters.values()) if wanted.facts else 0
    found: list[_Found] = []
    refused: list[Refused] = []
    for one in preferences.candidates(wanted.hardware, wanted.task, wanted.prefer, count):
        try:
            found.append(_found(one, wanted, preferences, backends))
        except Misfit as error:
            refused.append(Refused(framework=one.framework, row=one.row, reason=error.reason))
    if not found:
        raise Misfit("framework", f"no framework takes it ({_reasons(refused)}); name one, or give another source")
    found.sort(key=lambda one: bool(one.tight))
    first, rest = found[0], [one for one in found[1:] if not one.tight]
    refused += [
        Refused(framework=one.candidate.framework, row=one.candidate.row, reason=one.tight) for one in found[1:] if one.tight
    ]
    unknown = "" if wanted.facts else "by its format and task alone: its headers are not here yet"
    choice = Choice(
        framework=first.candidate.framework,
        reason="; ".join(filter(None, (first.candidate.reason, first.tight, unknown))),
        runner_up=rest[0].candidate.framework if rest else "",
        runner_up_reason=rest[0].candidate.reason if rest else "",
        refused=tuple(refused),
        note=preferences.notes.get(wanted.hardware, ""),
    )
    return Fit(choice=choice, scheme=first.scheme, recipes=first.recipes)


def _reasons(refused: Iterable[Refused]) -> str:
    """Frameworks with one reason together, each named once."""
    found: dict[str, list[str]] = {}
    for one in refused:
        found.setdefault(one.reason.removeprefix(f"{one.framework} ").removesuffix("."), []).append(one.framework)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.items())


def _found(one: Candidate, wanted: Wanted, preferences: Preferences, backends: Mapping[str, Backend]) -> _Found:
    """Raises Misfit where it cannot be built."""
    if problem := _contradiction(one.framework, wanted, preferences):
        raise Misfit("framework", problem)
    if one.framework not in backends:
        raise Misfit("framework", f"edgebuild has no {one.framework} backend")
    backend = backends[one.framework]
    scheme, recipes = _quantized(wanted, one.framework, backend, preferences)
    tight = _too_large(wanted, backend, scheme, _first(recipes))
    return _Found(candidate=one, scheme=scheme, recipes=recipes, tight=tight)


def _first(recipes: Recipes) -> Mapping[str, Any]:
    return next(iter(recipes.values()), {})


def _contradiction(framework: str, wanted: Wanted, preferences: Preferences) -> str:
    facts = preferences.frameworks[framework]
    found = facts.contradict(wanted.hardware, preferences.kind(wanted.task))
    if found and wanted.hardware in facts.runs and wanted.facts:
        return f"{found}, and this one, for {wanted.task}, is {wanted.facts.architecture}"
    return found


def _too_large(wanted: Wanted, backend: Backend, scheme: str, parameters: Mapping[str, Any]) -> str:
    """Why the artifact fits neither the bundle's limit nor the device's memory, else empty."""
    if wanted.facts is None:
        return ""
    size = backend.estimate(wanted.facts, scheme, parameters, 0).artifact
    if wanted.weights and size * wanted.copies * (1 - SIZE_MARGIN) > wanted.weights:
        return f"its weights in the bundle, about {human(size * wanted.copies)}, exceed the limit of {human(wanted.weights)}"
    if wanted.memory and size * (1 - SIZE_MARGIN) > wanted.memory:
        return f"its weights alone, about {human(size)}, exceed the device's memory of {human(wanted.memory)}"
    return ""


# -- one framework ------------------------------------------------------------------------------------------------------
def _quantized(wanted: Wanted, name: str, backend: Backend, preferences: Preferences) -> tuple[str, Recipes]:
    """(scheme, recipes) of what this framework makes of the model. Raises Misfit for what it lacks."""
    if wanted.format not in backend.NEEDS:
        takes = " and ".join(backend.NEEDS)
        message = f"{name} takes a source of format {takes}, but this one is {wanted.format}"
        raise Misfit("model.source", message, "name another framework or give another source")
    if reason := wanted.kind_refuses(name):
        raise Misfit("package.kind", reason)
    if wanted.facts and (reason := backend.refuse(wanted.facts, {})):
        raise Misfit("model.source", f"{name} refuses it: {reason}")
    scheme, recipes = _settled(wanted, name, backend, preferences)
    if reason := wanted.unfit(name, scheme):
        raise Misfit("platform", reason)
    return scheme, recipes


def _settled(wanted: Wanted, name: str, backend: Backend, preferences: Preferences) -> tuple[str, Recipes]:
    """The scheme that is named, or the first preferred one that this framework takes. Raises Misfit."""
    already = wanted.facts.quantized if wanted.facts and wanted.scheme == AUTO else ""
    if wanted.scheme == "none" or already:
        if wanted.written:
            why = f"the model is quantized already ({already})" if already else "scheme is none"
            raise Misfit("quantize", f"{why}, so the other keys have no meaning; remove them or name a scheme")
        return "none", {}
    options = [{"scheme": wanted.scheme}] if wanted.scheme != AUTO else preferences.settings(name, wanted.task)
    problems = []
    for option in options:
        try:
            return option["scheme"], _recipes(wanted, name, backend, **option)
        except Misfit as error:
            problems.append(error)
    if not problems:
        problems = [
            Misfit("quantize.scheme", f"no scheme of {name} is preferred; name one of: {', '.join(sorted(backend.SCHEMES))}")
        ]
    raise problems[0]


def _recipes(wanted: Wanted, name: str, backend: Backend, scheme: str, **preferred: Any) -> Recipes:
    if scheme not in backend.SCHEMES:
        known = sorted(backend.SCHEMES)
        message = f"{name} has no scheme {scheme}; it has: {', '.join(known)}, none.{did_you_mean(scheme, known)}"
        raise Misfit("quantize.scheme", message)
    given = {key: value for key, value in preferred.items() if key in backend.SCHEMES[scheme]} | dict(wanted.quantize)
    for key in wanted.quantize:
        if key not in backend.SCHEMES[scheme]:
            if key not in wanted.written:  # a default of the platform for another scheme
                del given[key]
                continue
            taken = ", ".join(backend.SCHEMES[scheme]) or "nothing"
            raise Misfit(f"quantize.{key}", f"{name} {scheme} does not read it; it reads: {taken}")
    walked = wanted.calibrated and "method" in backend.SCHEMES[scheme] and given.get("method", AUTO) == AUTO
    walked = walked and given.keys().isdisjoint(("max_drop", "passes"))  # a search of its own; recipes of one's own
    rungs = {rung: {**given, "method": rung} for rung in backend.LADDER} if walked else {}
    try:
        recipes = {rung: backend.parameters(scheme, asked, wanted.calibrated) for rung, asked in (rungs or {"": given}).items()}
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        raise Misfit(f"quantize.{key}", message) from error
    if wanted.facts and (reason := backend.refuse(wanted.facts, {"scheme": scheme, **_first(recipes)})):
        raise Misfit("quantize", f"{name} refuses it: {reason}")
    return recipes
