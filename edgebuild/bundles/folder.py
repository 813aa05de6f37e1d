"""The kind `folder`: any artifact as it is, with a golden example and, for frameworks that run in Python, a self-test."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving

CODE: Sequence[str] = ("bundles.folder",)
COPIES = Copies()
TOOLS: Mapping[str, str] = {}
LOCKS: Mapping[str, str] = {}
SELF_TEST = "selftest.py"  # there only where a folder for-FRAMEWORK of templates/folder has one


def refuse(framework: str, task: str) -> str:
    return ""


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def payload(model: Path, module: str) -> Payload:
    return Payload(files=bundle.lay(model, "model"), model="model", golden="golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def make(making: Making) -> Mapping[str, bool]:
    return {}


def assemble(making: Making) -> Mapping[str, bool]:
    return {}


def verify(out: Path) -> Mapping[str, str]:
    return {}


def consume(proving: Proving) -> Proof:
    """L4: opened from the bundle in its own runtime, it gives its golden output."""
    tools = {"runtime": proving.runs()}
    if (proving.out / SELF_TEST).exists():
        bundle.self_test(proving.out, SELF_TEST)
        tools[SELF_TEST] = f"Python {platform.python_version()}"
    return Proof(level="L4", tools=tools)
