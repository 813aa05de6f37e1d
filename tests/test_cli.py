"""`doit` and `edgebuild` as they are typed: outcomes, exit statuses, the last line, interrupts, what is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest

from edgebuild import cli, tasks
from edgebuild.errors import shown
from tests.conftest import ROOT, TARGET, Lab, ends, write_model

BIN = Path(sys.executable).parent


def run(lab: Lab, *words: str, program: str = "doit") -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(BIN / program), *words], cwd=lab.root, capture_output=True, text=True, timeout=120)


def last_run(lab: Lab) -> dict[str, str]:
    content = json.loads((lab.root / ".edgebuild" / "last-run.json").read_text())
    return {step["name"]: step["outcome"] for step in content["steps"]}


@pytest.mark.parametrize("program", ["doit", "edgebuild"])
def test_build_then_nothing(lab: Lab, program: str) -> None:
    first = run(lab, program=program)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == ""
    assert first.stdout.splitlines()[-1].startswith("edgebuild: 9 ran, 0 restored, 0 up to date, 0 failed (")
    assert "dist/one: folder bundle" in first.stdout
    second = run(lab, program=program)
    assert second.stdout.splitlines()[-1].startswith("edgebuild: 0 ran, 0 restored, 9 up to date, 0 failed (")
    assert set(last_run(lab).values()) == {"fresh"}
    assert sorted(path.name for path in (lab.root / "dist").iterdir()) == ["one", "one.evidence.json", "one.tar"]
    assert not list((lab.root / ".edgebuild" / "tmp").iterdir())


def test_list_shows_targets_with_their_descriptions(lab: Lab) -> None:
    assert "build:one   a fake deliverable" in run(lab, "list").stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["build:onee"], 'Did you mean "build:one"?'),
        (["one"], "doit build:one"),
        (["biuld"], 'Did you mean "build"?'),
        (["-n", "2", "lits"], 'Did you mean "list"?'),
        (["quantise:one"], 'Did you mean "quantize:one"?'),
        (["build:zz*"], "there is no"),
        (["strct=1"], 'Did you mean "strict"?'),
        (["strict=no"], 'strict: must be 1 or 0, not "no"'),
        (["plan", "one"], "edgebuild plan …"),
        (["exlain", "one"], 'Did you mean "explain"?'),
        (["build:one", "package.version=1.x"], "semantic version"),
    ],
)
def test_wrong_words(lab: Lab, words: list[str], hint: str) -> None:
    result = run(lab, *words)
    assert result.returncode == 3
    assert hint in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--strct"],
            'there is no option "--strct"; `edgebuild --help` and `edgebuild help run` show them. Did you mean "--strict"?',
        ),
        (["--strict", "plan", "one"], "--strict is for what builds"),
    ],
)
def test_wrong_options(lab: Lab, words: list[str], hint: str) -> None:
    result = run(lab, *words, program="edgebuild")
    assert (result.returncode, len(result.stderr.splitlines())) == (3, 1)
    assert hint in result.stderr


def test_options_stand_before_commands_too(lab: Lab) -> None:
    assert run(lab, "--offline", "explain", "one", program="edgebuild").returncode == 0
    assert "USAGE\n    edgebuild clean" in run(lab, "clean", "--help", program="edgebuild").stdout


def test_who_stops_reading_is_no_fault(lab: Lab) -> None:
    listed = subprocess.run(
        ["sh", "-c", f"{BIN / 'edgebuild'} list --all | true"], cwd=lab.root, capture_output=True, text=True, check=True
    )
    assert listed.stderr == ""


def test_doit_is_told_of_every_command() -> None:
    assert {*tasks.OWN} == {*cli.COMMANDS} - {*tasks.DOCS}


def test_selection(lab: Lab) -> None:
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "default: false\n")
    assert run(lab, "quantize:one").returncode == 0
    assert set(last_run(lab)) == {"fetch:one", "assess:one", "convert:one", "evaluate:one.baseline", "quantize:one"}
    run(lab)
    assert not any(name.endswith(":two") for name in last_run(lab))
    run(lab, "build:t*")
    assert last_run(lab)["quantize:two"] == "restored"  # the same key: the work is done once
    assert run(lab, "dist/two").returncode == 0


def test_bad_target_fails_alone_with_status_3(lab: Lab) -> None:
    (lab.root / "targets" / "bad.yaml").write_text("nonsense: 1\n")
    result = run(lab)
    assert result.returncode == 3
    assert "targets/bad.yaml:1: nonsense: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
    assert (lab.root / "dist" / "one").exists()
    assert run(lab, "build:one").returncode == 0


@pytest.mark.parametrize("name", ["a=b", "a\nb", "a\x1b[31mb", "a\udcffb", "-x"])
def test_a_file_of_any_name_fails_alone(lab: Lab, name: str) -> None:
    (lab.root / "targets" / f"{name}.yaml").write_text(TARGET)
    result = run(lab)
    assert result.returncode == 3
    assert "rename it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert (lab.root / "dist" / "one").exists()
    assert "cannot be built: targets/" in run(lab, "list").stdout
    assert f"\n{shown(name)} " in run(lab, "du", program="edgebuild").stdout
    assert {one["name"] for one in json.loads(run(lab, "du", "--json", program="edgebuild").stdout)["targets"]} == {name, "one"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!killed", "killed (SIGKILL)"),
        ("!abort", "died of SIGABRT"),
        ("!exit", "status 0 and no result"),
        ("!nothing", "no result"),
        (
            "!fault",
            "unexpected RuntimeError: a fault in the framework\n  log: .edgebuild/logs/one/convert.log\n    | RuntimeError: a fault",
        ),
        (
            "!refused",
            "the framework does not take this model\n  log: .edgebuild/logs/one/convert.log\n    | what the framework prints",
        ),
        ("!full", "the disk is full; nothing was kept; free space"),
        ("!hang", "took longer than its limit of 4 s"),
        ("!memory", "over its limit of 400 MB"),
    ],
)
def test_a_worker_that_fails(lab: Lab, text: str, message: str) -> None:
    (lab.root / "targets" / "one.yaml").write_text(
        TARGET + f"limits: {{memory: 400MB, time: {'4s' if text == '!hang' else '60s'}}}\n"
    )
    write_model(lab.root / "model.gguf", text)
    result = run(lab)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert last_run(lab)["convert:one"] == "failed"
    assert last_run(lab)["quantize:one"] == "blocked"
    assert not (lab.root / "build" / "one" / "convert").exists()
    write_model(lab.root / "model.gguf", "better")
    assert run(lab).returncode == 0


def test_children_left_behind_are_ended(lab: Lab) -> None:
    write_model(lab.root / "model.gguf", "!child")
    assert run(lab).returncode == 0
    ends(lambda: not left_behind("edgebuild-left-behind"))


def left_behind(word: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        if any(word in part for part in process.info["cmdline"] or []) and process.info["pid"] != os.getpid():
            found.append(process.info["pid"])
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_interrupt(lab: Lab, number: signal.Signals, options: list[str]) -> None:
    write_model(lab.root / "model.gguf", "!slow30")
    process = subprocess.Popen(
        [str(BIN / "doit"), *options], cwd=lab.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = lab.root / ".edgebuild" / "workers"
    ends(lambda: (lab.root / "build/one/assess.json").exists() and workers.exists() and list(workers.iterdir()))
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    ends(lambda: not left_behind(str(lab.root)), 20)  # long before the worker would end by itself
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert out.splitlines()[-1].startswith("edgebuild: 2 ran")
    write_model(lab.root / "model.gguf", "better")
    assert run(lab).returncode == 0
    assert not list((lab.root / ".edgebuild" / "tmp").iterdir())
    assert not list(workers.iterdir())


def test_what_a_crash_at_the_very_end_left_behind_is_collected(lab: Lab) -> None:
    """All steps were done, so that the next build has no work; yet it is no no-op by stats alone."""
    run(lab)
    state = lab.root / ".edgebuild"
    (state / "noop.json").unlink(missing_ok=True)
    (state / ".tmp-999999999.1-abc").write_text("half a file")
    (state / "tmp" / "999999999.1-abc").mkdir()
    assert "9 up to date" in run(lab).stdout
    assert not [path for path in state.rglob("*") if "999999999" in path.name]


def test_parallel_builds_do_the_work_once(lab: Lab) -> None:
    write_model(lab.root / "model.gguf", "!slow1")
    builds = [
        subprocess.Popen([str(BIN / "doit")], cwd=lab.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [build.communicate(timeout=60) for build in builds]
    assert [build.returncode for build in builds] == [0, 0], outputs
    assert sum(out.count("convert:one                      ran ") for out, _ in outputs) == 1
    assert set(lab.build().values()) == {"fresh"}


def test_a_measuring_step_has_the_machine_to_itself(lab: Lab, tmp_path: Path) -> None:
    """While one build measures, the framework steps of another, with another store, wait and say so."""
    from edgebuild.files import locked

    with locked(f"{os.environ['XDG_CACHE_HOME']}/edgebuild/machine.lock"):
        process = subprocess.Popen([str(BIN / "doit")], cwd=lab.root, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert "waits for a measurement" in process.stdout.readline()
        assert not (lab.root / "build" / "one" / "fetch.json").exists()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_two_threads(lab: Lab) -> None:
    for number in range(3):
        (lab.root / "targets" / f"t{number}.yaml").write_text(TARGET + f"package: {{version: 1.0.{number}}}\n")
    result = run(lab, "-n", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(lab.build().values()) == {"fresh"}


def test_clean(lab: Lab) -> None:
    run(lab)
    assert run(lab, "clean").returncode == 0
    assert not (lab.root / "build").exists()
    assert not (lab.root / "dist").exists()
    assert "9 restored" in run(lab).stdout
    assert "remove what build:one made" in run(lab, "clean", "build:one").stdout
    assert not (lab.root / "build").exists()
    assert not (lab.root / "dist").exists()


def test_a_removed_target_takes_its_bundle_with_it(lab: Lab) -> None:
    (lab.root / "targets" / "two.yaml").write_text(TARGET)
    run(lab)
    (lab.root / "dist" / "mine").write_text("not edgebuild's")
    (lab.root / "targets" / "two.yaml").unlink()
    run(lab)
    assert sorted(path.name for path in (lab.root / "dist").iterdir()) == ["mine", "one", "one.evidence.json", "one.tar"]
    assert not (lab.root / "build" / "two").exists()


def test_a_failing_gate(lab: Lab) -> None:
    run(lab)
    target = lab.root / "targets" / "one.yaml"
    target.write_text(TARGET + "gates: {cosine: {min: 2}}\n")
    for _ in range(2):  # the second time too, when everything else is up to date
        result = run(lab)
        assert result.returncode == 1
        assert "gate cosine FAIL" in result.stderr
    assert not (lab.root / "dist" / "one").exists()
    assert not (lab.root / "dist" / "one.evidence.json").exists()
    assert (lab.root / "build" / "one" / "quantize" / "model").exists()
    evidence = json.loads((lab.root / "build" / "one" / "evidence.json").read_text())
    assert evidence["gates"][0]["verdict"] == "FAIL"
    assert evidence["bundle"]["files"] is None
    jsonschema.validate(evidence, json.loads((ROOT / "schemas" / "evidence.json").read_text()))
    target.write_text(TARGET + 'gates: {cosine: {min: 2, waive: {reason: "known", until: "2099-01-01"}}}\n')
    result = run(lab)
    assert result.returncode == 0
    assert "FAIL, waived" in result.stdout
    assert (lab.root / "dist" / "one").exists()


def test_strict(lab: Lab) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "gates: {latency_ratio: {max: 2}}\n")
    result = run(lab)
    assert result.returncode == 0
    assert "INCONCLUSIVE" in result.stdout
    assert run(lab, "--strict", program="edgebuild").returncode == 1
    assert run(lab, "strict=1").returncode == 1


def test_package_version_on_the_command_line(lab: Lab) -> None:
    run(lab)
    assert run(lab, "build:one", "package.version=2.0.0").returncode == 0
    assert last_run(lab)["package:one"] == "ran"
    assert json.loads((lab.root / "dist" / "one" / "manifest.json").read_text())["version"] == "2.0.0"
    run(lab)
    assert last_run(lab)["package:one"] == "restored"


def test_explain(lab: Lab) -> None:
    run(lab)
    assert "stale" not in run(lab, "explain", "one", program="edgebuild").stdout
    write_model(lab.root / "model.gguf", "another")
    result = run(lab, "explain", "one", program="edgebuild")
    assert "fetch:one                        stale       input model: " in result.stdout
    assert "waiting     for fetch:one" in result.stdout
    states = json.loads(run(lab, "explain", "one", "--json", program="edgebuild").stdout)
    jsonschema.validate(states, json.loads((ROOT / "schemas" / "explain.json").read_text()))
    assert states["steps"][0]["state"] == "stale"
    missing = run(lab, "explain", "onee", program="edgebuild")
    assert missing.returncode == 3
    assert 'Did you mean "one"?' in missing.stderr


def test_explain_help_and_no_project(lab: Lab, tmp_path: Path) -> None:
    assert "example" in run(lab, "explain", "--help", program="edgebuild").stdout
    result = subprocess.run([str(BIN / "edgebuild")], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 3
    assert "edgebuild init DIR" in result.stderr


@pytest.mark.parametrize("place", ["build", "dist", ".edgebuild"])
def test_a_folder_that_cannot_be_written(lab: Lab, place: str) -> None:
    """Root ignores modes, so the capability that lets it is dropped for the child."""
    (lab.root / place).mkdir()
    (lab.root / place).chmod(0o555)
    command = [str(BIN / "doit")]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    result = subprocess.run(command, cwd=lab.root, capture_output=True, text=True)
    (lab.root / place).chmod(0o755)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert run(lab).returncode == 0


@pytest.mark.parametrize("size", [8, 24, 48, 80, 120])
def test_a_full_disk(lab: Lab, size: int) -> None:
    """A store on a file system of so many kB."""
    store = lab.root / "store"
    store.mkdir()
    script = f"mount -t tmpfs -o size={size}k none {store} && EDGEBUILD_STORE={store} exec {BIN / 'doit'}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=lab.root, capture_output=True, text=True)
    if "mount" in result.stderr and "permitted" in result.stderr:
        pytest.skip("this user may not mount; run as root")
    assert result.returncode == 1
    assert "disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert run(lab).returncode == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "folder"])
@pytest.mark.parametrize("what", ["objects", "records", "memo.json", "plan.json", "noop.json", "recipes.json", "receipts"])
def test_damage_is_a_miss(lab: Lab, what: str, damage: str) -> None:
    run(lab)
    run(lab)
    before = lab.outputs()
    state = lab.root / ".edgebuild"
    paths = list((lab.root / "build").glob("*/*.json")) if what == "receipts" else [state / what]
    if what in ("objects", "records"):
        paths = [path for path in sorted((state / what).rglob("*")) if path.is_file()]
    for path in paths:
        data = path.read_bytes()
        path.chmod(0o644)
        if damage == "folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "truncate": data[: len(data) // 2], "empty": b""}[damage])
    (lab.root / "build" / "one" / "quantize.json").unlink() if what != "receipts" else None
    result = run(lab)
    assert result.returncode == 0, result.stdout + result.stderr
    assert lab.outputs() == before


def test_init(tmp_path: Path) -> None:
    result = subprocess.run([str(BIN / "edgebuild"), "init", "there"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "there" / "targets" / "web-digits.yaml").read_text() == (ROOT / "targets" / "web-digits.yaml").read_text()
    again = subprocess.run([str(BIN / "edgebuild"), "init", "there"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 3
