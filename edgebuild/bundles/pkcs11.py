"""Keys in PKCS#11 tokens, as what signs bundles takes them: OpenSSL's engine, Java's provider, OpenSC's pkcs11-tool.

They run in the worker, outside the sandbox: a token's library may lie, and keep its keys, anywhere. The PIN goes from the worker's
environment to theirs, and is in no argument and no file.
"""

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgebuild.bundles import programs
from edgebuild.errors import StepFailed
from edgebuild.signing import Pair
from edgebuild.token import module, parsed

ENGINE, TOOL = f"/usr/lib/{platform.machine()}-linux-gnu/engines-3/pkcs11.so", "pkcs11-tool"
BY_ENGINE: Mapping[str, str] = {ENGINE: "libengine-pkcs11-openssl"}
BY_TOOL: Mapping[str, str] = {TOOL: "opensc"}
PACKAGES: Mapping[str, str] = {**BY_ENGINE, **BY_TOOL}
ADVICE = "its token, object and id must be there, and the PIN that of the token"
# libp11 0.4.12, which Debian 12 has, reads no key of a token that one of Ed25519 is in too.
ENGINE_ADVICE = f"{ADVICE}; OpenSSL's engine takes no token that an Ed25519 key is in too"
PROVIDER_ADVICE = f"{ADVICE}, and with the key its certificate, of the same id and label, by which alone Java finds it"
EXPORTS = "--add-exports=jdk.crypto.cryptoki/sun.security.pkcs11=ALL-UNNAMED"  # apksigner names Java's provider by its class


def call(
    words: Sequence[str], pair: Pair, *, cwd: Path, environment: Mapping[str, str] | None = None, advice: str = ADVICE
) -> str:
    """Run what signs; it finds the PIN in the variable programs.PASSWORD. → what it printed. Raises StepFailed."""
    given = {programs.PASSWORD: pair.password(), **(environment or {})}
    try:
        return programs.call(words, cwd=cwd, packages=PACKAGES, environment=given)
    except StepFailed as error:
        raise StepFailed(f"package.sign: {address(pair)} cannot be signed with: {error}; {advice}") from error


def address(pair: Pair) -> str:
    """The URI as tools take it that are told the library apart."""
    return pair.key.partition("?")[0]


def engine(pair: Pair) -> dict[str, str]:
    """What openssl and rauc find library and PIN by, in their environment."""
    library = module(pair.key)
    return {"PKCS11_MODULE_PATH": library, "RAUC_PKCS11_MODULE": library, "RAUC_PKCS11_PIN": pair.password()}


def provider(pair: Pair, scratch: Path) -> list[str]:
    """apksigner's options, to a file in `scratch` with Java's own names for library and slot. Raises StepFailed."""
    file, asked = scratch / "pkcs11.cfg", parsed(pair.key)
    file.write_text(f"name = edgebuild\nlibrary = {module(pair.key)}\nslot = {_slot(pair, scratch)}\n", encoding="utf-8")
    words = ["--ks", "NONE", "--ks-type", "PKCS11", "--ks-pass", f"env:{programs.PASSWORD}"]
    words += ["--provider-class", "sun.security.pkcs11.SunPKCS11", "--provider-arg", str(file)]
    return [*words, "--ks-key-alias", asked["object"].decode()] if "object" in asked else words


def signature(pair: Pair, data: bytes, scratch: Path) -> bytes:
    """Ed25519 (RFC 8032) of `data`, 64 bytes. Raises StepFailed."""
    asked, source, target = parsed(pair.key), scratch / "to-sign", scratch / "signature"
    words = [TOOL, "--module", module(pair.key), "--slot", _slot(pair, scratch), "--login", "--pin", f"env:{programs.PASSWORD}"]
    listed = call([*words, "--list-objects", "--type", "privkey"], pair, cwd=scratch)
    wanted = {"label": asked.get("object", b"").decode(), "ID": asked.get("id", b"").hex()}
    keys = {one.get("ID", "") for one in _found(listed, wanted) if "EC_EDWARDS" in one[""]}
    if len(keys) != 1:
        raise StepFailed(
            f"package.sign: the token has {len(keys) or 'no'} Ed25519 keys that are {address(pair)}; name one by object=LABEL or id=%01"
        )
    source.write_bytes(data)
    words += ["--sign", "--mechanism", "EDDSA", "--id", *keys, "--input-file", str(source), "--output-file", str(target)]
    call(words, pair, cwd=scratch)
    return target.read_bytes()


def _slot(pair: Pair, scratch: Path) -> str:
    """The number of the slot that the token is in, such as 0x1, which its library alone knows. Raises StepFailed."""
    asked = parsed(pair.key)
    wanted = {"token label": asked.get("token", b"").decode(), "serial num": asked.get("serial", b"").decode()}
    listed = call([TOOL, "--module", module(pair.key), "--list-token-slots"], pair, cwd=scratch)
    slots = [match[1] for one in _found(listed, wanted) if (match := re.search(r"\((0x[0-9a-f]+)\)", one[""]))]
    if len(slots) != 1:
        raise StepFailed(
            f"package.sign: {len(slots) or 'no'} tokens are {address(pair)}; name one that is there by token=LABEL or serial=NUMBER"
        )
    return slots[0]


def _found(listed: str, wanted: Mapping[str, str]) -> list[dict[str, str]]:
    """Of what pkcs11-tool lists those with all that is wanted, where that is not empty: their lines by name, the first by none."""
    found: list[dict[str, str]] = []
    for line in listed.splitlines():
        name, _, value = line.partition(":")
        if not line.startswith(" "):
            found.append({"": line})
        elif found:
            found[-1][name.strip()] = value.strip()
    return [one for one in found if all(one.get(name) == value for name, value in wanted.items() if value)]
