"""MLX (mlx-lm): Hugging Face in, a folder out that mlx-lm and mlx-swift-lm load; affine int2 to int8 in groups, one for all or by layer.

MLX reads older configuration keys than transformers 5 writes and falls back to defaults without a word: a rope theta of
500,000 became 10,000 (KL 0.28). So the configuration is rewritten as MLX reads it, and every conversion is held.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import machine, positions, reference
from edgebuild.backend import WINDOW, Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.backends import mlx_float32 as float32
from edgebuild.backends.mlx_weights import AHEAD, saved
from edgebuild.errors import BadInput, EdgebuildError, StepFailed, did_you_mean, said, shown
from edgebuild.formats import safetensors
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PACKAGES = ("mlx", *(("mlx-cpu",) if float32.LINUX else ()), "mlx-lm", "transformers", "tokenizers", "safetensors", "numpy")
NEEDS: Mapping[str, Needs] = {"huggingface": Needs(lock="mlx", packages=_PACKAGES)}
BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}
SCHEMES: Mapping[str, Sequence[str]] = dict.fromkeys(BITS, ("group_size", "method", "layers"))
# Recipes of mlx-lm (mlx_lm/convert.py): the scheme of most layers, and the bits of the output layer and of every other layer's values
# and down projections.
MIXED = {"mixed-2-6": ("int2", 6), "mixed-3-4": ("int3", 4), "mixed-3-6": ("int3", 6), "mixed-4-6": ("int4", 6)}
MIXED_SHARE = 0.2  # of the weights that get more bits by such a recipe, about
LADDER: Mapping[str, Rung] = {}
VIEWS: Mapping[str, str] = {"dequantized": "weights dequantized to float32", "kernels": "the int4/8 kernels themselves"}
GROUPS = (32, 64, 128)
MAX_CORES = 4  # that quantize beside one another
IMPORTED = 60_000_000  # bytes of memory that mlx and transformers take before any weight; measured
# What transformers 5 writes under a new name, and MLX reads under the old one.
OLD_NAMES = {"dtype": "torch_dtype", "num_local_experts": "num_experts"}
OLD_ROPE_NAMES = {"gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}}
CONTEXT = "original_max_position_embeddings"
NO_DECODERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
# What its code computes of scaled positions; what of some model types, whose code reads no other kind, or none: what is `dynamic` scales
# nothing within the context.
SCALED = ("linear", "dynamic", "llama3", "yarn", "longrope", "deepseek_yarn", "telechat3-yarn", "proportional")
UNREAD = (
    *("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "glm", "glm4", "glm4_moe"),
    *("gpt_neox", "lfm2", "lfm2_moe", "mixtral", "phi", "qwen3_moe", "stablelm", "starcoder2"),
)
SCALED_OF = {
    **dict.fromkeys(UNREAD, ("dynamic",)),
    "hunyuan_v1_dense": ("dynamic",),
    "nemotron": ("linear",),
    "phi3": ("linear", "longrope"),
    "qwen2_moe": (),
}


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    """Raises ValueError for a group size, a recipe or a layer's scheme that MLX does not have."""
    size, method = quantize.get("group_size", 64), quantize.get("method", "auto")
    if size not in GROUPS:
        raise ValueError(f"group_size: MLX quantizes in groups of 32, 64 or 128, not {size}")
    given = {"group_size": size}
    if method != "auto":
        if method not in MIXED or MIXED[method][0] != scheme:
            known = ", ".join(f"{name} ({most})" for name, (most, _) in MIXED.items())
            raise ValueError(f"method: of MLX's recipes none is {shown(method)} with the scheme {scheme}; there are: {known}")
        given["method"] = method
    for name, one in quantize.get("layers", {}).items():
        if one not in (*BITS, "none"):
            raise ValueError(f'layers: MLX has no scheme {shown(one)} for "{shown(name)}"; it has: {", ".join(BITS)}, none')
        given.setdefault("layers", {})[name] = one
    return given


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    if facts.quantized:
        return f"it is quantized already ({facts.quantized}); give the float model that it was made from"
    if facts.model_type not in _model_types():
        code = "its config.json names Python code (auto_map), which is never run, and " if facts.custom_code else ""
        return f"{code}mlx-lm knows no model type {facts.model_type!r}; name another framework"
    if facts.architecture.endswith(NO_DECODERS):
        return f"{facts.architecture} has no head for language, which mlx-lm gives it; give one (…ForCausalLM), or name another framework"
    if reason := _refuse_positions(facts):
        return reason
    size, hidden = parameters.get("group_size"), facts.hidden
    if size and hidden and hidden % size:
        return f"its hidden size {hidden} is no multiple of group_size {size}; {_advice(_fitting([hidden]))}"
    return ""


