"""`edgebuild assess`: what a model is, by its headers, and what each backend would make of it; for people, or JSON (schemas/assessment.json)."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from edgebuild import source
from edgebuild.backend import Backend, ModelFacts
from edgebuild.backends import BACKENDS
from edgebuild.errors import StepFailed, UserError, shown
from edgebuild.facts import facts_of
from edgebuild.feasible import settings
from edgebuild.resources import memory
from edgebuild.target import COMMIT, Source, parse_source
from edgebuild.units import human

OPERATORS = 8  # of an ONNX model that are shown to people; JSON has all


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What one scheme makes of the model, in bytes; `memory`: at the peak of building it here. `refused`: why it cannot, else empty."""

    scheme: str
    group_size: int | None
    artifact: int | None
    memory: int | None
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Takes:
    """A backend: why it cannot take the model, else empty; and every scheme that it has for it."""

    backend: str
    refused: str
    sizes: tuple[Size, ...] = ()


def assessment(model: str, as_json: bool) -> str:
    """What to print. Raises UserError and StepFailed."""
    facts = look(model)
    available = memory().available
    found = [_takes(name, BACKENDS[name], facts, available) for name in sorted(BACKENDS) if name != "fake"]
    if as_json:
        return json.dumps(_json(model, facts, found), indent=1, ensure_ascii=False)
    return "\n".join([*_shown(facts), *(line for one in found for line in _shown_backend(one))])


def look(model: str) -> ModelFacts:
    """The facts of a path, `package:…` or `hf:…`, read from headers alone. Raises UserError and StepFailed."""
    try:
        named = parse_source(model)
        if named.kind == "https":
            raise UserError("of an address nothing is read before a build fetches it; give a local copy, or hf:ORG/REPO@COMMIT")
        if named.kind == "hf" and COMMIT.match(named.commit):
            return _repository(named)
        found = source.find(".", model, "", "")  # a commit that is none is refused here
    except (ValueError, OSError) as error:
        raise UserError(f"{shown(model)}: {error}") from error
    return facts_of({role: Path(path) for role, path in found.files.items()})


def _repository(named: Source) -> ModelFacts:
    """As the cache has it; where that does not have all of it, by parts of its files."""
    from edgebuild import hub
    from edgebuild.peek import peek

    if here := hub.cached(named.name, named.commit, named.path):
        try:
            return facts_of(here)
        except StepFailed:
            pass  # an unfinished download
    with tempfile.TemporaryDirectory(prefix="edgebuild-assess-") as folder:
        return facts_of(peek(named.name, named.commit, named.path, Path(folder)))


def _takes(name: str, backend: Backend, facts: ModelFacts, available: int) -> Takes:
    if facts.format not in backend.NEEDS:
        return Takes(backend=name, refused=f"it takes {' and '.join(backend.NEEDS)}, and this is {facts.format}")
    if reason := backend.refuse(facts, {}):
        return Takes(backend=name, refused=reason)
    return Takes(backend=name, refused="", sizes=tuple(_sizes(backend, facts, available)))


def _sizes(backend: Backend, facts: ModelFacts, available: int) -> Iterator[Size]:
    baseline = backend.estimate(facts, "none", {}, available)
    least = max(baseline.making, baseline.running)
    yield Size(scheme="none", group_size=None, artifact=baseline.artifact, memory=least)
    for scheme, group, parameters in settings(backend, {}, calibrated=False):
        if reason := backend.refuse(facts, {"scheme": scheme, **parameters}):
            yield Size(scheme=scheme, group_size=group, artifact=None, memory=None, refused=reason)
            continue
        found = backend.estimate(facts, scheme, parameters, available)
        peak = max(least, found.making, found.running)
        yield Size(scheme=scheme, group_size=group, artifact=found.artifact, memory=peak)


def _json(model: str, facts: ModelFacts, found: list[Takes]) -> dict[str, Any]:
    values = facts.to_json()
    by_dtype: Mapping[str, int] = values.pop("parameters")
    return {
        "model": model,
        **values,
        "parameters": {"total": sum(by_dtype.values()), "by_dtype": by_dtype},
        "backends": [asdict(one) for one in found],
    }


# -- for people ---------------------------------------------------------------------------------------------------------
def _shown(facts: ModelFacts) -> Iterator[str]:
    for name, text in _rows(facts):
        if text:
            yield f"{name:<14} {text}"


def _rows(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    yield "format", f"{facts.format}, {human(facts.bytes)}"
    kind = f" ({facts.model_type})" if facts.model_type and facts.model_type != facts.architecture else ""
    yield "architecture", facts.architecture + kind + (", with Python code, which is never run" if facts.custom_code else "")
    total = sum(facts.parameters.values())
    by_dtype = ", ".join(f"{dtype} {count:,}" for dtype, count in facts.parameters.items())
    yield "parameters", f"{total:,}: {by_dtype}" if total else "none"
    yield "quantized", facts.quantized and f"already: {facts.quantized}"
    yield "positions", ", ".join(sorted({f"scaled by {shown(str(one['rope_type']))}" for one in facts.scaled}))
    numbers = {
        "layers": facts.layers,
        "heads": facts.heads,
        "context": facts.context,
        "hidden": facts.hidden,
        "vocabulary": facts.vocabulary,
        "experts": facts.experts,
    }
    yield "shape", ", ".join(f"{name} {number:,}" for name, number in numbers.items() if number is not None)
    yield "embeddings", {True: "tied to the head", False: "apart from the head", None: ""}[facts.tied_embeddings]
    yield "opsets", ", ".join(f"{shown(name or 'ai.onnx')} {version}" for name, version in facts.opsets.items())
    most = sorted(facts.operators.items(), key=lambda one: (-one[1], one[0]))
    more = f", and {len(most) - OPERATORS} more" if len(most) > OPERATORS else ""
    yield "operators", ", ".join(f"{shown(name)}×{count}" for name, count in most[:OPERATORS]) + more
    for name, values in (("inputs", facts.inputs), ("outputs", facts.outputs)):
        yield name, ", ".join(f"{shown(one['name'])} {one['dtype']} {_shape(one['shape'])}" for one in values)
    yield "licence", facts.licence or "not stated in its files"


def _shape(shape: list[int | str | None]) -> str:
    return "[" + ", ".join("?" if one is None else shown(str(one)) for one in shape) + "]"


def _shown_backend(takes: Takes) -> Iterator[str]:
    if takes.refused:
        yield f"{takes.backend:<14} cannot: {takes.refused}"
        return
    yield f"{takes.backend:<14} {'takes it as':<26} {'weights':<15} memory to build"
    for reason, sizes in groupby(takes.sizes, lambda size: size.refused and (size.scheme, size.refused)):
        alike = list(sizes)
        if reason:
            yield f"{'':<14} {_name(alike):<26} cannot: {alike[0].refused}"
            continue
        for size in alike:
            yield f"{'':<14} {_name([size]):<26} {f'about {human(size.artifact or 0)}':<15} about {human(size.memory or 0)}"


def _name(sizes: Sequence[Size]) -> str:
    """`int4, groups of 32`: of one scheme, with the groups of each."""
    groups = ", ".join(str(size.group_size) for size in sizes if size.group_size)
    return sizes[0].scheme + (f", groups of {groups}" if groups else "")
