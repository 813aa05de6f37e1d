"""The kind `firmware`: signed updates of the model on a device. SWUpdate and RAUC for Linux, MCUboot for microcontrollers.

Which of the two forms it has is a fact of the platform: `facts: {bootloader: mcuboot}`, as `cortex-m` says, or another one.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.backend import ModelFacts, Needs
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving
from edgebuild.bundles import dense, firmware_linux, firmware_mcu
from edgebuild.signing import Takes

CODE: Sequence[str] = (
    "bundles.firmware",
    "bundles.firmware_linux",
    "bundles.firmware_mcu",
    "bundles.dense",
    "bundles.pkcs11",
    "bundles.programs",
)
COPIES = Copies(bundle=3, scratch=2)  # the model, and one in each of two updates, both unpacked; or as C and as a program
TOOLS: Mapping[str, str] = {**firmware_linux.TOOLS, **firmware_mcu.TOOLS}
LOCKS: Mapping[str, str] = {}
BOOTLOADER = "mcuboot"


def refuse(framework: str, task: str) -> str:
    return ""


def signs(device: Mapping[str, Any]) -> Takes:
    return firmware_mcu.TAKES if device.get("bootloader") == BOOTLOADER else firmware_linux.TAKES


def unfit(device: Mapping[str, Any], framework: str, scheme: str, facts: Callable[[], ModelFacts | None]) -> str:
    if device.get("bootloader") != BOOTLOADER:
        return ""
    if framework != "onnxruntime":
        return f"a microcontroller's model is read as ONNX, but the framework is {framework}; name framework: onnxruntime"
    if scheme != "none":
        return f"emlearn takes float32 weights, but quantize.scheme is {scheme}; write quantize: {{scheme: none}}"
    found = facts()
    if found is None:
        return ""
    if found.format != "onnx":
        return f"{dense.TAKEN} as ONNX, and this model is {found.format}"
    return dense.foreign(found.operators)


def needs(device: Mapping[str, Any]) -> Needs | None:
    """What making and proving it runs with beside the framework, as one toolchain; None where the framework's is enough."""
    return firmware_mcu.NEEDS if device.get("bootloader") == BOOTLOADER else None


def settled(out: Path) -> Mapping[str, str]:
    return {} if (out / firmware_mcu.IMAGE).exists() else firmware_linux.settled(out)


def shares(device: Mapping[str, Any]) -> str:
    """A Linux device may run the self-test of the kind `folder`."""
    return "" if device.get("bootloader") == BOOTLOADER else "folder"


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    return firmware_mcu.stated(device) if device.get("bootloader") == BOOTLOADER else firmware_linux.stated(device)


def payload(model: Path, module: str) -> Payload:
    return Payload(files=bundle.lay(model, "model"), model="model", golden="golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    form = firmware_mcu if common["facts"].get("bootloader") == BOOTLOADER else firmware_linux
    return {"form": form.FORM, **form.values(common)}


def make(making: Making) -> Mapping[str, bool]:
    return firmware_mcu.make(making) if making.values["form"] == firmware_mcu.FORM else {}


def assemble(making: Making) -> Mapping[str, bool]:
    if making.values["form"] == firmware_mcu.FORM:
        return firmware_mcu.assemble(making)
    return firmware_linux.assemble(making)


def verify(out: Path) -> Mapping[str, str]:
    return firmware_mcu.verify(out) if (out / firmware_mcu.IMAGE).exists() else firmware_linux.verify(out)


def consume(proving: Proving) -> Proof:
    return firmware_mcu.consume(proving) if proving.values["form"] == firmware_mcu.FORM else firmware_linux.consume(proving)
