"""A toolchain is an interpreter plus packages: which versions a backend really runs with, here."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable


def versions(packages: Iterable[str]) -> dict[str, str]:
    """package → installed version, `missing` where there is none; and the interpreter's own."""
    found = {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def evidence(packages: Iterable[str]) -> list[str]:
    """The paths whose stat moves when any of these packages is installed, removed or changed."""
    paths = {entry for entry in sys.path if entry and os.path.isdir(entry)}
    for package in packages:
        try:
            for file in ("METADATA", "RECORD"):
                paths.add(str(importlib.metadata.distribution(package).locate_file("")))
                location = getattr(importlib.metadata.distribution(package), "_path", None)
                if location is not None:
                    paths.add(os.path.join(str(location), file))
        except importlib.metadata.PackageNotFoundError:
            continue
    return sorted(paths)
