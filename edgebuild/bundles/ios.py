"""The kind `ios`: a Swift package around an MLX model folder, for apps on iPhone, iPad and Mac.

No Swift toolchain runs here, so the Swift is only held against the rules of its tokens, and the proof says no more than that.
"""

import platform
import plistlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Payload, Proof, Token
from edgebuild.errors import StepFailed

CODE: Sequence[str] = ("bundles.ios",)
COPIES = 1
FACTS = {"ios": "17.0", "macos": "14.0", "swift_tools": "6.2"}  # what mlx-swift-lm 3 asks for
# Apple, "Privacy manifest files": every key that such a file may have, and its type.
PRIVACY: Mapping[str, type] = {
    "NSPrivacyTracking": bool,
    "NSPrivacyTrackingDomains": list,
    "NSPrivacyCollectedDataTypes": list,
    "NSPrivacyAccessedAPITypes": list,
}
# Apple, "Describing use of required reason API": the reasons that each category takes.
REASONS = {
    "FileTimestamp": "DDA9.1 C617.1 3B52.1 0A2A.1",
    "SystemBootTime": "35F9.1 8FFB.1 3D61.1",
    "DiskSpace": "85F4.1 E174.1 7D9E.1 B728.1",
    "ActiveKeyboards": "3EC4.1 54BD.1",
    "UserDefaults": "CA92.1 1C8F.1 C56D.1 AC6B.1",
}
# Swift's tokens as far as brackets may hide in them: in code, and by what was opened last (strings, comments, which nest).
_CODE_TOKENS = re.compile(r'//[^\n]*|/\*|\*/|#+"(?:"")?|"""|"|[()\[\]{}]')
_TOKENS = {'"': re.compile(r'\\.|"|\n'), '"""': re.compile(r'\\.|"""', re.DOTALL), "/*": re.compile(r"/\*|\*/")}
_CLOSES = {")": "(", "]": "[", "}": "{", '"': '"', '"""': '"""', "*/": "/*"}
_OPENS = (*_CLOSES.values(), "\\(")  # the last one opens an interpolation in a string, which ")" closes too
_PAIRS = {*((one, one) for one in _CLOSES.values()), ("(", "\\(")}


def refuse(framework: str, task: str) -> str:
    if framework != "mlx":
        return f"it holds a model for MLX Swift, but the framework is {framework}; name framework: mlx, or another package.kind"
    if task != "text-generation":
        return f"MLX Swift runs language models here, but the task is {task}; name another package.kind"
    return ""


def payload(model: Path, module: str) -> Payload:
    resources = f"Sources/{module}/Resources"
    files = bundle.lay(model, f"{resources}/model")
    if f"{resources}/model/config.json" not in files:
        raise StepFailed("the artifact is no MLX model folder: it holds no config.json")
    return Payload(files=files, model=f"{resources}/model", golden=f"{resources}/golden.json")


def values(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """`ios`, `macos`: the oldest systems; `tools_line`: the comment that a Package.swift must begin with."""
    found = {}
    for key, default in FACTS.items():
        found[key] = str(facts.get(key, default))
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){1,2}", found[key]):
            raise StepFailed(f"facts.{key}: {found[key]!r} is no version such as {default}; correct the platform file")
    return {"ios": found["ios"], "macos": found["macos"], "tools_line": Token(f"// swift-tools-version: {found['swift_tools']}")}


def make(out: Path) -> Mapping[str, bool]:
    return {}


def prove(out: Path, runs: Callable[[], str]) -> Proof:
    """L1: privacy manifest by plistlib, Swift by its tokens; and the model folder runs, which alone would be L4."""
    for path in bundle.walk(out):
        if path.suffix == ".swift" and (problem := unbalanced(path.read_text(encoding="utf-8", errors="replace"))):
            raise StepFailed(f"{path.relative_to(out)}: {problem}")
        if path.suffix == ".xcprivacy":
            check_privacy(path.read_bytes())
    runtime = runs()
    return Proof(
        level="L1",
        tools={"runtime": runtime, "plistlib": platform.python_version(), "Swift tokens": "edgebuild's own reading"},
        why_not_higher=f"no Swift toolchain here: nothing was compiled. The model folder was loaded from the bundle by {runtime} and gave its golden output",
    )


def check_privacy(data: bytes) -> None:
    """Raises StepFailed where a PrivacyInfo.xcprivacy is no property list, or says what Apple has no name for."""
    try:
        found = plistlib.loads(data)
    except Exception as error:  # plistlib raises expat's errors and its own
        raise StepFailed(f"PrivacyInfo.xcprivacy is no property list: {error}") from error
    if not isinstance(found, dict) or {key: type(value) for key, value in found.items()} != PRIVACY:
        raise StepFailed(
            "PrivacyInfo.xcprivacy must have the keys " + ", ".join(f"{key} ({kind.__name__})" for key, kind in PRIVACY.items())
        )
    for entry in found["NSPrivacyAccessedAPITypes"]:
        if not isinstance(entry, dict) or set(entry) != {"NSPrivacyAccessedAPIType", "NSPrivacyAccessedAPITypeReasons"}:
            raise StepFailed("PrivacyInfo.xcprivacy: an accessed API has other keys than its type and its reasons")
        name, given = str(entry["NSPrivacyAccessedAPIType"]), entry["NSPrivacyAccessedAPITypeReasons"]
        known = REASONS.get(name.removeprefix("NSPrivacyAccessedAPICategory"), "").split()
        if not isinstance(given, list) or not given or any(reason not in known for reason in given):
            raise StepFailed(f"PrivacyInfo.xcprivacy: {name} with {given} is no API with reasons that Apple lists")


def unbalanced(text: str) -> str:
    """Why comments, strings or brackets of a Swift file do not close, else empty."""
    opened: list[tuple[str, int]] = []
    place = 0
    while match := _TOKENS.get(opened[-1][0] if opened else "", _CODE_TOKENS).search(text, place):
        token, line, place = match[0], text.count("\n", 0, match.start()) + 1, match.end()
        if token.startswith("#"):  # a raw string
            quotes = token.lstrip("#")
            end = quotes + token.removesuffix(quotes)
            place = text.find(end, place) + len(end)
            if place < len(end):
                return f"line {line}: {token} is never closed"
        elif token == "\n":
            return f"line {line}: a string is not closed"
        elif opened and (_CLOSES.get(token), opened[-1][0]) in _PAIRS:
            opened.pop()
        elif token in _OPENS:
            opened.append((token, line))
        elif token in _CLOSES:
            return f"line {line}: {token} closes nothing"
    return f"line {opened[-1][1]}: {opened[-1][0]} is never closed" if opened else ""
