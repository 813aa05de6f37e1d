"""MLX for real, on the example model: what it converts, what it refuses, and that a wrong conversion does not get through."""

import argparse
import ast
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgebuild import original, reference
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import mlx
from edgebuild.errors import BadInput, StepFailed
from edgebuild.step import Outcome
from tests.backends import language
from tests.backends.language import permute
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
    needs_torch,
    report,
)
from tests.journeys.test_examples import copy_project, doit, outcomes


def edit_golden(folder: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    path = folder / reference.GOLDEN
    tensors, metadata = load_file(path), {"text": golden(MODEL).text}
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


convert = partial(language.convert, "mlx")


def quantize(model: Path, out: Path, scheme: str, group_size: int = 64, **more: Any) -> Outcome:
    return language.quantize("mlx", model, out, scheme, group_size=group_size, **more)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlx") / "converted"
    convert(MODEL, out)
    return out


def test_the_folder_is_what_mlx_swift_reads(converted: Path) -> None:
    names = set(contents(converted / "model"))
    assert {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert {"chat_template.jinja", "generation_config.json"} <= names
    assert not names & {"README.md", reference.GOLDEN}
    tokenizer = json.loads((converted / "model/tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "LlamaTokenizer"


@pytest.mark.parametrize(
    ("scheme", "group_size"), [("int2", 32), ("int3", 64), ("int4", 64), ("int5", 64), ("int6", 128), ("int8", 64)]
)
def test_quantize(converted: Path, tmp_path: Path, scheme: str, group_size: int) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", scheme, group_size)
    found = report(tmp_path / "out")
    assert found["layers_quantized"] == found["layers"] == 18
    assert found["bytes_after"] < found["bytes_before"] * (found["bits"] + 1.1) / 16
    assert outcome.summary.startswith(f"{scheme} in groups of {group_size}, ")
    assert ", 18 of 18 layers, 8.4 MB → " in outcome.summary
    exact, stored = (mlx.open(tmp_path / "out/model", view) for view in mlx.VIEWS)
    assert exact.runtime.endswith("weights dequantized to float32")
    assert stored.runtime.endswith(f"{scheme} kernels{' in float32' if sys.platform == 'linux' else ''}")
    tokens = golden(MODEL).tokens[:24]
    assert divergence(exact.logits(tokens), stored.logits(tokens)) < (1e-6 if sys.platform == "linux" else 0.05)


def apart(reference: Path, model: Path) -> float:
    tokens = golden(MODEL).tokens
    return divergence(mlx.open(reference / "model").logits(tokens), mlx.open(model / "model").logits(tokens))


@pytest.mark.parametrize(
    ("method", "scheme", "more"), [("mixed-2-6", "int2", 6), ("mixed-3-4", "int3", 4), ("mixed-4-6", "int4", 6)]
)
def test_a_mixed_recipe_gives_some_layers_more_bits(converted: Path, tmp_path: Path, method: str, scheme: str, more: int) -> None:
    quantize(converted / "model", tmp_path / "plain", scheme)
    outcome = quantize(converted / "model", tmp_path / "mixed", scheme, method=method)
    plain, mixed = report(tmp_path / "plain"), report(tmp_path / "mixed")
    assert mixed["layers_by_bits"].keys() == {scheme[3:], str(more)}
    assert f"18 of 18 layers ({mixed['layers_by_bits'][str(more)]} int{more}), " in outcome.summary
    assert plain["bytes_after"] < mixed["bytes_after"] < plain["bytes_after"] * 1.5
    assert apart(converted, tmp_path / "mixed") < apart(converted, tmp_path / "plain")
    assert f"int{scheme[3:]} and int{more} kernels" in mlx.open(tmp_path / "mixed/model", "kernels").runtime
    facts = assess(inputs(MODEL))
    expected = mlx.estimate(facts, scheme, mlx.parameters(scheme, {"method": method}, False), 2**40).artifact
    assert expected == pytest.approx(sum(path.stat().st_size for path in (tmp_path / "mixed/model").iterdir()), rel=0.15)


def test_layers_of_their_own_scheme(converted: Path, tmp_path: Path) -> None:
    layers = {"model.layers.0.*": "int8", "model.layers.0.mlp.down_proj": "none", "lm_head": "none", "model.embed_tokens": "int8"}
    outcome = quantize(converted / "model", tmp_path / "own", "int2", layers=layers)
    found = report(tmp_path / "own")
    assert found["layers_by_bits"] == {"2": 12, "8": 4}
    assert found["not_quantized"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert "16 of 18 layers (4 int8)" in outcome.summary
    quantize(converted / "model", tmp_path / "plain", "int2")
    assert apart(converted, tmp_path / "own") < apart(converted, tmp_path / "plain")
    tokens = golden(MODEL).tokens[:24]
    exact, stored = (mlx.open(tmp_path / "own/model", view).logits(tokens) for view in mlx.VIEWS)
    assert divergence(exact, stored) < (1e-6 if sys.platform == "linux" else 0.05)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"model.layers.0.mlp.down_prj": "int8"}, r'no layer is called "model.layers.0.mlp.down_prj"; .*down_proj'),
        (
            {"*.down_proj": "int8", "model.layers.1.*": "int6"},
            r"model.layers.1.mlp.down_proj fits patterns of int6 and int8; name it",
        ),
    ],
)
def test_layers_that_are_not_there_or_fit_twice(converted: Path, tmp_path: Path, layers: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        quantize(converted / "model", tmp_path / "out", "int4", layers=layers)


def test_float32_weights_made_anew_for_each_pass_are_the_same(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(converted / "model", tmp_path / "out", "int4")
    kept = mlx.open(tmp_path / "out/model").logits(TOKENS)
    monkeypatch.setattr("psutil.virtual_memory", lambda: argparse.Namespace(available=0))
    session = mlx.open(tmp_path / "out/model")
    for _ in range(2):  # the second pass reads anew what the first let go
        np.testing.assert_array_equal(session.logits(TOKENS), kept)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a GPU multiplies")
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("length", [1, 5, 7])
@pytest.mark.parametrize("kind", ["", "causal", "allowed", "added"])
def test_attention_by_numpy_is_that_of_mlx(kind: str, length: int, heads: int) -> None:
    """Grouped heads, values of another width, fewer queries than keys; with sinks it is MLX's own."""
    import mlx.core as mx

    draw = np.random.default_rng(0)
    shapes = (2, 4, length, 8), (2, heads, 7, 8), (2, heads, 7, 6)
    q, k, v = (mx.array(draw.normal(0, 2, shape).astype(np.float32)) for shape in shapes)
    allowed = draw.random((2, 1, length, 7)) < 0.7
    allowed[..., 0] = True
    mask = {"allowed": mx.array(allowed), "added": mx.array(draw.normal(0, 2, (length, 7)).astype(np.float32))}.get(
        kind, kind or None
    )
    own = mx.fast.scaled_dot_product_attention
    expected = own(q, k, v, scale=0.3, mask=mask)
    with mlx.float32.attention():
        assert mx.fast.scaled_dot_product_attention is not own
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=None)
        sinks = [mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=mx.zeros(4))]
    assert mx.fast.scaled_dot_product_attention is own
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-6)
    np.testing.assert_array_equal(np.asarray(sinks[0]), np.asarray(own(q, k, v, scale=0.3, mask=mask, sinks=mx.zeros(4))))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a GPU multiplies")