def _refuse_positions(facts: ModelFacts) -> str:
    """Where they are scaled as MLX does not do it, for all its code says."""
    kinds = SCALED_OF.get(facts.model_type)
    who = "mlx-lm" if kinds is None else f"mlx-lm's {facts.model_type}"
    if any(one["rope_type"] == "longrope" and one.get("short_factor") != one.get("long_factor") for one in facts.scaled):
        return (
            "its positions are scaled by longrope, of which MLX applies the long_factor at every length, "
            "so that it computes short texts otherwise; name another framework"
        )
    return positions.refuse(facts.scaled, SCALED if kinds is None else kinds, who) or positions.refuse_yarn(
        facts.scaled, who, truncates=True
    )


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Weights counted from the headers: `bits` an element, and two values a group (scale, bias) in the source's own type.

    MLX quantizes every matrix, embeddings too; norms stay. Memory of making: what mlx_weights computes ahead and the largest tensor
    (of a mixture of experts, what may be all of a layer in one), each beside what it is made of: of Phi-3 up to 1.17 times what was
    measured, which is nothing where the source's files stay. Of running: weights as stored, then all of them in float32 where `float32.compute`
    keeps them, else the largest tensor twice; and a window's logits. What `layers` names is not in the headers that are known
    here: a part of a model in other bits is not seen.
    """
    count = sum(facts.parameters.values())
    source = sum(number * safetensors.BITS.get(dtype, 16) for dtype, number in facts.parameters.items()) / 8
    weights = source
    made_of = 1.0 if facts.experts else 0.0  # bytes held beside each of what is made: of experts, those that are stacked into one
    if scheme != "none":
        matrices, each = sum(facts.weights.values()), source / max(count, 1)
        weights = (
            matrices * (_bits_on_average(scheme, parameters) / 8 + 2 * each / parameters["group_size"])
            + (count - matrices) * each
        )
        made_of = source / max(weights, 1)
    stacked = min(facts.largest * (facts.experts or 0), count // (facts.layers or 1))
    largest = weights / max(count, 1) * max(facts.largest, stacked)
    making = IMPORTED + int(min(AHEAD + largest, weights) * (1 + made_of))
    floats = 4 * count if float32.kept(4 * count, available) else 8 * facts.largest
    logits = 24 * WINDOW * (facts.vocabulary or 0)
    return Estimate(artifact=int(weights) + facts.tokenizer, making=making, running=IMPORTED + int(weights) + floats + logits)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """Weights as stored, in the source's own files where MLX changes none of them; configuration rewritten, no code.

    Byte for byte the same from any folder.
    """
    _start()
    import mlx_lm

    out = action.outputs["model"]
    with reference.staged(action.inputs) as source:
        config = _rewritten(reference.without_code(source / "config.json"))
        (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with _mlx("convert this model"), saved() as stay:
            mlx_lm.convert(hf_path=str(source), mlx_path=str(out))
        _tidy(out, source / "tokenizer_config.json")
    files = [action.inputs[f"model/{name}"] for name in stay] or sorted(out.glob("*.safetensors"))
    kinds = ", ".join(sorted({dtype.lower() for path in files for dtype, _ in safetensors.read(str(path)).tensors.values()}))
    action.outputs["report"].write_text(json.dumps({"dtypes": kinds}), encoding="utf-8")
    kept = {f"model/{name}": f"model/{name}" for name in stay}
    return Outcome(summary=f"{kinds}, {sum(facts.parameters.values()):,} parameters", kept=kept)


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    """By tokens and logits, in float32."""
    return reference.hold(session, source)


def quantize(action: Action, facts: ModelFacts) -> Outcome:
    """Affine, groups along the inputs of every layer that MLX quantizes. Raises StepFailed where nothing got smaller."""
    _start()
    import mlx_lm

    source, out = action.inputs["model"], action.outputs["model"]
    scheme, group, method = str(action.params["scheme"]), int(action.params["group_size"]), action.params.get("method", "")
    layers = _layers(source)
    named = _named([layer.name for layer in layers], action.params.get("layers", {}))
    _check_groups([layer for layer in layers if named.get(layer.name) != "none"], group)
    settings: dict[str, Any] = {"q_bits": BITS[scheme], "q_group_size": group}
    if method or named:
        settings["quant_predicate"] = _predicate(source, group, method, named)
    cores = min(MAX_CORES, machine.cores()) if float32.LINUX else 1  # elsewhere a GPU computes
    with _mlx("quantize this model"), saved(cores):
        mlx_lm.convert(hf_path=str(source), mlx_path=str(out), quantize=True, **settings)
    _tidy(out, source / "tokenizer_config.json")
    layers = _layers(out)
    done = sum(layer.bits > 0 for layer in layers)
    before, after = _weights(source), _weights(out)
    if not done or after >= before or "quantization" not in json.loads((out / "config.json").read_text(encoding="utf-8")):
        raise StepFailed(
            f"MLX quantized {done} of {len(layers)} layers, and the weights went from {before:,} to {after:,} bytes: "
            "this model cannot be quantized so; set quantize: {scheme: none} or name another framework"
        )
    counted = sorted(Counter(layer.bits for layer in layers if layer.bits).items())
    report = {
        "scheme": scheme,
        "bits": BITS[scheme],
        "group_size": group,
        **{key: action.params[key] for key in ("method", "layers") if key in action.params},
        "bytes_before": before,
        "bytes_after": after,
        "layers": len(layers),
        "layers_quantized": done,
        "layers_by_bits": {str(bits): count for bits, count in counted},
        "not_quantized": sorted(layer.name for layer in layers if not layer.bits),
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    others = ", ".join(f"{count} int{bits}" for bits, count in counted if bits != BITS[scheme])
    which = f"{done} of {len(layers)} layers{f' ({others})' if others else ''}"
    return Outcome(summary=f"{scheme} in groups of {group}, {which}, {human(before)} → {human(after)}")


def _named(names: Sequence[str], layers: Mapping[str, str]) -> dict[str, str]:
    """layer → its own scheme: by its name, else by the one pattern that it fits. Raises BadInput for what fits no layer, or two schemes."""
    found: dict[str, str] = {}
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = did_you_mean(pattern, names)
            raise BadInput(f'quantize.layers: no layer is called "{shown(pattern)}"; the first is {names[0]}.{near}')
    for name in names:
        schemes = {layers[name]} if name in layers else {one for pattern, one in layers.items() if fnmatchcase(name, pattern)}
        if len(schemes) > 1:
            both = " and ".join(sorted(schemes))
            raise BadInput(f"quantize.layers: {name} fits patterns of {both}; name it by itself, or narrow one of them")
        if schemes:
            found[name] = schemes.pop()
    return found


def _predicate(source: Path, group: int, method: str, named: Mapping[str, str]) -> Callable[[str, Any], bool | dict[str, Any]]:
    """What mlx-lm asks of each layer: whether it is quantized, or how. What is not named goes by the recipe, or by the model's own rule."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    with _mlx(f"quantize this model by {method}" if method else "load this model"):
        model = load_model(source, lazy=True, trust_remote_code=False)[0]
        rule = getattr(model, "quant_predicate", None)
        if method:
            rule = mixed_quant_predicate_builder(method.replace("-", "_"), model, group)

    def predicate(name: str, module: Any) -> bool | dict[str, Any]:
        if name in named:
            bits = BITS.get(named[name])
            return {"group_size": group, "bits": bits, "mode": "affine"} if bits else False
        return rule(name, module) if rule else True

    return predicate


