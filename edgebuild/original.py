"""The source of a language model as transformers computes it: run once by a step of its own, `reference`, for all conversions."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import reference, resources
from edgebuild.backend import Needs
from edgebuild.errors import StepFailed, said
from edgebuild.formats import safetensors
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEEDS = Needs(lock="reference", packages=("torch", "transformers", "tokenizers", "safetensors", "numpy"))
TOKENS = 64
# A second text, of which the last 64 tokens are held: as long as it takes to pass a layer's window, or this long where positions are scaled.
LONGEST = 640
WINDOWS = ("sliding_window", "attention_chunk_size")
# Bytes of memory that torch and transformers take before any weight, measured; and the room that an estimate wants.
IMPORTED, ROOM = 250_000_000, 1.15


def run(action: Action) -> Outcome:
    """`reference`: the source run once by transformers. Output `logits`, a safetensors file: int32 token_ids [T] and float32
    logits [T, V], with `made_by`; neither where it cannot be run on this machine, with the `reason`. Where something of the model
    begins later than that, longer.token_ids and the last 64 rows of longer.logits too. Raises StepFailed.
    """
    from safetensors.numpy import save_file

    out = action.outputs["logits"]
    if reason := _unknown_to_transformers(action.inputs) or _too_large(action.inputs):
        save_file({}, out, metadata={"reason": reason})
        return Outcome(summary=reason.partition(": ")[2])
    stored = reference.golden(action.inputs)
    with reference.staged(action.inputs) as model:  # transformers would look for code beside it
        texts = by_transformers(model, stored.tokens if stored else None, longer(action.inputs))
    made_by = f"transformers {importlib.metadata.version('transformers')}"
    tensors: dict[str, NDArray[Any]] = {}
    for prefix, (tokens, logits) in zip(("", reference.LONGER), texts, strict=False):
        tensors |= {f"{prefix}token_ids": tokens, f"{prefix}logits": logits.copy()}
    save_file(tensors, out, metadata={"made_by": made_by})
    lengths = " and ".join(str(len(tokens)) for tokens, _ in texts)
    return Outcome(summary=f"by {made_by}: logits of {lengths} tokens, for conversions to be held against")


def longer(files: Mapping[str, Path]) -> Sequence[int]:
    """How many tokens a second text has: none, or one number, where the config names what 64 tokens do not show.

    A window beyond what is run here is not seen. Raises StepFailed where the config is no JSON.
    """
    config = reference.without_code(files["model/config.json"])
    inner = config.get("text_config")
    shape = {**inner, **config} if isinstance(inner, dict) else config
    lengths = [size + TOKENS for key in WINDOWS if isinstance(size := shape.get(key), int) and size + TOKENS <= LONGEST]
    if any(_scaled(shape.get(key)) for key in ("rope_parameters", "rope_scaling")):
        lengths.append(LONGEST)
    context = shape.get("max_position_embeddings")
    length = min(max(lengths, default=0), context if isinstance(context, int) else LONGEST)
    return [length] if length > TOKENS else []


def _scaled(rope: Any) -> bool:
    """Whether positions are scaled, by transformers' name of how; or those of some kinds of layers, each with its own."""
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return kind != "default" or any(map(_scaled, rope.values()))


def memory_of(parameters: int) -> int:
    """About what transformers takes to run a source of so many parameters, in bytes: all of them in float32."""
    return IMPORTED + 4 * parameters


def fits(memory: int, available: int) -> bool:
    return memory * ROOM <= available


def by_transformers(
    model: Path, tokens: NDArray[np.int32] | None, longer: Sequence[int] = ()
) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """A Hugging Face model run by transformers on torch in float32: int32 [T] tokens, float32 [T, V] logits.

    Without `tokens`, 64 that are spread over the vocabulary. Then texts of so many tokens as `longer` says, with as many logits, of
    their ends. Runs no code of the model's. Raises StepFailed.
    """
    import numpy as np
    from transformers import AutoModelForCausalLM

    def spread(count: int) -> NDArray[np.int32]:
        vocabulary = int(source.get_input_embeddings().weight.shape[0])
        return ((np.arange(count, dtype=np.int64) * 7919 + 11) % vocabulary).astype(np.int32)

    def run(text: NDArray[np.int32]) -> NDArray[np.float32]:
        given = torch.from_numpy(text.astype(np.int64))[None]
        logits: NDArray[np.float32] = source(input_ids=given, use_cache=False, **few).logits[0, -kept:].float().numpy()
        return logits

    try:
        torch: Any = importlib.import_module("torch")  # not installed everywhere, so that a type checker cannot know it
        source: Any = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
        texts = [spread(TOKENS) if tokens is None else tokens, *map(spread, longer)]
        kept = len(texts[0])
        few = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(source.forward).parameters else {}
        with torch.no_grad():
            return [(text, run(text)) for text in texts]
    except Exception as error:
        raise StepFailed(
            f"transformers cannot run the source model ({said(error)}), so that nothing can be held against it; "
            f"mend the source, or put {reference.GOLDEN} beside it, which says what it computes"
        ) from error


def _unknown_to_transformers(files: Mapping[str, Path]) -> str:
    """Why transformers cannot be the reference for this model, else empty: it has no code of its own for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = reference.without_code(files["model/config.json"]).get("model_type", "")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    return f"conversion unverified: transformers has no language model of type {kind!r}, and no {reference.GOLDEN} lies beside the model"


def _too_large(files: Mapping[str, Path]) -> str:
    """Why this machine has no room for the source in transformers, else empty."""
    weights = [
        safetensors.read(str(path))
        for role, path in files.items()
        if role.endswith(".safetensors") and reference.GOLDEN not in role
    ]
    needed = memory_of(sum(prod(shape) for header in weights for _, shape in header.tensors.values()))
    if fits(needed, resources.memory().available):
        return ""
    free = "more than this machine has free"
    return f"conversion unverified: running the source by transformers takes about {human(needed)} of memory, {free}, and no {reference.GOLDEN} lies beside the model"
