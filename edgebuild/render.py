"""Templates → text: every value becomes one whole token of the output's own language, or is refused.

The only module that knows jinja2.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from edgebuild.errors import StepFailed

if TYPE_CHECKING:
    import jinja2


class Word(str):
    """Text of letters, digits and `.` `_` `+` `-`: needs no escaping where a format has no quotes."""


class Identifier(Word):
    """A name in code: stands bare."""


class Token(str):
    """A whole token of the output's language, checked by whoever made it: stands as it is."""


def word(key: str, text: str) -> Word:
    """Raises StepFailed where `text` has other characters than a word may have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
        raise StepFailed(f"{key}: {text!r} may hold letters, digits and . _ + - alone")
    return Word(text)


def identifier(name: str) -> Identifier:
    """A name for code, in Swift and most other languages: ios-phi3 → IosPhi3Model."""
    parts = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", name))
    return Identifier(f"{'M' if parts[:1].isdigit() else ''}{parts}Model")


def check_values(value: Any, key: str = "") -> None:
    """Refuse, anywhere in `value`, text that no line of a file should hold. Raises StepFailed naming the value's key."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            check_values(str(inner), f"{key}, a key")
            check_values(one, f"{key}.{inner}" if key else str(inner))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            check_values(one, f"{key}[{index}]")
    elif isinstance(value, str):
        for character in value:
            if _forbidden(character):
                name = unicodedata.name(character, "a control character")
                raise StepFailed(f"{key!r} holds U+{ord(character):04X} ({name}), which text for templates may not; remove it")


def _forbidden(character: str) -> bool:
    """Controls, line ends, lone surrogates, non-characters, and what is invisible or turns the direction of text.

    The zero-width joiners stay: scripts of India and emoji need them.
    """
    code = ord(character)
    if code in (0x200C, 0x200D):
        return False
    return (
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    )


# -- templates --------------------------------------------------------------------------------------------------------------
def _json(text: str) -> str:
    """A string literal of JSON, and of JavaScript, Python, YAML and TOML, which all take its escapes."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")  # never "</script>" where a page holds it


def _swift(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'  # "\\(" begins no interpolation


def _xml(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(character, entity)
    return text


def _markdown(text: str) -> str:
    """Inline text that CommonMark and GitHub show as it is."""
    text = re.sub(r"[\\`*_{}\[\]()#+!|<>&~$^=\"@]", r"\\\g<0>", text.strip())
    text = re.sub(r"^(\d+)([.])(?=\s|$)", r"\1\\\2", re.sub(r"^-", r"\\-", text))
    return re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", text)


def _plain(text: str) -> str:
    return text


def _escaped(characters: str) -> Callable[[str], str]:
    """A literal in double quotes, with a backslash before each of these, and before backslash and quote."""
    table = str.maketrans({character: f"\\{character}" for character in f'\\"{characters}'})
    return lambda text: f'"{text.translate(table)}"'


def _shell(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _c(text: str) -> str:
    """A string literal of C and C++: UTF-8, its bytes beyond ASCII in octal; no `?`, of which two begin a trigraph."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return '"' + "".join(plain) + '"'


def _key_file(text: str) -> str:
    """A value of GLib's key files, which lose spaces at the ends of it (GLib, "Key-value file parser")."""
    inner = text.strip(" ")
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return "\\s" * len(before) + inner.replace("\\", "\\\\") + "\\s" * len(after)


def _properties(text: str) -> str:
    """A value of Java's property files, in ASCII (java.util.Properties.load)."""
    units = text.encode("utf-16-be")
    found = (int.from_bytes(units[place : place + 2], "big") for place in range(0, len(units), 2))
    return "".join(f"\\u{unit:04x}" if unit > 126 or chr(unit) in " :=#!\\" else chr(unit) for unit in found)


def _names_alone(text: str) -> str:
    raise StepFailed(f"a placeholder's value is {text!r}; this format takes names and numbers alone")


# Name or suffix of the output file → how it writes text. A format that is missing here has no templates.
_TEXT: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys((".json", ".js", ".mjs", ".py", ".yaml", ".yml", ".toml"), _json),
    **dict.fromkeys((".xml", ".plist", ".xcprivacy"), _xml),
    **dict.fromkeys((".c", ".h", ".cpp"), _c),
    **dict.fromkeys((".kt", ".kts"), _escaped("$")),  # Kotlin, and Gradle in it
    **dict.fromkeys(("CMakeLists.txt", ".cmake"), _escaped("$")),
    **dict.fromkeys((".raucm", ".ini"), _key_file),
    "Dockerfile": _escaped("$"),
    "sw-description": _escaped(""),  # libconfig, as SWUpdate reads it
    ".ld": _names_alone,  # GNU ld's scripts have no way to quote a quote
    ".properties": _properties,
    ".sh": _shell,
    ".swift": _swift,
    ".md": _markdown,
    ".txt": _plain,
}
# Where an identifier stands bare.
_CODE = (".swift", ".js", ".mjs", ".py", ".c", ".h", ".cpp", ".kt", ".kts", "CMakeLists.txt", ".cmake", ".ld", ".sh")
_TRUTH: Mapping[str, tuple[str, str]] = {
    ".py": ("False", "True"),
    **dict.fromkeys((".plist", ".xcprivacy"), ("<false/>", "<true/>")),
}


def finalize(name: str) -> Callable[[Any], str]:
    """What turns a placeholder's value into one whole token of a file of this name. It raises StepFailed or UndefinedError."""
    format = name if name in _TEXT else name[name.rfind(".") :] if "." in name else ""
    if format not in _TEXT:
        raise StepFailed(
            f"edgebuild knows no way to write values into such a file ({format or 'no suffix'}); it has: {', '.join(sorted(_TEXT))}"
        )

    def token(value: Any) -> str:
        if isinstance(value, bool):
            return _TRUTH.get(format, ("false", "true"))[value]
        if isinstance(value, int):
            return str(value)
        if isinstance(value, float) and math.isfinite(value):
            return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML wants the point
        if isinstance(value, Token) or (isinstance(value, Identifier if format in _CODE else Word) and format in (*_CODE, ".md")):
            return str(value)
        if isinstance(value, str):
            return _TEXT[format](str(value))
        str(value)  # an undefined name says so here
        raise StepFailed(f"a placeholder's value is {value!r}; text, numbers, true and false can be written")

    return token


def render(source: str, rel: str, values: Mapping[str, Any]) -> str:
    """A template's text, filled in. `rel`: its path, whose suffix (without `.j2`) is the output's format. Raises StepFailed."""
    import jinja2

    try:
        return _environment(finalize(PurePosixPath(rel.removesuffix(".j2")).name)).from_string(source).render(values)
    except StepFailed as error:
        raise StepFailed(f"template {rel}: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise StepFailed(f"template {rel}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template may divide by zero, add text to numbers, …
        raise StepFailed(f"template {rel}: {type(error).__name__}: {str(error)[:200]}") from error


def _environment(token: Callable[[Any], str]) -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=token,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.clear()  # lipsum is random, and nothing else is needed
    del environment.filters["random"]
    return environment
