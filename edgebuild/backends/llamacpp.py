"""llama.cpp (llama-cpp-python): Hugging Face folder or GGUF in, one GGUF file out that llama.cpp loads; k-quants.

Where llama.cpp fails it leaves part of a file behind, and a row that its type does not divide gets another type without a
word: so the return code is looked at and, afterwards, the type of every tensor in the file.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import machine, reference
from edgebuild.backend import MAX_WINDOWS, WINDOW, Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.errors import StepFailed, said
from edgebuild.formats import gguf
from edgebuild.importance import Importance
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEEDS: Mapping[str, Needs] = dict.fromkeys(
    ("huggingface", "gguf"),
    Needs(
        lock="llamacpp",
        packages=("llama-cpp-python", "torch", "transformers", "tokenizers", "sentencepiece", "protobuf", "numpy"),
    ),
)
# Bits an element that a scheme takes on the average of a language model, without its output matrix; measured.
BITS = {"q4_0": 4.5, "q4_k_m": 4.9, "q5_k_m": 5.68, "q6_k": 6.5625, "q8_0": 8.5}
OUTPUT_BITS = 6.5625  # of the output matrix, where a scheme has fewer
ROW = {"q4_0": 32, "q4_k_m": 256, "q5_k_m": 256, "q6_k": 256, "q8_0": 32}  # elements, of which a row must be a multiple
FALLBACK_BITS = {"q4_k_m": 5.8, "q5_k_m": 6.3, "q6_k": 8.5}  # where its rows are none: Q5_0, Q5_1 and Q8_0
SCHEMES: Mapping[str, Sequence[str]] = dict.fromkeys(BITS, ("imatrix",))
LADDER: Mapping[str, Rung] = {}
VIEWS: Mapping[str, str] = {"native": "the file as it is, on the CPU"}
FILE = "model.gguf"
# The architectures whose scaled positions may be a longrope: of these its converter writes the factors.
LONGROPE = ("MiniCPM3ForCausalLM", "MiniCPMForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM")
CONVERTER = "converter/convert_hf_to_gguf.py"  # beside llama_cpp's modules: llama.cpp's own script, of the same sources
FLOATS = ("F32", "F16", "BF16", "F64")  # GGUF's types that are not quantized
# Bytes of memory; fitted on Phi-3 of 0.65 to 3.8 billion parameters: the converter maps weights and holds a tensor at a time.
CONVERTING, QUANTIZING, IMPORTED = 200_000_000, 150_000_000, 45_000_000
VOCABULARY = 24  # bytes an entry of the vocabulary takes in the file
BATCH = 256  # tokens of one pass
CALIBRATION = 512  # windows of text that an importance matrix is made of, where a target names no number
DEBUG, ERROR, AS_BEFORE = 1, 4, 5  # ggml_log_level
# What its converter says, and what to do about it.
ADVICE = {
    "pre-tokenizer was not recognized": "llama.cpp knows no tokenizer that splits words as this model's does; name another framework",
    "Missing tokenizer.model": "this architecture's tokenizer is read from tokenizer.model: copy it beside the weights",
    "Can not map tensor": "the weights are not those of the architecture that config.json names",
}


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    """Raises ValueError for an importance matrix that there is no text for."""
    if quantize.get("imatrix") and not calibrated:
        raise ValueError("imatrix: an importance matrix is made from text: give calibration.data, or leave imatrix out")
    return {"imatrix": True} if quantize.get("imatrix") else {}


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    if facts.format == "gguf":
        if not facts.parameters:
            return "it holds no weights; give the whole model"
        if facts.quantized and "scheme" in parameters:
            return (
                f"it is quantized already ({facts.quantized}); quantize: {{scheme: none}} takes it as it is, "
                "or give the float model that it was made from"
            )
        return ""
    if facts.quantized:
        return f"it is quantized already ({facts.quantized}); give the float model that it was made from"
    if facts.architecture not in _architectures():
        code = "its config.json names Python code (auto_map), which is never run, and " if facts.custom_code else ""
        return f"{code}llama.cpp's converter knows no language model {facts.architecture!r}; name another framework"
    if facts.architecture not in LONGROPE and any(one["rope_type"] == "longrope" for one in facts.scaled):
        return f"its positions are scaled by longrope, whose factors llama.cpp's converter does not write of {facts.architecture}; name another framework"
    return ""


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Matrices by the scheme's bits, vectors in float32, the vocabulary; a GGUF source as it is.

    Running: weights in 16 bits are mapped, quantized ones kept in memory as kernels want them laid out; the context; and what an
    evaluation keeps of a text. Measured on Phi-3 of 0.004 and 0.65 billion parameters at 0.8 to 1 of it.
    """
    matrices, total = sum(facts.weights.values()), sum(facts.parameters.values())
    vocabulary = VOCABULARY * (facts.vocabulary or 0)
    output = min((facts.vocabulary or 0) * (facts.hidden or 0), matrices)
    if scheme == "none":
        artifact, making = 2 * matrices + 4 * (total - matrices) + vocabulary, CONVERTING + 8 * facts.largest
        if facts.format == "gguf":
            artifact, making = facts.bytes, IMPORTED
        kept = artifact if facts.quantized else 0
    else:
        fits = not (facts.hidden or 0) % ROW[scheme]
        bits = BITS[scheme] if fits else FALLBACK_BITS.get(scheme, 16)
        artifact = int(((matrices - output) * bits + output * max(bits, OUTPUT_BITS)) / 8) + 4 * (total - matrices) + vocabulary
        making, kept = QUANTIZING + 4 * facts.largest, artifact
    answers = (4 * MAX_WINDOWS + 24) * WINDOW * (facts.vocabulary or 0)
    running = IMPORTED + kept + 4 * BATCH * (facts.layers or 0) * (facts.hidden or 0) + answers
    if parameters.get("imatrix"):
        making = max(making, running)
    return Estimate(artifact=artifact, making=making, running=running)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """One GGUF file: of a Hugging Face folder by llama.cpp's converter, in 16 bits; of a GGUF the same bytes."""
    out = action.outputs["model"]
    out.mkdir()
    kept = {f"model/{FILE}": "model"} if "model" in action.inputs else {}
    if not kept:
        _converted(action, facts, out / FILE)
        (out / FILE).chmod(0o644)
    tensors = _read(action.inputs["model"] if kept else out / FILE).tensors.values()
    kinds = Counter(kind for kind, _ in tensors)
    action.outputs["report"].write_text(json.dumps({"types": kinds}, indent=1, sort_keys=True), encoding="utf-8")
    matrices = sorted({kind.lower() for kind, shape in tensors if len(shape) > 1})
    return Outcome(summary=f"{', '.join(matrices)}, {sum(facts.parameters.values()):,} parameters", kept=kept)


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    """A folder's conversion by tokens and logits; a GGUF's own bytes by whether they give an answer."""
    import numpy as np

    from edgebuild import samples

    if "model" not in source:
        return reference.hold(session, source)
    if not np.isfinite(session.logits(samples.golden_tokens(session))).all():
        raise StepFailed(f"{source['model'].name}: a logit is no finite number; copy or download it again")
    return {"verified": True, "against": [], "reason": "nothing was converted: the file has its source's bytes"}


