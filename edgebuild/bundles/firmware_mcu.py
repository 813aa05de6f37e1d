"""The model for a microcontroller: C by emlearn, a self-test around it, and that program as an image which MCUboot starts.

The image's header and its signature are imgtool's (docs.mcuboot.com, "imgtool"): by ed25519, whose bytes are the same each time.
"""

from __future__ import annotations

import base64
import re
import shutil
import struct
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import sandbox, signing
from edgebuild.backend import Needs
from edgebuild.bundle import Making, Proof, Proving
from edgebuild.bundles import dense, pkcs11, programs
from edgebuild.errors import StepFailed, WrongFact
from edgebuild.render import Identifier, Word
from edgebuild.signing import Pair
from edgebuild.units import size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORM = "mcuboot"
NEEDS = Needs(
    lock="firmware", packages=("onnxruntime", "onnx", "onnx-ir", "numpy", "protobuf", "ml_dtypes", "emlearn", "imgtool")
)
HOST, COMPILER, QEMU = "gcc", "arm-none-eabi-gcc", "qemu-system-arm"
TOOLS: Mapping[str, str] = {
    HOST: "gcc libc6-dev",
    COMPILER: "gcc-arm-none-eabi libnewlib-arm-none-eabi",
    QEMU: "qemu-system-arm",
    sandbox.PROGRAM: sandbox.PACKAGE,
}
IMAGE, PUBLIC = "image.signed.bin", "image-key.pem"
TAKES = signing.Takes(
    what="an MCUboot image",
    keys=(signing.EDWARDS,),
    make="openssl genpkey -algorithm ed25519 -out key.pem",
    certificate=False,
    token=pkcs11.BY_TOOL,
)
HEADER = 512  # bytes before the program, so that its table of vectors is aligned
MAGIC = 0x96F3B83D  # of an image's header (mcuboot, "bootutil/image.h")
DEVICE = {"cpu": "cortex-m3", "slot": "0x10000", "slot_size": "512KiB", "ram": "0x20000000", "ram_size": "256KiB"}
PROCESSORS = ("cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33")
# What two C libraries' expf may differ by; without one (Relu alone) both compute the same bits.
AGREES = {"relative": 1e-5, "absolute": 1e-6}


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its processor and memory, as numbers."""
    facts = {key: str(device.get(key, default)) for key, default in {**DEVICE, "qemu": ""}.items()}
    if facts["cpu"] not in PROCESSORS:
        raise WrongFact("cpu", f"{facts['cpu']!r} is none of {', '.join(PROCESSORS)}")
    if not re.fullmatch(r"[a-z0-9-]*", facts["qemu"]):
        raise WrongFact("qemu", f"{facts['qemu']!r} is no machine such as mps2-an385")
    slot, ram = (_address(facts, key) for key in ("slot", "ram"))
    slot_size, ram_size = (_size(facts, key) for key in ("slot_size", "ram_size"))
    return {
        "cpu": Word(facts["cpu"]),
        "qemu": facts["qemu"],
        "slot_start": slot,
        "slot_size": slot_size,
        "body_start": slot + HEADER,
        "body_size": slot_size - HEADER,
        "ram_start": ram,
        "ram_size": ram_size,
    }


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """`run`: the model's function; `image_version`. Raises StepFailed."""
    name = re.sub(r"[^a-z0-9]", "_", common["name"])
    return {
        **stated(common["facts"]),
        "run": Identifier(f"{'m' if name[0].isdigit() else ''}{name}_run"),
        "image_version": _version(common["version"]),
    }


def _address(facts: Mapping[str, str], key: str) -> int:
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,8}", facts[key]) or int(facts[key], 16) % HEADER:
        raise WrongFact(key, f'{facts[key]!r} is no address such as "{DEVICE[key]}", a multiple of {HEADER}')
    return int(facts[key], 16)


