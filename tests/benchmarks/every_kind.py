"""Every kind of bundle from the example models: how far each was proven, by which tools, and what its package step took.

    python tests/benchmarks/every_kind.py [--keep FOLDER] [TARGET …]

Builds the example targets in a clone of the repository's last commit by `doit`, with the Python that runs this and the user's own
caches: toolchains, wheels and the base image of containers are made where they are not there yet, which takes minutes. As root on
Debian, with what `edgebuild doctor --apt` names, every kind is proven as far as it can be; elsewhere less far, and the reasons are
printed. All is read from the evidence. Exits 1 where a target was not built.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from every_framework import ROOT, timed
from rich.console import Console
from rich.table import Table

TARGETS = (
    *("web-digits", "ios-phi3", "server-digits", "android-digits", "android-phi3", "board-digits", "mcu-digits"),
    *("container-digits", "container-server-digits", "container-phi3"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work there, and leave all there")
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    options = parser.parse_args()
    table = Table(box=None, pad_edge=False)
    for column in ("target", "kind", "level", "seconds", "tools"):
        table.add_column(column, no_wrap=column != "tools")
    with tempfile.TemporaryDirectory() as scratch:
        root = (options.keep or Path(scratch)) / "edgebuild"
        if not root.exists():
            subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
        environment = {**os.environ, "PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        status = timed(["doit", *(f"build:{name}" for name in options.targets)], root, environment)
        steps = json.loads((root / ".edgebuild" / "last-run.json").read_text(encoding="utf-8"))["steps"]
        seconds = {step["name"]: f"{step['seconds']:.1f}" for step in steps if step["outcome"] == "ran"}
        reasons = []
        for name in options.targets:
            path = root / "dist" / f"{name}.evidence.json"
            if path.exists():
                bundle = json.loads(path.read_text(encoding="utf-8"))["bundle"]
                tools = "; ".join(f"{tool}: {version}" for tool, version in bundle["tools"].items())
                table.add_row(name, bundle["kind"], bundle["level"], seconds.get(f"package:{name}", "–"), tools)
                reasons += [f"{name}: {bundle['why_not_higher']}"] if bundle["why_not_higher"] else []
        Console(width=180).print(table)
        print("\n".join(reasons))
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
