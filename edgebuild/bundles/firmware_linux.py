"""Updates for a Linux device with two slots for the model: a read-only image that SWUpdate (.swu) or RAUC (.raucb) writes to one of them.

An .swu is a cpio archive (crc format) whose first members are sw-description and its CMS signature (SWUpdate's documentation,
"swupdate.html"). cpio and openssl make it, as that documentation shows. Rejected: swugenerator, which evaluates as Python what
stands behind a `$` in a description and writes the time of the build into the archive.
"""

import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edgebuild import bundle, digest, sandbox, signing
from edgebuild.bundle import EPOCH, Making, Proof, Proving
from edgebuild.bundles import pkcs11, programs
from edgebuild.errors import StepFailed, WrongFact
from edgebuild.signing import Pair
from edgebuild.units import human

FORM = "linux"
TOOLS: Mapping[str, str] = {
    "swupdate": "swupdate",
    "rauc": "rauc",
    "mksquashfs": "squashfs-tools",
    "unsquashfs": "squashfs-tools",
    "cpio": "cpio",
    "openssl": "openssl",
    sandbox.PROGRAM: sandbox.PACKAGE,
}
TAKES = signing.Takes.certified("an update for Linux", pkcs11.BY_ENGINE)
IMAGE, CERTIFICATE, SELF_TEST = "model.squashfs", "certificate.pem", "selftest.py"
DESCRIPTION, MANIFEST, SYSTEM = "swupdate/sw-description", "rauc/manifest.raucm", "rauc/system.ini"
LARGEST = 0xFFFFFFFF  # bytes of a member of such an archive: its size has eight hexadecimal digits
UNKNOWN = "0" * 64  # what stands for the image's sha256 until there is an image
DEVICES = ("/dev/disk/by-partlabel/model_a", "/dev/disk/by-partlabel/model_b")
SQUASHED = f"-noappend -all-root -all-time {EPOCH} -mkfs-time {EPOCH} -no-xattrs -no-exports -no-progress -quiet -processors 1"
STORED = "-noD -noF"  # the image, which is compressed already: and RAUC takes no payload of 4096 bytes or less
BOARD = "board"  # any name: what is held against hardware-compatibility is the revision
SLOTS = ("a", "b")


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """`revisions` of the hardware, `slot_a` and `slot_b`, and RAUC's `compatible` where that is given."""
    revisions = str(device.get("hardware_revisions", "1.0")).split()
    compatible = {"compatible": str(device["compatible"])} if "compatible" in device else {}
    for key, texts in (("hardware_revisions", revisions), *((key, [text]) for key, text in compatible.items())):
        if not texts or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) for text in texts):
            raise WrongFact(key, "letters, digits and . _ - alone, such as 1.0")
    slots = {f"slot_{name}": str(device.get(f"slot_{name}", path)) for name, path in zip(SLOTS, DEVICES, strict=True)}
    for key, path in slots.items():
        if not re.fullmatch(r"/dev(/[A-Za-z0-9][A-Za-z0-9._-]*)+", path) or [*slots.values()].count(path) > 1:
            raise WrongFact(key, f"{path!r} is no device of its own such as {DEVICES[0]}")
    return {"revisions": revisions, **compatible, **slots}


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"compatible": str(common["platform"]), **stated(common["facts"]), "image_sha256": UNKNOWN}


# -- making ---------------------------------------------------------------------------------------------------------------
def assemble(making: Making) -> Mapping[str, bool]:
    pair, out, name = making.key, making.out, making.values["name"]
    assert pair
    assert pair.certificate
    _whole(pair.certificate)
    image = _image(making)
    _complete(out / DESCRIPTION, digest.of_file(str(image)))
    shutil.copyfile(pair.certificate, out / CERTIFICATE)
    _swu(out, image, pair, making.scratch, out / f"{name}.swu")
    _raucb(out, image, pair, making.scratch, out / f"{name}.raucb")
    return {f"{name}.swu": True, f"{name}.raucb": True, CERTIFICATE: False}


def _whole(certificate: Path) -> None:
    """Raises StepFailed where devices that are given this file alone could not verify what it signs: SWUpdate wants all issuers."""
    try:
        words = ["openssl", "verify", "-purpose", "any", "-CAfile", str(certificate), str(certificate)]
        programs.call(words, cwd=certificate.parent, packages=TOOLS)
    except StepFailed as error:
        message = (
            f"package.sign.cert: {certificate.name} does not hold the certificates that issued its first one; append them to it"
        )
        raise StepFailed(f"{message} ({str(error).rpartition('|')[2].strip()})") from error


