"""Models from elsewhere: hf:, https: and package:, through the real worker, from servers on 127.0.0.1 that misbehave."""

import hashlib
import importlib.metadata
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from huggingface_hub import constants

from edgebuild import fsck, gc, original
from edgebuild.backend import Needs
from edgebuild.errors import StepFailed
from edgebuild.forecast import forecast
from edgebuild.fresh import Fresh
from edgebuild.process import Workers
from edgebuild.progress import Plain
from edgebuild.project import Project
from edgebuild.run import Builder, Done, sweep
from edgebuild.target import parse_source
from edgebuild.verify import verify
from tests.backends.magika import MAGIKA
from tests.backends.phi3 import golden
from tests.conftest import ROOT, TARGET, Lab, perform_here
from tests.loopback import COMMIT, Loopback, serve

GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + b"hello" + bytes(3_000_000)
MODEL = {path.name: path.read_bytes() for path in (ROOT / "targets/models/tiny-phi3").iterdir()}
AUTO_MAP = b'{"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},'
REPOSITORY = {
    **MODEL,
    "config.json": AUTO_MAP + MODEL["config.json"].lstrip()[1:],
    "LICENSE.txt": b"as you like",
    "modeling_phi3.py": b"import os; os._exit(77)",
    "pytorch_model.bin": b"\x80\x02}q\x00.",
    "onnx/model.onnx": (ROOT / "targets/models/digits.onnx").read_bytes(),
    "README.md": b"# A model",
}
PHI = f"""edgebuild: 1
model: {{source: "hf:org/model@{COMMIT}", task: text-generation}}
platform: ios
"""


def target(lab: Lab, text: str, name: str = "one") -> None:
    (lab.root / "targets" / f"{name}.yaml").write_text(text)


def run(lab: Lab, step: str = "fetch:one", moved: list[tuple[str, int, int | None]] | None = None) -> Done:
    os.chdir(lab.root)
    project = Project()
    assert not project.problems, project.problems
    workers = Workers(moved=lambda *what: moved.append(what)) if moved is not None else Workers()
    try:
        return Builder(project, Fresh(project), workers).run(project.steps[step])
    finally:
        project.memo.save()


def fails(lab: Lab, step: str = "fetch:one") -> str:
    with pytest.raises(StepFailed) as caught:
        run(lab, step)
    message = str(caught.value)
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1, message
    return message


# -- Hugging Face ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    with serve(dict(REPOSITORY)) as (loopback, address):
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read once, at whichever test's first import
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        target(lab, PHI)
        yield loopback


def test_a_repository_is_read_where_the_cache_has_it(lab: Lab, hub: Loopback, tmp_path: Path) -> None:
    assert run(lab).outcome == "ran"
    source = json.loads((lab.root / "build/one/fetch/source.json").read_text())
    names = {entry["path"] for entry in source["files"]}
    assert names == {*MODEL, "LICENSE.txt"}  # no code, no pickle, no other form of the weights
    place = lab.root / f".edgebuild/sources/hf/org/model/{COMMIT}"
    assert all(path.is_symlink() and tmp_path / "hf" in path.resolve().parents for path in place.iterdir())
    assert [path.name for path in (lab.root / "build/one/fetch/licences").iterdir()] == ["LICENSE.txt"]
    weights = hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
    assert not (lab.root / f".edgebuild/objects/{weights[:2]}/{weights[2:]}").exists()  # never copied in
    assert "4,196,608 parameters" in run(lab, "assess:one").summary