def _size(facts: Mapping[str, str], key: str) -> int:
    try:
        found = size(facts[key])
    except ValueError as error:
        raise WrongFact(key, f"{facts[key]!r} is not {error}") from error
    if not 2 * HEADER <= found < 2**32:
        raise WrongFact(key, f"{facts[key]} cannot be: it is from 1 KiB to 4 GiB")
    return found


def _version(version: str) -> Word:
    """As an image's header holds it: three numbers of 8, 8 and 16 bits, and no pre-release (mcuboot, "struct image_version")."""
    numbers = re.split(r"[-+]", version)[0].split(".")
    if any(int(number) > most for number, most in zip(numbers, (255, 255, 65535), strict=True)):
        raise StepFailed(f"package.version: {version} does not go into an MCUboot image, whose version is at most 255.255.65535")
    return Word(".".join(numbers))


# -- making ---------------------------------------------------------------------------------------------------------------
def make(making: Making) -> Mapping[str, bool]:
    """src/: the model as C, the golden example as C, and the headers of emlearn that the first includes."""
    model, example = making.out / making.payload.model, making.example
    layers = dense.read(model / "model.onnx" if model.is_dir() else model)
    inputs, outputs = layers[0].weights.shape[0], layers[-1].weights.shape[1]
    run, prefix = making.values["run"], f"{making.values['run'].removesuffix('_run')}_model"
    for folder in ("src", "src/emlearn"):
        (making.out / folder).mkdir()
        (making.out / folder).chmod(0o755)  # whatever the umask
    texts = {
        "src/model.h": _header(run, inputs, outputs),
        "src/model.c": _source(dense.c_source(layers, prefix), run, prefix, inputs, outputs),
        "src/golden.h": _golden(example, inputs, outputs),
    }
    headers = Path(dense.generator().__file__).parent
    texts |= {f"src/emlearn/{name}": (headers / name).read_text(encoding="utf-8") for name in dense.HEADERS}
    texts["src/emlearn/LICENSE.md"] = _licence()
    for place, text in texts.items():
        (making.out / place).write_text(text, encoding="utf-8")
    return {place: place == "src/model.c" for place in texts}


def _licence() -> str:
    found = [file for file in metadata.files("emlearn") or () if file.name.startswith("LICENSE")]
    if not found:
        raise StepFailed("emlearn's licence is not among its files; install it again: pip install 'edgebuild[firmware]'")
    return str(found[0].read_text(encoding="utf-8"))


def _header(run: str, inputs: int, outputs: int) -> str:
    return f"""/* The model: made by edgebuild, do not edit. */
#ifndef MODEL_H
#define MODEL_H

#define MODEL_CONVERTER "emlearn {metadata.version("emlearn")}"
#define MODEL_INPUTS {inputs}
#define MODEL_OUTPUTS {outputs}

/* MODEL_INPUTS floats in, MODEL_OUTPUTS floats out, in the order of the ONNX model; 0 where all is well. Not reentrant. */
int {run}(const float *input, float *output);

#endif
"""


def _source(code: str, run: str, prefix: str, inputs: int, outputs: int) -> str:
    return f"""/* The model as C by emlearn: made by edgebuild, do not edit. */
#include "model.h"

{code}
int {run}(const float *input, float *output)
{{
    return (int){prefix}_regress(input, {inputs}, output, {outputs});
}}
"""


def _golden(example: Mapping[str, Any], inputs: int, outputs: int) -> str:
    """The example's samples, a row each. Raises StepFailed where it is another shape than the model's."""
    import numpy as np

    given, made = example["inputs"][0], example["outputs"][0]
    samples = len(given["data"]) // inputs
    if made["stride"] != 1 or len(given["data"]) != samples * inputs or len(made["data"]) != samples * outputs:
        raise StepFailed(
            f"the golden example has {len(given['data'])} and {len(made['data'])} numbers, no rows of {inputs} and {outputs}"
        )
    rows = [np.array(one["data"], np.float32).reshape(samples, -1) for one in (given, made)]
    tolerance = example["tolerance"]
    return f"""/* The golden example: made by edgebuild, do not edit. */
#ifndef GOLDEN_H
#define GOLDEN_H

#define GOLDEN_SAMPLES {samples}
#define GOLDEN_OUTPUTS {outputs}
#define GOLDEN_ABSOLUTE {tolerance["absolute"]!r}f
#define GOLDEN_RELATIVE {tolerance["relative"]!r}f

{dense.c_array("golden_inputs", rows[0])}
{dense.c_array("golden_outputs", rows[1])}
#endif
"""


