"""One file, many targets: the combinations of a `matrix`, their names, and the document that each of them stands for."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from edgebuild.units import name_problem

MAX_TARGETS = 1_000
_PART = re.compile(r"[a-z0-9._-]+\Z")
Texts = Mapping[str, Sequence[str]]  # dotted key → each of its values, as written
Places = Mapping[str, int]  # dotted key → which of its values


def problems(file: str, given: Mapping[str, Any], texts: Texts) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path, message) of everything for which a matrix cannot be used: `given` is the document that it stands in."""
    for key in texts:
        if _holds(given, key.split(".")):
            yield ("matrix", key), f"stands twice: {key} is given outside of the matrix too; remove one of the two"
    bad = [(key, place) for key, values in texts.items() for place, text in enumerate(values) if not _PART.match(part(text))]
    for key, place in bad:
        rule = "such names hold a-z, 0-9, '.', '_' and '-' alone"
        yield ("matrix", key, place), f"{json.dumps(part(texts[key][place])[:60])} cannot be part of a target's name; {rule}"
    count = prod(len(values) for values in texts.values())
    if count > MAX_TARGETS:
        yield ("matrix",), f"makes {count:,} targets, more than {MAX_TARGETS:,}; vary fewer keys, or write several files"
    if bad or count > MAX_TARGETS:
        return
    seen: set[str] = set()
    for places in combinations(texts):
        name = target_name(file, texts, places)
        if name in seen:
            yield ("matrix",), f"two of its targets would be named {name}; rename what the values name"
            return
        if problem := name_problem(name):
            yield ("matrix",), f"{name[:100]} cannot be a target's name: {problem}; rename the file, or what the values name"
            return
        seen.add(name)


def combinations(texts: Texts) -> Iterator[Places]:
    """Each choice of one value for every key; the last key varies fastest."""
    for places in product(*(range(len(values)) for values in texts.values())):
        yield dict(zip(texts, places, strict=True))


def target_name(file: str, texts: Texts, places: Places) -> str:
    """NAME-VALUE[-VALUE…], in the order in which the keys stand in the file."""
    return "-".join([file, *(part(texts[key][place]) for key, place in places.items())])


def part(text: str) -> str:
    """What a value gives to a name: itself in lower case; of a path or address the last part, without `@COMMIT`."""
    return text.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def document(given: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """The document with this choice's values at their keys, and without the matrix."""
    made = {key: value for key, value in given.items() if key != "matrix"}
    for key, place in places.items():
        made = _put(made, key.split("."), given["matrix"][key][place])
    return made


def _put(value: Any, path: Sequence[str], leaf: Any) -> Any:
    """A copy with `leaf` at `path`. What should be a map and is none stays as it is: the schema speaks of it."""
    if not path:
        return leaf
    if not isinstance(value, Mapping):
        return value
    return {**value, path[0]: _put(value.get(path[0], {}), path[1:], leaf)}


def _holds(value: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True
