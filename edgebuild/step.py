"""Steps: one verb on inputs, as frozen data, and the action record that a worker is handed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebuild import digest

VERBS = ("fetch", "assess", "convert", "quantize", "evaluate", "benchmark", "gate", "package")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One verb on inputs. Paths are relative to the project's root, or absolute where they lie outside it.

    `recipe` is the digest of everything that is known before the step runs; its components stand in the plan.
    `after` are the steps that must be fresh before this one (those that make its inputs are among them).
    """

    name: str  # "quantize:web-digits"
    verb: str
    target: str
    recipe: str
    inputs: Mapping[str, str]  # role -> path
    outputs: Mapping[str, str]  # name -> path
    after: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The step's own folder in `build/TARGET`, and its receipt's name: `quantize`, `evaluate.baseline`."""
        rest = self.name.split(":", 1)[1].removeprefix(self.target)
        return self.verb + rest

    @property
    def receipt(self) -> str:
        return f"build/{self.target}/{self.stem}.json"

    def key(self, inputs: Mapping[str, str]) -> str:
        """The key: the recipe and the content digest of each input, by role."""
        return digest.tagged("key", [self.recipe, sorted(inputs.items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """What a worker is told to do: one verb, its parameters, where its inputs lie and where its outputs go.

    `params` is the recipe's own parameter component: a worker sees nothing that is not in the key.
    """

    verb: str
    backend: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What an action reports: one line for the terminal, and why what follows must stop (else empty)."""

    summary: str
    refused: str = ""
