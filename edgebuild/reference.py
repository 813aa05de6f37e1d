"""Every conversion is held against its source before anything is made of it: where the two disagree, it failed.

What the source computes is known from transformers, which a step of its own runs once for all conversions, or from the logits
that it gave once, stored beside the model (`golden.safetensors`). Formats that their own runtime reads are held by named outputs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgebuild.backend import Session
from edgebuild.errors import StepFailed, said
from edgebuild.formats import safetensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOLDEN = "golden.safetensors"
# Measured on a 4-layer Phi-3: an honest conversion has a mean KL divergence of 7e-13 against transformers and 5e-7 against
# logits stored as float16; a rope theta of 500,000 instead of 10,000 has 0.28.
LIMIT = 1e-3
# What float32 cannot tell beside 1, four times over: a sigmoid that is shut gives 3e-7, and runtimes round it otherwise.
ROUNDING = 2.0**-22
# Longer scripts, white space and bytes outside the vocabulary are where tokenizers differ.
SAMPLE = "The year 2026:\n\n\tdef f(x):  return x**2 - 3.14  # naïve Übergröße, 東京, привет, 🙂 https://example.org/a?b=c\r\n"
LONGER = "longer."  # before the names of the tensors of a second text, in what the source gave
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines", "model_file")  # they name Python code to run
UNVERIFIED = f"conversion unverified: its source was not run, and no {GOLDEN} lies beside the model"
MEND = "; mend what this names, or name another framework"  # of a framework that fails of a model, whichever it is
WRONG = "the backend computes this model otherwise than transformers does: use another framework"
STALE = f"the conversion agrees with the source as it is now: {GOLDEN} is of another model, remove or remake it"
WRONG_OR_STALE = (
    f"the conversion is wrong, or the model was changed after its golden logits were made: then remove or remake {GOLDEN}"
)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What the source computed once: int32 [T] tokens of `text`, float32 [T, V] logits (stored as float16)."""

    tokens: NDArray[np.int32]
    logits: NDArray[np.float32]
    text: str
    made_by: str

    @property
    def name(self) -> str:
        return f"{GOLDEN} ({self.made_by})" if self.made_by else GOLDEN


def golden(files: Mapping[str, Path]) -> Golden | None:
    """The golden logits among a Hugging Face model's files (role → path), None where there are none.

    Raises StepFailed where they cannot be used.
    """
    path = files.get(f"model/{GOLDEN}")
    if path is None:
        return None
    try:
        header = safetensors.read(str(path))
        vocabulary = _check_golden(header)
        loaded = _load(path)
        if loaded["token_ids"].min() < 0 or loaded["token_ids"].max() >= vocabulary:
            raise ValueError(f"a token is outside the vocabulary of {vocabulary}")
    except (OSError, ValueError) as error:
        problem = str(error).removesuffix(safetensors.AGAIN)
        raise StepFailed(f"{GOLDEN}: {problem}; copy it again, remake it from the source model, or remove it") from error
    text, made_by = header.metadata["text"], header.metadata.get("made_by", "")
    return Golden(tokens=loaded["token_ids"], logits=loaded["logits"], text=text, made_by=made_by)


class Speaker(Session, Protocol):
    """A converted language model whose own runtime turns tokens into text."""

    def text(self, tokens: NDArray[np.int32]) -> str: ...