def _image(making: Making) -> Path:
    """The slot's content, a small bundle of its own: model, golden example, self-test, licences and manifest."""
    out, folder, image = making.out, making.scratch / "slot", making.scratch / IMAGE
    places = [*making.payload.files, making.payload.golden, *(f"licences/{name}" for name in making.values["licences"])]
    if (out / SELF_TEST).exists():
        places.append(SELF_TEST)
    for place in places:
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / place, target)
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o755)  # whatever the umask
    bundle.write_manifest(folder, {key: making.values[key] for key in ("name", "version", "kind", "framework", "platform")})
    programs.call(["mksquashfs", str(folder), str(image), *SQUASHED.split()], cwd=making.scratch, packages=TOOLS)
    shutil.rmtree(folder)
    return image


def _complete(description: Path, sha256: str) -> None:
    """The image's digest into the description that is signed. Raises StepFailed where the template left no place for it."""
    text = description.read_text(encoding="utf-8")
    text, count = re.subn(rf'(\bsha256\s*=\s*)"{UNKNOWN}"', rf'\g<1>"{sha256}"', text)
    if not count:
        raise StepFailed(f"template {DESCRIPTION}.j2: it names no image_sha256, so that SWUpdate would refuse the image")
    description.write_text(text, encoding="utf-8")


def _sign(words: Sequence[str], pair: Pair, cwd: Path) -> None:
    """Run openssl or rauc, whose last word is the key, and which ask for a password nowhere but in the environment. Raises StepFailed."""
    if pair.in_token:
        words = [*words, pkcs11.address(pair)]
        pkcs11.call(words, pair, cwd=cwd, environment=pkcs11.engine(pair), advice=pkcs11.ENGINE_ADVICE)
        return
    environment = dict.fromkeys((programs.PASSWORD, "RAUC_KEY_PASSPHRASE"), pair.password())
    programs.call([*words, pair.key], cwd=cwd, packages=TOOLS, environment=environment)


def _swu(out: Path, image: Path, pair: Pair, scratch: Path, target: Path) -> None:
    if image.stat().st_size > LARGEST:
        raise StepFailed(f"an .swu takes files of up to 4 GiB, and the model's image has {human(image.stat().st_size)}")
    folder = scratch / "swu"
    folder.mkdir()
    image.rename(folder / IMAGE)
    shutil.copyfile(out / DESCRIPTION, folder / "sw-description")
    words = ["openssl", "cms", "-sign", "-binary", "-nosmimecap", "-outform", "DER", "-passin", f"env:{programs.PASSWORD}"]
    words += ["-engine", "pkcs11", "-keyform", "engine"] if pair.in_token else []
    words += ["-signer", str(pair.certificate), "-in", "sw-description", "-out", "sw-description.sig"]
    _sign([*words, "-inkey"], pair, folder)
    members = ("sw-description", "sw-description.sig", IMAGE)
    for name in members:
        _plain(folder / name)
    words = ["cpio", "--create", "--format=crc", "--reproducible", "--owner=0:0", "--quiet", f"--file={target}"]
    programs.call(words, cwd=folder, packages=TOOLS, given="".join(f"{name}\n" for name in members).encode())
    (folder / IMAGE).rename(image)


def _raucb(out: Path, image: Path, pair: Pair, scratch: Path, target: Path) -> None:
    folder = scratch / "raucb"
    folder.mkdir()
    folder.chmod(0o755)
    image.rename(folder / IMAGE)
    shutil.copyfile(out / MANIFEST, folder / Path(MANIFEST).name)
    for path in folder.iterdir():
        _plain(path)
    words = ["rauc", "bundle", f"--mksquashfs-args={SQUASHED} {STORED}", str(folder), str(target)]
    _sign([*words, "--cert", str(pair.certificate), "--key"], pair, scratch)


def _plain(path: Path) -> None:
    """The mode and time that archives are to hold."""
    path.chmod(0o644)
    os.utime(path, (EPOCH, EPOCH))


