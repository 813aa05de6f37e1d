"""What bundles are signed with: the pair that a target names by `package.sign`, else the user's test pair, made once.

The only module that knows cryptography's keys of bundles. A private key is used by whoever signs; a plan opens it, and no token.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild.errors import StepFailed, UserError, shown
from edgebuild.files import locked, mine, remove_tree, user_cache
from edgebuild.token import SCHEME, VARIABLES, module

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

KEY, CERTIFICATE, ED25519 = "key.pem", "certificate.pem", "ed25519.pem"
TEST = "test"
SUBJECT = "edgebuild test key, not for release"
RSA_BITS = 2048  # as Android's own keys for debugging
RSA, EC, EDWARDS = "RSA", "EC", "Ed25519"  # types of keys
CERTIFIED = "openssl req -x509 -newkey rsa:3072 -noenc -days 9125 -subj /CN=NAME -keyout key.pem -out cert.pem"  # makes a pair
SINCE, UNTIL = datetime.datetime(2020, 1, 1), datetime.datetime(2049, 12, 31)  # no clock of a device is before or after


@dataclass(frozen=True, kw_only=True, slots=True)
class Takes:
    """What a kind of bundle is signed with, as its tools have it. `keys`: types; `make`: the line that makes such a key.

    `certificate`: whether one goes with the key. `token`: what reads a key in a token, program or path → Debian's package.
    """

    what: str  # "an APK"
    keys: Sequence[str]
    make: str
    certificate: bool
    token: Mapping[str, str]

    @classmethod
    def certified(cls, what: str, token: Mapping[str, str]) -> Takes:
        """An RSA or EC key with a certificate."""
        return cls(what=what, keys=(RSA, EC), make=CERTIFIED, certificate=True, token=token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A private key, in a PEM file or by a `pkcs11:` URI in a token, and where the certificate of its public half is, in PEM.

    `pin`: the environment variable that holds the password of an encrypted key or a token's PIN, else empty. `secret`: what a worker
    took out of it, so that no other program finds it there. `test`: not for release.
    """

    key: str
    certificate: Path | None
    pin: str = ""
    test: bool = False
    secret: str = field(default="", repr=False, compare=False)

    @property
    def in_token(self) -> bool:
        return self.key.startswith(SCHEME)

    @property
    def name(self) -> str:
        return self.key if self.in_token else os.path.basename(self.key)

    def to_json(self) -> dict[str, Any]:
        certificate = str(self.certificate) if self.certificate else None
        return {"key": self.key, "certificate": certificate, "pin": self.pin, "test": self.test}

    def password(self) -> str:
        """Of the key's file or its token; empty where it has none."""
        return self.secret or (os.environ.get(self.pin, "") if self.pin else "")


def pair_from_json(value: Mapping[str, Any]) -> Pair:
    certificate = Path(value["certificate"]) if value["certificate"] else None
    return Pair(key=value["key"], certificate=certificate, pin=value["pin"], test=value["test"])


def taken(value: Mapping[str, Any]) -> Pair:
    """The pair that a worker signs with, whose password or PIN leaves the environment."""
    pair = pair_from_json(value)
    return replace(pair, secret=os.environ.pop(pair.pin, "")) if pair.pin else pair


def chosen(target: Mapping[str, str], takes: Takes, said: str) -> Pair:
    """The pair that a target names, else the user's test pair; that also where `said` is TEST, as where the target's keys are not.

    Raises ValueError with what is wrong and what to do.
    """
    if said not in ("", TEST):
        raise ValueError(f"EDGEBUILD_SIGN is {shown(said)}; set it to {TEST}, which signs with the test key, or unset it")
    return users_pair(takes) if said or not target else named(target, takes)


def variables(value: Mapping[str, Any]) -> tuple[str, ...]:
    """What whoever signs with a pair, as JSON has it, needs of the environment: the PIN, and what a token's library reads."""
    return (*filter(None, [value["pin"]]), *(VARIABLES if value["key"].startswith(SCHEME) else ()))


def named(given: Mapping[str, str], takes: Takes) -> Pair:
    """The pair that a target names, held against what its kind takes. Raises ValueError with what is wrong and what to do.

    A key in a token is known by its certificate: a plan is made where no token is, and the tool that signs holds one against the other.
    """
    certificate = Path(given["cert"]).absolute() if given.get("cert") else None
    where = given["key"] if given["key"].startswith(SCHEME) else os.path.abspath(given["key"])
    pair = Pair(key=where, certificate=certificate, pin=given.get("pin_env", ""))
    if pair.in_token:
        _check_token(pair)
    certified = _half(certificate, bare=not takes.certificate) if certificate else None
    half = certified if pair.in_token and certified else _private(pair).public_key()
    if (kind := _kind(half)) not in takes.keys:
        raise ValueError(
            f"{pair.name} is of type {kind}, and {takes.what} is signed with {' or '.join(takes.keys)}; to make one: {takes.make}"
        )
    if certified is None and takes.certificate:
        raise ValueError(f"needs `cert` too, the certificate of the key's public half; to make both: {takes.make}")
    if certificate and certified and _spki(certified) != _spki(half):
        raise ValueError(f"{certificate.name} is the certificate of another key than {pair.name}")
    return pair


