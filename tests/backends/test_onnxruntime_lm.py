"""ONNX Runtime for language models, on the example model: what is converted and quantized, and that a wrong one does not get through.

onnxruntime-genai's model builder needs torch: .ci/run has it in an environment of its own. What needs none of it runs everywhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import reference
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import onnxruntime, onnxruntime_lm
from edgebuild.bundles import BUNDLES
from edgebuild.errors import BadInput, StepFailed
from edgebuild.step import ENVIRONMENT, Action, Outcome
from tests.backends.phi3 import (
    MODEL,
    TOKENS,
    contents,
    copied,
    divergence,
    edit,
    edit_weights,
    golden,
    inputs,
    narrow,
    needs_onnxruntime_lm,
    report,
    swap_first_tokens,
)
from tests.conftest import ROOT
from tests.journeys.test_examples import BIN, copy_project, doit, outcomes

BY_TORCH = {"torch": "2", "transformers": "5"}


def convert(source: Path, out: Path, versions: Mapping[str, str] | None = None) -> Outcome:
    out.mkdir()
    files = inputs(source)
    params = {"task": "text-generation", "reference": versions or {}}
    made = {"model": out / "model", "report": out / "report.json"}
    action = Action(verb="convert", backend="onnxruntime", params=params, inputs=files, outputs=made)
    return onnxruntime.convert(action, assess(files))


def quantize(model: Path, out: Path, **given: Any) -> Outcome:
    out.mkdir()
    params = {"task": "text-generation", "scheme": "int4", **onnxruntime.parameters("int4", given, False)}
    made = {"model": out / "model", "report": out / "report.json"}
    action = Action(verb="quantize", backend="onnxruntime", params=params, inputs={"model": model}, outputs=made)
    return onnxruntime.quantize(action, ModelFacts(format="huggingface"))


def logits(out: Path, tokens: Any) -> Any:
    session = onnxruntime.open(out / "model")
    try:
        return session.logits(tokens)
    finally:
        session.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnxruntime-lm") / "converted"
    convert(MODEL, out, BY_TORCH)
    return out


@pytest.fixture(scope="module")
def int4(converted: Path) -> Path:
    out = converted.parent / "int4"
    quantize(converted / "model", out)
    return out


# -- conversion -----------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
def test_the_conversion_agrees_with_transformers_and_the_golden_logits(converted: Path) -> None:
    by_torch, stored = report(converted)["against"]
    assert report(converted)["verified"] is True
    assert by_torch["reference"] == "transformers 5"
    assert stored["reference"].startswith("golden.safetensors (torch ")
    assert (stored["tokens"], stored["same_top"], by_torch["same_top"]) == (64, 1.0, 1.0)
    assert by_torch["kl_mean"] < 1e-6
    assert stored["kl_mean"] < 1e-5


@needs_onnxruntime_lm
def test_the_same_bytes_from_any_folder(converted: Path, int4: Path, tmp_path: Path) -> None:
    outcome = convert(copied(tmp_path / "another name"), tmp_path / "out", BY_TORCH)
    assert contents(tmp_path / "out/model") == contents(converted / "model")
    assert {mode for _, mode in contents(converted / "model").values()} == {0o644}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "report.json"]
    assert outcome.summary.startswith("float32, 4,196,608 parameters, held against transformers 5 and golden.safetensors: KL ")
    os.link(tmp_path / "out/model/model.onnx.data", tmp_path / "stored")  # as a link into the store
    quantize(tmp_path / "out/model", tmp_path / "again")
    assert contents(tmp_path / "again/model") == contents(int4 / "model")
    names = {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(int4 / "model")) == names | {"chat_template.jinja"}
    assert not any(b"staged" in data for data, _ in contents(converted / "model").values())  # nothing of where it was made


@needs_onnxruntime_lm
def test_it_generates_text_in_its_own_runtime(int4: Path) -> None:
    """In a process that knows nothing of edgebuild; greedy, it says what the session's logits say."""
    code = (
        "import sys, onnxruntime_genai as og\n"
        "model = og.Model(sys.argv[1])\ntokenizer = og.Tokenizer(model)\nparams = og.GeneratorParams(model)\n"
        "given = tokenizer.encode(sys.argv[2])\nparams.set_search_options(max_length=len(given) + 8, do_sample=False)\n"
        "generator = og.Generator(model, params)\ngenerator.append_tokens(given)\n"
        "while not generator.is_done():\n    generator.generate_next_token()\n"
        "print(list(map(int, generator.get_sequence(0))))\nprint(repr(tokenizer.decode(generator.get_sequence(0))))"
    )
    prompt = "The small boat left the harbour at seven"
    done = subprocess.run([sys.executable, "-c", code, str(int4 / "model"), prompt], capture_output=True, text=True, check=True)
    found, text = done.stdout.splitlines()[-2:]
    session = onnxruntime_lm.LmSession(int4 / "model")
    tokens = session.tokens(prompt)
    length = len(tokens) + 8
    while len(tokens) < length:
        tokens = np.append(tokens, session.logits(tokens)[-1].argmax()).astype(np.int32)
    assert json.loads(found) == tokens.tolist()
    assert prompt in text