def assemble(making: Making) -> Mapping[str, bool]:
    """Compile, and sign what came out. Raises StepFailed where it does not fit into the slot."""
    assert making.key
    if lacking := programs.absent([COMPILER]):
        raise StepFailed(f"{programs.missing(lacking, TOOLS)}; this bundle is made with it")
    made = build(making.out, making.key, making.values, making.scratch / "build")
    for name in (IMAGE, PUBLIC):
        shutil.copyfile(made / name, making.out / name)
    return {IMAGE: True, PUBLIC: False}


def build(out: Path, pair: Pair, values: Mapping[str, Any], folder: Path) -> Path:
    """The image of what lies in a bundle's src/, and the public key, in a new folder: → that. Raises StepFailed."""
    try:
        programs.call(["sh", "build.sh", "firmware", str(folder)], cwd=out, packages=TOOLS)
    except StepFailed as error:
        if found := re.search(r"region `(FLASH|RAM)' overflowed by (\d+) bytes", str(error)):
            fact = {"FLASH": "slot_size", "RAM": "ram_size"}[found[1]]
            raise StepFailed(
                f"the program takes {found[2]} bytes more than the device has by facts.{fact}, {values[fact]:,} bytes: take a smaller model"
            ) from error
        raise
    sign(pair, folder / "selftest.bin", folder, slot_size=values["slot_size"], version=values["image_version"])
    return folder


def sign(pair: Pair, body: Path, folder: Path, *, slot_size: int, version: str) -> None:
    """IMAGE and PUBLIC of a program: imgtool says what is to be signed, and puts the signature in. Raises StepFailed."""
    (folder / PUBLIC).write_bytes(signing.public_pem(pair))
    about = ["--version", version, "--header-size", str(HEADER), "--pad-header", "--align", "8", "--slot-size", str(slot_size)]
    imgtool(["sign", "--vector-to-sign", "digest", *about, str(body), str(folder / "digest")], folder)
    digest = (folder / "digest").read_bytes()
    made = pkcs11.signature(pair, digest, folder) if pair.in_token else signing.signature(pair, digest)
    (folder / "signature.txt").write_bytes(base64.b64encode(made))
    words = ["sign", "--fix-sig", str(folder / "signature.txt"), "--fix-sig-pubkey", str(folder / PUBLIC), *about]
    imgtool([*words, str(body), str(folder / IMAGE)], folder)


def imgtool(words: list[str], cwd: Path) -> str:
    """→ what it printed. Raises StepFailed."""
    program = [sys.executable, "-c", "from imgtool.main import imgtool; imgtool(prog_name='imgtool')"]
    try:
        return programs.call([*program, *words], cwd=cwd, packages=TOOLS)
    except StepFailed as error:
        raise StepFailed(f"imgtool {words[0]}: {str(error).partition('fails: ')[2]}") from error


# -- proving --------------------------------------------------------------------------------------------------------------
def verify(out: Path) -> Mapping[str, str]:
    verify_image(out)
    return {"imgtool": metadata.version("imgtool"), "emlearn": metadata.version("emlearn"), COMPILER: programs.version(COMPILER)}


def verify_image(out: Path) -> None:
    """The image's digest and signature, by imgtool. Raises StepFailed."""
    said = imgtool(["verify", "--key", str(out / PUBLIC), str(out / IMAGE)], out)
    if "Image was correctly validated" not in said:
        raise StepFailed(f"imgtool verify: {said.strip()[:300]}")


