"""An Ed25519 key in a PKCS#11 token (a smart card, an HSM), by its URI (RFC 7512). The only module that knows PKCS#11.

pkcs11:token=release;object=models?module-path=/usr/lib/softhsm/libsofthsm2.so
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from edgebuild.errors import UserError

if TYPE_CHECKING:
    from pkcs11 import Session

SCHEME = "pkcs11:"
VARIABLES = ("SOFTHSM2_CONF", "OPENSC_CONF", "YUBIHSM_PKCS11_CONF")  # where libraries find their tokens
PATH, QUERY = ("token", "serial", "object", "id"), ("module-path",)


class Token:
    """`public`: the key's public half, 32 bytes. Raises UserError where the URI, the PIN or the token is wrong."""

    def __init__(self, uri: str, pin: str, variable: str) -> None:
        self._asked, self._pin, self._variable = parsed(uri), pin, variable
        with self._session() as session:
            self.public = bytes(self._key(session, "PUBLIC_KEY")[_attribute("EC_POINT")])[-32:]  # behind DER's head, if any

    def sign(self, data: bytes) -> bytes:
        """Ed25519 (RFC 8032) of `data`, 64 bytes."""
        from pkcs11 import Mechanism

        with self._session() as session:
            return bytes(self._key(session, "PRIVATE_KEY").sign(data, mechanism=Mechanism.EDDSA))

    @contextmanager
    def _session(self) -> "Iterator[Session]":
        try:
            import pkcs11
        except ImportError as error:
            raise UserError("keys in tokens need the package python-pkcs11: pip install 'edgebuild[pkcs11]'") from error
        try:
            library = pkcs11.lib(self._asked["module-path"].decode())
            names = {"token_label": self._asked.get("token", b"").decode(), "token_serial": self._asked.get("serial")}
            token = library.get_token(**{name: value for name, value in names.items() if value})
            with token.open(user_pin=self._pin or None) as session:
                yield session
        except (pkcs11.PKCS11Error, RuntimeError) as error:
            why = str(error) or type(error).__name__
            advice = f"; the PIN is taken from the variable {self._variable}" if "Pin" in type(error).__name__ else ""
            raise UserError(f"the token cannot be used: {why}{advice}") from error

    def _key(self, session: "Session", kind: str) -> Any:
        from pkcs11 import KeyType, ObjectClass

        wanted: dict[Any, Any] = {_attribute("CLASS"): ObjectClass[kind], _attribute("KEY_TYPE"): KeyType.EC_EDWARDS}
        if "object" in self._asked:
            wanted[_attribute("LABEL")] = self._asked["object"].decode()
        if "id" in self._asked:
            wanted[_attribute("ID")] = self._asked["id"]
        found = list(session.get_objects(wanted))
        if len(found) != 1:
            what = "no" if not found else f"{len(found)}"
            pin = "" if self._pin else f", and its PIN is taken from the variable {self._variable}"
            raise UserError(
                f"the token has {what} Ed25519 {kind.lower().replace('_', ' ')} of that name: name one by object=LABEL or id=%01{pin}"
            )
        return found[0]


def _attribute(name: str) -> Any:
    from pkcs11 import Attribute

    return Attribute[name]


def module(uri: str) -> str:
    """The library that a key's URI names. Raises UserError where the URI is wrong."""
    return parsed(uri)["module-path"].decode()


def parsed(uri: str) -> dict[str, bytes]:
    """PATH's and QUERY's attributes of a key's URI, those that it has. Raises UserError where it is wrong."""
    path, _, query = uri.partition(":")[2].partition("?")
    found: dict[str, bytes] = {}
    for parts, known in ((path.split(";"), PATH), (query.split("&"), QUERY)):
        for part in filter(None, parts):
            name, _, value = part.partition("=")
            if name in ("pin-value", "pin-source"):
                raise UserError(
                    f"{name} has no place in a key's URI, where others can read it; the PIN comes from a variable (README)"
                )
            if name not in known:
                raise UserError(f'"{name}" is not known in a key\'s URI; known: {", ".join((*PATH, *QUERY))}')
            found[name] = unquote_to_bytes(value)
    if "module-path" not in found:
        raise UserError("the key's URI names no library: pkcs11:token=NAME;object=NAME?module-path=/usr/lib/….so")
    return found
