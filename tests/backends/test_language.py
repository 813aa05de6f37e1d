"""What every backend promises that takes language models: it is held against what the source gives, and a wrong one does not pass.

Each runs where its framework is, as .ci/run shows; what only one of them does stands in its own file.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgebuild import reference
from edgebuild.assess import assess
from edgebuild.backends import BACKENDS, onnxruntime_lm, openvino_lm
from edgebuild.errors import StepFailed
from edgebuild.step import ENVIRONMENT
from tests.backends.language import byte_level, convert, logits, permute, quantize, random_weights, transpose
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
    needs_llama,
    needs_onnxruntime_lm,
    needs_openvino_lm,
    needs_torch,
    report,
    swap_first_tokens,
)
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Case:
    """How far one of them may be from the golden logits and from transformers, and what is its own."""

    dtypes: str = "bf16"
    golden: float = 1e-5
    torch: float = 1e-6
    others: float = 1e-6  # with random weights, of other architectures
    earlier: float = 1e-3  # how far logits are apart that a later token must not touch
    scheme: str = "int4"
    by_torch: bool = False
    arrays: str = "takes tokens, not named arrays"
    converter: str = ""
    by: tuple[ModuleType, str] | None = None  # its function that has a source converted by that
    files: tuple[str, ...] = ()  # without which it does not load


CASES = {
    "llamacpp": Case(golden=1e-4, torch=5e-4, others=1e-3, earlier=0.02, scheme="q4_k_m", arrays="language models only"),
    "mlx": Case(torch=1e-9, arrays="language models only"),
    "onnxruntime": Case(
        dtypes="float32",
        by_torch=True,
        converter="onnxruntime-genai's model builder",
        by=(onnxruntime_lm, "_build"),
        files=("model.onnx", "tokenizer.json", "genai_config.json"),
    ),
    "openvino": Case(
        by_torch=True,
        converter="optimum-intel",
        by=(openvino_lm, "_export"),
        files=("openvino_model.xml", "openvino_tokenizer.xml"),
    ),
}
MARKS = {"llamacpp": [needs_llama], "onnxruntime": [needs_onnxruntime_lm], "openvino": [needs_openvino_lm]}
pytestmark = pytest.mark.usefixtures("as_in_a_worker")


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in names])


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in CASES])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A backend's name, and the example as it converts it."""
    out = tmp_path_factory.mktemp(request.param) / "converted"
    convert(request.param, MODEL, out, CASES[request.param].by_torch)
    return request.param, out


# -- conversion -----------------------------------------------------------------------------------------------------------
def test_the_conversion_agrees_with_the_golden_logits(made: tuple[str, Path]) -> None:
    name, converted = made
    *by_torch, stored = report(converted)["against"]
    assert report(converted)["verified"] is True
    assert stored["reference"].startswith("golden.safetensors (torch ")
    assert (stored["tokens"], stored["same_top"]) == (64, 1.0)
    assert stored["kl_mean"] < CASES[name].golden
    assert len(by_torch) == bool(CASES[name].by_torch)
    for held in by_torch:
        assert held["reference"].startswith("transformers 5.")
        assert held["same_top"] == 1.0
        assert held["kl_mean"] < CASES[name].torch


def test_the_same_bytes_from_any_folder(made: tuple[str, Path], tmp_path: Path) -> None:
    name, converted = made
    case = CASES[name]
    outcome = convert(name, copied(tmp_path / "another name"), tmp_path / "out", case.by_torch)
    assert contents(tmp_path / "out/model") == contents(converted / "model")
    assert (tmp_path / "out/report.json").read_bytes() == (converted / "report.json").read_bytes()
    assert {mode for _, mode in contents(converted / "model").values()} == {0o644}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "report.json"]
    by = r"(transformers 5\.[0-9.]+ and )golden.safetensors" if case.by_torch else "golden.safetensors"
    assert re.match(f"{case.dtypes}, 4,196,608 parameters, held against {by}: KL ", outcome.summary)
    quantize(name, converted / "model", tmp_path / "a", case.scheme)
    for path in (tmp_path / "out/model").iterdir():
        os.link(path, tmp_path / f"object {path.name}")  # as links into the store
    quantize(name, tmp_path / "out/model", tmp_path / "b", case.scheme)
    assert contents(tmp_path / "a/model") == contents(tmp_path / "b/model")
    assert not any(b"staged" in data for data, _ in contents(converted / "model").values())  # nothing of where it was made