def settled(out: Path) -> Mapping[str, str]:
    """Signatures hold times and random numbers, RAUC's tree of hashes a random salt: all else two builds have in common.

    The payload of an .raucb is the squashfs that it begins with (squashfs, "superblock": its size is at byte 40).
    """
    (swu,), (raucb,) = list(out.glob("*.swu")), list(out.glob("*.raucb"))
    return {swu.name: _members(swu), raucb.name: _payload(raucb)}


def _members(swu: Path) -> str:
    """sha256 of all members but the signature, with their headers (cpio(5), "New CRC Format"): read, as it may be anybody's, not extracted."""
    found = hashlib.sha256()
    with swu.open("rb") as file:
        while (name := _member(file, found)) != "TRAILER!!!":
            if not name:
                raise ValueError(f"{swu.name} is no such archive, or is cut off")
    return found.hexdigest()


def _member(file: BinaryIO, found: "hashlib._Hash") -> str:
    """A member's name, empty where there is none; what it holds goes into `found`."""
    head = file.read(110)
    if len(head) < 110 or head[:6] != b"070702":
        return ""
    size, length = int(head[54:62], 16), int(head[94:102], 16)
    if not 0 < length <= 4096 or size < 0:
        return ""
    name = file.read(length + -(110 + length) % 4)
    signature = name.rstrip(b"\0") == b"sw-description.sig"
    found.update(b"" if signature else head + name)
    left = size + -size % 4
    while left > 0 and (block := file.read(min(left, bundle.BLOCK))):
        found.update(b"" if signature else block)
        left -= len(block)
    return "" if left else name.rstrip(b"\0").decode("utf-8", "replace")


def _payload(raucb: Path) -> str:
    with raucb.open("rb") as file:
        head = file.read(96)
        if len(head) < 96:
            raise ValueError(f"{raucb.name} is cut off")
        (size,) = struct.unpack_from("<Q", head, 40)
        file.seek(0)
        found = hashlib.sha256()
        while size > 0 and (block := file.read(min(size, bundle.BLOCK))):
            found.update(block)
            size -= len(block)
    return found.hexdigest()


