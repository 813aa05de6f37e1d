"""A YAML file as untrusted text: its value, the line of every key, and what a schema says of it. Alone knows yaml and jsonschema.

YAML is read from parser events, in one pass: aliases, anchors, tags, duplicate keys, deep nesting and scalars that YAML
1.1 and 1.2 read differently are refused before anything is built from them (a 200 kB file of '[' crashes libyaml's
loader; a 306-byte alias bomb takes gigabytes).
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jsonschema
import referencing.jsonschema
import yaml

from edgebuild import matrix, shipped
from edgebuild.errors import TargetError, did_you_mean, shown

MAX_BYTES, MAX_DEPTH, MAX_NODES = 256 * 1024, 32, 20_000
LONGEST = 100  # characters; what looks like a number that far is one: the patterns take the square of a length
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})\Z")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+\Z")
_AMBIGUOUS = re.compile(
    r"""( y|yes|n|no|on|off|true|false|null            # booleans of YAML 1.1, in any case
        | [-+]?0[0-9_]+ | [-+]?0[xob][0-9a-f_]+        # octal, hexadecimal, binary
        | [-+]?[0-9_]*\.?[0-9_]*e[-+]?[0-9]+           # exponents
        | [-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?        # sixties
        | [-+]?(\.[0-9]+ | [0-9]+\.) | \+[0-9][0-9.]*  # numbers that lack a digit, or with a plus
        | [-+]?[0-9][0-9_]*_[0-9_]* | [0-9]{20,}       # 1_000, and what no 64-bit integer holds
        | [-+]?\.(inf|nan)
        | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([t\ ].*)?     # dates
    )\Z""",
    re.VERBOSE | re.IGNORECASE,
)
Path = tuple[str | int, ...]


class Document:
    """A YAML file: its value, and the line on which each key stands."""

    def __init__(self, path: str, file: str) -> None:
        self.file = file
        self.lines: dict[Path, int] = {}
        self._raw: dict[Path, str] = {}
        self.value: Any = self._build(_text(path, file))

    def problem(self, path: Path, message: str) -> str:
        """`FILE:LINE: KEY: message`, with the line of the nearest key that is there."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known in self.lines else ""
        key = ".".join(shown(str(part)) for part in path)
        return f"{self.file}{line}: {key + ': ' if key else ''}{message}"

    def mapping(self) -> dict[str, Any]:
        """The value as a map. Raises TargetError where it is none."""
        if not isinstance(self.value, dict):
            raise TargetError(
                [f"{self.file}: must hold a map of keys, such as `model:` and `platform:`; see the README's example"]
            )
        return self.value

    def text(self, *path: str | int) -> str:
        """A scalar as it is written, without quotes."""
        value: Any = self.value
        for part in path:
            value = value[part]
        return self._raw.get(path, str(value))

    def variant(self, places: Mapping[str, int]) -> "Document":
        """The document that one choice of a matrix stands for; its values keep the lines on which they stand."""
        made = copy.copy(self)
        made.lines = {path: line for path, line in self.lines.items() if len(path) < 2 or path[0] != "matrix"}
        made._raw = dict(self._raw)
        made.value = matrix.document(self.mapping(), places)
        for key, place in places.items():
            value, path = ("matrix", key, place), tuple(key.split("."))
            for length in range(1, len(path)):
                made.lines.setdefault(path[:length], self.lines[value])
            made.lines[path] = self.lines[value]
            if value in self._raw:
                made._raw[path] = self._raw[value]
        return made

    def check(self, schema: str, key: str = "") -> None:
        """Raises TargetError with every way in which the value (or what it has at `key`) is not what the schema says."""
        value = self.mapping()
        above = (key,) if key else ()
        found = _validator(schema).iter_errors(value[key] if key else value)
        errors = sorted(found, key=lambda error: self.lines.get((*above, *error.absolute_path), 0))
        problems = list(dict.fromkeys(problem for error in errors for problem in self._explain(error, above)))
        if problems:
            raise TargetError(problems)

    def _explain(self, error: Any, above: Path) -> list[str]:
        path: Path = (*above, *error.absolute_path)
        schema, value = error.schema, error.instance
        expected = schema.get("expected", "")
        if error.validator == "additionalProperties":
            known = list(schema.get("properties", ()))
            takes = schema.get("known", f"known here: {', '.join(known)}")
            unknown = [key for key in value if key not in known]
            return [self.problem((*path, key), f"unknown key; {takes}.{did_you_mean(key, known)}") for key in unknown]
        if error.validator == "required":
            missing = [key for key in error.validator_value if key not in value]
            return [self.problem((*path, key), "missing; add it" + _hint(schema, key)) for key in missing]
        if error.validator == "enum":
            choices = [str(choice) for choice in error.validator_value]
            one_of = f"is {show(value)}, but must be one of: {', '.join(choices)}."
            return [self.problem(path, one_of + (did_you_mean(value, choices) if isinstance(value, str) else ""))]
        if error.validator == "minProperties" and not expected:
            return [self.problem(path, "is empty; give min, max, required or waive")]
        raw = self._raw.get(path)
        fits = raw is not None and re.search(schema.get("pattern", ""), raw) is not None  # quotes alone would mend it
        raw = raw and shown(raw)
        if error.validator == "type" and "string" in str(error.validator_value) and fits and not isinstance(value, str):
            what = "a boolean" if isinstance(value, bool) else "a number"
            return [self.problem(path, f'{raw} is {what}; where text is meant, write it in quotes: "{raw}"')]
        if error.validator == "type" and isinstance(value, str) and raw is None and "number" in str(error.validator_value):
            return [self.problem(path, f"is text, but must be {expected or 'a number'}; write it without quotes")]
        if raw and not isinstance(value, str) and expected and "string" in str(schema.get("type")):
            return [self.problem(path, f"must be {expected}, in quotes where YAML would take it for a number; {raw} is one")]
        kinds = {
            "object": "a map of keys",
            "array": "a list",
            "boolean": "true or false",
            "string": "text",
            "integer": "a whole number",
        }
        return [
            self.problem(
                path, f"must be {expected or kinds.get(str(error.validator_value), error.validator_value)}, not {show(value)}"
            )
        ]

    def _build(self, text: str) -> Any:
        """The document's value, from parser events. Raises TargetError."""
        stack: list[tuple[Any, Path, list[str]]] = []  # (container, its path, the key that waits for its value)
        documents, nodes, result = 0, 0, None
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                line = event.start_mark.line + 1 if event.start_mark else 1
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        raise self._refuse(line, "a second document begins here; one file holds one target")
                    continue
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    raise self._refuse(line, "anchors (&) and aliases (*) are not allowed; write the value out")
                if isinstance(event, yaml.CollectionEndEvent):
                    stack.pop()
                    continue
                if not isinstance(event, yaml.NodeEvent):
                    continue
                nodes += 1
                if nodes > MAX_NODES:
                    raise self._refuse(line, f"more than {MAX_NODES} values; a target needs a few dozen")
                if tag := getattr(event, "tag", None):
                    raise self._refuse(line, f"tags such as {show(tag)} are not allowed; write the plain value")
                if len(stack) >= MAX_DEPTH:
                    raise self._refuse(line, f"nested deeper than {MAX_DEPTH} levels")
                value = self._place(event, stack, line)
                if not stack and result is None:
                    result = value
                if isinstance(event, yaml.CollectionStartEvent):
                    stack.append((value, self._path, []))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            if "nesting depth" in str(error.problem):  # libyaml's own limit, where it has one
                raise self._refuse(line, f"nested deeper than {MAX_DEPTH} levels") from error
            raise self._refuse(
                line, f"not valid YAML: {error.problem or error.context}; check indentation, colons and quotes"
            ) from error
        except yaml.YAMLError as error:  # the reader: characters that YAML does not allow
            raise TargetError(
                [f"{self.file}: not valid YAML: it holds a character that YAML does not allow (a control character?)"]
            ) from error
        return result

    def _place(self, event: Any, stack: list[tuple[Any, Path, list[str]]], line: int) -> Any:
        """Read one node and put it where it belongs: as a key, under the key that waits, or into a list."""
        container, above, waiting = stack[-1] if stack else (None, (), [])
        if isinstance(container, dict) and not waiting:
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refuse(line, "a key must be a word, not a list or map")
            if event.value in container:
                raise self._refuse(line, f"the key {show(event.value)} stands twice in one map; remove one")
            if event.value == "<<":
                raise self._refuse(line, "merge keys (<<) are not allowed; write the keys out")
            waiting.append(event.value)
            self.lines[(*above, event.value)] = line
            return event.value
        path: Path = above
        if isinstance(container, dict):
            path = (*above, waiting[0])
        elif isinstance(container, list):
            path = (*above, len(container))
        self._path = path
        self.lines.setdefault(path, line)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = event.value
            if event.implicit[0]:  # plain, not quoted
                value = self._scalar(event.value, path, line)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if isinstance(container, dict):
            container[waiting.pop()] = value
        elif isinstance(container, list):
            container.append(value)
        return value

    def _scalar(self, text: str, path: Path, line: int) -> Any:
        """A plain scalar is what it looks like; what YAML versions read differently is refused."""
        if text in ("true", "false"):
            self._raw[path] = text
            return text == "true"
        if text in ("", "~", "null"):
            return None
        if _INTEGER.match(text):
            self._raw[path] = text
            return int(text)
        if _FLOAT.match(text):
            self._raw[path] = text
            return float(text)
        if _AMBIGUOUS.match(text[:LONGEST]):
            key, text = ".".join(shown(str(part)) for part in path), shown(text)
            raise self._refuse(
                line,
                f'{key}: YAML versions read {text} differently; where text is meant, write it in quotes: "{text}"; else write a plain number, true or false',
            )
        return text

    def _refuse(self, line: int, message: str) -> TargetError:
        return TargetError([f"{self.file}:{line}: {message}"])


def _text(path: str, file: str) -> str:
    try:
        with open(path, "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise TargetError([f"{file}: cannot be read: {error.strerror}"]) from error
    if len(data) > MAX_BYTES:
        raise TargetError([f"{file}: larger than 256 KiB; a target needs a few hundred bytes"])
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise TargetError([f"{file}: begins with a byte-order mark; save it as UTF-8 without one"])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TargetError([f"{file}:{line}: not UTF-8 text; save it as UTF-8"]) from error


@cache
def _validator(schema: str) -> Any:
    """The validator of `SCHEMA` or `SCHEMA#POINTER`. Its registry holds our own schemas and fetches nothing."""
    registry: Any = referencing.Registry()
    for name in ("target", "platform", "compose"):
        with open(os.path.join(shipped.folder("schemas"), f"{name}.json"), encoding="utf-8") as file:
            loaded = json.load(file)
        del loaded["$schema"]  # it would bring back jsonschema's own validator of that draft
        registry = registry.with_resource(loaded["$id"], referencing.jsonschema.DRAFT202012.create_resource(loaded))
    name, _, pointer = schema.partition("#")
    plain = jsonschema.Draft202012Validator
    whole = plain.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # 8.0 samples are none
    strict = jsonschema.validators.extend(plain, {"pattern": _pattern}, type_checker=whole)  # type: ignore[no-untyped-call]
    return strict({"$ref": f"urn:edgebuild:{name}:1#{pointer}"}, registry=registry)


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As JSON Schema means it: in Python `$` also matches before a line break at the end."""
    if validator.is_type(value, "string") and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"does not match {pattern}")


def _hint(schema: Mapping[str, Any], key: str) -> str:
    expected = schema.get("properties", {}).get(key, {}).get("expected", "")
    return f": {expected}" if expected else ""


def show(value: Any) -> str:
    """A value in a message: one line, ASCII, never long."""
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
