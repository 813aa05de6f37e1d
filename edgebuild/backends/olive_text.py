"""A language model in ONNX, as onnxruntime-genai's builder makes it, run by plain ONNX Runtime: every pass with an empty past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import onnxsource, reference
from edgebuild.errors import StepFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE, CONFIG = "model.onnx", "genai_config.json"  # the second says that a folder holds a language model


class TextSession:
    """`model.onnx` in its folder, on the CPU and one thread; and its tokenizer, by transformers."""

    inputs: Sequence[Mapping[str, Any]] = ()

    def __init__(self, folder: Path) -> None:
        self._session = onnxsource.OnnxSession(folder / FILE)
        self.runtime = self._session.runtime
        self._given = {str(one["name"]): one for one in self._session.inputs}
        if "input_ids" not in self._given:
            raise StepFailed(f"{FILE} takes no input_ids, but {', '.join(self._given)}: it is no language model as {CONFIG} says")
        self._tokenizer = reference.tokenizer(folder)
        self._vocabulary: int | None = None

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise StepFailed("this ONNX model is a language model: it takes tokens, not named arrays")

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """One pass of all tokens. Raises StepFailed."""
        import numpy as np

        reference.within(self._vocabulary, tokens)
        feeds = {name: self._feed(name, one, tokens) for name, one in self._given.items()}
        found = np.asarray(self._session.infer(feeds)["logits"][0], dtype=np.float32)
        self._vocabulary = found.shape[-1]
        return found

    def tokens(self, text: str) -> NDArray[np.int32]:
        return reference.tokens(self._tokenizer, text)

    def close(self) -> None:
        self._session.close()

    def _feed(self, name: str, one: Mapping[str, Any], tokens: NDArray[np.int32]) -> NDArray[Any]:
        """Tokens, their mask and places; of keys and values of earlier tokens none. Raises StepFailed for anything else."""
        import numpy as np

        kind = np.dtype(one["dtype"])
        if name == "input_ids":
            return tokens[None].astype(kind)
        if name == "attention_mask":
            return np.ones((1, len(tokens)), kind)
        if name == "position_ids":
            return np.arange(len(tokens), dtype=kind)[None]
        if name.startswith("past_key_values."):
            batch, heads, _, width = one["shape"]
            return np.zeros((1 if not isinstance(batch, int) else batch, heads, 0, width), kind)
        raise StepFailed(f"the model has an input {name}, which no plain language model has; name another framework")