def test_attention_is_by_numpy_where_weights_are_dequantized_and_nowhere_else(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    asked: list[str] = []
    own = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *given, **words: asked.append("") or own(*given, **words))
    quantize(converted / "model", tmp_path / "out", "int4")
    exact, stored = (mlx.open(tmp_path / "out/model", view) for view in mlx.VIEWS)
    exact.logits(TOKENS)
    assert not asked
    stored.logits(TOKENS)
    assert len(asked) == 4


def test_what_a_session_runs_in(converted: Path) -> None:
    session = mlx.open(converted / "model")
    assert session.runtime.startswith("mlx ")
    session.close()
    with pytest.raises(StepFailed, match='no view "fast"; it has: dequantized, kernels'):
        mlx.open(converted / "model", "fast")


def test_rope_parameters_reach_mlx(converted: Path, tmp_path: Path) -> None:
    """mlx-lm reads `rope_theta` at the top level alone, and takes 10,000 where it is missing."""
    source = copied(tmp_path / "source", golden=False)
    edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/model/config.json").read_text(encoding="utf-8"))
    assert (config["rope_theta"], config["partial_rotary_factor"], config["rope_scaling"]) == (500_000.0, 1.0, None)
    apart = mlx.open(tmp_path / "out/model").logits(TOKENS) - mlx.open(converted / "model").logits(TOKENS)
    assert np.abs(apart).max() > 0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8}},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "llama3", "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
            },
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
        ),
        ({"text_config": {"rope_parameters": {"rope_theta": 1e6}}}, {}),
        ({"dtype": "bfloat16", "num_local_experts": 4}, {"torch_dtype": "bfloat16", "num_experts": 4}),
    ],
)
def test_the_configuration_as_mlx_reads_it(given: dict[str, Any], expected: dict[str, Any]) -> None:
    new = mlx._rewritten(given)
    assert {key: new.get(key) for key in expected} == expected
    if "text_config" in given:
        assert new["text_config"]["rope_theta"] == 1e6


