"""Makes or renews the locks of toolchains: `python .ci/lock.py NAME… | --all [--upgrade]`.

uv resolves the extra NAME of pyproject.toml with all that edgebuild itself needs, for every platform, and writes
`edgebuild/locks/NAME.txt`. Versions stay as they are in the lock that is there, but for --upgrade. What uv cannot be told by the
extra stands in pyproject.toml, in `[tool.edgebuild.locks.NAME]`:

    requires    requirements in the place of an extra, for versions that pip by itself would not put together
    alone       whether edgebuild's own needs are left away: of what runs without it
    head        lines at the top of the lock: comments, and options such as --extra-index-url
    overrides   requirements that take the place of what packages ask for
    leave-out   packages that are not installed though a package asks for them

and, for all that name the package, in `[tool.edgebuild.every-lock]`: `leave-out`; `heads`, package → lines below the lock's own head,
where {lock} is its name; and `hashes`, package → the sha256 hashes that take the place of those that the index has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "edgebuild" / "locks"


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, dict[str, Any]] = project["tool"]["edgebuild"]["locks"]
    every: dict[str, Any] = project["tool"]["edgebuild"]["every-lock"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*settings, []], metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the extra allows")
    options = parser.parse_args()
    names = list(settings) if options.all else options.names
    if not names:
        parser.error(f"name a toolchain, or --all; there are: {', '.join(settings)}")
    for name in names:
        leave_out = [*every["leave-out"], *settings[name].get("leave-out", ())]
        lock(name, {**every, **settings[name], "leave-out": leave_out}, options.upgrade)
    return 0


def lock(name: str, settings: Mapping[str, Any], upgrade: bool) -> None:
    path = LOCKS / f"{name}.txt"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides, tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
        for file, key in ((overrides, "overrides"), (wanted, "requires")):
            file.write("\n".join(settings.get(key, ())))
            file.flush()
        command = [
            *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"),
            *("--no-header", "--no-annotate", "--overrides", overrides.name, "-o", str(path)),
            *((wanted.name,) if "requires" in settings else ("--extra", name)),
            *(word for package in settings["leave-out"] for word in ("--no-emit-package", package)),
            *(("--upgrade",) if upgrade else ()),
            *(() if settings.get("alone") else ("pyproject.toml",)),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join([*head(name, settings, lines), *lines]) + "\n"
    for package, hashes in settings["hashes"].items():
        text = _with_hashes(text, package, hashes)
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(re.findall('^[a-z0-9].*==', text, re.MULTILINE))} packages")


def head(name: str, settings: Mapping[str, Any], lines: list[str]) -> list[str]:
    """What stands above the lines of a lock."""
    named = {line.partition("==")[0] for line in lines}
    of_packages = [line.format(lock=name) for package, found in settings["heads"].items() if package in named for line in found]
    return [*settings.get("head", ()), *of_packages]


def _with_hashes(text: str, package: str, hashes: list[str]) -> str:
    """These hashes behind a package's line, in the place of those there."""
    lines = " \\\n".join(f"    --hash=sha256:{sha256}" for sha256 in hashes)
    found = re.compile(rf"^({re.escape(package)}==.*\n)(?:    --hash=.*\n)+", re.MULTILINE)
    return found.sub(lambda line: f"{line[1]}{lines}\n", text)


if __name__ == "__main__":
    sys.exit(main())