def quantize(action: Action, facts: ModelFacts) -> Outcome:
    """By llama.cpp's own mixture of types for the scheme. Raises StepFailed where nothing was quantized or got smaller."""
    source, out = action.inputs["model"] / FILE, action.outputs["model"]
    out.mkdir()
    scheme = str(action.params["scheme"])
    tokens, importance = 0, dict[str, "NDArray[np.float32]"]()
    if action.params.get("imatrix"):
        tokens, importance = _importance(source, action.inputs["calibration"], action.params["samples"] or CALIBRATION)
    _quantize(source, out / FILE, scheme, importance)
    (out / FILE).chmod(0o644)
    return _counted(action, scheme, tokens, source, out / FILE)


def smoke() -> str:
    """A model of a few numbers: written, quantized and run."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "float.gguf"), Path(folder, FILE)
        _write_small(source)
        _quantize(source, made, "q8_0", {})
        exact, coarse = (_small_logits(path) for path in (source, made))
        right = bool(abs(exact - coarse).max() < 0.1 * abs(exact).max())
    if not right:
        raise StepFailed("llama.cpp computes wrongly on this machine; build llama-cpp-python anew, or use another machine")
    return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} on CPU, with llama.cpp's converter"


def open(model: Path, view: str = "") -> LlamaSession:
    """Raises StepFailed where llama.cpp cannot load it."""
    return LlamaSession(model / FILE if model.is_dir() else model)


class LlamaSession:
    """A GGUF file, mapped, on the CPU. Its context grows with the longest text that it is given."""

    inputs: Sequence[Mapping[str, Any]] = ()

    def __init__(self, path: Path, hear: Callable[[int, bool, object], bool] | None = None) -> None:
        """`hear` is called with the address of each tensor before it is computed, and after that where it said yes."""
        self._api = api = _llama()
        self._hear = api.ggml_backend_sched_eval_callback(hear) if hear else None
        self._context: Any = None
        self._room = 0
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        _heard.clear()
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise StepFailed(f"llama.cpp does not load {path.name}: {_reason(path)}{reference.MEND}")
        if api.llama_model_has_encoder(self._model) or not api.llama_model_has_decoder(self._model):
            raise StepFailed(f"{path.name} has an encoder: it is no plain language model; name another framework")
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))
        self._batch = _batch(api)
        self._threads = machine.threads(path.stat().st_size)
        threads = f"{self._threads} thread{'s' * (self._threads > 1)}"
        self.runtime = f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')}) on CPU, {threads}"

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise StepFailed("llama.cpp runs language models only: it takes tokens, not named arrays; name another framework")

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Passes of up to 256 tokens, each seeing those before it."""
        import numpy as np

        reference.within(self._vocabulary, tokens)
        api, context = self._api, self._make_room(len(tokens))
        api.llama_memory_clear(api.llama_get_memory(context), True)
        found = np.empty((len(tokens), self._vocabulary), np.float32)
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._batch.n_tokens = len(part)
            np.ctypeslib.as_array(self._batch.token, (BATCH,))[: len(part)] = part
            np.ctypeslib.as_array(self._batch.pos, (BATCH,))[: len(part)] = np.arange(start, start + len(part))
            _heard.clear()
            if status := api.llama_decode(context, self._batch):
                raise StepFailed(f"llama.cpp cannot run the model (status {status}): {_reason()}{reference.MEND}")
            found[start : start + len(part)] = np.ctypeslib.as_array(api.llama_get_logits(context), (len(part), self._vocabulary))
        return found

    def tokens(self, text: str) -> NDArray[np.int32]:
        import numpy as np

        api, data = self._api, text.encode()
        room = len(data) + 16
        found = (api.llama_token * room)()
        count = api.llama_tokenize(api.llama_model_get_vocab(self._model), data, len(data), found, room, False, True)
        if count < 0:
            raise StepFailed(f"llama.cpp's tokenizer makes {-count} tokens of {len(data)} bytes; give the model's own tokenizer")
        return np.frombuffer(found, np.int32, count).copy()

    def close(self) -> None:
        if self._model:
            self._api.llama_batch_free(self._batch)
            if self._context:
                self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
        self._model = self._context = None

    def _make_room(self, length: int) -> Any:
        """A context for so many tokens. Raises StepFailed."""
        if length > self._room:
            if self._context:
                self._api.llama_free(self._context)
            options = self._api.llama_context_default_params()
            options.n_ctx = -(-length // BATCH) * BATCH
            options.n_batch = options.n_ubatch = BATCH
            options.n_threads = options.n_threads_batch = self._threads
            if self._hear:
                options.cb_eval = self._hear
            _heard.clear()
            self._context = self._api.llama_init_from_model(self._model, options)
            if not self._context:
                raise StepFailed(f"llama.cpp makes no context of {options.n_ctx} tokens: {_reason()}")
            if not self._api.llama_get_memory(self._context):
                raise StepFailed(
                    "the model keeps nothing of a text from one token to the next: it is an encoder, and gives no next token"
                )
            self._room = int(options.n_ctx)
        return self._context


def _batch(api: Any) -> Any:
    """Room for BATCH tokens of one text, the logits of each wanted."""
    batch = api.llama_batch_init(BATCH, 0, 1)
    for at in range(BATCH):
        batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
    return batch


# -- conversion -----------------------------------------------------------------------------------------------------------
def _converted(action: Action, facts: ModelFacts, out: Path) -> None:
    """The file holds its folder's name as the model's, so that folder has the same name wherever it lies."""
    kinds = Counter(facts.parameters)
    with reference.staged(action.inputs, re.sub(r"[^A-Za-z0-9]+", "-", facts.model_type).strip("-") or "model") as source:
        _run_converter(source, out, "bf16" if kinds.most_common(1)[0][0] == "BF16" else "f16")


def _run_converter(source: Path, out: Path, kind: str) -> None:
    """Raises StepFailed with the last thing that it said; all of it is in the log."""
    script = _converter()
    if script is None:
        raise StepFailed(
            "llama.cpp's converter is not installed here; run: edgebuild toolchain install llamacpp, or give a GGUF file"
        )
    command = [sys.executable, str(script), str(source), "--outfile", str(out), "--outtype", kind]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    said = done.stdout.decode("utf-8", "replace")
    sys.stderr.write(said)
    if done.returncode or not out.is_file():
        lines = [line.strip() for line in said.replace(f"{source}/", "").splitlines() if line.strip()] or ["it said nothing"]
        last = f"its converter died of signal {-done.returncode}" if done.returncode < 0 else lines[-1][:300]
        advice = next((what for phrase, what in ADVICE.items() if phrase in last), "see the log, or name another framework")
        raise StepFailed(f"llama.cpp cannot convert this model: {last}; {advice}")


def _converter() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    script = Path(places[0], CONVERTER) if places else None
    return script if script and script.is_file() else None


@cache
def _architectures() -> frozenset[str]:
    """The language models that the lock's converter has: the same wherever it is asked."""
    return frozenset(Path(__file__).with_name("llamacpp_architectures.txt").read_text(encoding="ascii").split())


# -- quantizing -----------------------------------------------------------------------------------------------------------
def _quantize(source: Path, out: Path, scheme: str, importance: Mapping[str, NDArray[np.float32]]) -> None:
    """The same bytes with any number of threads. Raises StepFailed, and then leaves no part of a file."""
    api = _llama()
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{scheme.upper()}")
    options.nthread = machine.cores()
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, of zeros, ends it
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    _heard.clear()
    if api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
        out.unlink(missing_ok=True)
        raise StepFailed(f"llama.cpp cannot quantize this model: {_reason(source, out)}{reference.MEND}")


def _importance(model: Path, text: Path, windows: int) -> tuple[int, dict[str, NDArray[np.float32]]]:
    """(tokens, tensor → importance of its inputs) of a model that is run on a text. Raises StepFailed."""
    from edgebuild import samples

    operator, overhead = (
        _function("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p),
        _function("ggml_tensor_overhead", ctypes.c_size_t),
    )
    importance, tokens = Importance(operator, overhead), 0
    session = LlamaSession(model, importance.hear)
    try:
        for window in samples.windows(text, session, windows):
            session.logits(window)
            tokens += len(window)
    finally:
        session.close()
    if not (found := importance.matrix()):
        raise StepFailed("no matrix of this model was seen as it ran, so that there is no importance matrix; leave imatrix out")
    return tokens, found


def _counted(action: Action, scheme: str, calibrated: int, source: Path, out: Path) -> Outcome:
    """What became of every matrix; `calibrated` is the tokens that its importance was measured on. Raises StepFailed where nothing was quantized, or the file is no smaller."""
    before, after = source.stat().st_size, out.stat().st_size
    made = _read(out).tensors
    matrices = [name for name, (kind, shape) in _read(source).tensors.items() if len(shape) > 1 and kind in FLOATS]
    done = [name for name in matrices if name in made and made[name][0] not in FLOATS]
    if not done or after >= before:
        raise StepFailed(
            f"llama.cpp quantized {len(done)} of {len(matrices)} matrices, and the file went from {before:,} to {after:,} bytes: "
            "this model cannot be quantized so; set quantize: {scheme: none} or name another framework"
        )
    fallen = {name: made[name][0] for name in matrices if name in made and made[name][1][0] % ROW[scheme]}
    report = {
        "scheme": scheme,
        "imatrix_tokens": calibrated,
        "bytes_before": before,
        "bytes_after": after,
        "tensors": len(matrices),
        "tensors_quantized": len(done),
        "not_quantized": sorted(set(matrices) - set(done)),
        "types": Counter(kind for kind, _ in made.values()),
        "fallback": {"row_multiple": ROW[scheme], "tensors": fallen},
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    kinds = ", ".join(f"{kind}×{number}" for kind, number in Counter(made[name][0] for name in done).most_common())
    others = f", {len(fallen)} fell back: their rows are no multiple of {ROW[scheme]}" if fallen else ""
    sizes = f"{human(before)} → {human(after)}"
    how = f"{scheme}, its importance matrix of {calibrated:,} tokens" if calibrated else scheme
    return Outcome(summary=f"{how}, {len(done)} of {len(matrices)} matrices ({kinds}){others}, {sizes}")


# -- files and the library ------------------------------------------------------------------------------------------------
def _read(path: Path) -> gguf.Header:
    try:
        return gguf.read(str(path))
    except ValueError as error:
        raise StepFailed(f"{path.name}: {error}") from error


_heard: list[str] = []  # what llama.cpp called an error since this was cleared


@cache
def _llama() -> Any:
    """llama_cpp's functions. What llama.cpp says goes to the log. Raises StepFailed where it is not installed."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # where it aborts it would start a debugger
    try:
        api: Any = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        problem = f"llama-cpp-python does not load here ({said(error)})"
        raise StepFailed(f"{problem}; run: edgebuild toolchain install llamacpp") from error

    def hear(level: int, text: bytes, data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level != AS_BEFORE:
            levels[0] = level
        if levels[0] != DEBUG:
            sys.stderr.write(line)
        if level == ERROR and line.strip():
            _heard.append(line.strip())

    levels = [DEBUG]
    _listeners.append(api.llama_log_callback(hear))
    api.llama_log_set(_listeners[-1], None)
    api.llama_backend_init()
    return api


_listeners: list[Any] = []  # C keeps no reference to a callback


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """One of ggml's own, which llama_cpp does not name."""
    found = getattr(_llama().llama_cpp._lib, name)
    found.restype, found.argtypes = result, list(arguments)
    return found


def _reason(*paths: Path) -> str:
    """The first error that llama.cpp told, without the function that it came from."""
    text = re.sub(r"^(\w+: )+", "", _heard[0]) if _heard else "it gave no reason"
    for path in paths:
        text = text.replace(str(path), path.name)
    return " ".join(text.split())[:300]


# -- a model to try -------------------------------------------------------------------------------------------------------
def _write_small(path: Path, width: int = 32) -> None:
    """A llama of one layer, with 64 tokens and no tokenizer, by the converter's own gguf package."""
    import numpy as np

    script = _converter()
    if script is None:
        raise StepFailed("llama.cpp's converter is not beside llama-cpp-python; run: edgebuild toolchain install llamacpp")
    sys.path.insert(0, str(script.parent / "gguf-py"))
    try:
        writer: Any = importlib.import_module("gguf").GGUFWriter(path, "llama")
    finally:
        del sys.path[0]
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("none")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (64, width), "output": (64, width)}
    shapes |= {"blk.0.ffn_gate": (2 * width, width), "blk.0.ffn_up": (2 * width, width), "blk.0.ffn_down": (width, 2 * width)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.2 * generator.standard_normal(shape, dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _small_logits(path: Path) -> NDArray[np.float32]:
    import numpy as np

    session = open(path)
    try:
        return session.logits(np.arange(8, dtype=np.int32))
    finally:
        session.close()
