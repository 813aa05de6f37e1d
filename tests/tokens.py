"""A token of SoftHSM's, with keys that were made elsewhere."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgebuild.bundles import programs

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "27182818"  # such as no other file has


@dataclass(frozen=True)
class Token:
    """`environment`: what its library finds it by."""

    environment: Mapping[str, str]

    def uri(self, name: str) -> str:
        return f"pkcs11:token=t;object={name}?module-path={SOFTHSM}"

    def run(self, *words: str) -> None:
        subprocess.run(words, env=os.environ | self.environment, capture_output=True, check=True)

    def take(self, number: int, key: Path, name: str) -> None:
        """Put a private key in PKCS #8, with its public half, into it."""
        self.run("softhsm2-util", "--import", str(key), "--token", "t", "--label", name, "--id", f"{number:02x}", "--pin", PIN)

    def take_certificate(self, number: int, certificate: Path, name: str) -> None:
        der = certificate.with_suffix(".der")
        self.run("openssl", "x509", "-in", str(certificate), "-outform", "DER", "-out", str(der))
        words = ["pkcs11-tool", "--module", str(SOFTHSM), "--token-label", "t", "--login", "--pin", PIN]
        self.run(*words, "--write-object", str(der), "--type", "cert", "--id", f"{number:02x}", "--label", name)


def make(folder: Path) -> Token:
    """An empty one. Skips the test where SoftHSM is missing, fails it in CI."""
    if not shutil.which("softhsm2-util"):
        assert not os.environ.get("CI"), "softhsm2-util is missing: apt-get install softhsm2"
        pytest.skip("softhsm2-util is not installed")
    (folder / "tokens").mkdir(parents=True)
    (folder / "softhsm.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\n")
    token = Token({"SOFTHSM2_CONF": str(folder / "softhsm.conf")})
    token.run("softhsm2-util", "--init-token", "--free", "--label", "t", "--pin", PIN, "--so-pin", "5678")
    return token


def listen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every program that is called from here on for a bundle."""
    said: list[list[str]] = []
    call = programs.call

    def told(words: Sequence[str], **how: Any) -> str:
        said.append(list(words))
        return call(words, **how)

    monkeypatch.setattr(programs, "call", told)
    return said
