"""ONNX Runtime for language models, on the example model: what is converted and quantized, and that a wrong one does not get through.

onnxruntime-genai's model builder needs torch: .ci/run has it in an environment of its own. What needs none of it runs everywhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import original
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import onnxruntime, onnxruntime_lm
from edgebuild.bundles import BUNDLES
from edgebuild.errors import BadInput, StepFailed
from tests.backends import language
from tests.backends.language import PHI3_MINI, random_weights
from tests.backends.phi3 import (
    MODEL,
    TOKENS,
    contents,
    copied,
    divergence,
    edit,
    golden,
    inputs,
    narrow,
    needs_onnxruntime_lm,
    report,
)

convert = partial(language.convert, "onnxruntime")
quantize = partial(language.quantize, "onnxruntime", scheme="int4")
logits = partial(language.logits, "onnxruntime")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnxruntime-lm") / "converted"
    convert(MODEL, out, by_torch=True)
    return out


@pytest.fixture(scope="module")
def int4(converted: Path) -> Path:
    out = converted.parent / "int4"
    quantize(converted / "model", out)
    return out


# -- conversion -----------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
def test_the_folder_is_what_onnxruntime_genai_loads(int4: Path) -> None:
    names = {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(int4 / "model")) == names | {"chat_template.jinja"}


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
def test_no_layer_is_filled_with_random_numbers_first(tmp_path: Path) -> None:
    import torch

    fill, before = torch.nn.Linear.reset_parameters, torch.get_rng_state()
    convert(copied(tmp_path / "source", golden=False), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.Linear.reset_parameters is fill


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


# -- quantizing -----------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
@pytest.mark.parametrize(
    ("scheme", "given", "most"),
    [
        ("int4", {"group_size": 16}, 0.05),
        ("int4", {"group_size": 64, "symmetric": True}, 0.05),
        ("int4", {"group_size": 256}, 0.05),
        ("int8", {"method": "weights", "group_size": 64}, 1e-4),  # a hundredth of what int4 loses
        ("int8", {"method": "weights", "group_size": 256, "symmetric": True}, 1e-4),
    ],
)
def test_quantize(converted: Path, tmp_path: Path, scheme: str, given: dict[str, Any], most: float) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", scheme=scheme, **given)
    found = report(tmp_path / "out")
    assert (found["operators"], found["quantizable"], found["not_quantized"]) == (21, 21, [])
    assert outcome.summary.startswith(f"{scheme} in groups of {given['group_size']}, 21 of 21 matrix products, ")
    facts = assess(inputs(MODEL))
    for made, folder in (("none", converted), (scheme, tmp_path / "out")):
        size = sum(len(data) for data, _ in contents(folder / "model").values())
        expected = onnxruntime.estimate(facts, made, onnxruntime.parameters(scheme, given, False), 0).artifact
        assert 0.97 < size / expected < 1.03
    tokens = golden(MODEL).tokens
    assert 0 < divergence(logits(converted, tokens), logits(tmp_path / "out", tokens)) < most


@pytest.mark.parametrize(
    ("layers", "count", "scheme", "measured", "most"),
    [
        (4, 650_013_696, "none", 1.32e9, 1.1),
        (10, 1_329_527_808, "none", 1.66e9, 1.1),
        (4, 650_013_696, "int4", 0.54e9, 1.2),
        (10, 1_329_527_808, "int4", 0.91e9, 1.2),
        (10, 1_329_527_808, "int8", 1.83e9, 1.2),
    ],
)
def test_estimates_of_phi3_mini_are_as_measured(layers: int, count: int, scheme: str, measured: float, most: float) -> None:
    """Of memory, by the records of builds: no step holds the model; some copies of the largest tensor, and what was quantized."""
    facts = replace(PHI3_MINI, layers=layers, parameters={"BF16": count}, weights={"": count - (2 * layers + 1) * 3072})
    given = {} if scheme == "none" else onnxruntime.parameters(scheme, {"method": "weights", "group_size": 64}, False)
    assert measured < onnxruntime.estimate(facts, scheme, given, 10**11).making < most * measured


@needs_onnxruntime_lm
def test_weights_that_are_read_where_they_lie(converted: Path, tmp_path: Path) -> None:
    """As the store has them, under two names; what is made holds them and no path. One cut short is said to be."""
    source = tmp_path / "in/model"
    shutil.copytree(converted / "model", source)
    (tmp_path / "second").hardlink_to(source / "model.onnx.data")
    quantize(source, tmp_path / "out")
    quantize(converted / "model", tmp_path / "again")
    assert contents(tmp_path / "out/model") == contents(tmp_path / "again/model")
    assert str(tmp_path).encode() not in (tmp_path / "out/model/model.onnx").read_bytes()
    os.truncate(source / "model.onnx.data", (source / "model.onnx.data").stat().st_size - 1000)
    for exclude in ([], ["/lm_head/MatMul"]):  # what is cut is quantized, or copied
        with pytest.raises(StepFailed, match=r"onnxruntime.quantization cannot quantize this model: "):
            quantize(source, tmp_path / f"cut-{len(exclude)}", exclude=exclude)


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


# -- windows and contexts -------------------------------------------------------------------------------------------------
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
    convert(source, tmp_path / "out", by_torch=True)
    assert [one["tokens"] for one in report(tmp_path / "out")["against"]] == [64, 64]  # of one text's end, beyond all windows
    tokens = ((np.arange(100) * 7919 + 11) % 2000 + 5).astype(np.int32)
    ((_, exact),) = original.by_transformers(source, tokens)
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
    convert(source, tmp_path / "out", by_torch=True)
    assert logits(tmp_path / "out", np.arange(64, dtype=np.int32)).shape == (64, 2048)


# -- running --------------------------------------------------------------------------------------------------------------
@needs_onnxruntime_lm
def test_what_a_session_runs_in(converted: Path) -> None:
    session = onnxruntime.open(converted / "model")
    assert re.fullmatch(r"onnxruntime-genai [\d.]+, onnxruntime [\d.]+, CPU, 1 thread", session.runtime)
    session.close()


@needs_onnxruntime_lm
@pytest.mark.slow
def test_the_example_for_any_computer(tmp_path: Path) -> None:
    evidence = language.example(tmp_path / "project", "generic-phi3")
    assert "onnxruntime-genai" in evidence["toolchain"]
    assert {"latency_p50", "peak_memory", "artifact_bytes", "kl_mean", "same_top"} <= language.measured(evidence)


@pytest.mark.parametrize(("scaling", "original"), [(None, 512), ({"rope_type": "longrope"}, 64)])
def test_a_phi3_is_of_two_lengths_by_a_longrope_alone(scaling: dict[str, Any] | None, original: int) -> None:
    config = {
        "model_type": "phi3",
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": scaling,
    }
    assert onnxruntime_lm._spelt_out(config)["original_max_position_embeddings"] == original


# -- without any of it ----------------------------------------------------------------------------------------------------
# Each converted once, of random weights, and held against transformers.
SCALED: Sequence[tuple[str, Mapping[str, Any], str]] = (
    ("LlamaForCausalLM", {"rope_type": "llama3"}, ""),
    ("LlamaForCausalLM", {"rope_type": "dynamic"}, ""),
    (
        "LlamaForCausalLM",
        {"rope_type": "linear"},
        "by linear, which onnxruntime-genai's model builder (of LlamaForCausalLM) does not",
    ),
    ("LlamaForCausalLM", {"rope_type": "longrope"}, "positions are scaled by longrope"),
    ("Phi3ForCausalLM", {"rope_type": "longrope"}, ""),
    ("Qwen2ForCausalLM", {"rope_type": "linear"}, ""),
    ("Qwen2ForCausalLM", {"rope_type": "llama3"}, "positions are scaled by llama3"),
    ("Qwen2ForCausalLM", {"rope_type": "yarn"}, "never rounds (truncate); name another framework"),
    ("GptOssForCausalLM", {"rope_type": "yarn", "truncate": False}, ""),
    ("Qwen2ForCausalLM", {"rope_type": "yarn", "truncate": False, "attention_factor": 1.0}, "with an attention_factor, which"),
    ("HunYuanDenseV1ForCausalLM", {"rope_type": "yarn"}, "positions are scaled by yarn"),
)


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
            "the weights of its 32 experts would stay in float32, as only matrix products are quantized; write scheme: none",
        ),
        ({"architecture": "GptOssForCausalLM", "experts": 32}, {}, ""),
        ({"architecture": "Phi3ForCausalLM", "quantized": "awq"}, {}, "quantized already (awq); give the float model"),
        (
            {"architecture": "Phi3ForCausalLM"},
            {"scheme": "int8", "method": "dynamic"},
            "method: dynamic is for ONNX models; of a language model weights alone are quantized: write method: weights",
        ),
        ({"architecture": "Phi3ForCausalLM"}, {"scheme": "int8", "method": "weights", "group_size": 64}, ""),
        *(({"architecture": name, "scaled": [scaled]}, {}, reason) for name, scaled, reason in SCALED),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = onnxruntime.refuse(ModelFacts(**{"format": "huggingface", **facts}), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


def test_what_is_refused_has_an_estimate_too() -> None:
    """`plan` asks for it before it says why not."""
    facts = ModelFacts(format="huggingface", parameters={"F32": 1000}, weights={"": 900})
    refused, float32 = (
        onnxruntime.estimate(facts, *one, 0) for one in (("int8", onnxruntime.parameters("int8", {}, False)), ("none", {}))
    )
    assert refused.artifact == float32.artifact


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
    assert language.shipped(onnxruntime_lm, "onnxruntime_architectures.txt", found) == onnxruntime_lm._architectures() == found
