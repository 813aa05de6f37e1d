"""The kind `ios`: a Swift package around an MLX model folder, for apps on iPhone, iPad and Mac.

No Swift toolchain runs here, so the Swift is only held against the rules of its tokens, and the proof says no more than that.
"""

import platform
import plistlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving
from edgebuild.bundles.tokens import SWIFT, unbalanced
from edgebuild.errors import StepFailed, WrongFact
from edgebuild.render import Token

CODE: Sequence[str] = ("bundles.ios", "bundles.tokens")
COPIES = Copies()
TOOLS: Mapping[str, str] = {}
LOCKS: Mapping[str, str] = {}
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


def refuse(framework: str, task: str) -> str:
    if framework != "mlx":
        return f"it holds a model for MLX Swift, but the framework is {framework}; name framework: mlx, or another package.kind"
    if task != "text-generation":
        return f"MLX Swift runs language models here, but the task is {task}; name another package.kind"
    return ""


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """`ios`, `macos`: the oldest systems; `tools_line`: the comment that a Package.swift must begin with."""
    found = {key: str(device.get(key, default)) for key, default in FACTS.items()}
    for key, version in found.items():
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){1,2}", version):
            raise WrongFact(key, f"{version!r} is no version such as {FACTS[key]}")
    return {"ios": found["ios"], "macos": found["macos"], "tools_line": Token(f"// swift-tools-version: {found['swift_tools']}")}


def payload(model: Path, module: str) -> Payload:
    resources = f"Sources/{module}/Resources"
    files = bundle.lay(model, f"{resources}/model")
    if f"{resources}/model/config.json" not in files:
        raise StepFailed("the artifact is no MLX model folder: it holds no config.json")
    return Payload(files=files, model=f"{resources}/model", golden=f"{resources}/golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    return stated(common["facts"])


def make(making: Making) -> Mapping[str, bool]:
    return {}


def assemble(making: Making) -> Mapping[str, bool]:
    return {}


def verify(out: Path) -> Mapping[str, str]:
    """The privacy manifest by plistlib, Swift by its tokens."""
    for path in bundle.walk(out):
        if path.suffix == ".swift" and (problem := unbalanced(path.read_text(encoding="utf-8", errors="replace"), SWIFT)):
            raise StepFailed(f"{path.relative_to(out)}: {problem}")
        if path.suffix == ".xcprivacy":
            check_privacy(path.read_bytes())
    return {"plistlib": platform.python_version(), "Swift tokens": "edgebuild's own reading"}


def consume(proving: Proving) -> Proof:
    """L1, for want of a Swift toolchain; and the model folder runs, which alone would be L4."""
    runtime = proving.runs()
    return Proof(
        level="L1",
        tools={"runtime": runtime, **proving.tools},
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