# -- proving --------------------------------------------------------------------------------------------------------------
def verify(out: Path) -> Mapping[str, str]:
    """The archive's members, their digests and both signatures, and that RAUC takes manifest and example configuration."""
    (swu,), (raucb,) = list(out.glob("*.swu")), list(out.glob("*.raucb"))
    with tempfile.TemporaryDirectory(prefix="edgebuild-verify-") as name:
        folder = Path(name)
        programs.call(["cpio", "--extract", "--quiet", f"--file={swu}"], cwd=folder, packages=TOOLS)
        held_description = (folder / "sw-description").read_bytes()
        if held_description != (out / DESCRIPTION).read_bytes():
            raise StepFailed(f"{swu.name} holds another sw-description than {DESCRIPTION}")
        said = set(re.findall(rb'\bsha256\s*=\s*"([0-9a-f]{64})"', held_description))
        if said != {digest.of_file(str(folder / IMAGE)).encode()}:
            raise StepFailed(f"{swu.name}: its sw-description says another sha256 than its image has")
        words = ["openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "sw-description.sig", "-out", "signed"]
        words += ["-content", "sw-description", "-CAfile", str(out / CERTIFICATE), "-purpose", "any"]
        programs.call(words, cwd=folder, packages=TOOLS)
        _configure(out, folder)
        programs.call(["rauc", "--conf=system.conf", "info", str(raucb)], cwd=folder, packages=TOOLS)
    return {name: programs.version(name) for name in ("openssl", "rauc")}


def _configure(out: Path, folder: Path) -> None:
    """RAUC's configuration of a device, as the bundle has it."""
    shutil.copyfile(out / SYSTEM, folder / "system.conf")
    shutil.copyfile(out / CERTIFICATE, folder / CERTIFICATE)


def consume(proving: Proving) -> Proof:
    """L3: installed by SWUpdate into each of two slots in turn, and extracted by RAUC; both times all of it arrived."""
    tools = {**proving.tools, "runtime": proving.runs()}
    lacking = programs.absent(("swupdate", "unsquashfs"))
    if reason := programs.missing(lacking, TOOLS) if lacking else sandbox.closed():
        return Proof(level="L2", tools=tools, why_not_higher=reason)
    image = _extracted(proving)
    if (proving.out / SELF_TEST).exists():
        tools[SELF_TEST] = f"Python {platform.python_version()}"
    for slot in SLOTS:
        _installed(proving, slot, image)
    return Proof(
        level="L3",
        tools={**tools, "swupdate": programs.version("swupdate"), "bwrap": programs.version(sandbox.PROGRAM)},
        why_not_higher=(
            "SWUpdate installed it and RAUC extracted it in a sandbox, with files for partitions: no bootloader and no processor of "
            f"the device took part. The model itself gave its golden output by {tools['runtime']}"
        ),
    )


def _extracted(proving: Proving) -> Path:
    """What RAUC makes of the bundle, which only then notices a corrupt payload: → the image. Raises StepFailed."""
    out, scratch = proving.out, proving.scratch
    raucb, made = out / f"{proving.values['name']}.raucb", scratch / "extracted"
    _configure(out, scratch)
    words = ["rauc", "--conf=system.conf", "extract", str(raucb), str(made)]
    done = sandbox.run(words, scratch=scratch, read=(out,), environment={"TMPDIR": str(scratch)})
    if done.returncode:
        raise StepFailed(f"rauc does not extract {raucb.name}: {programs.last_lines(done)}")
    _held(proving, made / IMAGE)
    return made / IMAGE


def _held(proving: Proving, image: Path) -> None:
    """That an image holds the model of the bundle, and nothing that its own manifest does not list; and its self-test passes.

    Raises StepFailed.
    """
    folder = proving.scratch / "held"
    programs.call(["unsquashfs", "-quiet", "-no-progress", "-dest", str(folder), str(image)], cwd=proving.scratch, packages=TOOLS)
    problems = bundle.verify(folder)
    for place in proving.payload.files:
        if not (folder / place).is_file() or digest.of_file(str(folder / place)) != digest.of_file(str(proving.out / place)):
            problems.append(f"{place}: is not the bundle's")
    if problems:
        raise StepFailed(f"{image.name} as it arrived: {problems[0]}")
    if (folder / SELF_TEST).exists():
        bundle.self_test(folder, SELF_TEST)
    shutil.rmtree(folder)


def _installed(proving: Proving, slot: str, image: Path) -> None:
    """Install into one slot: its first bytes are then the image, and the other slot is as it was. Raises StepFailed."""
    size = image.stat().st_size
    slots = {name: proving.scratch / f"slot_{name}" for name in SLOTS}
    for path in slots.values():
        with path.open("wb") as file:
            file.truncate(size + 4096)
    empty = digest.of_file(str(slots[slot]))
    done = install(proving.out, proving.values, slot, slots, proving.scratch)
    if not succeeded(done):
        raise StepFailed(f"swupdate does not install {proving.values['name']}.swu: {programs.last_lines(done)}")
    with slots[slot].open("r+b") as file:
        file.truncate(size)
    if digest.of_file(str(slots[slot])) != digest.of_file(str(image)):
        raise StepFailed(f"swupdate ended well, but slot {slot} does not hold the image")
    if any(digest.of_file(str(path)) != empty for name, path in slots.items() if name != slot):
        raise StepFailed(f"swupdate wrote to another slot than {slot}")


def succeeded(done: "subprocess.CompletedProcess[bytes]") -> bool:
    """By what SWUpdate says: its status is 1 after some successes on a busy machine (2022.12: five of about sixty)."""
    return b"SWUPDATE successful" in done.stdout


def install(
    out: Path, values: Mapping[str, Any], slot: str, slots: Mapping[str, Path], scratch: Path
) -> "subprocess.CompletedProcess[bytes]":
    """SWUpdate as a device calls it, in a sandbox with a root of its own where these files stand for the slots' partitions."""
    root = scratch / f"root_{slot}"
    root.mkdir()
    devices = {values[f"slot_{name}"]: path for name, path in slots.items()}
    words: Sequence[str] = (
        *("swupdate", "--no-transaction-marker", "--no-state-marker", "--bootloader", "none"),
        *("--key", str(out / CERTIFICATE), "--hwrevision", f"{BOARD}:{values['revisions'][0]}"),
        *("--select", f"stable,{slot}", "--image", str(out / f"{values['name']}.swu")),
    )
    return sandbox.run(words, scratch=scratch, root=root, read=(out,), devices=devices)
