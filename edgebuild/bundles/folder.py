"""The kind `folder`: any artifact as it is, with a golden example and, for frameworks that run in Python, a self-test."""

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Payload, Proof

CODE: Sequence[str] = ("bundles.folder",)
COPIES = 1
SELF_TEST = "selftest.py"  # there only where a folder for-FRAMEWORK of templates/folder has one


def refuse(framework: str, task: str) -> str:
    return ""


def payload(model: Path, module: str) -> Payload:
    return Payload(files=bundle.lay(model, "model"), model="model", golden="golden.json")


def values(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def make(out: Path) -> Mapping[str, bool]:
    return {}


def prove(out: Path, runs: Callable[[], str]) -> Proof:
    """L4: opened from the bundle in its own runtime, it gives its golden output."""
    tools = {"runtime": runs()}
    if (out / SELF_TEST).exists():
        bundle.self_test(out, SELF_TEST)
        tools[SELF_TEST] = f"Python {platform.python_version()}"
    return Proof(level="L4", tools=tools)