@of(*CASES)
def test_a_rope_theta_that_the_golden_logits_were_not_made_with_fails(name: str, tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
    with pytest.raises(StepFailed, match=r"held against golden.safetensors .* 64 tokens: mean KL .* remove or remake golden"):
        convert(name, source, tmp_path / "out")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[*MARKS.get(name, []), needs_torch]) for name in CASES])
def test_transformers_is_a_reference_where_torch_is_installed(name: str, tmp_path: Path) -> None:
    source = copied(tmp_path / "source", golden=False)
    edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
    convert(name, source, tmp_path / "out", by_torch=True)
    (held,) = report(tmp_path / "out")["against"]
    assert held["reference"].startswith("transformers 5.")
    assert held["kl_mean"] < CASES[name].torch


OTHERS: Mapping[str, Mapping[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 64},
    "Gemma2": {"head_dim": 64},
    "Mistral": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "decoder_sparse_step": 1,
    },
}
# llama.cpp knows a tokenizer of Qwen's or Gemma's by what it makes of a text; optimum-intel takes Gemma with transformers 5.0 at most,
# and of mixtures onnxruntime-genai's builder has GptOss alone.
TAKEN = {
    "llamacpp": ("Llama", "Mistral", "Mixtral"),
    "mlx": tuple(OTHERS),
    "onnxruntime": ("Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral"),
    "openvino": ("Llama", "Qwen2", "Qwen3", "Mistral", "Mixtral", "Qwen3Moe"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, kind, marks=[*MARKS.get(name, []), needs_torch]) for name in CASES for kind in TAKEN[name]],
)
def test_other_architectures_with_random_weights(name: str, kind: str, tmp_path: Path) -> None:
    """Grouped heads, another rope theta, tied embeddings, mixtures of experts; held against transformers."""
    source, case = tmp_path / "source", CASES[name]
    random_weights(source, kind, {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, **OTHERS[kind]})
    if kind.startswith("Qwen"):
        byte_level(source)
    assert BACKENDS[name].refuse(assess(inputs(source)), {"scheme": case.scheme, "group_size": 64}) == ""
    convert(name, source, tmp_path / "out", by_torch=True)
    (held,) = report(tmp_path / "out")["against"]
    assert held["kl_mean"] < case.others
    quantize(name, tmp_path / "out/model", tmp_path / "coarse", case.scheme)
    left = report(tmp_path / "coarse")["not_quantized"]
    assert [one for one in left if not one.endswith("ffn_gate_inp.weight")] == []  # llama.cpp leaves a mixture's router as it is
    exact, coarse = logits(name, tmp_path / "out", TOKENS), logits(name, tmp_path / "coarse", TOKENS)
    assert np.isfinite(coarse).all()
    assert divergence(exact, coarse) < divergence(exact, exact[:, ::-1]) / 2


@of(*CASES)
@pytest.mark.parametrize("change", [transpose, permute])
def test_other_weights_fail(name: str, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, change)
    with pytest.raises(StepFailed, match=r"mean KL divergence .* \(limit 0.001\), logits up to .* apart, same top token"):
        convert(name, source, tmp_path / "out")


