"""How MLX's weights get from file to file, beside what mlx-lm itself writes: the same weights, in less memory."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file

from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import mlx, mlx_weights
from edgebuild.errors import StepFailed
from edgebuild.formats import safetensors
from edgebuild.step import Action, Outcome
from tests.backends.phi3 import MODEL, copied, edit, edit_weights, inputs


def made(verb: str, files: dict[str, Path], out: Path, **params: Any) -> Outcome:
    """A step's own action; what it keeps is not put in place."""
    out.mkdir(exist_ok=True)
    action = Action(
        verb=verb, backend="mlx", params=params, inputs=files, outputs={"model": out / "model", "report": out / "report.json"}
    )
    if verb == "convert":
        return mlx.convert(action, assess(files))
    return mlx.quantize(action, ModelFacts(format="huggingface"))


def by_mlx_lm(source: Path, out: Path, **words: Any) -> dict[str, Any]:
    import mlx_lm

    mlx_lm.convert(str(source), str(out), **words)
    return weights(out)


def weights(*places: Path) -> dict[str, Any]:
    """Name → array, of all files of a folder, or of some files."""
    import mlx.core as mx

    files = [file for place in places for file in (sorted(place.glob("*.safetensors")) if place.is_dir() else [place])]
    return {name: one for file in files for name, one in mx.load(str(file)).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import mlx.core as mx

    kinds = [{name: (array.dtype, array.shape) for name, array in which.items()} for which in (one, other)]
    return kinds[0] == kinds[1] and all(mx.array_equal(one[name], other[name]).item() for name in one)


def cut_in_two(source: Path) -> None:
    """The example's weights in two files with an index, as models of more than a few gigabytes have them."""
    from safetensors import deserialize

    stored = deserialize((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    where = {}
    for number, part in ((1, stored[:7]), (2, stored[7:])):
        file = f"model-{number:05}-of-00002.safetensors"
        tensors = {name: (one["dtype"], tuple(one["shape"])) for name, one in part}
        safetensors.write(str(source / file), tensors, (memoryview(one["data"]) for _, one in part), {"format": "pt"})
        where |= {name: file for name, _ in part}
    index = {"metadata": {"total_size": 8_393_216}, "weight_map": where}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("files", [1, 2])
def test_files_that_hold_what_mlx_would_write_stay(files: int, tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    if files == 2:
        cut_in_two(source)
    outcome = made("convert", inputs(source), tmp_path / "out")
    names = sorted(path.name for path in source.glob("model*.safetensors"))
    assert len(names) == files
    assert outcome.kept == {f"model/{name}": f"model/{name}" for name in names}
    assert outcome.summary == "bf16, 4,196,608 parameters"
    assert not list((tmp_path / "out/model").glob("*.safetensors"))
    plain = by_mlx_lm(source, tmp_path / "plain")
    assert same(weights(*(source / name for name in names)), plain)
    index, other = (json.loads((tmp_path / place / mlx_weights.INDEX).read_text()) for place in ("out/model", "plain"))
    assert index["metadata"] == other["metadata"]
    assert index["weight_map"].keys() == plain.keys()
    assert all(name in safetensors.read(str(source / file)).tensors for name, file in index["weight_map"].items())


def cast(source: Path) -> None:
    edit(source / "config.json", lambda config: config.update(dtype="float32"))


def one_more(source: Path) -> None:
    """A Llama with what older ones have in their files: mlx-lm drops it."""
    edit(source / "config.json", lambda config: config.update(model_type="llama", architectures=["LlamaForCausalLM"]))
    edit_weights(source, as_llama)


def as_llama(stored: dict[str, Any]) -> None:
    for name in [name for name in stored if "qkv_proj" in name or "gate_up_proj" in name]:
        whole = stored.pop(name)
        hidden, rows = whole.shape[1], len(whole)
        cuts = (
            {"q": hidden, "k": (rows - hidden) // 2, "v": (rows - hidden) // 2}
            if "qkv" in name
            else {"gate": rows // 2, "up": rows // 2}
        )
        for part, count in cuts.items():
            stored[name.replace("qkv" if "qkv" in name else "gate_up", part)], whole = whole[:count], whole[count:]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.uint16)


@pytest.mark.parametrize("change", [cast, one_more])
def test_what_mlx_changes_is_written(change: Any, tmp_path: Path) -> None:
    source = copied(tmp_path / "source", golden=False)
    change(source)
    outcome = made("convert", inputs(source), tmp_path / "out")
    assert not outcome.kept
    written = tmp_path / "out/model/model.safetensors"
    config = json.loads((tmp_path / "out/model/config.json").read_text(encoding="utf-8"))
    assert same(weights(written), by_mlx_lm(source, tmp_path / "plain", dtype=config["torch_dtype"]))
    assert safetensors.read(str(written)).metadata == {"format": "mlx"}
    assert not same(weights(written), weights(source / "model.safetensors"))


def test_values_that_mlx_changes_under_the_same_name_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import phi3

    def shifted(model: Any, stored: dict[str, Any]) -> dict[str, Any]:
        return {name: one + 1 if name == "model.norm.weight" else one for name, one in stored.items()}

    monkeypatch.setattr(phi3.Model, "sanitize", shifted, raising=False)
    assert not made("convert", inputs(MODEL), tmp_path / "out").kept
    assert same(weights(tmp_path / "out/model"), shifted(None, weights(MODEL / "model.safetensors")))


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("ahead", [0, 10**9])
def test_quantized_by_several_cores_the_weights_are_those_of_mlx_lm(
    cores: int, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx.machine, "cores", lambda: cores)
    monkeypatch.setattr(mlx_weights, "AHEAD", ahead)
    outcome = made("quantize", {"model": MODEL}, tmp_path / "out", scheme="int4", group_size=64)
    assert not outcome.kept
    assert same(weights(tmp_path / "out/model"), by_mlx_lm(MODEL, tmp_path / "plain", quantize=True, q_bits=4, q_group_size=64))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a GPU quantizes")
def test_each_core_has_its_stream_and_loads_have_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    mlx._start()
    before, used = mx.default_stream(mx.cpu), []
    quantize = mx.quantize

    def seen(weight: Any, *more: Any, **words: Any) -> Any:
        used.append(str(mx.default_stream(mx.cpu)))
        return quantize(weight, *more, **words)

    monkeypatch.setattr(mlx.machine, "cores", lambda: 64)
    monkeypatch.setattr(mx, "quantize", seen)
    made("quantize", {"model": MODEL}, tmp_path / "out", scheme="int4", group_size=64)
    quantizing = used[: used.index(str(before))]  # then what was made is looked at
    assert len(quantizing) >= 18
    assert len(set(quantizing)) == mlx.MAX_CORES
    assert mx.default_stream(mx.cpu) == before


def test_no_more_is_in_memory_than_is_computed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's own way has all of them there at once."""
    import mlx.core as mx

    source = copied(tmp_path / "source", golden=False)
    cast(source)
    monkeypatch.setattr(mlx_weights, "AHEAD", 0)
    total, largest = 4 * 4_196_608, 4 * 2048 * 256
    peaks = []
    for make in (
        lambda: made("convert", inputs(source), tmp_path / "out"),
        lambda: by_mlx_lm(source, tmp_path / "plain", dtype="float32"),
    ):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        make()
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 2.5 * largest < total <= peaks[1]


def test_mlx_is_as_it_was_afterwards(tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm import utils

    def functions() -> list[Any]:
        return [mx.load, mx.save_safetensors, utils.load_model, utils.save_model, nn.quantize]

    before = functions()
    (tmp_path / "out/model").mkdir(parents=True)
    with pytest.raises(StepFailed, match="cannot quantize this model: Cannot save to the path"):
        made("quantize", {"model": MODEL}, tmp_path / "out", scheme="int4", group_size=64)
    assert functions() == before


# -- the file -------------------------------------------------------------------------------------------------------------
KINDS = st.sampled_from([np.float32, np.float16, np.uint32, np.int64, np.uint8, np.bool_])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(NAMES, KINDS.flatmap(lambda kind: arrays.arrays(kind, SHAPES)), max_size=6))
def test_what_is_written_is_read_by_the_library(tensors: dict[str, Any]) -> None:
    import tempfile

    names = {"float32": "F32", "float16": "F16", "uint32": "U32", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
    kinds = {name: (names[str(one.dtype)], one.shape) for name, one in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        safetensors.write(path, kinds, (memoryview(one.tobytes()) for one in tensors.values()), {"format": "mlx"})
        found = load_file(path)
        assert safetensors.read(path) == safetensors.Header(tensors=kinds, metadata={"format": "mlx"})
    assert found.keys() == tensors.keys()
    for name, one in tensors.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (one.dtype, one.shape, one.tobytes())


@pytest.mark.parametrize("size", [7, 9])
def test_a_tensor_of_another_size_than_its_shape_says(size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"tensor 'a' has {size} bytes, not 8"):
        safetensors.write(str(tmp_path / "out"), {"a": ("F32", (2,))}, iter([memoryview(bytes(size))]), {})


def test_each_is_let_go_when_it_is_written(tmp_path: Path) -> None:
    held: list[memoryview] = []

    def data() -> Iterator[memoryview]:
        for number in range(3):
            for one in held:
                with pytest.raises(ValueError, match="released"):
                    one.tobytes()
            held.append(memoryview(bytes([number] * 4)))
            yield held[-1]

    safetensors.write(str(tmp_path / "out"), dict.fromkeys("abc", ("U8", (4,))), data(), {})
    assert sorted(load_file(tmp_path / "out")) == ["a", "b", "c"]