def test_code_is_neither_run_nor_needed(lab: Lab, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    known = golden(ROOT / "targets/models/tiny-phi3")

    def by_transformers(model: Path, *texts: object) -> list[tuple[object, object]]:
        assert not list(model.rglob("*.py"))
        assert "auto_map" not in (model / "config.json").read_text()
        return [(known.tokens, known.logits)]

    monkeypatch.setattr(original, "by_transformers", by_transformers)
    monkeypatch.setattr(original, "NEEDS", Needs(lock="this interpreter's", packages=("transformers",)))
    for step in ("fetch:one", "assess:one"):
        assert run(lab, step).outcome == "ran"
    project = Project()
    assert Builder(project, Fresh(project), Workers(), perform_here).run(project.steps["reference:one"]).outcome == "ran"
    run(lab, "convert:one")
    assert "held against transformers " in run(lab, "evaluate:one.baseline").summary
    assert not list((lab.root / "build/one/convert").rglob("*.py"))
    assert "auto_map" not in (lab.root / "build/one/convert/model/config.json").read_text()


def test_weights_that_a_conversion_leaves_as_they_are_come_from_the_cache(lab: Lab, hub: Loopback) -> None:
    for step in ("fetch:one", "assess:one", "convert:one"):
        assert run(lab, step).outcome == "ran"
    made = lab.root / "build/one/convert/model"
    assert {path.name for path in made.glob("*.safetensors")} == {"model.safetensors"}
    assert (made / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_a_plan_knows_the_model_once_it_is_here(lab: Lab, hub: Loopback) -> None:
    os.chdir(lab.root)
    assert forecast(Project(), "one").unknown == "known after fetch:one"
    run(lab)
    known = forecast(Project(), "one")
    assert known.facts is not None
    assert sum(known.facts.parameters.values()) == 4_196_608
    assert known.candidate.bytes == pytest.approx(2_564_731, rel=0.05)  # what int4 in groups of 64 really makes of it


def test_what_the_cache_has_is_not_asked_for_again(lab: Lab, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    run(lab)
    sent = hub.sent
    (lab.root / "build/one/fetch.json").unlink()
    assert run(lab).outcome == "restored"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EDGEBUILD_STORE", str(lab.root / "another"))
    assert run(lab).outcome == "ran"
    assert hub.sent == sent


def test_the_cache_is_watched(lab: Lab, hub: Loopback) -> None:
    """A file of the cache that is gone or edited is brought anew, and nothing is served from it."""
    run(lab)
    os.chdir(lab.root)
    blob = (lab.root / f".edgebuild/sources/hf/org/model/{COMMIT}/config.json").resolve()
    right = blob.read_bytes()
    blob.write_bytes(right.replace(b"1", b"2", 1))
    project = Project()
    assert not Fresh(project)(project.steps["fetch:one"])
    assert "is not what the hub says" in fails(lab)
    assert not blob.exists()
    assert run(lab).outcome == "ran"
    assert blob.read_bytes() == right
    blob.unlink()
    project = Project()
    assert not Fresh(project)(project.steps["fetch:one"])
    assert run(lab).outcome == "ran"


def test_a_token_is_used_and_never_kept(lab: Lab, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    run(lab)
    assert set(hub.tokens) == {"Bearer hf_verysecret"}
    for path in (lab.root / ".edgebuild").rglob("*"):
        assert not path.is_file() or b"verysecret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "answers 401: set HF_TOKEN to a valid token"),
        ("404", "no such repository"),
        ("429", "answers 429: too many requests"),
        ("500", "answers 500"),
    ],
)
def test_a_refusal_is_one_sentence(lab: Lab, hub: Loopback, fault: str, says: str) -> None:
    hub.faults[COMMIT] = fault
    assert says in fails(lab)
    assert not (lab.root / "build/one/fetch.json").exists()
    del hub.faults[COMMIT]
    assert run(lab).outcome == "ran"


def test_a_slow_hub_shows_how_far_it_is(lab: Lab, hub: Loopback) -> None:
    hub.faults["model.safetensors"] = "slow"
    moved: list[tuple[str, int, int | None]] = []
    run(lab, moved=moved)
    total = sum(len(REPOSITORY[name]) for name in (*MODEL, "LICENSE.txt"))
    assert any(0 < here < total for _, here, _ in moved)
    assert moved[-1] == ("fetch:one", total, total)


def test_how_far_a_quick_hub_came_is_told_too(lab: Lab, hub: Loopback) -> None:
    moved: list[tuple[str, int, int | None]] = []
    run(lab, moved=moved)
    total = sum(len(REPOSITORY[name]) for name in (*MODEL, "LICENSE.txt"))
    assert moved[-1] == ("fetch:one", total, total)


def test_a_cut_connection_is_resumed(lab: Lab, hub: Loopback) -> None:
    hub.faults["model.safetensors"] = "cut once"
    run(lab)
    assert hub.sent < sum(len(REPOSITORY[name]) for name in (*MODEL, "LICENSE.txt")) + 100_000


def test_wrong_bytes_are_refused_and_nothing_is_kept(lab: Lab, hub: Loopback, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = "wrong"
    assert "model.safetensors of hf:org/model is not what the hub says it is" in fails(lab)
    weights = hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
    assert not list((tmp_path / "hf").rglob(weights))
    assert not (lab.root / ".edgebuild/sources").exists()
    hub.faults.clear()
    assert run(lab).outcome == "ran"


def test_offline_without_a_cache(lab: Lab, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in fails(lab)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached(lab: Lab, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "check the network and HF_ENDPOINT" in fails(lab)


def test_a_branch_is_refused_with_its_commit(lab: Lab, hub: Loopback) -> None:
    target(lab, PHI.replace(COMMIT, "main"))
    os.chdir(lab.root)
    problem = Project().problems["one"]
    assert f"hf:org/model@{COMMIT}" in problem
    assert problem.startswith("targets/one.yaml:2: model.source: ")


def test_one_file_of_a_repository(lab: Lab, hub: Loopback) -> None:
    target(
        lab,
        PHI.replace(COMMIT, COMMIT + "/onnx/model.onnx").replace("text-generation", "image-classification").replace("ios", "web"),
    )
    assert run(lab).outcome == "ran"
    assert "158,284 parameters" in run(lab, "assess:one").summary
    target(
        lab,
        PHI.replace(COMMIT, COMMIT + "/onnx/none.onnx").replace("text-generation", "image-classification").replace("ios", "web"),
    )
    assert "none.onnx" in fails(lab)


def test_two_targets_of_one_repository_fetch_once(lab: Lab, hub: Loopback) -> None:
    target(lab, PHI, "two")
    run(lab)
    assert run(lab, "fetch:two").outcome == "restored"


def test_links_that_no_target_needs_go_and_the_cache_stays(lab: Lab, hub: Loopback, tmp_path: Path) -> None:
    target(lab, PHI, "two")
    for name in ("fetch:one", "fetch:two"):
        run(lab, name)
    links = lab.root / f".edgebuild/sources/hf/org/model/{COMMIT}"
    (lab.root / "targets" / "two.yaml").unlink()
    assert not sweep(Project())
    assert links.is_dir()
    target(lab, TARGET)
    assert not sweep(Project())
    assert not (lab.root / ".edgebuild/sources").exists()
    assert list((tmp_path / "hf").rglob("model.safetensors"))


# -- https -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def site(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with serve({"m.gguf": GGUF, "other.gguf": GGUF}, hub=False, tls=context) as (loopback, address):
        loopback.tokens = [address]
        web(lab, address)
        yield loopback


def web(lab: Lab, address: str, name: str = "m.gguf?token=secret", sha256: str = hashlib.sha256(GGUF).hexdigest()) -> None:
    target(
        lab,
        f'edgebuild: 1\nmodel: {{source: "{address}/{name}", sha256: {sha256}, task: image-classification}}\nplatform: fake\n',
    )


def partial(lab: Lab) -> list[Path]:
    return list((lab.root / ".edgebuild/partial").glob("*"))


def test_a_file_by_its_sha256(lab: Lab, site: Loopback) -> None:
    moved: list[tuple[str, int, int | None]] = []
    run(lab, moved=moved)
    assert (lab.root / "build/one/fetch/model").read_bytes() == GGUF
    assert not partial(lab)
    for path in [*(lab.root / ".edgebuild/records").rglob("*"), *(lab.root / "build").rglob("*")]:
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    web(lab, site.tokens[0], "other.gguf")  # a mirror
    assert run(lab).outcome == "restored"
    assert set(lab.build().values()) <= {"ran", "fresh"}


def test_what_the_store_has_is_not_downloaded_again(lab: Lab, site: Loopback) -> None:
    run(lab)
    sent = site.sent
    for path in (lab.root / ".edgebuild/records").rglob("*"):
        if path.is_file():
            path.unlink()
    assert run(lab).outcome == "ran"
    assert site.sent == sent


def test_wrong_content_is_refused_and_nothing_is_kept(lab: Lab, site: Loopback) -> None:
    site.faults["m.gguf"] = "wrong"
    message = fails(lab)
    assert "not " + hashlib.sha256(GGUF).hexdigest() in message
    assert "secret" not in message
    assert not partial(lab)


def test_a_cut_download_goes_on(lab: Lab, site: Loopback) -> None:
    site.faults["m.gguf"] = "cut once"
    run(lab)
    assert site.sent == len(GGUF)


def test_an_unfinished_download_goes_on_in_the_next_build(lab: Lab, site: Loopback) -> None:
    os.chdir(lab.root)
    half = len(GGUF) // 2
    project = Project()
    path = lab.root / ".edgebuild/partial" / project.steps["fetch:one"].key({})
    path.parent.mkdir(parents=True)
    path.write_bytes(GGUF[:half])
    run(lab)
    assert site.sent == len(GGUF) - half


def test_leftovers_of_another_file_do_no_harm(lab: Lab, site: Loopback) -> None:
    os.chdir(lab.root)
    path = lab.root / ".edgebuild/partial" / Project().steps["fetch:one"].key({})
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 1_000_000)
    run(lab)
    assert (lab.root / "build/one/fetch/model").read_bytes() == GGUF


def test_a_server_without_ranges(lab: Lab, site: Loopback) -> None:
    os.chdir(lab.root)
    path = lab.root / ".edgebuild/partial" / Project().steps["fetch:one"].key({})
    path.parent.mkdir(parents=True)
    path.write_bytes(GGUF[:1000])
    site.faults["m.gguf"] = "ignore range"
    run(lab)
    assert (lab.root / "build/one/fetch/model").read_bytes() == GGUF


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("404", "404 Not Found; there is no such file (any more)"),
        ("401", "it asks for an account"),
        ("redirect http://127.0.0.1:9/m.gguf", "which is not https; not followed"),
        ("redirect /m.gguf", "redirected"),
        ("redirect https://[::1/m.gguf?secret", "redirected to what is no address; not followed"),
        ("redirect https://a..b/m.gguf?secret", "redirected to what is no address; not followed"),
        ("redirect file:///m.gguf?secret", "or to what is not https; not followed"),
        ("raw 404", "m.gguf: the server says 404; there is no such file (any more)"),
        ("raw 404 \x1b[31mred\x07", r"the server says 404 \x1b[31mred\x07; there is"),
        ("raw 401 " + "x" * 5000, "x; it asks for an account"),
    ],
)
def test_a_server_that_refuses(lab: Lab, site: Loopback, fault: str, says: str) -> None:
    site.faults["m.gguf"] = fault
    message = fails(lab)
    assert says in message
    assert site.tokens[0] in message  # which port it was, too
    assert "secret" not in message
    assert len(message) < 700


def test_numbers_that_are_none(lab: Lab, site: Loopback) -> None:
    site.faults["m.gguf"] = "raw 200 OK\r\nContent-Length: \xb2"
    assert "its 0 bytes have the sha256" in fails(lab)
    site.faults["m.gguf"] = "raw 503 Busy\r\nRetry-After: \xb2 once"
    assert run(lab).outcome == "ran"


def test_an_endless_file_is_cut_off(lab: Lab, site: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebuild import download
    from edgebuild.step import Download

    monkeypatch.setattr(download, "MAX_BYTES", 10_000_000)
    site.faults["m.gguf"] = "endless"
    what = Download(url=site.tokens[0] + "/m.gguf", partial=lab.root / "partial", moved=lambda here, total: None)
    with pytest.raises(StepFailed, match="sends more than 10 MB"):
        download.download(what, "0" * 64, lab.root / "out")


def test_content_of_another_kind_than_its_name(lab: Lab, site: Loopback) -> None:
    site.files = {"m.gguf": REPOSITORY["onnx/model.onnx"]}
    web(lab, site.tokens[0], sha256=hashlib.sha256(REPOSITORY["onnx/model.onnx"]).hexdigest())
    assert "named as gguf, but its content is onnx" in fails(lab)


# -- package ---------------------------------------------------------------------------------------------------------------
def test_a_model_inside_a_distribution(lab: Lab) -> None:
    target(lab, f"edgebuild: 1\nmodel: {{source: {MAGIKA}, task: other}}\nplatform: web\n")
    assert "1 file" in run(lab).summary
    assert "parameters" in run(lab, "assess:one").summary


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:no-such-distribution/x.onnx", "pip install no-such-distribution"),
        ("package:magika/nothing.onnx", "has no nothing.onnx; its models: magika/models/standard_v3_3/model.onnx"),
        ("package:magika/../x.onnx", "without .."),
    ],
)
def test_what_is_in_no_distribution(lab: Lab, source: str, says: str) -> None:
    target(lab, f"edgebuild: 1\nmodel: {{source: {source}, task: other}}\nplatform: web\n")
    os.chdir(lab.root)
    assert says in Project().problems["one"]


def test_a_distribution_is_watched(lab: Lab) -> None:
    target(lab, f"edgebuild: 1\nmodel: {{source: {MAGIKA}, task: other}}\nplatform: web\n")
    os.chdir(lab.root)
    assert any("magika" in path for path in Project().guards)
    assert importlib.metadata.version("magika")


@pytest.mark.parametrize(
    "text",
    [
        "hf:org@" + COMMIT,
        "hf:org/../x@" + COMMIT,
        "hf:org/model",
        f"hf:org/model@{COMMIT}/../x.onnx",
        "https:///m.onnx",
        "https://user:pass@example.org/m.onnx",
        "http://example.org/m.onnx",
        "s3://bucket/m.onnx",
        "package:magika",
        "package:magika/",
        "https://[x/m.onnx",
        "https://example.org:99999/m.onnx",
        "https://example.org:abc/m.onnx",
        "https://example..org/m.onnx",
        "https://example.org/bücher.onnx",
        "https://example.org/a b.onnx",
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_source(text)


# -- verify and gc -----------------------------------------------------------------------------------------------------------
def test_verify_holds_what_was_fetched_and_fetches_nothing(lab: Lab, site: Loopback) -> None:
    os.chdir(lab.root)
    lab.build()
    sent = site.sent
    project = Project()
    builder = Builder(project, Fresh(project), Workers(), perform_here)
    assert not any(one.differences for one in verify(project, "one", builder, Plain()))
    path = lab.root / "build/one/fetch/model"
    path.chmod(0o644)
    path.write_bytes(GGUF[:-1] + b"?")
    found = {one.path: one.differences for one in verify(project, "one", builder, Plain())}
    assert found["build/one/fetch/model"] == ("build/one/fetch/model: its bytes are not those that were fetched",)
    assert found["build/one/fetch/source.json"] == ()
    assert site.sent == sent


def test_a_store_is_whole_without_what_lies_in_the_cache(lab: Lab, hub: Loopback) -> None:
    run(lab)
    project = Project()
    assert fsck.check(project.store, lambda size: None, lambda: None).damaged == ()
    assert gc.collect(project, 0, None, False, lambda: None).freed == 0
    assert run(lab).outcome == "restored"