@needs_onnxruntime_lm
def test_the_graph_in_plain_onnx_runtime_says_the_same(int4: Path) -> None:
    """From an empty cache, as the self-test of a bundle runs it."""
    import onnxruntime as ort

    plain = ort.InferenceSession(str(int4 / "model/model.onnx"), providers=["CPUExecutionProvider"])
    given = TOKENS[None].astype(np.int64)
    feeds = {"input_ids": given, "attention_mask": np.ones_like(given)}
    feeds |= {one.name: np.zeros((1, 2, 0, 64), np.float32) for one in plain.get_inputs() if one.name.startswith("past")}
    np.testing.assert_allclose(plain.run(["logits"], feeds)[0][0], logits(int4, TOKENS), atol=1e-3)


@needs_onnxruntime_lm
def test_a_rope_theta_that_the_golden_logits_were_not_made_with_fails(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
    with pytest.raises(StepFailed, match=r"held against golden.safetensors .* 64 tokens: mean KL .* remove or remake golden"):
        convert(source, tmp_path / "out")


def permute(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"].flip(0)


@needs_onnxruntime_lm
@pytest.mark.parametrize("kind", ["rope", "weights"])
def test_a_wrong_conversion_fails_against_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What the builder would do wrong, done to what it is given; the source is as it was."""
    build = onnxruntime_lm._build

    def wrong(source: Path, out: Path) -> None:
        if kind == "rope":
            edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
        else:
            weights = (source / "model.safetensors").resolve()
            (source / "model.safetensors").unlink()
            shutil.copyfile(weights, source / "model.safetensors")
            edit_weights(source, permute)
        build(source, out)

    monkeypatch.setattr(onnxruntime_lm, "_build", wrong)
    with pytest.raises(
        StepFailed, match=r"held against transformers 5 on 64 tokens: mean KL .* the backend computes this model otherwise"
    ):
        convert(copied(tmp_path / "source", golden=False), tmp_path / "out", BY_TORCH)


@needs_onnxruntime_lm
def test_a_wrong_tokenizer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another vocabulary in its place, as a wrong conversion would make it."""
    build = onnxruntime_lm._build

    def wrong(source: Path, out: Path) -> None:
        build(source, out)
        edit(out / "tokenizer.json", swap_all)

    monkeypatch.setattr(onnxruntime_lm, "_build", wrong)
    with pytest.raises(StepFailed, match="the converted tokenizer gives other tokens"):
        convert(copied(tmp_path / "source", golden=False), tmp_path / "out")


def swap_all(tokenizer: dict[str, Any]) -> None:
    """Two letters of the sample change places."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["2"] = vocabulary["2"], vocabulary["x"]


@needs_onnxruntime_lm
def test_a_tokenizer_that_the_golden_logits_were_not_made_with_fails(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit(source / "tokenizer.json", swap_first_tokens)
    with pytest.raises(StepFailed, match=r"the tokenizer does not give the tokens of golden.safetensors .* at token 0"):
        convert(source, tmp_path / "out")


@needs_onnxruntime_lm
def test_no_code_of_the_model_runs(converted: Path, tmp_path: Path) -> None:
    source, marker = copied(tmp_path / "source"), tmp_path / "ran"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (source / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    mapped = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(source / "config.json", lambda config: config.update(auto_map=mapped))
    edit(
        source / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    )
    convert(source, tmp_path / "out", BY_TORCH)
    assert not marker.exists()
    assert contents(tmp_path / "out/model") == contents(converted / "model")


@needs_onnxruntime_lm
def test_nobody_is_called_and_nothing_is_left_in_the_home_folder(tmp_path: Path) -> None:
    """As in a worker, and with every connection an error that is seen."""
    code = (
        "import socket, sys\nfrom pathlib import Path\ncalled = []\n"
        "def refuse(*words):\n    called.append(words)\n    raise OSError('no network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from tests.backends.test_onnxruntime_lm import convert, quantize, BY_TORCH\n"
        "from tests.backends.phi3 import MODEL\n"
        "convert(MODEL, Path(sys.argv[1]) / 'out', BY_TORCH)\n"
        "quantize(Path(sys.argv[1]) / 'out/model', Path(sys.argv[1]) / 'int4')\n"
        "print(called)"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **ENVIRONMENT}
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(home.rglob("*")) == []


@needs_onnxruntime_lm
def test_what_the_builder_cannot_convert_is_one_sentence(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:, :128]}))
    with pytest.raises(StepFailed, match=r"^onnxruntime-genai's model builder cannot convert this model: \w") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


# -- quantizing -----------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
@pytest.mark.parametrize("given", [{"group_size": 16}, {"group_size": 64, "symmetric": True}, {"group_size": 256}])
def test_quantize(converted: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", **given)
    found = report(tmp_path / "out")
    assert (found["operators"], found["quantizable"], found["not_quantized"]) == (21, 21, [])
    assert outcome.summary.startswith(f"int4 in groups of {given['group_size']}, 21 of 21 matrix products, ")
    facts = assess(inputs(MODEL))
    for scheme, folder in (("none", converted), ("int4", tmp_path / "out")):
        size = sum(len(data) for data, _ in contents(folder / "model").values())
        expected = onnxruntime.estimate(facts, scheme, onnxruntime.parameters("int4", given, False), 0).artifact
        assert 0.97 < size / expected < 1.03
    tokens = golden(MODEL).tokens
    assert 0 < divergence(logits(converted, tokens), logits(tmp_path / "out", tokens)) < 0.05


@needs_onnxruntime_lm
def test_exclude(converted: Path, tmp_path: Path) -> None:
    assert "20 of 21" in quantize(converted / "model", tmp_path / "out", exclude=["/lm_head/MatMul"]).summary
    assert report(tmp_path / "out")["not_quantized"] == ["/lm_head/MatMul"]
    with pytest.raises(BadInput, match=r'quantize.exclude: no node or operator is called "no such"; operators: '):
        quantize(converted / "model", tmp_path / "no", exclude=["no such"])
    with pytest.raises(StepFailed, match="nothing was quantized"):
        quantize(converted / "model", tmp_path / "nothing", exclude=["MatMul"])


@needs_onnxruntime_lm
def test_rows_that_a_group_does_not_divide(tmp_path: Path) -> None:
    """The last group of a row is filled up."""
    convert(narrow(copied(tmp_path / "source", golden=False), 96), tmp_path / "in")
    assert "21 of 21" in quantize(tmp_path / "in/model", tmp_path / "out").summary
    exact, coarse = logits(tmp_path / "in", TOKENS), logits(tmp_path / "out", TOKENS)
    assert divergence(exact, coarse) < divergence(exact, exact[:, ::-1]) / 10


# -- other architectures --------------------------------------------------------------------------------------------------
OTHERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 64},
    "Gemma2": {"head_dim": 64},
    "Mistral": {},
}


def byte_level(source: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    for path in source.glob("token*"):
        path.unlink()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the small boat left the harbour"] * 3, vocab_size=300)
    model = json.loads(trained._tokenizer.to_str())["model"]
    Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).save_pretrained(source)


def random_weights(source: Path, kind: str, settings: Mapping[str, Any]) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **ids, **settings})
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(source)
    for path in MODEL.glob("token*"):
        shutil.copy(path, source)
    if kind == "Qwen2":  # is read by the class of its own, whatever the files say
        byte_level(source)


@needs_onnxruntime_lm
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_other_architectures_with_random_weights(tmp_path: Path, kind: str) -> None:
    """Grouped heads, another rope theta, tied embeddings; held against transformers."""
    source = tmp_path / "source"
    random_weights(source, kind, {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, **OTHERS[kind]})
    assert onnxruntime.refuse(assess(inputs(source)), {"scheme": "int4", "group_size": 64}) == ""
    convert(source, tmp_path / "out", BY_TORCH)
    (held,) = report(tmp_path / "out")["against"]
    assert held["kl_mean"] < 1e-6
    quantize(tmp_path / "out/model", tmp_path / "int4")
    assert report(tmp_path / "int4")["not_quantized"] == []
    exact, coarse = logits(tmp_path / "out", TOKENS), logits(tmp_path / "int4", TOKENS)
    assert np.isfinite(coarse).all()
    assert divergence(exact, coarse) < divergence(exact, exact[:, ::-1]) / 2


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1 + index / 10 for index in range(32)],
    "long_factor": [2 + index / 10 for index in range(32)],
    "original_max_position_embeddings": 64,
}
WINDOWS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 16},
    "Phi3": {"sliding_window": 16, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    "Gemma2": {"sliding_window": 16, "head_dim": 64},
    "GptOss": {"sliding_window": 16, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@needs_onnxruntime_lm
@pytest.mark.parametrize("kind", sorted(WINDOWS))
def test_a_text_that_is_longer_than_the_window_of_a_layer(tmp_path: Path, kind: str) -> None:
    """Also past the length from which a longrope has other factors; in plain ONNX Runtime too, as a bundle's self-test runs it."""
    import onnxruntime as ort

    source = tmp_path / "source"
    random_weights(source, kind, WINDOWS[kind])
    convert(source, tmp_path / "out", BY_TORCH)
    tokens = ((np.arange(100) * 7919 + 11) % 2000 + 5).astype(np.int32)
    _, exact = reference.by_transformers(source, tokens)
    assert divergence(exact, logits(tmp_path / "out", tokens)) < 1e-6
    plain = ort.InferenceSession(str(tmp_path / "out/model/model.onnx"), providers=["CPUExecutionProvider"])
    given = tokens[None].astype(np.int64)
    feeds = {"input_ids": given, "attention_mask": np.ones_like(given)}
    feeds |= {one.name: np.zeros((1, 2, 0, 64), np.float32) for one in plain.get_inputs() if one.name.startswith("past")}
    assert divergence(exact, plain.run(["logits"], feeds)[0][0]) < 1e-6


@needs_onnxruntime_lm
def test_a_text_as_long_as_the_context(tmp_path: Path) -> None:
    source = tmp_path / "source"
    random_weights(source, "Llama", {"max_position_embeddings": 64})
    convert(source, tmp_path / "out", BY_TORCH)
    assert logits(tmp_path / "out", np.arange(64, dtype=np.int32)).shape == (64, 2048)


# -- running --------------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
def test_a_session(converted: Path) -> None:
    session = onnxruntime.open(converted / "model")
    assert re.fullmatch(r"onnxruntime-genai [\d.]+, onnxruntime [\d.]+, CPU, 1 thread", session.runtime)
    found = session.logits(TOKENS)
    assert found.dtype == np.dtype("float32")
    assert found.shape == (len(TOKENS), 2048)
    np.testing.assert_allclose(session.logits(TOKENS[:4]), found[:4], atol=1e-3)  # no position sees a later token
    np.testing.assert_array_equal(session.logits(TOKENS), found)  # nothing is left of an earlier text
    stored = golden(MODEL)
    np.testing.assert_array_equal(session.tokens(stored.text), stored.tokens)
    assert session.tokens("").tolist() == []
    with pytest.raises(StepFailed, match=r"token 2048 is outside the model's vocabulary of 2048"):
        session.logits(np.array([1, 2048], np.int32))
    with pytest.raises(StepFailed, match="takes tokens, not named arrays"):
        session.infer({})
    session.close()
    session.close()


@needs_onnxruntime_lm
@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "genai_config.json"])
def test_what_is_damaged_is_one_sentence(converted: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(converted / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_text("nothing")
    with pytest.raises(StepFailed, match=r"cannot load ") as caught:
        onnxruntime.open(tmp_path / "model")
    assert "\n" not in str(caught.value)


@needs_onnxruntime_lm
@pytest.mark.slow
def test_the_example_for_any_computer(tmp_path: Path) -> None:
    """Through doit, with the bundle's own check; built twice, nothing runs."""
    folder = copy_project(tmp_path / "project", "generic-phi3")
    done = doit(folder, "build:generic-phi3")
    assert done.returncode == 0, done.stdout + done.stderr
    evidence = json.loads((folder / "dist/generic-phi3.evidence.json").read_text())
    judged = {gate["name"]: gate["verdict"] for gate in evidence["gates"]}
    assert judged == {"kl_mean": "PASS", "perplexity_ratio": "PASS", "same_top": "PASS"}
    assert evidence["bundle"]["level"] == "L4"
    assert evidence["conversion"]["verified"] is True
    assert "onnxruntime-genai" in evidence["toolchain"]
    measured = {one["name"] for one in evidence["measurements"] if one["value"] is not None and one["of"] == "candidate"}
    assert {"latency_p50", "peak_memory", "artifact_bytes", "kl_mean", "same_top"} <= measured
    assert doit(folder, "build:generic-phi3").returncode == 0
    assert set(outcomes(folder).values()) == {"fresh"}
    done = subprocess.run([str(BIN / "edgebuild"), "verify", "generic-phi3"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- without any of it ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"architecture": "Phi3ForCausalLM"}, {"scheme": "int4", "group_size": 64}, ""),
        (
            {"architecture": "BertModel"},
            {},
            "onnxruntime-genai's model builder knows no language model 'BertModel'; name another framework",
        ),
        (
            {"architecture": "OwnForCausalLM", "custom_code": True},
            {},
            "names Python code (auto_map), which is never run, and onnxruntime-genai's model builder knows no",
        ),
        (
            {"architecture": "GptOssForCausalLM", "experts": 32},
            {"scheme": "int4", "group_size": 64},
            "the weights of its 32 experts would stay in float32, as int4 is of matrix products alone; write scheme: none",
        ),
        ({"architecture": "GptOssForCausalLM", "experts": 32}, {}, ""),
        ({"architecture": "Phi3ForCausalLM", "quantized": "awq"}, {}, "quantized already (awq); give the float model"),
        (
            {"architecture": "Phi3ForCausalLM"},
            {"scheme": "int8", "method": "dynamic"},
            "int8 is for ONNX models; of a language model it makes int4 of weights: write scheme: int4, or none",
        ),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = onnxruntime.refuse(ModelFacts(**{"format": "huggingface", **facts}), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_group_size_without_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"^group_size: ONNX Runtime has kernels for 16, 32, 64, 128, 256, not for 48"):
        onnxruntime.parameters("int4", {"group_size": 48}, False)


def test_the_bundle_with_loaders_for_arrays_takes_no_language_model() -> None:
    assert "package.kind: folder" in BUNDLES["onnx"].refuse("onnxruntime", "text-generation")


@needs_onnxruntime_lm
def test_the_architectures_are_those_of_the_builder() -> None:
    """`EDGEBUILD_REWRITE=1 pytest tests/backends/test_onnxruntime_lm.py` writes the list anew, when the lock names another builder.

    Of language models that transformers has code for; PhiMoE is for GPUs alone. The others left out were tried: Gemma3 and SmolLM3
    end in a KeyError, as the builder reads keys that transformers 5 does not write; Olmo and GraniteMoeHybrid compute otherwise
    than their source (KL 0.3 and more).
    """
    from onnxruntime_genai.models import builder
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = Path(builder.__file__).read_text(encoding="utf-8")
    built = set(re.findall(r'config\.architectures\[0\] == "(\w+ForCausalLM)"', text))
    built -= {f"{name}ForCausalLM" for name in ("PhiMoE", "Gemma3", "SmolLM3", "Olmo", "GraniteMoeHybrid")}
    values = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    found = built & {name for one in values for name in ([one] if isinstance(one, str) else one)}
    shipped = Path(onnxruntime_lm.__file__).with_name("onnxruntime_architectures.txt")
    if os.environ.get("EDGEBUILD_REWRITE"):
        shipped.write_text("\n".join(sorted(found)) + "\n", encoding="ascii")
    assert onnxruntime_lm._architectures() == found