def smoke() -> str:
    """A small matrix product, and one by weights in int4."""
    _start()
    import mlx.core as mx

    with _mlx("multiply matrices"):
        ones = mx.ones((64, 64))
        weights, scales, *biases = mx.quantize(ones, group_size=64, bits=4)
        exact, coarse = ones @ ones, mx.quantized_matmul(ones, weights, scales, biases[0], group_size=64, bits=4)
        right = bool(mx.all(exact == 64)) and bool(mx.all(mx.abs(coarse - 64) < 1))
    if not right:
        raise StepFailed("mlx multiplies matrices wrongly on this machine; install another version, or use another machine")
    device = "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"
    return f"mlx {importlib.metadata.version('mlx')} on {device}, mlx-lm {importlib.metadata.version('mlx-lm')}"


def open(model: Path, view: str = "") -> MlxSession:
    """Raises StepFailed where MLX cannot load it."""
    return MlxSession(model, view or next(iter(VIEWS)))


class MlxSession:
    """A language model and its tokenizer, on the CPU where MLX has no Metal. Weights are read when they are first used.

    Dequantized, it keeps float32 weights between passes where memory has room for twice as many.
    """

    inputs: Sequence[Mapping[str, Any]] = ()

    def __init__(self, model: Path, view: str = next(iter(VIEWS))) -> None:
        if view not in VIEWS:
            raise StepFailed(f'mlx has no view "{view}"; it has: {", ".join(VIEWS)}')
        _start()
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.utils import dequantize_model, load_model

        with _mlx(f"load {model.name}"):
            self._model, config = load_model(model, lazy=True, trust_remote_code=False)
            self._tokenizer = reference.tokenizer(model)
            self._attention: Callable[[], AbstractContextManager[None]] = nullcontext
            if view == "dequantized":
                self._attention = float32.attention
                float32.compute(self._model, lambda: load_model(model, lazy=True, trust_remote_code=False)[0])
                # Before dequantizing: int4 times a bfloat16 scale, rounded to bfloat16, would be a third set of weights.
                self._model.update(tree_map(float32.of, self._model.parameters()))
                self._model = dequantize_model(self._model)  # what is left: mixtures of experts
            elif config.get("quantization") and float32.LINUX:
                # In bfloat16 the CPU's kernels are seven times slower, and 2 % off.
                self._model.update(tree_map(float32.of, self._model.parameters()))
        self._vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        bits = _bits(config.get("quantization") or {})
        stored = (
            f"{' and '.join(f'int{one}' for one in bits)} kernels{' in float32' if float32.LINUX else ''}"
            if bits
            else "weights as stored"
        )
        computed = "weights dequantized to float32" if bits else "weights in float32"
        device = "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"
        self.runtime = f"mlx {importlib.metadata.version('mlx')} on {device}, {computed if view == 'dequantized' else stored}"

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise StepFailed("mlx runs language models only: it takes tokens, not named arrays; name another framework for this task")

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """One forward pass without a cache."""
        import mlx.core as mx
        import numpy as np

        reference.within(self._vocabulary, tokens)
        with _mlx("run the model"), self._attention():
            found: NDArray[np.float32] = np.array(self._model(mx.array(tokens)[None])[0].astype(mx.float32))
        return found

    def tokens(self, text: str) -> NDArray[np.int32]:
        return reference.tokens(self._tokenizer, text)

    def close(self) -> None:
        import mlx.core as mx

        self._model = self._tokenizer = None
        mx.clear_cache()