def test_a_window_that_begins_beyond_64_tokens_is_held(tmp_path: Path) -> None:
    """mlx-lm gives no window to the layers of a Mistral that does not name their types. What has it stands in for transformers."""
    draw = np.random.default_rng(0)
    sizes = {"q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (64, 64)}
    layer = {f"self_attn.{name}.weight": size for name, size in sizes.items()}
    layer |= {"mlp.gate_proj.weight": (128, 64), "mlp.up_proj.weight": (128, 64), "mlp.down_proj.weight": (64, 128)}
    shapes = {f"model.layers.{at}.{name}": size for at in "01" for name, size in layer.items()}
    shapes["model.embed_tokens.weight"] = (2048, 64)
    weights = {name: draw.normal(0, 0.2, size).astype(np.float32) for name, size in shapes.items()}
    norms = [f"layers.{at}.{name}_layernorm" for at in "01" for name in ("input", "post_attention")]
    weights |= {f"model.{name}.weight": np.ones(64, np.float32) for name in (*norms, "norm")}
    config = {"model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": True}
    config |= {
        "max_position_embeddings": 512,
        "sliding_window": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    made = {}
    for name, types in (("right", {"layer_types": ["sliding_attention", "full_attention"]}), ("wrong", {})):
        source = tmp_path / name / "source"
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(config | types))
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        for path in MODEL.glob("token*"):
            shutil.copy(path, source)
        convert(source, tmp_path / name / "out")
        made[name] = mlx.open(tmp_path / name / "out/model")
    written = tmp_path / "logits"
    tensors: dict[str, Any] = {}
    for prefix, length in (("", 64), (reference.LONGER, *original.longer(inputs(source)))):
        tokens = (np.arange(length) * 7919 % 2048).astype(np.int32)
        tensors |= {f"{prefix}token_ids": tokens, f"{prefix}logits": made["right"].logits(tokens)[-64:].copy()}
    save_file(tensors, written, metadata={"made_by": "transformers 5"})
    files = {**inputs(source), "reference": written}
    held = reference.hold(made["right"], files)
    assert [one["kl_mean"] for one in held["against"]] == [0, 0]
    assert reference.verdict(held) == "held against transformers 5: KL 0"
    with pytest.raises(StepFailed, match=r"held against transformers 5 \(at the end of 160 tokens\) on 64 tokens: mean KL"):
        reference.hold(made["wrong"], files)


def test_missing_weights_fail(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(StepFailed, match=r"mlx-lm cannot convert this model: Missing 1 parameters: model.layers.1.mlp.down_proj"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"model_type": "phi3", "hidden": 256}, {"group_size": 64}, ""),
        ({"model_type": "mistral", "hidden": 192}, {}, ""),  # mlx-lm has it under another name
        (
            {"model_type": "own", "custom_code": True},
            {},
            "names Python code (auto_map), which is never run, and mlx-lm knows no model type",
        ),
        ({"model_type": "olmo"}, {}, "mlx-lm knows no model type 'olmo'"),  # it ends the process without a package of its own
        ({"model_type": "cache"}, {}, "mlx-lm knows no model type 'cache'; name another framework"),
        ({"model_type": "phi3", "quantized": "awq"}, {}, "quantized already (awq); give the float model"),
        (
            {"model_type": "phi3", "hidden": 192},
            {"group_size": 128},
            "192 is no multiple of group_size 128; quantize.group_size: 32 or 64",
        ),
        (
            {"model_type": "phi3", "hidden": 100},
            {"group_size": 64},
            "none of 32, 64 and 128 divides it: set quantize: {scheme: none}",
        ),
        (
            {"model_type": "qwen2", "architecture": "Qwen2ForSequenceClassification"},
            {},
            "Qwen2ForSequenceClassification has no head for language, which mlx-lm gives it; give one (…ForCausalLM)",
        ),
        ({"model_type": "qwen2_vl", "architecture": "Qwen2VLForConditionalGeneration"}, {}, ""),
        ({"model_type": "qwen2", "scaled": [{"rope_type": "yarn", "factor": 4.0}]}, {}, ""),
        ({"model_type": "qwen2", "scaled": [{"rope_type": "yarn", "truncate": False}]}, {}, "whose bounds mlx-lm always rounds"),
        ({"model_type": "qwen3_moe", "scaled": [{"rope_type": "yarn"}]}, {}, "yarn, which mlx-lm's qwen3_moe does not compute"),
        ({"model_type": "phi3", "scaled": [{"rope_type": "longrope", "short_factor": [1.5], "long_factor": [1.5]}]}, {}, ""),
        (
            {"model_type": "phi3", "scaled": [{"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}]},
            {},
            "scaled by longrope, of which MLX applies the long_factor at every length",
        ),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = mlx.refuse(ModelFacts(format="huggingface", **facts), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


def test_the_model_types_are_those_of_mlx_lm() -> None:
    """Its modules with arguments of a model, and its own other names for them, read and not imported; without one that ends the process.

    `EDGEBUILD_REWRITE=1 pytest tests/backends/test_mlx.py` writes the list anew, when the lock names another mlx-lm.
    """
    package = Path(next(iter(importlib.util.find_spec("mlx_lm").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    texts = {path.stem: path.read_text("utf-8") for path in (package / "models").glob("*.py")}
    found = {name for name, text in texts.items() if re.search(r"\bModelArgs\b", text) and "sys.exit(" not in text}
    for node in ast.parse((package / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            found |= {name for name, model in ast.literal_eval(node.value).items() if model in found}
    assert language.shipped(mlx, "mlx_types.txt", found) == found
    scaling = re.compile(r"scaling_config|rope_scaling\[|self\.rope_scaling|args\.rope_scaling|rope_type")
    assert [name for name in mlx.UNREAD if scaling.search(texts[name])] == []  # of positions that are scaled they read nothing


def test_parameters() -> None:
    assert mlx.parameters("int4", {}, False) == {"group_size": 64}
    assert mlx.parameters("int8", {"group_size": 32}, True) == {"group_size": 32}
    with pytest.raises(ValueError, match=r"^group_size: MLX quantizes in groups of 32, 64 or 128, not 48$"):
        mlx.parameters("int4", {"group_size": 48}, False)
    own = {"method": "mixed-4-6", "layers": {"lm_head": "none"}}
    assert mlx.parameters("int4", own, False) == {"group_size": 64, **own}
    with pytest.raises(
        ValueError, match=r"^method: of MLX's recipes none is static with the scheme int4; there are: mixed-2-6 \(int2\), "
    ):
        mlx.parameters("int4", {"method": "static"}, False)
    with pytest.raises(ValueError, match=r'^layers: MLX has no scheme q8_0 for "lm_head"; it has: int2, .*, int8, none$'):
        mlx.parameters("int4", {"layers": {"lm_head": "q8_0"}}, False)


def test_a_group_size_that_does_not_divide_a_layer_fails(tmp_path: Path) -> None:
    convert(narrow(copied(tmp_path / "source", golden=False), 96), tmp_path / "out")
    with pytest.raises(
        StepFailed, match=r"layers.0.mlp.down_proj has 96 inputs, no multiple of group_size 64; .*size: 32 would fit"
    ):
        quantize(tmp_path / "out/model", tmp_path / "int4", "int4")
    assert "18 of 18 layers" in quantize(tmp_path / "out/model", tmp_path / "fits", "int4", 32).summary


def test_layers_that_no_group_size_divides_stay_as_they_are(tmp_path: Path) -> None:
    convert(narrow(copied(tmp_path / "source", golden=False), 100), tmp_path / "out")
    assert "14 of 18 layers" in quantize(tmp_path / "out/model", tmp_path / "int4", "int4").summary
    assert report(tmp_path / "int4")["not_quantized"] == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]


def test_without_a_reference_the_report_says_so(tmp_path: Path) -> None:
    outcome = convert(copied(tmp_path / "source", golden=False), tmp_path / "out")
    assert outcome.summary == "bf16, 4,196,608 parameters, its conversion unverified"
    found = report(tmp_path / "out")
    assert found["verified"] is False
    assert found["reason"] == ("conversion unverified: its source was not run, and no golden.safetensors lies beside the model")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors, metadata: tensors.update(logits=tensors["logits"].astype(np.float32)), "no tensor logits of type F16"),
        (lambda tensors, metadata: tensors.pop("token_ids"), "no tensor token_ids of type I32"),
        (lambda tensors, metadata: tensors.update(logits=tensors["logits"][:9]), "holds 64 tokens, but logits for 9"),
        (lambda tensors, metadata: tensors["token_ids"].__setitem__(3, 4096), "a token is outside the vocabulary of 2048"),
        (lambda tensors, metadata: tensors["logits"].__setitem__((0, 0), np.inf), "a logit is no finite number"),
        (lambda tensors, metadata: metadata.pop("text"), "its metadata hold no text"),
    ],
)
def test_damaged_golden_logits(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], object], problem: str) -> None:
    source = copied(tmp_path / "source")
    edit_golden(source, change)
    with pytest.raises(
        StepFailed, match=f"^golden.safetensors: .*{problem}.*; copy it again, remake it from the source model, or remove"
    ):
        golden(source)


def test_truncated_golden_logits_fail_the_conversion(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    path = source / reference.GOLDEN
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StepFailed, match=r"^golden.safetensors: .*truncated or damaged; copy it again"):
        convert(source, tmp_path / "out")


def test_outputs_by_name() -> None:
    right = {"y": np.linspace(-1, 1, 8, dtype=np.float32), "label": np.array([1, 2])}
    (entry,) = reference.hold_outputs("the source", right, {**right, "y": right["y"] * np.float32(1 + 1e-5)})["against"]
    assert (entry["reference"], entry["limit"]) == ("the source", reference.LIMIT)
    assert entry["relative_l2"] == pytest.approx(1e-5, rel=0.1)
    assert entry["max_abs"] == pytest.approx(1e-5, rel=0.1)
    for wrong, problem in [
        ({**right, "y": right["y"] + np.float32(0.01)}, "output y has a relative L2 error of 0.015"),
        ({**right, "y": right["y"] * np.float32("nan")}, "output y has a relative L2 error of inf"),
        ({**right, "y": right["y"][:4]}, r"output y is float32 \[4\] instead of float32 \[8\]"),
        ({**right, "label": np.array([1, 3])}, "output label differs in 1 of 2 values"),
        ({"y": right["y"]}, r"it has the outputs \['y'\], the source has \['label', 'y'\]"),
    ]:
        with pytest.raises(StepFailed, match=problem):
            reference.hold_outputs("the source", right, wrong)


@needs_torch
def test_golden_logits_of_another_model_are_told_from_a_wrong_conversion(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, permute)
    with pytest.raises(StepFailed, match=r"agrees with the source as it is now: golden.safetensors is of another model"):
        convert(source, tmp_path / "out", by_torch=True)


@needs_torch
def test_the_source_is_run_once_for_several_targets(tmp_path: Path) -> None:
    """Through doit; what is left out of the reference is left out of no gate."""
    folder = copy_project(tmp_path / "project", "ios-phi3")
    (folder / "targets/models/tiny-phi3/golden.safetensors").unlink()
    other = (folder / "targets/ios-phi3.yaml").read_text().replace("evaluate:", "quantize: {scheme: int8}\nevaluate:")
    (folder / "targets/other.yaml").write_text(other)
    done = doit(folder, "quantize:ios-phi3", "quantize:other")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"reference:ios-phi3 +ran .* by transformers 5[.0-9]+: logits of 64 tokens", done.stdout)
    once = ("reference", "convert", "evaluate")
    assert {name: outcome for name, outcome in outcomes(folder).items() if name.startswith(once)} == {
        "reference:ios-phi3": "ran",
        "convert:ios-phi3": "ran",
        "evaluate:ios-phi3.baseline": "ran",
        "reference:other": "restored",
        "convert:other": "restored",
        "evaluate:other.baseline": "restored",
    }
    assert re.search(r"evaluate:ios-phi3.baseline +ran .* held against transformers 5[.0-9]+: KL ", done.stdout)
