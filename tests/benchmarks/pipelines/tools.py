"""The compared tools: their commands and projects. A project is a git repository with the pipeline in one tool's words."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parents[2] / "targets"
BIN = Path(sys.executable).parent
JOURNAL = ".edgebuild/last-run.json"  # edgebuild's own
TARGET = """edgebuild: 1
model: {{source: models/digits.onnx, task: image-classification}}
platform: peers
calibration: {{data: data/calibration.npz, samples: {samples}}}
evaluate: {{data: data/eval.npz}}
gates: {{quality: {{min: 0.1}}, flip_rate: {{max: 0.9}}}}
"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A peer: its command, the files of its project (source → name), and how it is told the variants."""

    name: str
    command: Sequence[str]
    files: Mapping[str, str]
    settings: Callable[[Path, Mapping[str, int]], None]
    version: Sequence[str]
    setup: Sequence[Sequence[str]] = ()  # once in a new project; {cache} is the shared cache
    restore: Sequence[str] = ()  # in a clone, before the command


def targets(project: Path, variants: Mapping[str, int]) -> None:
    (project / "targets").mkdir(exist_ok=True)
    for name, samples in variants.items():
        rewrite(project / "targets" / f"{name}.yaml", TARGET.format(samples=samples))


def parameters(file: str) -> Callable[[Path, Mapping[str, int]], None]:
    def write(project: Path, variants: Mapping[str, int]) -> None:
        lines = [f"  {name}: {{samples: {samples}}}\n" for name, samples in variants.items()]
        rewrite(project / file, "variants:\n" + "".join(lines))

    return write


def settings(project: Path, variants: Mapping[str, int]) -> None:
    (project / "settings").mkdir(exist_ok=True)
    for name, samples in variants.items():
        rewrite(project / "settings" / f"{name}.txt", f"{samples}\n")


def rewrite(path: Path, text: str) -> None:
    """As an editor does: a file that stays the same is not written."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def tools(environments: Path) -> list[Tool]:
    dvc, snakemake = (str(environments / name / "bin" / name) for name in ("dvc", "snakemake"))
    snake = [snakemake, "--cores", "1"]
    return [
        Tool(
            name="edgebuild",
            command=[str(BIN / "edgebuild")],
            files={"platform.yaml": "platforms/peers.yaml", "../../../dodo.py": "dodo.py"},
            settings=targets,
            version=[str(BIN / "python"), "-c", "import edgebuild; print(edgebuild.__version__)"],
        ),
        Tool(
            name="DVC",
            command=[dvc, "repro"],
            files={"dvc.yaml": "dvc.yaml", "step.py": "step.py"},
            settings=parameters("params.yaml"),
            version=[dvc, "--version"],
            restore=[dvc, "checkout", "--quiet"],  # `dvc repro` alone restores too, ten times slower
            setup=[
                [dvc, "init", "--quiet"],
                [dvc, "config", "core.analytics", "false"],
                [dvc, "config", "core.check_update", "false"],
                [dvc, "cache", "dir", "{cache}"],
            ],
        ),
        Tool(
            name="Snakemake",
            command=snake,
            files={"Snakefile": "Snakefile", "step.py": "step.py"},
            settings=parameters("config.yaml"),
            version=[snakemake, "--version"],
        ),
        Tool(
            name="Snakemake --cache",
            command=[*snake, "--cache"],
            files={"Snakefile": "Snakefile", "step.py": "step.py"},
            settings=parameters("config.yaml"),
            version=[snakemake, "--version"],
        ),
        Tool(
            name="Make",
            command=["make", "-s"],
            files={"Makefile": "Makefile", "step.py": "step.py"},
            settings=settings,
            version=["make", "--version"],
        ),
    ]


class Project:
    """A new git repository with the pipeline in one tool's words, and a cache that its clones share."""

    def __init__(self, tool: Tool, folder: Path, variants: Mapping[str, int]) -> None:
        self.tool, self.root = tool, folder / "project"
        self._log = folder / "steps.log"
        self._cache = folder / "cache"
        for path in (self.root / "models", self.root / "data", self._cache, folder / "home"):
            path.mkdir(parents=True)
        self._environment = environment(folder) | {
            "STEP_LOG": str(self._log),
            "EDGEBUILD_STORE": str(self._cache),
            "SNAKEMAKE_OUTPUT_CACHE": str(self._cache),
        }
        shutil.copyfile(EXAMPLE / "models/digits.onnx", self.root / "models/digits.onnx")
        for name in ("calibration", "eval"):
            shutil.copyfile(EXAMPLE / f"data/digits-{name}.npz", self.root / f"data/{name}.npz")
        for source, name in tool.files.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(HERE / source, self.root / name)
        (self.root / ".gitignore").write_text("/build/\n/dist/\n.edgebuild/\n.snakemake/\n__pycache__/\n")
        self.set(variants)
        self._run(["git", "init", "-q"])
        for command in tool.setup:
            self._run([word.format(cache=self._cache) for word in command])
        self._commit()

    def set(self, variants: Mapping[str, int]) -> None:
        self.tool.settings(self.root, variants)

    def build(self, *words: str) -> tuple[float, int]:
        """Seconds, and how many steps really ran."""
        self._log.write_text("")
        journal = self.root / JOURNAL
        journal.unlink(missing_ok=True)
        start = time.perf_counter()
        self._run([*self.tool.command, *words])
        seconds = time.perf_counter() - start
        ran = len(self._log.read_text().splitlines())
        if journal.exists():
            steps = json.loads(journal.read_text())["steps"]
            ran = sum(one["outcome"] == "ran" and not one["name"].startswith("build:") for one in steps)
        return seconds, ran

    def seconds(self, step: str) -> float:
        """What edgebuild says that a step of its last run took."""
        steps = json.loads((self.root / JOURNAL).read_text())["steps"]
        return next(float(one["seconds"]) for one in steps if one["name"] == step)

    def clone(self) -> float:
        """Commit (DVC's lock file with it) and go on in a clone; → seconds that the tool's own restoring took."""
        self._commit()
        clone = self.root.parent / "clone"
        self._run(["git", "clone", "-q", ".", str(clone)])
        self.root = clone
        start = time.perf_counter()
        if self.tool.restore:
            self._run(self.tool.restore)
        return time.perf_counter() - start

    def models(self) -> list[Path]:
        """The quantized models, by variant."""
        return sorted(path for path in self.root.glob("build/v*/**/model.onnx") if "convert" not in path.parts)

    def outputs(self) -> dict[str, str]:
        paths = [*self.models(), *self.root.glob("dist/*.tar")]
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def _commit(self) -> None:
        self._run(["git", "add", "-A"])
        self._run(["git", "commit", "-q", "--allow-empty", "-m", "pipeline"])

    def _run(self, command: Sequence[str]) -> None:
        checked(command, self.root, self._environment)


def environment(folder: Path) -> dict[str, str]:
    """Telemetry off, no settings of the user's, caches of their own; `python` is the one that runs edgebuild."""
    author = {f"GIT_{role}_{what}": "peers@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {
        **os.environ,
        **author,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "home" / "dvc"),
        "OLIVE_DISABLE_TELEMETRY": "1",
        "CI": "1",  # Olive sends a heartbeat before it reads the variable above, and waits 10 s for it without a network
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def checked(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {folder}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
