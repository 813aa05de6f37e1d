"""Whether comments, strings and brackets of a source file close, in languages whose compilers do not run here.

Knows their tokens as far as brackets may hide in them: what stands in code, and what in each thing that was opened last.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CLOSES = {")": "(", "]": "[", "}": "{", '"': '"', '"""': '"""', "*/": "/*"}
_OPENS = (*_CLOSES.values(), "\\(", "${")  # the last two open an interpolation in a string
_PAIRS = {*((one, one) for one in _CLOSES.values()), ("(", "\\("), ("{", "${")}
_ENDS = {"\n": "a string is not closed", "'": "a character is not closed", "`": "a name in backticks is not closed"}
_SWIFT_RAW, _C_RAW, _CMAKE_RAW = re.compile(r'#+"(?:"")?'), re.compile(r'R"([^\s()\\]{0,16})\('), re.compile(r"#?\[(=*)\[")
_NESTED = re.compile(r"/\*|\*/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """Tokens in code, and by what was opened last. What they match whole, such as a line comment, opens and closes nothing."""

    code: re.Pattern[str]
    inside: Mapping[str, re.Pattern[str]]


SWIFT = Language(
    code=re.compile(r'//[^\n]*|/\*|\*/|#+"(?:"")?|"""|"|[()\[\]{}]'),
    inside={'"': re.compile(r'\\.|"|\n'), '"""': re.compile(r'\\.|"""', re.DOTALL), "/*": _NESTED},
)
KOTLIN = Language(  # of three and more quotes in a row the last three close
    code=re.compile(r'//[^\n]*|/\*|\*/|"""|"|`[^`\n]+`|`|\'(?:\\.|[^\'\\\n])[^\'\n]*\'|\'|[()\[\]{}]'),
    inside={'"': re.compile(r'\\.|\$\{|"|\n'), '"""': re.compile(r'\$\{|"{3,}'), "/*": _NESTED},
)
C = Language(
    code=re.compile(r'//[^\n]*|/\*|\*/|R"[^\s()\\]{0,16}\(|"|\'(?:\\.|[^\'\\\n])+\'|(?<![0-9A-Fa-f])\'|[()\[\]{}]'),
    inside={'"': re.compile(r'\\.|"|\n', re.DOTALL), "/*": re.compile(r"\*/")},
)
CMAKE = Language(code=re.compile(r'#?\[=*\[|#[^\n]*|"|[()]'), inside={'"': re.compile(r'\\.|"', re.DOTALL)})
# Suffix or name of a file → the language that it is held against.
LANGUAGES: Mapping[str, Language] = {
    ".swift": SWIFT,
    **dict.fromkeys((".kt", ".kts"), KOTLIN),
    **dict.fromkeys((".c", ".h", ".cpp"), C),
    **dict.fromkeys((".cmake", "CMakeLists.txt"), CMAKE),
}


def unbalanced(text: str, language: Language) -> str:
    """Why comments, strings or brackets of a file do not close, else empty."""
    opened: list[tuple[str, int]] = []
    place = 0
    while match := language.inside.get(opened[-1][0] if opened else "", language.code).search(text, place):
        token, line, place = match[0], text.count("\n", 0, match.start()) + 1, match.end()
        if opened and opened[-1][0] == '"""' and token.startswith('"""'):
            token = '"""'
        if end := _end(token):  # raw text
            place = text.find(end, place) + len(end)
            if place < len(end):
                return f"line {line}: {token} is never closed"
        elif token in _ENDS:
            return f"line {line}: {_ENDS[token]}"
        elif opened and (_CLOSES.get(token), opened[-1][0]) in _PAIRS:
            opened.pop()
        elif token in _OPENS:
            opened.append((token, line))
        elif token in _CLOSES:
            return f"line {line}: {token} closes nothing"
    return f"line {opened[-1][1]}: {opened[-1][0]} is never closed" if opened else ""


def _end(token: str) -> str:
    """What ends the raw text that this token begins, else empty."""
    if _SWIFT_RAW.fullmatch(token):
        quotes = token.lstrip("#")
        return quotes + token.removesuffix(quotes)
    if match := _C_RAW.fullmatch(token):
        return f'){match[1]}"'
    if match := _CMAKE_RAW.fullmatch(token):
        return f"]{match[1]}]"
    return ""
