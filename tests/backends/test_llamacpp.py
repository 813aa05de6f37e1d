"""llama.cpp for real, on the example model: what it converts and quantizes, and that a wrong file does not get through.

llama-cpp-python is compiled: .ci/run has it in an environment of its own. What needs no llama.cpp runs everywhere.
"""

import ast
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import bundle, resources, samples
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import llamacpp
from edgebuild.bundles import android
from edgebuild.errors import StepFailed
from edgebuild.formats import gguf
from edgebuild.step import Outcome
from tests.backends import language
from tests.backends.language import PHI3_MINI, TEXT, random_weights
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
    needs_llama,
    report,
)
from tests.bundles import kotlin
from tests.bundles.packing import MADE_WITH, action, require, self_tested

SCHEMES = tuple(llamacpp.SCHEMES)


convert = partial(language.convert, "llamacpp")
logits = partial(language.logits, "llamacpp")


def quantize(model: Path, out: Path, scheme: str, calibration: Path | None = None) -> Outcome:
    imatrix = {"imatrix": True} if calibration else {}
    return language.quantize("llamacpp", model, out, scheme, calibration, 8, **imatrix)


def header(out: Path) -> gguf.Header:
    return gguf.read(str(out / "model/model.gguf"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llamacpp") / "converted"
    convert(MODEL, out)
    return out


# -- conversion -----------------------------------------------------------------------------------------------------------
@needs_llama
def test_the_file_is_what_llama_cpp_reads_on_a_device(converted: Path) -> None:
    found = header(converted)
    assert [path.name for path in (converted / "model").iterdir()] == ["model.gguf"]
    assert found.values["general.architecture"] == "phi3"
    assert found.values["general.name"] == "Phi3"  # and nothing of the folder that it was made in
    assert found.values["phi3.rope.freq_base"] == 10_000.0
    assert found.lengths["tokenizer.ggml.tokens"] == 2048
    assert "<|assistant|>" in str(found.values["tokenizer.chat_template"])
    assert report(converted)["types"] == {"BF16": 18, "F32": 9}


@needs_llama
def test_rope_parameters_reach_llama_cpp(converted: Path, tmp_path: Path) -> None:
    source = copied(tmp_path / "source", golden=False)
    edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
    assert convert(source, tmp_path / "out").summary == "bf16, 4,196,608 parameters, its conversion unverified"
    assert header(tmp_path / "out").values["phi3.rope.freq_base"] == 500_000.0
    apart = logits(tmp_path / "out", TOKENS) - logits(converted, TOKENS)
    assert np.abs(apart).max() > 0.1


@needs_llama
def test_missing_weights_fail(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(StepFailed, match=r"llama.cpp does not load model.gguf: .*tensor 'blk.1.ffn_down.weight' not found"):
        convert(source, tmp_path / "out")


@needs_llama
def test_foreign_weights_fail(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, lambda weights: weights.update(other=weights["model.norm.weight"].copy()))
    with pytest.raises(
        StepFailed, match=r"llama.cpp cannot convert this model: ValueError: Can not map tensor 'other'; the weights"
    ):
        convert(source, tmp_path / "out")


def swap(pieces: list[Any], first: str, second: str) -> None:
    one, other = (next(piece for piece in pieces if piece.piece == text) for text in (first, second))
    one.piece, other.piece = other.piece, one.piece


@needs_llama
def test_another_tokenizer_model_fails(tmp_path: Path) -> None:
    """llama.cpp takes tokenizer.model, transformers tokenizer.json: they must agree."""
    from sentencepiece import sentencepiece_model_pb2

    source = copied(tmp_path / "source")
    model = sentencepiece_model_pb2.ModelProto.FromString((source / "tokenizer.model").read_bytes())
    swap(model.pieces, "e", "t")
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        StepFailed, match=r"the converted tokenizer gives other tokens than the source's; write the source's anew"
    ):
        convert(source, tmp_path / "out")


@needs_llama
def test_a_tokenizer_that_the_golden_logits_were_not_made_with_fails(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    source = copied(tmp_path / "source")
    words = {index: word for word, index in json.loads((source / "tokenizer.json").read_text())["model"]["vocab"].items()}
    first, second = (words[index] for index in golden(source).tokens[:2].tolist())
    model = sentencepiece_model_pb2.ModelProto.FromString((source / "tokenizer.model").read_bytes())
    swap(model.pieces, first, second)
    (source / "tokenizer.model").write_bytes(model.SerializeToString())

    def swap_words(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(source / "tokenizer.json", swap_words)
    with pytest.raises(
        StepFailed, match=r"the tokenizer does not give the tokens of golden.safetensors .* difference at token 0"
    ):
        convert(source, tmp_path / "out")


@needs_llama
def test_a_tokenizer_that_llama_cpp_does_not_know_fails(tmp_path: Path) -> None:
    """Its converter tells byte-level tokenizers by what they make of one text, and has a list of them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source = tmp_path / "source"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the small boat left the harbour"] * 3, vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(source)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(source)
    with pytest.raises(
        StepFailed, match=r"BPE pre-tokenizer was not recognized.*; llama.cpp knows no tokenizer that splits words"
    ):
        convert(source, tmp_path / "out")


@needs_llama
def test_a_model_without_a_tokenizer_fails(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    (source / "tokenizer.model").unlink()
    with pytest.raises(
        StepFailed, match=r"Missing tokenizer.model; this architecture's tokenizer is read from tokenizer.model: copy"
    ):
        convert(source, tmp_path / "out")
    (source / "tokenizer.json").unlink()
    with pytest.raises(StepFailed, match=r"^the folder has no tokenizer.json and no tokenizer.model; copy"):
        convert(source, tmp_path / "again")


@needs_llama
def test_a_source_that_memory_has_no_room_for_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by transformers; where the golden logits are there, they alone are compared."""
    monkeypatch.setattr(resources, "memory", lambda: resources.Memory(total=10**9, available=300_000_000, cgroup_limit=None))
    outcome = convert(copied(tmp_path / "source", golden=False), tmp_path / "out", by_torch=True)
    assert outcome.summary.endswith(", its conversion unverified")
    reason = report(tmp_path / "out")["reason"]
    assert reason.startswith("conversion unverified: running the source by transformers takes about 267 MB of memory, more than")
    convert(MODEL, tmp_path / "golden", by_torch=True)
    (held,) = report(tmp_path / "golden")["against"]
    assert held["reference"].startswith("golden.safetensors ")


# -- GGUF as a source -----------------------------------------------------------------------------------------------------
@needs_llama
def test_a_gguf_is_taken_as_it_is(converted: Path, tmp_path: Path) -> None:
    source = converted / "model/model.gguf"
    outcome = convert(source, tmp_path / "out")
    assert outcome.summary == "bf16, 4,196,608 parameters, its source's own bytes"
    assert contents(tmp_path / "out/model") == contents(converted / "model")
    assert report(tmp_path / "out")["verified"] is True
    facts = assess({"model": source})
    assert (facts.architecture, facts.layers, facts.heads, facts.hidden, facts.vocabulary) == ("phi3", 4, 4, 256, 2048)
    assert (facts.context, facts.experts, facts.tied_embeddings, facts.quantized) == (2048, None, False, "")
    assert facts.parameters == {"BF16": 4_194_304, "F32": 2_304}
    assert (facts.weights, facts.largest) == ({"": 4_194_304}, 524_288)


@needs_llama
def test_a_quantized_gguf_is_taken_with_scheme_none_alone(converted: Path, tmp_path: Path) -> None:
    quantize(converted / "model", tmp_path / "out", "q4_0")
    source = tmp_path / "out/model/model.gguf"
    facts = assess({"model": source})
    assert facts.quantized == "Q4_0, Q6_K"
    assert llamacpp.refuse(facts, {"scheme": "q4_k_m"}).startswith(
        "it is quantized already (Q4_0, Q6_K); quantize: {scheme: none}"
    )
    assert llamacpp.refuse(facts, {"task": "text-generation"}) == ""
    assert convert(source, tmp_path / "taken").summary == "q4_0, q6_k, 4,196,608 parameters, its source's own bytes"


@needs_llama
def test_a_damaged_gguf_fails(converted: Path, tmp_path: Path) -> None:
    whole = (converted / "model/model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(StepFailed, match=r"^cut.gguf: its tensors end at byte .* truncated"):
        assess({"model": tmp_path / "cut.gguf"})
    place = whole.index(b"phi3.block_count") + len("phi3.block_count") + 4
    (tmp_path / "odd.gguf").write_bytes(whole[:place] + struct.pack("<I", 7) + whole[place + 4 :])
    with pytest.raises(StepFailed, match=r"llama.cpp does not load model.gguf: .*tensor 'blk.4.attn_norm.weight' not found"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


# -- quantizing -----------------------------------------------------------------------------------------------------------
@needs_llama
@pytest.mark.parametrize(
    ("scheme", "bytes_each", "divergence_most"),
    [("q4_0", 0.68, 0.05), ("q4_k_m", 0.72, 0.03), ("q5_k_m", 0.80, 0.01), ("q6_k", 0.86, 0.005), ("q8_0", 1.1, 0.001)],
)
def test_quantize(converted: Path, tmp_path: Path, scheme: str, bytes_each: float, divergence_most: float) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", scheme)
    found = report(tmp_path / "out")
    assert (found["tensors"], found["tensors_quantized"], found["fallback"]["tensors"]) == (18, 18, {})
    assert found["types"] == {kind: number for kind, number in found["types"].items() if kind == "F32" or kind.startswith("Q")}
    assert found["bytes_after"] < 4_196_608 * bytes_each
    assert outcome.summary.startswith(f"{scheme}, 18 of 18 matrices (Q")
    assert f"), {8.44} MB → " in outcome.summary
    tokens = golden(MODEL).tokens
    assert 0 < divergence(logits(converted, tokens), logits(tmp_path / "out", tokens)) < divergence_most


@needs_llama
def test_quantize_twice_gives_the_same_bytes(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(converted / "model", tmp_path / "a", "q4_k_m")
    monkeypatch.setattr("edgebuild.machine.cores", lambda: 1)
    quantize(Path(shutil.copytree(converted / "model", tmp_path / "elsewhere")), tmp_path / "b", "q4_k_m")
    assert contents(tmp_path / "a/model") == contents(tmp_path / "b/model")


@needs_llama
def test_what_is_quantized_already_is_not_quantized_again_and_leaves_no_file(converted: Path, tmp_path: Path) -> None:
    quantize(converted / "model", tmp_path / "small", "q8_0")
    with pytest.raises(StepFailed, match=r"^llama.cpp cannot quantize this model: .*requantizing from type q8_0 is disabled"):
        quantize(tmp_path / "small/model", tmp_path / "out", "q4_0")
    assert list((tmp_path / "out/model").iterdir()) == []


@needs_llama
def test_rows_that_a_type_does_not_divide_are_told(tmp_path: Path) -> None:
    convert(narrow(copied(tmp_path / "source", golden=False), 96), tmp_path / "out")
    outcome = quantize(tmp_path / "out/model", tmp_path / "q4_k_m", "q4_k_m")
    assert ", 4 fell back: their rows are no multiple of 256, " in outcome.summary
    fallen = report(tmp_path / "q4_k_m")["fallback"]["tensors"]
    assert sorted(fallen) == [f"blk.{layer}.ffn_down.weight" for layer in range(4)]
    assert set(fallen.values()) <= {"Q5_0", "Q8_0"}
    assert quantize(tmp_path / "out/model", tmp_path / "q4_0", "q4_0").summary.count("fell back") == 0


@needs_llama
def test_where_nothing_can_be_quantized_it_fails(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    llamacpp._write_small(tmp_path / "model/model.gguf", 40)
    with pytest.raises(StepFailed, match=r"^llama.cpp quantized 0 of 9 matrices, and the file went from .*: this model cannot"):
        quantize(tmp_path / "model", tmp_path / "out", "q8_0")


# -- importance matrix ----------------------------------------------------------------------------------------------------
@needs_llama
def test_an_importance_matrix(converted: Path, tmp_path: Path) -> None:
    outcome = quantize(converted / "model", tmp_path / "a", "q4_k_m", TEXT)
    assert outcome.summary.startswith("q4_k_m, its importance matrix of 2,048 tokens, 18 of 18 matrices (Q")
    assert report(tmp_path / "a")["imatrix_tokens"] == 2048
    quantize(converted / "model", tmp_path / "b", "q4_k_m", TEXT)
    quantize(converted / "model", tmp_path / "without", "q4_k_m")
    assert contents(tmp_path / "a/model") == contents(tmp_path / "b/model") != contents(tmp_path / "without/model")
    session = llamacpp.open(converted / "model")
    tokens = session.tokens(TEXT.read_text())[-256:]
    session.close()
    exact = logits(converted, tokens)
    assert divergence(exact, logits(tmp_path / "a", tokens)) < 1.2 * divergence(exact, logits(tmp_path / "without", tokens))


@needs_llama
def test_an_importance_is_the_mean_square_that_torch_sees(converted: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens, found = llamacpp._importance(converted / "model/model.gguf", TEXT, 2)
    assert (tokens, len(found)) == (512, 16)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    seen: dict[str, Any] = {}
    for name, of in (("blk.0.attn_qkv.weight", "self_attn.qkv_proj"), ("blk.0.ffn_down.weight", "mlp.down_proj")):
        layer = model.model.layers[0].get_submodule(of)
        layer.register_forward_hook(lambda module, given, made, name=name: seen.setdefault(name, []).append(given[0][0]))
    session = llamacpp.open(converted / "model")
    for window in samples.windows(TEXT, session, 2):
        with torch.no_grad():
            model(input_ids=torch.from_numpy(window.astype(np.int64))[None])
    session.close()
    for name, inputs_seen in seen.items():
        exact = torch.cat(inputs_seen).square().mean(0).numpy()
        assert found[name].shape == exact.shape
        assert np.linalg.norm(found[name] - exact) < 0.02 * np.linalg.norm(exact), name


@needs_llama
def test_an_importance_matrix_of_experts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    random_weights(source, "Mixtral", {"head_dim": 64, "num_local_experts": 4})
    convert(source, tmp_path / "out")
    outcome = quantize(tmp_path / "out/model", tmp_path / "q4_k_m", "q4_k_m", TEXT)
    assert ", its importance matrix of 2,048 tokens, " in outcome.summary
    exact, coarse = logits(tmp_path / "out", TOKENS), logits(tmp_path / "q4_k_m", TOKENS)
    assert np.isfinite(coarse).all()
    assert divergence(exact, coarse) < divergence(exact, exact[:, ::-1]) / 2


# -- running --------------------------------------------------------------------------------------------------------------
@needs_llama
def test_what_a_session_runs_in(converted: Path) -> None:
    session = llamacpp.open(converted / "model")
    assert session.runtime.startswith("llama.cpp (llama-cpp-python ")
    assert session.runtime.endswith(" on CPU, 1 thread")
    session.close()


@needs_llama
def test_a_text_longer_than_a_pass(converted: Path) -> None:
    session = llamacpp.open(converted / "model")
    tokens = np.resize(session.tokens((TEXT).read_text()), 600)
    found = session.logits(tokens)
    assert found.shape == (600, 2048)
    assert divergence(session.logits(tokens[:300]), found[:300]) < 1e-5
    session.close()


@needs_llama
def test_what_is_no_gguf_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StepFailed, match=r"^llama.cpp does not load model.gguf: \w"):
        llamacpp.open(tmp_path / "model")


@needs_llama
def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    """llama.cpp gives zeros for its logits. Its converter knows tokenizers by a list, which this one is put on."""
    from transformers import BertConfig, BertModel, BertTokenizer

    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "boat", "##s"]))
    BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes)).save_pretrained(source)
    code = (
        "import conversion.base, convert_hf_to_gguf, sys\n"
        "conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'bert-bge'\n"
        "sys.argv[0] = 'convert'\nconvert_hf_to_gguf.main()"
    )
    script = llamacpp._converter()
    assert script is not None
    command = [sys.executable, "-c", code, str(source), "--outfile", str(tmp_path / "m.gguf"), "--outtype", "f16"]
    folders = os.pathsep.join([str(script.parent), str(script.parent / "gguf-py")])
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": folders})
    with pytest.raises(StepFailed, match="it is an encoder, and gives no next token"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@needs_llama
def test_smoke() -> None:
    assert llamacpp.smoke().startswith("llama-cpp-python ")


@needs_llama
@pytest.mark.slow
def test_the_example_for_android(tmp_path: Path) -> None:
    require(MADE_WITH["android"])
    evidence = language.example(tmp_path / "project", "android-phi3", "L1")
    assert evidence["quantization"]["scheme"] == "q4_k_m"
    assert "holds the same model, uncompressed and aligned (L3)" in evidence["bundle"]["why_not_higher"]
    assert "gave its golden output (L4)" in evidence["bundle"]["why_not_higher"]


RUN = """
import edgebuild.smallandroidmodel.SmallAndroidModel
import java.io.File
import kotlin.system.exitProcess

fun main(arguments: Array<String>) {
    val context = android.content.Context(File(arguments[0]), File(arguments[1]))
    SmallAndroidModel.load(context, contextSize = 256, threads = 1).use { model ->
        println(model.generate("Once upon a time", limit = 12) { it.length < 1000 })
        println(runCatching { model.evaluate(IntArray(300) { 7 }) }.exceptionOrNull())
        println(runCatching { model.evaluate(intArrayOf()) }.exceptionOrNull())
        println(runCatching { model.evaluate(intArrayOf(1_000_000)) }.exceptionOrNull())
    }
    exitProcess(if (SmallAndroidModel.selfTest(context)) 0 else 1)
}
"""


@needs_llama
@pytest.mark.slow
def test_the_modules_for_android_run_on_java(converted: Path, tmp_path: Path) -> None:
    """Their Kotlin by its own compiler, their C++ by g++ with llama.cpp, the APK as the device's assets: all but Android itself."""
    import llama_cpp

    kotlin.needed()
    quantize(converted / "model", tmp_path / "quantized", "q4_k_m")
    made = action("android", tmp_path / "quantized/model", tmp_path / "out")
    bundle.run(made, "llamacpp", llamacpp, android)
    library = made.outputs["bundle"] / "library/src/main"
    (tmp_path / "Run.kt").write_text(RUN)
    path = kotlin.compile([tmp_path / "Run.kt", *sorted((library / "kotlin").iterdir())], tmp_path / "classes")
    link_glue(library / "cpp/glue.cpp", Path(llama_cpp.__file__).parent, tmp_path / "libSmallAndroidModel.so")

    def run(apk: Path) -> tuple[int, list[str]]:
        words = ["java", f"-Djava.library.path={tmp_path}", "-cp", path, "RunKt", apk, tmp_path / "storage"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        return done.returncode, done.stdout.splitlines() or done.stderr.splitlines()

    status, (said, full, nothing, foreign, verdict, line) = run(made.outputs["bundle"] / "test.apk")
    assert status == 0, verdict
    assert said
    assert full.startswith("java.lang.IllegalStateException: the context is full: clear it, or load the model with a larger one")
    assert nothing == "java.lang.IllegalStateException: there are no tokens to evaluate"
    assert foreign == "java.lang.IllegalStateException: llama.cpp cannot evaluate these tokens"
    assert verdict.startswith("PASS golden_logits ")
    evidence = self_tested(line)
    assert (evidence["bundle"], evidence["version"], evidence["verdict"]) == ("small-android", "1.2.3", "PASS")
    assert {one["name"]: one["value"] <= 1 for one in evidence["measurements"]} == {"golden_logits": True, "golden_tokens": True}
    (copied_out,) = (tmp_path / "storage/SmallAndroidModel").iterdir()
    assert copied_out.read_bytes() == (tmp_path / "quantized/model/model.gguf").read_bytes()
    before = copied_out.stat().st_ino
    spoilt(made.outputs["bundle"] / "test.apk", tmp_path / "spoilt.apk")
    os.utime(tmp_path / "spoilt.apk", ns=(0, (made.outputs["bundle"] / "test.apk").stat().st_mtime_ns))
    status, lines = run(tmp_path / "spoilt.apk")
    assert (status, lines[-2].split()[0], self_tested(lines[-1])["verdict"]) == (1, "FAIL", "FAIL")
    assert copied_out.stat().st_ino == before, "it is copied once after each installation"


def link_glue(source: Path, llama: Path, target: Path) -> None:
    java = Path(os.path.realpath(str(shutil.which("javac")))).parents[1] / "include"
    words = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1", "-o", target, source]
    words += [f"-I{folder}" for folder in (llama / "include", java, java / "linux")]
    subprocess.run([*words, f"-L{llama / 'lib'}", "-lllama", f"-Wl,-rpath,{llama / 'lib'}"], check=True, timeout=300)


def spoilt(apk: Path, target: Path) -> None:
    """The same with another golden logit."""
    with zipfile.ZipFile(apk) as source, zipfile.ZipFile(target, "w") as made:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("golden.json"):
                content = json.loads(data)
                content["top"][0]["logit"] += 5
                data = json.dumps(content).encode()
            made.writestr(entry.filename, data)


# -- without llama.cpp ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"architecture": "Phi3ForCausalLM"}, {"scheme": "q4_k_m"}, ""),
        ({"architecture": "T5ForConditionalGeneration"}, {}, "llama.cpp's converter knows no language model 'T5ForConditional"),
        ({"architecture": "BertModel"}, {}, "llama.cpp's converter knows no language model 'BertModel'; name another framework"),
        (
            {"architecture": "OwnForCausalLM", "custom_code": True},
            {},
            "names Python code (auto_map), which is never run, and llama.cpp's converter knows no",
        ),
        ({"architecture": "Phi3ForCausalLM", "quantized": "awq"}, {}, "quantized already (awq); give the float model"),
        ({"architecture": "Phi3ForCausalLM", "scaled": [{"rope_type": "longrope"}]}, {}, ""),
        ({"architecture": "LlamaForCausalLM", "scaled": [{"rope_type": "yarn"}]}, {}, ""),
        (
            {"architecture": "LlamaForCausalLM", "scaled": [{"rope_type": "longrope"}]},
            {},
            "whose factors llama.cpp's converter does",
        ),
        ({"format": "gguf", "parameters": {"F16": 8}}, {"scheme": "q4_0"}, ""),
        ({"format": "gguf"}, {}, "it holds no weights"),
        (
            {"format": "gguf", "parameters": {"Q4_K": 8}, "quantized": "Q4_K"},
            {"scheme": "q4_0"},
            "quantized already (Q4_K); quantize: {scheme: none} takes it as it is",
        ),
        ({"format": "gguf", "parameters": {"Q4_K": 8}, "quantized": "Q4_K"}, {}, ""),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = llamacpp.refuse(ModelFacts(**{"format": "huggingface", **facts}), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


@needs_llama
def test_the_language_models_are_those_of_the_converter() -> None:
    """`EDGEBUILD_REWRITE=1 pytest tests/backends/test_llamacpp.py` writes the list anew, when the lock names another llama-cpp-python.

    Without encoder-decoders (its T5), and drafts that run only beside another model.
    """
    script = llamacpp._converter()
    assert script is not None
    (known,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((script.parent / "conversion/__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP" and node.value
    )
    found = {name for name in known if name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))}
    found -= {name for name, module in known.items() if module == "t5" or "Assistant" in name or "Eagle3" in name}
    texts = {name: (script.parent / f"conversion/{module}.py").read_text("utf-8") for name, module in known.items()}
    assert {name for name in found if "long_factor" in texts[name]} >= set(llamacpp.LONGROPE)
    assert language.shipped(llamacpp, "llamacpp_architectures.txt", found) == llamacpp._architectures() == found


@needs_llama
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_an_estimate_is_about_right(converted: Path, tmp_path: Path, scheme: str) -> None:
    facts, made = assess(inputs(MODEL)), converted
    if scheme != "none":
        made = tmp_path / "out"
        quantize(converted / "model", made, scheme)
    found = llamacpp.estimate(facts, scheme, {}, 10**11)
    assert found.artifact == pytest.approx((made / "model/model.gguf").stat().st_size, rel=0.05)
    assert found.making > 100_000_000


def test_estimates_of_phi3_mini_are_as_measured() -> None:
    """3,821,079,552 parameters: 7.643 GB in 16 bits, Q4_K_M 2.397 GB, Q8_0 4.061 GB; 0.97 and 0.5 GB of memory to make them."""
    for scheme, size, memory in (("none", 7.643e9, 0.97e9), ("q4_k_m", 2.397e9, 0.5e9), ("q8_0", 4.061e9, 0.53e9)):
        found = llamacpp.estimate(PHI3_MINI, scheme, {}, 10**11)
        assert found.artifact == pytest.approx(size, rel=0.03)
        assert memory < found.making < 1.25 * memory


def test_without_a_converter_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "_converter", lambda: None)
    with pytest.raises(
        StepFailed, match=r"llama.cpp's converter is not installed here; run: edgebuild toolchain install llamacpp"
    ):
        convert(copied(tmp_path / "source"), tmp_path / "out")


def test_a_converter_that_says_nothing_or_dies_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "converter.py"
    monkeypatch.setattr(llamacpp, "_converter", lambda: script)
    for number, (code, problem) in enumerate(
        [
            ("", "it said nothing; see the log"),
            ("import os; os.kill(os.getpid(), 11)", "its converter died of signal 11"),
            ("import sys; sys.exit('a reason of its own')", "a reason of its own; see the log"),
        ]
    ):
        script.write_text(code)
        with pytest.raises(StepFailed, match=f"^llama.cpp cannot convert this model: {problem}"):
            convert(MODEL, tmp_path / f"out{number}")


def test_parameters() -> None:
    assert llamacpp.parameters("q4_k_m", {"imatrix": False}, False) == llamacpp.parameters("q4_k_m", {}, True) == {}
    assert llamacpp.parameters("q4_k_m", {"imatrix": True}, True) == {"imatrix": True}
    with pytest.raises(ValueError, match=r"^imatrix: an importance matrix is made from text: give calibration.data"):
        llamacpp.parameters("q4_k_m", {"imatrix": True}, False)
