"""`edgebuild assess`: what the headers of real models say, against who wrote them; sizes; from a hub by parts; refusals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from edgebuild.assessment import look
from edgebuild.backends import BACKENDS
from edgebuild.errors import EdgebuildError, StepFailed, UserError
from edgebuild.formats import gguf
from edgebuild.formats.onnx import read
from tests.conftest import ROOT
from tests.loopback import COMMIT, Loopback, serve
from tests.sweeps.malformed_models import blob, headed, key, text, texts
from tests.test_cli import BIN

PHI, DIGITS = ROOT / "targets/models/tiny-phi3", ROOT / "targets/models/digits.onnx"


def run(*words: str | Path, status: int = 0, folder: Path = ROOT) -> str:
    done = subprocess.run([str(BIN / "edgebuild"), "assess", *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


def assessed(model: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(model, "--json"))
    jsonschema.validate(found, json.loads((ROOT / "schemas/assessment.json").read_text()))
    return found


def backend(found: dict[str, Any], name: str) -> dict[str, Any]:
    one: dict[str, Any] = next(one for one in found["backends"] if one["backend"] == name)
    return one


# -- real models ----------------------------------------------------------------------------------------------------------
def test_a_language_model(tmp_path: Path) -> None:
    """Outside of any project, by its configuration, which transformers wrote, and by the weights, which safetensors wrote."""
    copy = tmp_path / "phi"
    shutil.copytree(PHI, copy)
    (copy / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# license: none\n")
    found = assessed(copy)
    config = json.loads((PHI / "config.json").read_text())
    assert (found["format"], found["architecture"], found["model_type"]) == ("huggingface", "Phi3ForCausalLM", "phi3")
    assert found["parameters"] == {"total": 4_196_608, "by_dtype": {"BF16": 4_196_608}}
    assert found["layers"] == config["num_hidden_layers"]
    assert found["heads"] == config["num_attention_heads"]
    assert found["context"] == config["max_position_embeddings"]
    assert found["tied_embeddings"] is config["tie_word_embeddings"]
    assert found["licence"] == "mit"
    sizes = {(one["scheme"], one["group_size"]): one for one in backend(found, "mlx")["sizes"]}
    assert sizes["int4", 64]["artifact"] == pytest.approx(2_564_731, rel=0.05)  # what mlx-lm really makes of it
    assert set(sizes) == {("none", None), *((scheme, group) for scheme in BACKENDS["mlx"].SCHEMES for group in (32, 64, 128))}
    assert {one["backend"] for one in found["backends"]} == {name for name in BACKENDS if name != "fake"}


def test_a_graph() -> None:
    found = assessed(DIGITS)
    assert found["operators"]["Conv"] == 3
    assert found["opsets"] == {"": 18}
    assert found["parameters"]["total"] == 158_284
    assert found["inputs"][0]["shape"][1:] == [1, 8, 8]
    sizes = {one["scheme"]: one for one in backend(found, "onnxruntime")["sizes"]}
    assert sizes["int8"]["artifact"] == pytest.approx(175_000, rel=0.1)
    assert backend(found, "mlx") == {"backend": "mlx", "refused": "it takes huggingface, and this is onnx", "sizes": []}


def test_for_people() -> None:
    shown = run(PHI).splitlines()
    assert "architecture   Phi3ForCausalLM (phi3)" in shown
    assert "parameters     4,196,608: BF16 4,196,608" in shown
    assert "licence        not stated in its files" in shown
    assert any(line.split()[:5] == ["int4,", "groups", "of", "64", "about"] for line in shown)
    digits = run(DIGITS).splitlines()
    assert "opsets         ai.onnx 18" in digits
    (refused,) = (line.split() for line in digits if "its int4 is for the weights of MatMul and Gather" in line)
    assert refused[:7] == ["int4,", "groups", "of", "32,", "64,", "128", "cannot:"]


def test_a_size_that_an_exporter_wrote_as_minus_one_is_free_and_no_weights_are_none(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    shape = [value(name, onnx.TensorProto.FLOAT, [-1, 3, "height"]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "exported", [shape[0]], [shape[1]])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert read(str(tmp_path / "model.onnx")).inputs[0].shape == (None, 3, "height")
    assert "parameters     none" in run(tmp_path / "model.onnx").splitlines()


def test_a_mixture_of_experts_that_sees(tmp_path: Path) -> None:
    """The language part of a configuration counts; a lone licence file is read by its first line."""
    inner = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 8, "hidden_size": 64, "vocab_size": 100}
    config = {
        "architectures": ["OwnForConditionalGeneration"],
        "model_type": "own",
        "text_config": inner,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "LICENSE").write_text("\n\n   Apache License\n Version 2.0\n")
    save_file({"a": np.zeros((4, 4), np.float16), "b": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    facts = look(str(tmp_path))
    assert (facts.layers, facts.heads, facts.experts, facts.hidden, facts.tied_embeddings) == (2, 4, 8, 64, True)
    assert facts.parameters == {"F16": 16, "F32": 3}
    assert facts.licence == "Apache License"


def test_what_an_older_tool_packed_and_positions_that_are_scaled(tmp_path: Path) -> None:
    """Whose config.json does not say that it is quantized."""
    save_file({"model.layers.0.mlp.up_proj.qweight": np.zeros((8, 4), np.int32)}, tmp_path / "model.safetensors")
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "text_config": {"rope_scaling": scaling}}))
    facts = look(str(tmp_path))
    assert facts.quantized == "packed, as .qweight says"
    assert facts.scaled == [scaling]


def test_a_lone_file_of_weights(tmp_path: Path) -> None:
    """Read by itself; a build wants the folder."""
    found = assessed(PHI / "model.safetensors")
    assert (found["format"], found["architecture"]) == ("safetensors", "unknown")
    assert found["parameters"] == {"total": 4_196_608, "by_dtype": {"BF16": 4_196_608}}
    assert all("this is safetensors" in one["refused"] for one in found["backends"])


# -- GGUF -----------------------------------------------------------------------------------------------------------------
def test_gguf_as_mlx_writes_it(tmp_path: Path) -> None:
    import mlx.core as mx

    tensors = {
        "token_embd.weight": mx.zeros((100, 64), mx.float16),
        "blk.0.norm": mx.zeros(64),
        "output.weight": mx.zeros((100, 64)),
    }
    values = {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "llama.block_count": mx.array(2, mx.uint32),
        "llama.context_length": mx.array(2048, mx.uint32),
        "llama.expert_count": mx.array(4, mx.uint32),
        "llama.attention.head_count": mx.array(8, mx.uint32),
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(100)],
        "tokenizer.ggml.scores": mx.zeros(100),
    }
    mx.save_gguf(str(tmp_path / "m.gguf"), tensors, values)
    facts = look(str(tmp_path / "m.gguf"))
    assert (facts.architecture, facts.layers, facts.context, facts.heads, facts.experts) == ("llama", 2, 2048, 8, 4)
    assert facts.vocabulary == 100
    assert facts.parameters == {"F16": 6400, "F32": 6464}
    assert facts.largest == 6400
    assert facts.weights == {"": 12800}
    assert facts.tied_embeddings is False
    assert facts.licence == "apache-2.0"
    assert facts.quantized == ""


def test_gguf_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(headed([key(b"general.architecture", 8, text(b"phi3"))], [blob(b"token_embd.weight", (256, 2), 12)], 400))
    facts = look(str(path))
    assert (facts.parameters, facts.quantized, facts.tied_embeddings) == ({"Q4_K": 512}, "Q4_K", True)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StepFailed, match="its tensors end at byte 416, the file at"):
        look(str(path))


def test_a_part_of_a_model_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(headed([key(b"split.count", 2, b"\x03\0")], []))
    with pytest.raises(StepFailed, match="one of 3 parts of a model; merge them first"):
        look(str(path))


def test_where_a_header_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = [key(b"a", 9, texts(2) + text(b"x") + text(b"yz")), key(b"b", 9, texts(3, 4) + bytes(12)), key(b"c", 12, bytes(8))]
    whole = headed(keys, [blob()], 0)
    path.write_bytes(whole + bytes(64))
    header = gguf.read(str(path))
    assert header.end == len(whole)
    assert header.lengths == {"a": 2, "b": 3}


# -- large, and refused ---------------------------------------------------------------------------------------------------
def test_ten_gigabytes_that_take_no_room(tmp_path: Path) -> None:
    size, rows = 10 * 2**30, 10 * 2**30 // (2 * 4096)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    assert look(str(path)).parameters == {"BF16": size // 2}
    whole = headed([], [blob(b"a", (4096, rows), 30)], 0)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    os.truncate(path, -(-len(whole) // 32) * 32 + size)
    assert look(str(path)).parameters == {"BF16": size // 2}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nothing.onnx", "there is no file or folder"),
        ("https://example.org/m.onnx", "give a local copy"),
        ("hf:org/model@main", "is a branch, a tag or a short commit"),
        ("hf:org", "hf:ORG/REPO@COMMIT"),
        ("package:no-such-distribution/x.onnx", "pip install no-such-distribution"),
        ("pickle", "is a pickle"),
        ("folder", "config.json is missing"),
        ("cut.onnx", "truncated or damaged; copy or download it again"),
        ("old.gguf", "its version is 1; known are 2 and 3; make it again with a llama.cpp of today"),
        ("shape.safetensors", "shape, dtype and offsets do not agree: damaged; copy or download it again"),
    ],
)
def test_refused(model: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "folder").mkdir()
    shutil.copyfile(PHI / "model.safetensors", tmp_path / "folder/model.safetensors")
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    header = b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'
    (tmp_path / "shape.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "cut.onnx").write_bytes(DIGITS.read_bytes()[:5000])
    os.chdir(tmp_path)
    with pytest.raises(EdgebuildError) as caught:
        look(model)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_status_and_one_line(tmp_path: Path) -> None:
    assert run("nothing", status=3).startswith("edgebuild: nothing: there is no file or folder")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(4))
    assert run("m.gguf", status=1, folder=tmp_path).count("\n") == 1


# -- from a hub -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    files = {path.name: path.read_bytes() for path in PHI.iterdir()}
    files |= {
        "README.md": b"---\nlicense: mit\n---\n",
        "onnx/model.onnx": DIGITS.read_bytes(),
        "pytorch_model.bin": b"\x80\x02}q\0.",
    }
    tokens = [text(b"token %d" % number) for number in range(200_000)]  # 3 MB of header: more than is asked for first
    keys = [
        key(b"general.architecture", 8, text(b"phi3")),
        key(b"tokenizer.ggml.tokens", 9, texts(len(tokens)) + b"".join(tokens)),
    ]
    files["model.gguf"] = headed(keys, [blob(b"a", (1000, 1000))], 8_000_000)
    with serve(files) as (loopback, address):
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read once, at whichever test's first import
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield loopback


def from_hub(path: str = "") -> dict[str, Any]:
    return assessed(f"hf:org/model@{COMMIT}{path}")


def test_a_repository_is_read_by_parts(hub: Loopback, tmp_path: Path) -> None:
    found, local = from_hub(), assessed(PHI)
    assert found["licence"] == "mit"
    for same in ("architecture", "parameters", "bytes", "layers", "tokenizer", "backends"):
        assert found[same] == local[same], same
    assert hub.sent < 1_500_000 < found["bytes"]
    assert not list((tmp_path / "hf").rglob("*.safetensors"))  # nothing is kept


def test_one_gguf_of_a_repository(hub: Loopback) -> None:
    found = from_hub("/model.gguf")
    assert (found["architecture"], found["vocabulary"]) == ("phi3", 200_000)
    assert found["parameters"]["total"] == 1_000_000
    assert hub.sent < 5_000_000 < found["bytes"]


def test_of_onnx_the_whole_file_comes(hub: Loopback) -> None:
    assert from_hub("/onnx/model.onnx")["parameters"]["total"] == 158_284
    sent = hub.sent
    from_hub("/onnx/model.onnx")
    assert hub.sent == sent  # it is in the cache now


def test_what_the_cache_has_is_read_there(hub: Loopback) -> None:
    code = f"from huggingface_hub import snapshot_download; snapshot_download('org/model', revision='{COMMIT}')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    hub.asked.clear()
    assert from_hub()["architecture"] == "Phi3ForCausalLM"
    assert not hub.asked


@pytest.mark.parametrize(
    ("fault", "says"), [("404", "no such repository"), ("401", "set HF_TOKEN"), ("429", "too many requests")]
)
def test_a_hub_that_refuses(hub: Loopback, fault: str, says: str) -> None:
    hub.faults[COMMIT] = fault
    assert says in run(f"hf:org/model@{COMMIT}", status=1)


def test_a_file_that_is_not_there(hub: Loopback) -> None:
    assert "has no file other.gguf" in run(f"hf:org/model@{COMMIT}/other.gguf", status=1)


@pytest.mark.parametrize("size", [-1, 2**70, 1.5, "much", None])
def test_a_hub_that_says_what_no_file_is(hub: Loopback, size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgebuild.hub.sizes", lambda repository, commit: {"config.json": size})
    with pytest.raises(StepFailed, match=r"the hub says that its file config\.json has"):
        look(f"hf:org/model@{COMMIT}")


def test_a_server_without_ranges(hub: Loopback) -> None:
    hub.faults["model.gguf"] = "ignore range"
    assert from_hub("/model.gguf")["vocabulary"] == 200_000


def test_user_errors_are_of_their_kind() -> None:
    with pytest.raises(UserError):
        look("hf:org/model@main")