def consume(proving: Proving) -> Proof:
    """L4: the self-test passes, compiled for this machine and as the signed image on an emulated one, and both say the same."""
    tools = {**proving.tools, "runtime": proving.runs()}
    if reason := programs.missing([HOST], TOOLS) if programs.absent([HOST]) else sandbox.closed():
        return Proof(level="L2", tools=tools, why_not_higher=reason)
    here = on_host(proving.out, proving.scratch)
    tools[HOST] = programs.version(HOST)
    machine = proving.values["qemu"]
    if not machine or programs.absent([QEMU]):
        why = programs.missing([QEMU], TOOLS) if machine else "the platform names no machine of QEMU's (facts.qemu)"
        return Proof(
            level="L3", tools=tools, why_not_higher=f"{why}: the C source ran as {HOST} compiled it for this machine alone"
        )
    there = on_emulator(proving.out, proving.values, proving.scratch)
    if not (apart := difference(here, there)) <= 1:
        raise StepFailed(f"the emulated {machine} and this machine differ by {apart:.3g} times what is allowed")
    return Proof(level="L4", tools={**tools, QEMU: f"{programs.version(QEMU)}, {machine}"})


def on_host(out: Path, scratch: Path) -> NDArray[np.float32]:
    """The self-test's outputs [samples, outputs] on this machine. Raises StepFailed."""
    done = sandbox.run(["sh", str(out / "build.sh"), "host", str(scratch)], scratch=scratch, read=(out,))
    if done.returncode:
        raise StepFailed(f"{HOST} does not compile the self-test: {programs.last_lines(done)}")
    return _outputs(sandbox.run([str(scratch / "selftest")], scratch=scratch), "compiled for this machine")


def on_emulator(out: Path, values: Mapping[str, Any], scratch: Path) -> NDArray[np.float32]:
    """The same of the signed image, in its slot of an emulated machine that starts it as MCUboot does. Raises StepFailed."""
    image = (out / IMAGE).read_bytes()
    if struct.unpack_from("<I", image)[0] != MAGIC:
        raise StepFailed(f"{IMAGE} is no MCUboot image")
    header = struct.unpack_from("<H", image, 8)[0]
    (scratch / "vectors.bin").write_bytes(image[header : header + 8])  # stack and reset, where the processor looks first
    words = [QEMU, "-M", values["qemu"], "-display", "none", "-monitor", "none", "-serial", "none", "-chardev", "stdio,id=out"]
    words += ["-semihosting-config", "enable=on,target=native,chardev=out", "-kernel", str(scratch / "vectors.bin")]
    file = str(out / IMAGE).replace(",", ",,")  # as QEMU has it
    words += ["-device", f"loader,file={file},addr={values['slot_start']:#x},force-raw=on"]
    return _outputs(sandbox.run(words, scratch=scratch, read=(out,), timeout=120), f"on an emulated {values['qemu']}")


def _outputs(done: Any, where: str) -> NDArray[np.float32]:
    import numpy as np

    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode or not any(line.startswith("PASS ") for line in lines):
        verdict = next((line for line in lines if line.startswith("FAIL ")), "") or programs.last_lines(done)
        raise StepFailed(f"the self-test fails {where}: {verdict}")
    rows = [[int(word, 16) for word in line.split()[1:]] for line in lines if line.startswith("outputs ")]
    return np.array(rows, np.uint32).view(np.float32)


def difference(here: NDArray[np.float32], there: NDArray[np.float32]) -> float:
    """The largest, as a share of AGREES."""
    import numpy as np

    if here.shape != there.shape:
        return float("inf")
    allowed = AGREES["absolute"] + AGREES["relative"] * np.abs(here)
    return float((np.abs(here - there) / allowed).max(initial=0.0))
