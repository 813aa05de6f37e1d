"""Keys that releases are signed with: minisign's files, or Ed25519 keys in PKCS#11 tokens. The only module that knows minisign.

Formats: https://jedisct1.github.io/minisign/. A secret is in no argument: a password or a token's PIN comes from the variable
EDGEBUILD_KEY_PASSWORD, which is taken out of the environment before anything else runs.
"""

import base64
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgebuild.errors import StepFailed, UserError
from edgebuild.files import locked, user_cache
from edgebuild.token import SCHEME

if TYPE_CHECKING:
    from minisign import PublicKey, SecretKey

PASSWORD = "EDGEBUILD_KEY_PASSWORD"
LARGEST = 1 << 14  # bytes of a key or signature file: minisign's have a few hundred
COMMENT = "signature of a release by edgebuild, for minisign and edgebuild release --verify"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """`sign`: (bytes, trusted comment) → a minisign signature file's text. `public`: the text of the file that verifies it."""

    id: str
    public: bytes
    sign: Callable[[bytes, str], bytes]
    test: bool = False


# -- the signing side ---------------------------------------------------------------------------------------------------
def password() -> str:
    """The password or PIN that is given, once: no process that is started later inherits it."""
    return os.environ.pop(PASSWORD, "")


def load(word: str, password: str) -> Key:
    """The key in a file, or behind a `pkcs11:` URI. Raises UserError where there is none, it is not private, or wants another password."""
    if not word.startswith(SCHEME):
        key = _of_file(word, password)
        if _is_test(key.public):
            raise UserError(f"{word} is your test key; where that is meant: --test-key")
        return key
    from edgebuild.token import Token

    token = Token(word, password, PASSWORD)
    number = hashlib.sha256(token.public).digest()[:8]  # a token keeps none of minisign's key numbers
    public = _minisign().PublicKey.from_base64(base64.b64encode(b"Ed" + number + token.public))

    def sign(data: bytes, comment: str) -> bytes:
        first = token.sign(hashlib.blake2b(data).digest())
        lines = [
            f"untrusted comment: {COMMENT}".encode(),
            base64.b64encode(b"ED" + number + first),
            f"trusted comment: {comment}".encode(),
            base64.b64encode(token.sign(first + comment.encode())),
        ]
        return b"\n".join(lines) + b"\n"

    return Key(id=key_id(public), public=_text(public), sign=sign)


def new(path: str, password: str) -> Key:
    """Make a pair, `path` (mode 0600) and `path`.pub; encrypted where a password is given. Raises UserError where one is there."""
    secret = _minisign().KeyPair.generate().secret_key
    key = _key(secret)
    if password:
        secret.encrypt(password)
    made: list[str] = []
    try:
        for name, text, mode in ((path, bytes(secret) + b"\n", 0o600), (f"{path}.pub", key.public, 0o644)):
            _write_new(name, text, mode)
            made.append(name)
    except BaseException as error:
        for name in made:
            os.unlink(name)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or path} cannot be written: {error.strerror}") from error
        raise
    return key


def test() -> Key:
    """The user's one test key, made when it is first asked for: whoever can read this user's files can sign with it."""
    path = _test_file()
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with locked(f"{path}.lock"):
        if not os.path.exists(path):
            new(path, "")
    return replace(_of_file(path, ""), test=True)


def test_public() -> str:
    """Where the test key's public half lies."""
    return f"{_test_file()}.pub"


def _test_file() -> str:
    return os.path.join(user_cache(), "keys", "release-test.key")


def _of_file(path: str, password: str) -> Key:
    minisign = _minisign()
    try:
        with open(path, "rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(LARGEST)
    except OSError as error:
        advice = "; to make one: edgebuild key new FILE" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"the key {path} cannot be read: {error.strerror}{advice}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UserError(f"{path} can be read by other users (mode {stat.S_IMODE(mode):04o}); first: chmod 600 {path}")
    try:
        secret = minisign.SecretKey.from_bytes(text.strip())  # a CI's secret has a newline too many, or too few
    except minisign.Error as error:
        raise UserError(f"{path} is no secret key of minisign ({error}); `edgebuild key new FILE` makes one") from error
    if secret.is_encrypted():
        if not password:
            raise UserError(f"{path} is encrypted; put its password into the variable {PASSWORD}")
        try:
            secret.decrypt(password)
        except minisign.Error as error:
            raise UserError(f"{path}: {error} in the variable {PASSWORD}") from error
    return _key(secret)


def _key(secret: "SecretKey") -> Key:
    def sign(data: bytes, comment: str) -> bytes:
        return bytes(secret.sign(data, prehash=True, untrusted_comment=COMMENT, trusted_comment=comment)) + b"\n"

    public = secret.get_public_key()
    return Key(id=key_id(public), public=_text(public), sign=sign)


def _text(public: "PublicKey") -> bytes:
    public.untrusted_comment = f"minisign public key {key_id(public)}"
    return bytes(public) + b"\n"


def _is_test(public: bytes) -> bool:
    try:
        with open(test_public(), "rb") as file:
            return file.read(LARGEST).splitlines()[1:2] == public.splitlines()[1:2]
    except OSError:
        return False


def _write_new(path: str, text: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path} exists already; keys are never overwritten: name another file") from error
    with open(handle, "wb") as file:
        file.write(text)
        os.fchmod(handle, mode)
        os.fsync(handle)


# -- the verifying side -------------------------------------------------------------------------------------------------
def read_public(path: str) -> "PublicKey":
    """A public key's file. Raises UserError where it is none."""
    minisign = _minisign()
    try:
        with open(path, "rb") as file:
            return parsed(file.read(LARGEST))
    except OSError as error:
        raise UserError(f"the public key {path} cannot be read: {error.strerror}") from error
    except minisign.Error as error:
        raise UserError(
            f"{path} is no public key of minisign ({error}); `edgebuild key new FILE` puts it into FILE.pub"
        ) from error


def parsed(text: bytes) -> "PublicKey":
    return _minisign().PublicKey.from_bytes(text)


def check(data: bytes, signature: bytes, public: "PublicKey") -> str:
    """→ the trusted comment. Raises StepFailed where `signature` is not one of `data` by `public`."""
    minisign = _minisign()
    try:
        found = minisign.Signature.from_bytes(signature)
        if not found.is_prehashed():
            raise minisign.ParseError("its form is an old one, of the file itself and not of its hash")
        public.verify(data, found)
        if found.untrusted_comment != COMMENT or bytes(found) + b"\n" != signature:
            raise minisign.VerifyError("its signature was changed where minisign does not look")
    except minisign.Error as error:
        raise StepFailed(f"is not signed by the key {key_id(public)}: {error}") from error
    return str(found.trusted_comment)


def key_id(public: "PublicKey") -> str:
    """As minisign prints it: eight bytes, the last one first."""
    return base64.b64decode(public.to_base64())[9:1:-1].hex().upper()


def _minisign() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise UserError("signatures need the package py-minisign: pip install 'edgebuild[release]'") from error
    return minisign
