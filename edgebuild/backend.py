"""What a backend is, what it tells of a model, and how an artifact of its is run: the protocols, and ModelFacts.

A backend is a module with these names; `edgebuild.backends.BACKENDS` is the list. A new one is a module, a row, a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW = 256  # tokens that a language model sees at once, where it is evaluated
# 16 windows are 4,096 tokens: of a model of 4 million parameters in MLX float32 on two cores, 3 s at most. On the
# example the interval of kl_mean reaches from two thirds to three halves of it.
MAX_WINDOWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a model's headers say. `parameters` counts elements by dtype; shapes hold an int, a name or None."""

    format: str  # "huggingface", "onnx", "gguf", "safetensors" (a lone file of weights)
    architecture: str = "unknown"
    model_type: str = ""
    custom_code: bool = False  # config.json names Python code (auto_map)
    parameters: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    layers: int | None = None
    heads: int | None = None
    context: int | None = None
    hidden: int | None = None
    vocabulary: int | None = None
    experts: int | None = None
    tied_embeddings: bool | None = None
    scaled: Sequence[Mapping[str, Any]] = ()  # how rotary positions are, by kinds of layers; see positions.py
    opsets: Mapping[str, int] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    inputs: Sequence[Mapping[str, Any]] = ()
    outputs: Sequence[Mapping[str, Any]] = ()
    quantized: str = ""  # how the source is quantized already, else empty
    # Elements of tensors of two or more dimensions, which quantizers reach, by the ONNX operator that reads them; "" in other formats.
    weights: Mapping[str, int] = field(default_factory=dict)
    largest: int = 0  # elements of the largest tensor
    tokenizer: int = 0  # bytes of the tokenizer's file
    licence: str = ""  # as its files name it, else empty

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """About what a model will take, in bytes: its artifact; memory (RssAnon) at the peak of making it, and of running it.

    `holding`: what its source takes beside it where both are run, to hold the one against the other.
    """

    artifact: int
    making: int
    running: int
    holding: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a backend runs with: the name of the lock, and the distributions of it whose versions are in every key."""

    lock: str
    packages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A recipe of a ladder: the quantize parameters that it sets.

    It makes sense for a model that has one of `operators`, or any if empty, and of whose weights convolutions read at most the
    share `convolutions`.
    """

    sets: Mapping[str, Any]
    operators: Sequence[str] = ()
    convolutions: float = 1.0


class Session(Protocol):
    """A loaded artifact. Arrays are numpy's; what a backend cannot do it raises StepFailed for."""

    @property
    def runtime(self) -> str:
        """Name and version, and the threads it runs on: `onnxruntime 1.32.0, CPU, 1 thread`."""

    @property
    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """What `infer` takes: name, dtype (numpy's name) and shape (int, name or None) of each array."""

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Named arrays in, named arrays out."""

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Token ids [T] → logits [T, V], position t having seen tokens 0…t."""

    def tokens(self, text: str) -> NDArray[np.int32]:
        """The tokens [T] of a text, without any that mark its begin or end."""

    def close(self) -> None: ...


class Backend(Protocol):
    """A module; mypy holds its names against these. They are read only, hence properties."""

    @property
    def NEEDS(self) -> Mapping[str, Needs]:
        """Source formats that it takes → what every step of such a model runs with."""

    @property
    def SCHEMES(self) -> Mapping[str, Sequence[str]]:
        """quantize.scheme → the other quantize keys that it reads with it."""

    @property
    def LADDER(self) -> Mapping[str, Rung]:
        """What `quantize.method: auto` tries on calibration data, until the gates hold; each name is a method too. May be empty."""

    @property
    def VIEWS(self) -> Mapping[str, str]:
        """How its artifacts may be run: name → what that means; the first is the one judged."""

    def parameters(self, scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
        """The quantize parameters with this backend's defaults filled in; pure.

        Raises ValueError("KEY: sentence") where a value cannot be used.
        """

    def refuse(self, facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
        """Why this model cannot be converted or quantized so, in one sentence, else empty; pure.

        Never because of what is not installed here: a choice must be the same everywhere.
        """

    def estimate(self, facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
        """Of the model that this scheme makes of the converted one, or of the converted one itself (scheme `none`); pure.

        `available`: bytes of memory that the machine has free; a runtime may take more where there is more.
        """

    def convert(self, action: Action, facts: ModelFacts) -> Outcome:
        """In a worker: the source (inputs `model`, `model/…`) → a runnable model at output `model`."""

    def hold(self, session: Session, source: Mapping[str, Path], facts: ModelFacts) -> Mapping[str, Any]:
        """In a worker: hold a converted model, as it was opened, against its source: files by role, as `convert` has them.

        The report's JSON, with `verified`, and `against`: what each reference said; or the `reason`. Raises StepFailed where they
        disagree.
        """

    def quantize(self, action: Action, facts: ModelFacts) -> Outcome:
        """In a worker: the converted model (input `model`) → output `model`."""

    def smoke(self) -> str:
        """In a worker: the least work that shows that the framework runs here; → what ran. Raises StepFailed."""

    def open(self, model: Path, view: str = "") -> Session:
        """In a worker: load an artifact of this backend; `view` is one of VIEWS, the first by default."""


def facts_from_json(data: Mapping[str, Any]) -> ModelFacts:
    """Raises TypeError where `data` has other keys."""
    return ModelFacts(**data)