@of("onnxruntime", "openvino")
@pytest.mark.parametrize("kind", ["rope", "weights"])
def test_a_wrong_conversion_fails_against_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What the converter would do wrong, done to what it is given; the source is as it was."""
    by = CASES[name].by
    assert by
    make = getattr(*by)

    def wrong(source: Path, out: Path) -> None:
        if kind == "rope":
            edit(source / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500_000.0))
        else:
            weights = (source / "model.safetensors").resolve()
            (source / "model.safetensors").unlink()
            shutil.copyfile(weights, source / "model.safetensors")
            edit_weights(source, permute)
        make(source, out)

    monkeypatch.setattr(*by, wrong)
    with pytest.raises(
        StepFailed, match=r"held against transformers 5[.0-9]+ on 64 tokens: mean KL .* the backend computes this model otherwise"
    ):
        convert(name, copied(tmp_path / "source", golden=False), tmp_path / "out", by_torch=True)


@of("mlx", "onnxruntime", "openvino")
def test_a_tokenizer_that_the_golden_logits_were_not_made_with_fails(name: str, tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit(source / "tokenizer.json", swap_first_tokens)
    with pytest.raises(StepFailed, match=r"the tokenizer does not give the tokens of golden.safetensors .* at token 0"):
        convert(name, source, tmp_path / "out")


def test_no_code_of_the_model_runs(made: tuple[str, Path], tmp_path: Path) -> None:
    name, converted = made
    source, marker = copied(tmp_path / "source"), tmp_path / "ran"
    for part in ("modeling_own", "configuration_own", "tokenization_own"):
        (source / f"{part}.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    mapped = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(source / "config.json", lambda config: config.update(auto_map=mapped, model_file="modeling_own.py"))
    edit(
        source / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    )
    assert assess(inputs(source)).custom_code
    assert BACKENDS[name].refuse(assess(inputs(source)), {"scheme": "none"}) == ""
    convert(name, source, tmp_path / "out", CASES[name].by_torch)
    assert not marker.exists()
    assert contents(tmp_path / "out/model") == contents(converted / "model")


@of("onnxruntime", "openvino")
def test_nobody_is_called_and_nothing_is_left_in_the_home_folder(name: str, tmp_path: Path) -> None:
    """As in a worker, and with every connection an error that is seen."""
    code = (
        "import socket, sys\nfrom pathlib import Path\ncalled = []\n"
        "def refuse(*words):\n    called.append(words)\n    raise OSError('no network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from tests.backends.test_language import CASES, MODEL, convert, quantize\n"
        "name, place = sys.argv[1], Path(sys.argv[2])\n"
        "convert(name, MODEL, place / 'out', CASES[name].by_torch)\n"
        "quantize(name, place / 'out/model', place / 'quantized', CASES[name].scheme)\n"
        "telemetry = sys.modules.get('nncf.telemetry')\n"
        "print(type(getattr(telemetry, 'telemetry', None)).__name__, called)"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **ENVIRONMENT}
    words = [sys.executable, "-c", code, name, str(tmp_path)]
    done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    telemetry, called = done.stdout.splitlines()[-1].split(" ", 1)
    assert called == "[]"
    assert (telemetry == "NoneType") == (name != "openvino")
    assert telemetry != "NNCFTelemetry"
    assert list(home.rglob("*")) == []


@of("onnxruntime", "openvino")
def test_what_the_converter_cannot_convert_is_one_sentence(name: str, tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    edit_weights(source, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:, :128]}))
    with pytest.raises(StepFailed, match=rf"^{CASES[name].converter} cannot convert this model: \w") as caught:
        convert(name, source, tmp_path / "out")
    assert "\n" not in str(caught.value)


# -- running --------------------------------------------------------------------------------------------------------------
def test_a_session(made: tuple[str, Path]) -> None:
    name, converted = made
    session = BACKENDS[name].open(converted / "model")
    assert session.inputs == ()
    found = session.logits(TOKENS)
    assert found.dtype == np.dtype("float32")
    assert found.shape == (len(TOKENS), 2048)
    earlier = CASES[name].earlier
    np.testing.assert_allclose(session.logits(TOKENS[:4]), found[:4], atol=earlier)  # no position sees a later token
    np.testing.assert_array_equal(session.logits(TOKENS), found)  # nothing is left of an earlier text
    stored = golden(MODEL)
    np.testing.assert_array_equal(session.tokens(stored.text), stored.tokens)
    assert session.tokens("").tolist() == []
    with pytest.raises(StepFailed, match=r"token 2048 is outside the model's vocabulary of 2048"):
        session.logits(np.array([1, 2048], np.int32))
    with pytest.raises(StepFailed, match=CASES[name].arrays):
        session.infer({})
    session.close()
    session.close()


@of("onnxruntime", "openvino")
def test_what_is_damaged_is_one_sentence(name: str, tmp_path: Path) -> None:
    convert(name, MODEL, tmp_path / "out")
    for file in CASES[name].files:
        shutil.copytree(tmp_path / "out/model", tmp_path / file)
        (tmp_path / file / file).write_text("nothing")
        with pytest.raises(StepFailed, match=r"cannot load ") as caught:
            BACKENDS[name].open(tmp_path / file)
        assert "\n" not in str(caught.value)


# -- reference ------------------------------------------------------------------------------------------------------------
def test_tokens_outside_a_vocabulary_are_told() -> None:
    reference.within(None, np.array([5], np.int32))
    with pytest.raises(StepFailed, match="token -1 is outside the model's vocabulary of 4"):
        reference.within(4, np.array([0, -1], np.int32))