@cache
def _model_types() -> frozenset[str]:
    """The model types that the mlx-lm of the lock has, its own other names for them included: the same wherever it is asked."""
    return frozenset(Path(__file__).with_name("mlx_types.txt").read_text(encoding="ascii").split())


def _bits(quantization: Mapping[str, Any]) -> list[int]:
    """All bits that stand in the `quantization` of a config.json: those of most layers, and of what is named there."""
    found = {one["bits"] for one in (quantization, *quantization.values()) if isinstance(one, Mapping) and "bits" in one}
    return sorted(found)


def _bits_on_average(scheme: str, parameters: Mapping[str, Any]) -> float:
    bits = BITS[scheme]
    return bits + MIXED_SHARE * (MIXED[parameters["method"]][1] - bits) if "method" in parameters else bits


def _fitting(inputs: Sequence[int]) -> list[int]:
    return [size for size in GROUPS if not any(number % size for number in inputs)]


def _advice(sizes: Sequence[int]) -> str:
    if not sizes:
        return "none of 32, 64 and 128 divides it: set quantize: {scheme: none} or name another framework"
    return f"quantize.group_size: {' or '.join(map(str, sizes))} would fit"


def _check_groups(layers: Sequence[_Layer], group: int) -> None:
    """Raises StepFailed where MLX would leave out layers that another group size fits; what none fits stays as it is."""
    fitting = _fitting([layer.inputs for layer in layers])
    if not fitting or group in fitting:
        return
    layer = next(layer for layer in layers if layer.inputs % group)
    raise StepFailed(f"the layer {layer.name} has {layer.inputs} inputs, no multiple of group_size {group}; {_advice(fitting)}")


