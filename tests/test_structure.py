"""What holds the repository together: the modules named in recipes, the pins, the schemas, the quick path's imports."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement

from edgebuild import plan, toolchain
from edgebuild.backends import BACKENDS
from edgebuild.bundles import BUNDLES
from tests.conftest import ROOT

# Names and messages alone: what they hold is not computed with, so a change there makes no result another one.
NOUNS = {"", "errors", "step", "artifact", "digest", "shipped"}
# Where a verb's action begins.
ROOTS = {
    "fetch": ["source"],
    "assess": ["assess"],
    "convert": [f"backends.{name}" for name in BACKENDS],
    "quantize": [f"backends.{name}" for name in BACKENDS],
    "choose": ["ladder"],
    "evaluate": ["quality"],
    "answer": ["quality"],
    "agree": ["agree"],
    "benchmark": ["bench"],
    "gate": ["gates"],
    "package": ["bundle", *(f"bundles.{name}" for name in BUNDLES)],
    "build": ["evidence"],
}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("edgebuild", exclude_type_checking_imports=True)


@pytest.mark.parametrize("verb", sorted(ROOTS))
def test_a_recipe_names_every_module_that_its_action_runs(verb: str, graph: grimp.ImportGraph) -> None:
    named = set(plan.CODE[verb]) | {name for name in ROOTS[verb] if name.startswith(("backends.", "bundles."))}
    for kind in BUNDLES.values():
        named |= set(kind.CODE) if verb == "package" else set()
    for modules in plan.READERS.values():
        named |= set(modules) if verb in ("convert", "quantize") else set()
    for modules in plan.DOWNLOADS.values():
        named |= set(modules) if verb == "fetch" else set()
    for root in ROOTS[verb]:
        module = f"edgebuild.{root}"
        runs = {module, *graph.find_upstream_modules(module, as_package=False)}
        missing = {name.removeprefix("edgebuild").removeprefix(".") for name in runs} - named - NOUNS
        assert not missing, f"{verb}: {sorted(missing)} run in {root} and are not in plan.CODE"


def test_nothing_is_named_in_vain(graph: grimp.ImportGraph) -> None:
    for modules in (*plan.CODE.values(), *plan.DOWNLOADS.values(), *plan.READERS.values()):
        for module in modules:
            assert f"edgebuild.{module}" in graph.modules


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", sorted(set(toolchain.names()) & set(EXTRAS)))
def test_extras_pin_what_the_locks_pin(name: str) -> None:
    """On every platform, and every package that the backend names: what pip installs by the extra, the lock takes for its own."""
    extra = [Requirement(line) for line in EXTRAS[name]]
    text = Path(toolchain.file(name)).read_text()
    locked = {(toolchain.normalized(one), version) for one, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)}
    assert extra
    assert {(toolchain.normalized(one.name), str(one.specifier).removeprefix("==")) for one in extra} <= locked
    lock = toolchain.read(name)
    assert lock is not None
    here = {toolchain.normalized(one.name): str(one.specifier) for one in extra if one.marker is None or one.marker.evaluate()}
    for package in {
        one for backend in BACKENDS.values() for needs in backend.NEEDS.values() if needs.lock == name for one in needs.packages
    }:
        assert here[toolchain.normalized(package)] == f"=={lock.pinned(package)}", package
    assert lock.imports
    assert text.count("--hash=sha256:") > len(locked)


@pytest.mark.parametrize("name", sorted(toolchain.names()))
def test_the_head_of_a_lock_is_what_pyproject_says(name: str) -> None:
    settings = PROJECT["tool"]["edgebuild"]
    lines = Path(toolchain.file(name)).read_text().splitlines()
    head = runpy.run_path(str(ROOT / ".ci/lock.py"))["head"](name, {**settings["every-lock"], **settings["locks"][name]}, lines)
    assert lines[: len(head)] == head
    assert lines[len(head)][0].isalnum()


def test_what_one_environment_holds_agrees() -> None:
    """`[all]` is one environment: of a package that several of its extras name, they name one version."""
    (everything,) = (Requirement(line) for line in EXTRAS["all"])
    versions: dict[str, set[str]] = {}
    for name in everything.extras:
        for line in EXTRAS[name]:
            versions.setdefault(toolchain.normalized(Requirement(line).name), set()).add(str(Requirement(line).specifier))
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_every_backend_and_edgebuild_itself_is_in_a_lock() -> None:
    """A worker in a toolchain's environment has nothing but what the lock names."""
    project = PROJECT["project"]
    locks = {needs.lock for name, backend in BACKENDS.items() if name != "fake" for needs in backend.NEEDS.values()}
    assert locks <= set(toolchain.names())
    for name in toolchain.names():
        lock = toolchain.read(name)
        assert lock is not None
        if lock.wheels:
            continue  # for an image, in which nothing of edgebuild is
        for line in project["dependencies"]:
            wanted = Requirement(line)
            assert wanted.specifier.contains(lock.pinned(wanted.name) or "0"), f"{name}: {line}"


def test_no_framework_is_imported_by_the_core() -> None:
    code = "import sys, edgebuild.tasks, edgebuild.cli, edgebuild.plan, edgebuild.run, edgebuild.worker, edgebuild.backends, edgebuild.bundles, edgebuild.load\nprint(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert loaded.isdisjoint(
        {"numpy", "onnx", "onnxruntime", "mlx", "mlx_lm", "llama_cpp", "transformers", "torch", "openvino", "nncf"}
    )


def test_what_a_model_takes_is_estimated_without_numpy() -> None:
    """By every backend that takes it: so does the parent of workers, before each step."""
    code = "import sys\nfrom edgebuild.cli import main\nassert main(['assess', 'targets/models/tiny-phi3']) == 0\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "memory to build" in done.stdout
    assert {"numpy", "onnx", "jinja2"}.isdisjoint(done.stdout.split())


def test_a_no_op_imports_little(tmp_path: Path) -> None:
    from tests.conftest import make_lab

    lab = make_lab(tmp_path / "project")
    lab.build()
    doit = [sys.executable, "-m", "doit"]
    for _ in range(3):
        subprocess.run(doit, cwd=lab.root, check=True, capture_output=True)
    code = "import sys\nfrom edgebuild.cli import main\nassert main([]) == 0\nprint(*sys.modules)"
    quick = subprocess.run([sys.executable, "-c", code], cwd=lab.root, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"yaml", "jsonschema", "jinja2", "rich", "numpy", "onnx", "mlx", "psutil"}
    assert heavy.isdisjoint(quick)
    assert "doit" not in quick
    code = "import sys\nfrom doit.doit_cmd import DoitMain\ntry: DoitMain().run([])\nfinally: print(*sys.modules)"
    through = subprocess.run([sys.executable, "-c", code], cwd=lab.root, capture_output=True, text=True).stdout.split()
    assert heavy.isdisjoint(through)
    assert "doit" in through


@pytest.mark.parametrize("schema", sorted(path.name for path in (ROOT / "schemas").glob("*.json")))
def test_schemas_are_valid(schema: str) -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(json.loads((ROOT / "schemas" / schema).read_text()))


def test_no_path_of_a_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    for name in filter(None, listed):
        path = ROOT / name.decode()
        if path.is_file() and path.name != Path(__file__).name:
            content = path.read_bytes()
            for word in (b"/work/", b"/root/", b"/tmp/v"):
                assert word not in content, f"{path} holds {word!r}"
