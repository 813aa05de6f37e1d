"""The list of bundle kinds, and what some of them say beside what all do. Importing it imports no framework and no template engine.

A device is its platform's facts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgebuild.backend import ModelFacts, Needs
from edgebuild.bundle import BundleKind
from edgebuild.bundles import android, container, firmware, folder, ios, onnx
from edgebuild.signing import Takes


class Signed(Protocol):
    """What a kind says whose bundles are signed, by `package.sign` or the user's test key."""

    def signs(self, device: Mapping[str, Any]) -> Takes:
        """What a bundle for such a device is signed with."""

    def settled(self, out: Path) -> Mapping[str, str]:
        """Files of a bundle whose signatures differ from build to build → a digest of all in them that does not.

        Raises ValueError or OSError where one is damaged.
        """


class Particular(Protocol):
    """What a kind says where device and model make a difference to it."""

    def unfit(self, device: Mapping[str, Any], framework: str, scheme: str, facts: Callable[[], ModelFacts | None]) -> str:
        """Why a model cannot go on such a device, in one sentence, else empty.

        `facts` of the source, looked at where they have a say; None where nothing is known before it is fetched.
        """

    def needs(self, device: Mapping[str, Any]) -> Needs | None:
        """What packing runs with, the framework among it; None where what the framework needs is enough."""

    def shares(self, device: Mapping[str, Any]) -> str:
        """The kind whose self-tests are templates of this one too, else empty."""


BUNDLES: dict[str, BundleKind] = {
    "android": android,
    "ios": ios,
    "onnx": onnx,
    "folder": folder,
    "container": container,
    "firmware": firmware,
}
SIGNED: dict[str, Signed] = {"android": android, "firmware": firmware}
PARTICULAR: dict[str, Particular] = {"firmware": firmware}


def unfit(kind: str, device: Mapping[str, Any], framework: str, scheme: str, facts: Callable[[], ModelFacts | None]) -> str:
    """As Particular says it of a kind that has a say in it, else empty."""
    return PARTICULAR[kind].unfit(device, framework, scheme, facts) if kind in PARTICULAR else ""