def _rewritten(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys that MLX and mlx-swift-lm read beside those of transformers 5, text_config's likewise."""
    new = {key: _rewritten(value) if key == "text_config" and isinstance(value, dict) else value for key, value in config.items()}
    new = {**{old: new[name] for name, old in OLD_NAMES.items() if name in new}, **new}
    rope = new.get("rope_scaling") or new.get("rope_parameters")  # in this order, as transformers 5 does
    if isinstance(rope, dict):
        new |= _rope(new, rope)
    return new


def _rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level keys from transformers 5's `rope_parameters`, flat or one a layer type (transformers, modeling_rope_utils.py)."""
    if kinds := {kind: given for kind, given in rope.items() if isinstance(given, dict)}:
        new = _rope(config, kinds.get("full_attention", next(iter(kinds.values()))))
        if "rope_theta" in (sliding := kinds.get("sliding_attention", {})):
            new["rope_local_base_freq"] = sliding["rope_theta"]
        return new
    new = {key: rope.get(key, config.get(key)) for key in ("rope_theta", "partial_rotary_factor")}
    scaling = {key: value for key, value in rope.items() if key not in new}
    new |= {old: new[name] for old, name in OLD_ROPE_NAMES.get(config.get("model_type", ""), {}).items()}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    original = config.get(CONTEXT) or scaling.get(CONTEXT) or config.get("max_position_embeddings")
    if kind in ("llama3", "longrope", "yarn"):
        scaling[CONTEXT] = original
    if kind in ("longrope", "su"):
        new[CONTEXT] = original
    if isinstance(scaling.get("factor"), int):
        scaling["factor"] = float(scaling["factor"])
    scaled = kind != "default" or "mrope_section" in scaling
    new["rope_scaling"] = {**scaling, "type": kind, "rope_type": kind} if scaled else None
    return {key: value for key, value in new.items() if value is not None or key == "rope_scaling"}


def _tidy(out: Path, source: Path) -> None:
    """Remove the model card, which is none; name the tokenizer's class as the source did; set the modes that bundles have.

    transformers 5 writes TokenizersBackend, which no reader of another make (swift-transformers) need know.
    """
    (out / "README.md").unlink(missing_ok=True)
    path = out / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        named = reference.without_code(source).get("tokenizer_class") if source.exists() else None
        config["tokenizer_class"] = named if named and named != "TokenizersBackend" else "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    reference.set_modes(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    name: str
    inputs: int
    bits: int  # 0 where it is not quantized


def _layers(model: Path) -> list[_Layer]:
    """The layers that MLX can quantize or has quantized, by name; no weight is read."""
    from mlx_lm.utils import load_model

    with _mlx(f"load {model.name}"):
        modules = sorted(load_model(model, lazy=True, trust_remote_code=False)[0].named_modules())
    quantized = [_Layer(name=n, inputs=m.scales.shape[-1] * m.group_size, bits=m.bits) for n, m in modules if "scales" in m]
    plain = [_Layer(name=n, inputs=m.weight.shape[-1], bits=0) for n, m in modules if hasattr(m, "to_quantized")]
    return quantized + plain


def _weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _start() -> None:
    """Import MLX, and compute on the CPU on Linux: mlx-cpu is what the extra installs, also where there is a GPU.

    There it compiles nothing: no result depends on a compiler that the machine may have. Raises StepFailed; importing mlx_lm
    sets the limit of open files to 4,096, which fails where it is lower already.
    """
    with _mlx("start"):
        import mlx.core as mx
        import mlx_lm  # noqa: F401

        if float32.LINUX:
            mx.set_default_device(mx.Device(mx.cpu))
            mx.disable_compile()  # it fuses kernels by the machine's C++ compiler, anew in each process


@contextmanager
def _mlx(doing: str) -> Iterator[None]:
    """A framework's exception as one sentence of ours."""
    try:
        yield
    except EdgebuildError:
        raise
    except Exception as error:
        raise StepFailed(f"mlx-lm cannot {doing}: {said(error)}{reference.MEND}") from error