def hold(candidate: Session, source: Mapping[str, Path], hint: str = "") -> dict[str, Any]:
    """Hold a converted language model against a Hugging Face folder: its tokens, and its logits by every reference there is.

    `source`: the folder's files by role, and as `reference` what `original.run` wrote of it. The report's JSON. Raises StepFailed where the
    two disagree, with the figures; `hint` ends that sentence.
    """
    with staged(source) as folder:
        _same_tokenizer(candidate, folder)
    stored = golden(source)
    if stored is not None:
        _same_tokens(candidate, stored)
    held: list[dict[str, Any]] = []
    missing = ""
    if "reference" in source:
        report, tensors = _written(source["reference"])
        missing = report.get("reason", "")
        if not missing:
            held += [
                _held(candidate, report["made_by"], tensors, text, hint) for text in ("", LONGER) if f"{text}logits" in tensors
            ]
    if stored is not None:
        wrong = hint or (STALE if held else WRONG_OR_STALE)
        held.append(_compare(stored.name, stored.logits, candidate.logits(stored.tokens), wrong))
    if not held:
        return {"verified": False, "reason": missing or UNVERIFIED}
    return {"verified": True, "against": held, "tokenizer": {"checked": stored is not None}}


def hold_text(candidate: Speaker, source: Mapping[str, Path], by: str, leaves: str = "") -> None:
    """Raises StepFailed where a converted model makes another text of tokens than its source's tokenizer.

    `by` is what a message calls who makes it, and `leaves` what that may leave out before the first word.
    """
    with staged(source) as folder:
        own = tokenizer(folder)
    sample = tokens(own, SAMPLE)
    expected, found = str(own.decode(sample.tolist(), skip_special_tokens=False)), candidate.text(sample)
    if found.lstrip(leaves) != expected.lstrip(leaves):
        raise StepFailed(f"{by} gives {found[:60]!r} where the source's gives {expected[:60]!r}")


def hold_outputs(
    reference: str, expected: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]], limit: float = LIMIT
) -> dict[str, Any]:
    """Hold a model's named outputs against its source's: relative L2 error of floats, equality of all else; the report's JSON.

    Raises StepFailed where an output is missing, of another dtype or shape, or further off than `limit`, unless no value of it
    is off by more than ROUNDING.
    """
    if expected.keys() != actual.keys():
        raise StepFailed(f"{_against(reference)}: it has the outputs {sorted(actual)}, the source has {sorted(expected)}")
    figures = {name: _distance(reference, name, expected[name], actual[name]) for name in sorted(expected)}
    outputs = {name: {"relative_l2": _short(each[0]), "max_abs": _short(each[1])} for name, each in figures.items()}
    worst, name = max(
        ((relative * (absolute > ROUNDING), name) for name, (relative, absolute) in figures.items()), default=(0.0, "")
    )
    largest = max((absolute for _, absolute in figures.values()), default=0.0)
    if not worst <= limit:
        relative, absolute = figures[name]
        raise StepFailed(
            f"{_against(reference)}: output {name} has a relative L2 error of {relative:.3g} (limit {limit:g}), "
            f"at most {absolute:.3g} apart; the conversion is wrong: use another framework"
        )
    entry = {
        "reference": reference,
        "relative_l2": _short(worst),
        "max_abs": _short(largest),
        "limit": limit,
        "rounding": ROUNDING,
    }
    return {"verified": True, "against": [{**entry, "outputs": outputs}]}


def tokenizer(model: Path) -> Any:
    """The tokenizer of a Hugging Face folder, by transformers; no code of its runs. Raises StepFailed."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise StepFailed(f"transformers cannot load the tokenizer: {said(error)}; copy or download its files again") from error


def tokens(tokenizer: Any, text: str) -> NDArray[np.int32]:
    """Those of the text alone, without any that mark its begin or end. Raises StepFailed."""
    import numpy as np

    try:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    except Exception as error:
        raise StepFailed(f"the tokenizer cannot take a text: {said(error)}") from error


def _same_tokenizer(candidate: Session, source: Path) -> None:
    """Raises StepFailed where a converted model's tokenizer is another one than that of the folder `source`."""
    if tokens(tokenizer(source), SAMPLE).tolist() != candidate.tokens(SAMPLE).tolist():
        raise StepFailed(
            "the converted tokenizer gives other tokens than the source's; write the source's anew with transformers "
            "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)) and build again"
        )