def _check_token(pair: Pair) -> None:
    """All that can be told of a key in a token without that. Raises ValueError."""
    try:
        library = module(pair.key)
    except UserError as error:
        raise ValueError(str(error)) from error
    if os.path.isabs(library) and not os.path.isfile(library):
        raise ValueError(f"the token's library {library} is not there; correct module-path, or install it")
    if pair.certificate is None:
        raise ValueError(
            "needs `cert` too: a key in a token is known by its certificate, an Ed25519 key by its public half in PEM"
        )
    if not pair.password():
        raise ValueError(f"the PIN of a token is needed: name `pin_env`, and set {pair.pin or 'that variable'}")


def users_pair(takes: Takes) -> Pair:
    """The user's test pair of a type that is taken, made at the first call: RSA with a certificate that it signs itself, or Ed25519.

    RSA, for its signatures (PKCS #1 v1.5) are the same each time: ECDSA's would make every package another one. Raises ValueError
    where the user's cache takes no files, or part of it is gone.
    """
    folder = Path(user_cache(), "test-key")
    try:
        with locked(f"{folder}.lock"):
            if not folder.is_dir():
                _make(folder)
    except OSError as error:
        where = f"the test key cannot be made in {folder.parent}: {error.strerror}"
        raise ValueError(
            f"{where}; set XDG_CACHE_HOME to a folder that takes files, or name a key and its certificate"
        ) from error
    if not all((folder / name).is_file() for name in (KEY, CERTIFICATE, ED25519)):
        raise ValueError(f"the test key in {folder} is not whole; remove that folder, and it is made anew")
    if RSA in takes.keys:
        return Pair(key=str(folder / KEY), certificate=folder / CERTIFICATE, test=True)
    return Pair(key=str(folder / ED25519), certificate=None, test=True)


def public(pair: Pair) -> str:
    """sha256 of the public half, as SubjectPublicKeyInfo (RFC 5280 §4.1.2.7): all of a pair that a key of the store holds.

    Raises ValueError.
    """
    return hashlib.sha256(_spki(_public(pair))).hexdigest()


def public_pem(pair: Pair) -> bytes:
    """The public half, for whoever verifies. Raises StepFailed."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        return _public(pair).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    except ValueError as error:
        raise StepFailed(f"package.sign: {error}") from error


def der(pair: Pair) -> bytes:
    """The private key, unencrypted, as PKCS #8 in DER: for a tool that reads nothing else, and only while it runs. Raises StepFailed."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    try:
        return _private(pair).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    except ValueError as error:
        raise StepFailed(f"package.sign: {error}") from error


def signature(pair: Pair, data: bytes) -> bytes:
    """Ed25519 (RFC 8032) of `data`, 64 bytes, by a key in a file. Raises StepFailed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        private = _private(pair)
    except ValueError as error:
        raise StepFailed(f"package.sign: {error}") from error
    assert isinstance(private, Ed25519PrivateKey)  # `named` saw to it
    return private.sign(data)


def files(pair: Pair) -> list[str]:
    return [str(path) for path in (None if pair.in_token else pair.key, pair.certificate) if path]


def _public(pair: Pair) -> PublicKeyTypes:
    return _half(pair.certificate) if pair.certificate else _private(pair).public_key()


def _private(pair: Pair) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(Path(pair.key).read_bytes(), pair.password().encode() or None)
    except OSError as error:
        raise ValueError(f"{pair.name} cannot be read: {error.strerror}") from error
    except TypeError as error:  # a password is missing, or there is one too many
        wants = (
            f"is encrypted: name `pin_env`, and set {pair.pin or 'that variable'}" if not pair.password() else "has no password"
        )
        raise ValueError(f"{pair.name} {wants}") from error
    except Exception as error:  # its own exceptions share no base class
        raise ValueError(f"{pair.name} is no private key in PEM that its password opens") from error


def _half(path: Path, bare: bool = True) -> PublicKeyTypes:
    """The public key that a certificate is of, or where it may be `bare`, is there by itself. Raises ValueError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        data = path.read_bytes()
        if bare and b"-----BEGIN PUBLIC KEY-----" in data:
            return load_pem_public_key(data)
        return x509.load_pem_x509_certificate(data).public_key()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except Exception as error:  # as above
        raise ValueError(f"{path.name} is no certificate in PEM") from error


def _kind(key: PublicKeyTypes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    known = ((RSA, rsa.RSAPublicKey), (EC, ec.EllipticCurvePublicKey), (EDWARDS, ed25519.Ed25519PublicKey))
    return next((name for name, one in known if isinstance(key, one)), type(key).__name__.removesuffix("PublicKey"))


def _spki(key: PublicKeyTypes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _make(folder: Path) -> None:
    """Raises OSError where the user's cache takes no files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SUBJECT)])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), SINCE, UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    temporary = folder.with_name(f".tmp-{mine()}-test-key")
    try:
        temporary.mkdir(0o700, parents=True)
        for file, data in (
            (KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (ED25519, ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (CERTIFICATE, certificate.public_bytes(Encoding.PEM)),
        ):
            with open(os.open(temporary / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                target.write(data)
        temporary.rename(folder)
    except OSError:
        remove_tree(str(temporary))
        raise
