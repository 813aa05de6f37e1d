"""Steps: one verb on inputs, as frozen data, and the action record that a worker is handed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import digest

if TYPE_CHECKING:
    from edgebuild.signing import Pair

SOURCES = ".edgebuild/sources"  # outputs below it stay where they lie: links into the Hugging Face cache, never copies
ACROSS = "agree"  # in place of a target's name: steps that several targets of one model share; no target is called so
VERBS = ("fetch", "assess", "reference", "convert", "quantize", "choose", "evaluate", "benchmark", "gate", "package")
# What a worker's environment says; it may change an output, so it is in every recipe of a step that runs a framework.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "NNCF_CI": "1",  # NNCF's word for: no telemetry
    "CI": "true",  # openvino-telemetry's
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One verb on inputs. Paths are relative to the project's root, or absolute where they lie outside it.

    `recipe` is the digest of everything that is known before the step runs; its components stand in the plan.
    `after` are the steps that must be fresh before this one (those that make its inputs are among them). A step `on_demand`
    is in no other's `after`: a step that needs it runs it, or somebody by name; a target is fresh without it.
    """

    name: str  # "quantize:web-digits"
    verb: str
    target: str
    recipe: str
    inputs: Mapping[str, str]  # role -> path
    outputs: Mapping[str, str]  # name -> path
    after: tuple[str, ...] = ()
    on_demand: bool = False

    @property
    def stem(self) -> str:
        """The step's own folder in `build/TARGET`, and its receipt's name: `quantize`, `evaluate.baseline`."""
        rest = self.name.split(":", 1)[1]
        return f"{self.verb}.{rest}" if self.target == ACROSS else self.verb + rest.removeprefix(self.target)

    @property
    def receipt(self) -> str:
        return f"build/{self.target}/{self.stem}.json"

    def key(self, inputs: Mapping[str, str]) -> str:
        """The key: the recipe and the content digest of each input, by role."""
        return _key(self.recipe, tuple(sorted(inputs.items())))


@lru_cache(2048)
def _key(recipe: str, inputs: tuple[tuple[str, str], ...]) -> str:
    """Asked for several times in a step's life, for the same answer."""
    return digest.tagged("key", [recipe, inputs])


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """What a worker is told to do: one verb, its parameters, where its inputs lie and where its outputs go.

    `params` is the recipe's own parameter component: but for `download`, `key` and `image`, a worker sees nothing that is not in the
    key. `key`: what it signs with, where it does; the recipe holds the digest of its public half.
    `alone`: where a measurement, when it has prepared all, has the machine to itself.
    A step's input whose role ends in "/" is a folder: here each file in it is an input, its name behind the role.
    """

    verb: str
    backend: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    download: "Download | None" = None
    key: "Pair | None" = None
    image: "Image | None" = None
    alone: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What a bundle that is built to an image is given. `wheels`: of the lock in its recipe.

    `base`: the root file system that it is tried on, which makes no difference to the bundle; else `no_base` says why none is here.
    """

    wheels: Path
    base: Path | None
    no_base: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """What only a fetch from elsewhere is given: where from, and what has no say in what it makes.

    `url` is not in the key, because a sha256 or a commit is: another mirror re-runs nothing. An unfinished file stays at
    `partial` for the next try. `moved` is told the bytes that are here and the bytes expected, None where unknown.
    """

    url: str
    partial: Path
    moved: Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What an action reports: one line for the terminal, and why what follows must stop (else empty).

    `kept`: path of a file in an output, `model/model.onnx` → the role of the input whose bytes it has. The action does not make
    it: whoever ran it puts it there, and knows its digest without reading it again.
    """

    summary: str
    refused: str = ""
    kept: Mapping[str, str] = field(default_factory=dict)