def set_modes(folder: Path) -> None:
    """What lies in a model's folder is anybody's to read, and its owner's to write, whatever a framework says."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def within(vocabulary: int | None, tokens: NDArray[np.int32]) -> None:
    """Raises StepFailed for a token that the model does not have: some runtimes read beyond their embedding without a check."""
    outside = tokens[(tokens < 0) | (tokens >= (vocabulary or 2**31 - 1))]
    if outside.size:
        problem = f"token {outside[0]} is outside the model's vocabulary of {vocabulary}"
        raise StepFailed(f"{problem}: tokenizer and model do not belong together; give the model's own tokenizer")


def verdict(report: Mapping[str, Any]) -> str:
    """What a report of `hold` or `hold_outputs` says, for a step's summary."""
    if not report["verified"]:
        return "its conversion unverified"
    divergences = [entry["kl_mean"] for entry in report["against"] if "kl_mean" in entry]
    if not divergences:
        return "same outputs as its source" if report["against"] else "its source's own bytes"
    names = " and ".join(dict.fromkeys(str(entry["reference"]).partition(" (")[0] for entry in report["against"]))
    return f"held against {names}: KL {max(divergences):.2g}"


@contextmanager
def staged(files: Mapping[str, Path], name: str = "staged") -> Iterator[Path]:
    """A Hugging Face model's own files as links in a folder for a while, without code, and without the keys that name code.

    `name`: the folder's, which some frameworks write into what they make. Raises StepFailed where there is no tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(files, Path(scratch, name))
        yield Path(scratch, name)


def lay_out(files: Mapping[str, Path], folder: Path) -> None:
    """The same for good, in a folder to make."""
    if not {"model/tokenizer.json", "model/tokenizer.model"} & set(files):
        raise StepFailed("the folder has no tokenizer.json and no tokenizer.model; copy or download them beside the weights")
    folder.mkdir()
    for role, path in files.items():
        name = role.removeprefix("model/")
        if name in (role, GOLDEN) or "/" in name or name.endswith(".py"):
            continue
        if name in CONFIGS:
            (folder / name).write_text(json.dumps(without_code(path), indent=2), encoding="utf-8")
        else:
            (folder / name).symlink_to(path.absolute())


def without_code(path: Path) -> Any:
    """A configuration file without the keys that name Python code. Raises StepFailed where it is no JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StepFailed(f"{path.name} is no valid JSON ({str(error)[:80]}); copy or download it again") from error
    if not isinstance(config, dict):
        raise StepFailed(f"{path.name} holds no map of keys; copy or download it again")
    return {key: value for key, value in config.items() if key not in CODE_KEYS}


def _check_golden(header: safetensors.Header) -> int:
    """The size of the vocabulary. Raises ValueError with what is wrong."""
    for name, dtype, dimensions in (("token_ids", "I32", 1), ("logits", "F16", 2)):
        found = header.tensors.get(name)
        if found is None or found[0] != dtype or len(found[1]) != dimensions or 0 in found[1]:
            raise ValueError(f"it holds no tensor {name} of type {dtype} with {dimensions} dimension{'s' * (dimensions - 1)}")
    (tokens,), (rows, vocabulary) = header.tensors["token_ids"][1], header.tensors["logits"][1]
    if tokens != rows:
        raise ValueError(f"it holds {tokens} tokens, but logits for {rows}")
    if "text" not in header.metadata:
        raise ValueError("its metadata hold no text")
    return vocabulary


def _load(path: Path) -> dict[str, NDArray[Any]]:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        loaded: dict[str, NDArray[Any]] = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    loaded["logits"] = loaded["logits"].astype(np.float32)
    if not np.isfinite(loaded["logits"]).all():
        raise ValueError("a logit is no finite number")
    return loaded


