"""Pipelines run job by job as shell: what of GitHub's and GitLab's runners the pipelines of `edgebuild ci` use, and no more.

Each job has a fresh clone; caches and artifacts are copied, so that what is restored has other inodes and other times.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.test_cli import BIN


def copy(source: Path, target: Path) -> None:
    """Contents alone: times and inodes are new ones."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


@dataclass
class Job:
    """What one came to: `result` is success, failure or skipped."""

    name: str
    result: str
    log: str = ""
    folder: Path = Path()
    home: Path = Path()
    outputs: dict[str, str] = field(default_factory=dict)

    def last_run(self) -> dict[str, str]:
        content = json.loads((self.folder / ".edgebuild" / "last-run.json").read_text())
        return {step["name"]: step["outcome"] for step in content["steps"]}


@dataclass
class Machine:
    """Where pipelines run: the repository, what is kept between them, and who asked for secrets."""

    repository: Path
    place: Path  # of caches, artifacts and clones
    within: tuple[str, ...] = ()  # words before every script's
    secrets: Mapping[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (job, secret)
    number: int = 0

    def clone(self) -> Path:
        folder = self.place / "clones" / f"{len(list((self.place / 'clones').glob('*')))}"
        subprocess.run(["git", "clone", "-q", str(self.repository), str(folder)], check=True)
        return folder

    def shell(self, script: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
        path = f"{self.place / 'bin'}:{BIN}:{os.environ['PATH']}"
        outside = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
        command = [*self.within, "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        result = subprocess.run(
            command,
            cwd=folder,
            env={**outside, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return result.returncode, result.stdout


# -- GitHub -------------------------------------------------------------------------------------------------------------
class GitHub:
    """One run of a workflow, for a push to a branch, a tag, or a pull request."""

    def __init__(self, machine: Machine, text: str, event: str, ref: str) -> None:
        machine.number += 1
        self.machine, self.workflow = machine, yaml.safe_load(text)
        self.artifacts = machine.place / "artifacts" / str(machine.number)
        self.kind, _, self.ref_name = ref.removeprefix("refs/").partition("/")
        self.github = {
            "github.event_name": event,
            "github.ref": ref,
            "github.ref_type": "tag" if self.kind == "tags" else "branch",
            "github.run_id": str(machine.number),
            "github.run_attempt": "1",
            "github.event.repository.default_branch": "main",
            "github.token": "a token",
            "github.repository": "a/b",
        }
        self.jobs: dict[str, Job] = {}

    def run(self, without: tuple[str, ...] = ()) -> dict[str, Job]:
        """Job → what it came to; of a matrix `JOB VALUE`, and JOB for all of them."""
        for name, job in self.workflow["jobs"].items():
            if name in without:
                continue
            self._names = {
                f"needs.{one}.outputs.{key}": value for one in self.jobs for key, value in self.jobs[one].outputs.items()
            }
            self._names |= {f"needs.{one}.result": found.result for one, found in self.jobs.items()} | self.github
            needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
            wanted = job.get("if", "")
            good = all(self.jobs[one].result == "success" for one in needs)
            if (not good and "always()" not in wanted) or (wanted and not self._value(wanted)):
                self.jobs[name] = Job(name, "skipped")
                continue
            matrix = job.get("strategy", {}).get("matrix", {})
            if not matrix:
                self.jobs[name] = self._run(name, job, {})
                continue
            ((variable, values),) = matrix.items()
            runs = [(f"{name} {value}", {f"matrix.{variable}": value}) for value in self._value(values[4:-3])]
            for one, names in runs:
                self.jobs[one] = self._run(one, job, names)
            bad = any(self.jobs[one].result != "success" for one, _ in runs)
            self.jobs[name] = Job(name, "failure" if bad else "success")
        return self.jobs

    def _run(self, name: str, job: dict[str, Any], names: dict[str, Any]) -> Job:
        self._names |= names
        temporary = self.machine.place / "temporary" / f"{self.machine.number}-{name.replace(' ', '-')}"
        temporary.mkdir(parents=True)
        self._names |= {"runner.temp": str(temporary)}
        outer = {**self.workflow["env"], **job.get("env", {})}
        outer = {key: self._filled(name, value) for key, value in outer.items()}
        outer |= {
            "RUNNER_TEMP": str(temporary),
            "GITHUB_REF_NAME": self.ref_name,
            "GITHUB_REF_TYPE": self.github["github.ref_type"],
        }
        outer |= {"GITHUB_OUTPUT": str(temporary / "outputs"), "GITHUB_STEP_SUMMARY": str(temporary / "summary")}
        found = Job(name, "success", home=temporary / "home")
        outer["HOME"] = str(found.home)
        for step in job["steps"]:
            if (found.result == "failure" and "always()" not in step.get("if", "")) or not self._value(step.get("if", "True")):
                continue
            if "run" in step:
                own = {key: self._filled(name, value) for key, value in step.get("env", {}).items()}
                folder = found.folder / self.workflow["defaults"]["run"]["working-directory"]
                status, log = self.machine.shell(step["run"], folder, {**outer, **own})
                found.log += log
                found.result = "failure" if status else found.result
                self._names[f"steps.{step.get('id')}.outcome"] = "failure" if status else "success"
            else:
                given = {key: self._filled(name, value) for key, value in step.get("with", {}).items()}
                hit = self._action(step["uses"].split("@")[0], given, found)
                self._names[f"steps.{step.get('id')}.outputs.cache-hit"] = str(hit).lower()
        if (temporary / "outputs").exists():
            values = dict(line.split("=", 1) for line in (temporary / "outputs").read_text().splitlines())
            found.outputs = {
                key: values[value.split(".")[-1].removesuffix(" }}")] for key, value in job.get("outputs", {}).items()
            }
        return found

    def _action(self, action: str, given: dict[str, str], job: Job) -> bool:
        """→ whether a cache had what was asked for, and no other."""
        places = given.get("path", "").split()
        if action == "actions/checkout":
            assert given == {"persist-credentials": "False"}
            job.folder = self.machine.clone()
            assert subprocess.run(["git", "checkout", "-q", self.ref_name], cwd=job.folder, check=False).returncode == 0
        elif action == "actions/cache/restore":
            kept = sorted((self.machine.place / "cache").glob("*"), key=lambda path: path.stat().st_mtime_ns)
            matching = [path for path in kept if path.name.startswith(given.get("restore-keys", given["key"]))]
            for place in places if matching else ():
                copy(matching[-1] / place, self._at(job, place))
            return bool(matching) and matching[-1].name == given["key"]
        elif action == "actions/cache/save":
            for place in places:
                copy(self._at(job, place), self.machine.place / "cache" / given["key"] / place)
        elif action == "actions/upload-artifact":
            for place in places:
                source = self._at(job, place)
                copy(source, self.artifacts / given["name"] / ("" if source.is_dir() else source.name))
        elif action == "actions/download-artifact":
            for made in sorted(self.artifacts.glob("*")):
                if fnmatch.fnmatch(made.name, given["pattern"]):
                    copy(made, self._at(job, given["path"]) / ("" if "merge-multiple" in given else made.name))
        else:
            assert action == "actions/setup-python"
        return False

    def _at(self, job: Job, place: str) -> Path:
        return job.home / place[2:] if place.startswith("~/") else job.folder / place

    def _filled(self, job: str, value: object) -> str:
        def of(match: "re.Match[str]") -> str:
            if match[1].startswith("secrets."):
                self.machine.asked.append((job, match[1].removeprefix("secrets.")))
                return self.machine.secrets.get(match[1].removeprefix("secrets."), "")
            return str(self._value(match[1]))

        return re.sub(r"\$\{\{ (.*?) \}\}", of, str(value))

    def _value(self, expression: str) -> Any:
        """GitHub's expressions, as Python's."""
        text = expression.replace("&&", " and ").replace("||", " or ")
        text = re.sub(r"\b(needs|github|matrix|runner|steps)(\.[\w-]+)+", lambda match: f"names.get({match[0]!r}, '')", text)
        known = {"always": lambda: True, "fromJSON": json.loads, "format": lambda form, *values: form.format(*values)}
        return eval(text, {"names": self._names, **known})


# -- GitLab -------------------------------------------------------------------------------------------------------------
class GitLab:
    """One pipeline, for a branch or a tag, with the child that it makes."""

    def __init__(
        self, machine: Machine, text: str, variables: Mapping[str, str], parent: "Mapping[str, Path] | None" = None
    ) -> None:
        machine.number += 1
        self.machine, self.pipeline, self.variables = machine, yaml.safe_load(text), {**variables}
        self.parent = parent or {}  # the artifacts of its jobs
        self.artifacts: dict[str, Path] = {}
        self.jobs: dict[str, Job] = {}

    def run(self) -> dict[str, Job]:
        reserved = ("stages", "workflow", "variables", "default", "include")
        self.variables = {**self.pipeline.get("variables", {}), **self.variables}
        jobs = {name: self._extended(job) for name, job in self.pipeline.items() if name not in reserved and name[0] != "."}
        for stage in self.pipeline["stages"]:
            for name, job in jobs.items():
                when = self._when(job["rules"])
                bad = any(found.result == "failure" for found in self.jobs.values())
                if job["stage"] != stage or when == "never" or (bad and when != "always"):
                    continue
                self.jobs[name] = self._child(name, job) if "trigger" in job else self._run(name, job)
        return self.jobs

    def _extended(self, job: dict[str, Any]) -> dict[str, Any]:
        return {**self.pipeline.get(job.get("extends"), {}), **job}

    def _child(self, name: str, job: dict[str, Any]) -> Job:
        (include,) = job["trigger"]["include"]
        text = (self.artifacts[include["job"]] / include["artifact"]).read_text()
        assert job["variables"] == {"PARENT_PIPELINE_ID": "$CI_PIPELINE_ID"}
        jobs = GitLab(self.machine, text, self.variables, self.artifacts).run()
        self.jobs |= jobs
        return Job(name, "failure" if any(found.result == "failure" for found in jobs.values()) else "success")

    def _run(self, name: str, job: dict[str, Any]) -> Job:
        folder = self.machine.clone()
        if tag := self.variables.get("CI_COMMIT_TAG"):
            subprocess.run(["git", "checkout", "-q", tag], cwd=folder, check=True)
        needed = [
            self.artifacts[one] for one in job.get("needs", self.artifacts) if isinstance(one, str) and one in self.artifacts
        ]
        for one in job.get("needs", ()):
            if isinstance(one, dict):
                assert one["pipeline"] == "$PARENT_PIPELINE_ID"
                needed.append(self.parent[one["job"]])
        caches = job.get("cache", [])
        caches = caches if isinstance(caches, list) else [caches]
        for place in [place for cache in caches for place in cache["paths"]]:
            copy(self.machine.place / "cache" / place, folder / place)
        for made in needed:
            copy(made, folder)
        own = {key: str(value) for key, value in job.get("variables", {}).items()}
        secrets = dict(self.machine.secrets) if job.get("environment") else {}
        self.machine.asked += [(name, secret) for secret in secrets]
        variables = {**self.variables, **own, **secrets}
        before = job.get("before_script", self.pipeline["default"]["before_script"])
        status, log = self.machine.shell("\n".join([*before, *job["script"]]), folder, variables)
        if "after_script" in job:
            after, more = self.machine.shell("\n".join(job["after_script"]), folder, variables)
            assert after == 0, more
        for cache in caches if not status else ():
            for place in cache["paths"] if cache["policy"] == "pull-push" else ():
                copy(folder / place, self.machine.place / "cache" / place)
        kept = self.machine.place / "artifacts" / f"{self.machine.number}-{name.replace(':', '-')}"
        for place in self._kept(job.get("artifacts", {}), status):
            copy(folder / place, kept / place)
        self.artifacts[name] = kept
        return Job(name, "failure" if status else "success", log, folder)

    def _kept(self, artifacts: Mapping[str, Any], status: int) -> Iterator[str]:
        if not status or artifacts.get("when") == "always":
            yield from artifacts.get("paths", ())

    def _when(self, rules: list[dict[str, str]]) -> str:
        for rule in rules:
            if self._holds(rule.get("if", "")):
                return rule.get("when", "on_success")
        return "never"

    def _holds(self, condition: str) -> bool:
        first, equals, second = (part.strip() for part in condition.partition("=="))
        if equals:
            return self._of(first) == self._of(second)
        return not condition or bool(self._of(condition))

    def _of(self, word: str) -> str:
        return str(self.variables.get(word.removeprefix("$"), ""))