def _same_tokens(candidate: Session, stored: Golden) -> None:
    found, expected = candidate.tokens(stored.text).tolist(), stored.tokens.tolist()
    if found == expected:
        return
    where = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    raise StepFailed(
        f"the tokenizer does not give the tokens of {stored.name}: for its text {len(found)} instead of {len(expected)}, "
        f"the first difference at token {where} ({_at(found, where)} instead of {_at(expected, where)}); the tokenizer's "
        f"conversion is wrong, or it was changed after the golden logits were made: then remove or remake {GOLDEN}"
    )


def _at(tokens: list[int], index: int) -> str:
    return str(tokens[index]) if index < len(tokens) else "the end"


def _written(path: Path) -> tuple[Mapping[str, str], Mapping[str, NDArray[Any]]]:
    """What `original.run` wrote: its metadata, and its tensors."""
    from safetensors.numpy import load_file

    return safetensors.read(str(path)).metadata, load_file(path)


def _held(candidate: Session, made_by: str, tensors: Mapping[str, NDArray[Any]], prefix: str, hint: str) -> dict[str, Any]:
    """`_compare` with one of the texts that `original.run` wrote, where the source's logits are kept of its end."""
    tokens, expected = tensors[f"{prefix}token_ids"], tensors[f"{prefix}logits"]
    name = made_by if len(tokens) == len(expected) else f"{made_by} (at the end of {len(tokens)} tokens)"
    return _compare(name, expected, candidate.logits(tokens)[-len(expected) :], hint or WRONG)


def _compare(name: str, reference: NDArray[np.float32], logits: NDArray[np.float32], wrong: str) -> dict[str, Any]:
    """One entry of the report: KL(reference ‖ candidate) in nats a token. Raises StepFailed beyond the limit."""
    import numpy as np

    if reference.shape != logits.shape:
        raise StepFailed(f"{_against(name)}: its logits have the shape {logits.shape}, the source's {reference.shape}; {wrong}")
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        raise StepFailed(f"{_against(name)}: a logit is no finite number; {wrong}")
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = max(float((np.exp(p) * (p - q)).sum(-1).mean()), 0.0)  # rounding may make nothing a little less
    largest = float(np.abs(reference - logits).max())
    same = float((reference.argmax(-1) == logits.argmax(-1)).mean())
    if not kl <= LIMIT:
        raise StepFailed(
            f"{_against(name)} on {len(logits)} tokens: mean KL divergence {kl:.3g} (limit {LIMIT:g}), "
            f"logits up to {largest:.3g} apart, same top token {same:.1%}; {wrong}"
        )
    return {
        "reference": name,
        "tokens": len(logits),
        "kl_mean": _short(kl),
        "max_abs": _short(largest),
        "same_top": _short(same),
        "limit": LIMIT,
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _distance(reference: str, name: str, expected: NDArray[Any], actual: NDArray[Any]) -> tuple[float, float]:
    """(relative L2, largest absolute) distance of floats; infinite where one is finite and the other is not.

    Raises StepFailed for another dtype or shape, and for other integers or texts.
    """
    import numpy as np

    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        found, right = (f"{array.dtype} {list(array.shape)}" for array in (actual, expected))
        raise StepFailed(f"{_against(reference)}: output {name} is {found} instead of {right}")
    if not np.issubdtype(expected.dtype, np.floating):
        if others := int((expected != actual).sum()):
            raise StepFailed(f"{_against(reference)}: output {name} differs in {others} of {expected.size} values")
        return 0.0, 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return float("inf"), float("inf")
    difference = (a - b)[finite]
    if not difference.size:
        return 0.0, 0.0
    absolute, length = float(np.abs(difference).max()), float(np.linalg.norm(a[finite]))
    return float(np.linalg.norm(difference)) / (length or 1.0), absolute


def _against(reference: str) -> str:
    return f"the converted model does not agree with its source, held against {reference}"


def _short(value: float) -> float:
    """Four digits: what lies behind them differs from one processor to another, and reports are compared by their bytes."""
    return float(f"{value:.4g}")
