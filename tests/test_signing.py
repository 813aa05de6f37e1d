"""Keys of bundles: the user's test pair, made once, and what a target names, held against itself."""

import datetime
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from edgebuild import keys, release, signing
from edgebuild.bundles import SIGNED, apk, firmware_linux, firmware_mcu
from edgebuild.errors import UserError
from edgebuild.project import Project
from tests.conftest import TARGET, Lab

TAKES, RAW = firmware_linux.TAKES, firmware_mcu.TAKES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(
    folder: Path,
    name: str,
    password: bytes = b"",
    key: "ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | None" = None,
) -> Path:
    """A key and its certificate in PEM; → the key's path."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime(2026, 1, 1)
    built = x509.CertificateBuilder(who, who, key.public_key(), 1, now, now + datetime.timedelta(days=9))
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    (folder / f"{name}.crt").write_bytes(built.sign(key, algorithm).public_bytes(Encoding.PEM))
    return folder / f"{name}.key"


def test_the_users_pair_is_made_once_and_closed_to_others(cache: Path) -> None:
    with ThreadPoolExecutor(8) as many:
        pairs = list(many.map(lambda _: signing.users_pair(TAKES), range(8)))
    assert len({(pair, Path(pair.key).read_bytes()) for pair in pairs}) == 1
    pair, raw = pairs[0], signing.users_pair(RAW)
    assert pair.test
    assert raw.test
    assert {Path(path).stat().st_mode & 0o777 for path in (*signing.files(pair), *signing.files(raw))} == {0o600}
    assert Path(pair.key).parent.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in cache.joinpath("edgebuild").iterdir()) == ["test-key", "test-key.lock"]
    found = x509.load_pem_x509_certificate(pair.certificate.read_bytes() if pair.certificate else b"")
    assert "not for release" in found.subject.rfc4514_string()
    assert signing.public(pair) == signing.public(signing.users_pair(TAKES)) != signing.public(raw)
    assert signing.pair_from_json(pair.to_json()) == pair
    for takes in (TAKES, RAW, apk.TAKES):
        own = signing.users_pair(takes)
        given = {"key": own.key, **({"cert": str(own.certificate)} if own.certificate else {})}
        assert signing.named(given, takes) == replace(own, test=False), "it is of a type that its kind takes"


def test_openssl_takes_the_test_pair(tmp_path: Path) -> None:
    """What signs and verifies CMS on devices asks for a certificate that is its own root and may sign."""
    pair = signing.users_pair(TAKES)
    (tmp_path / "data").write_bytes(b"data")
    sign = [
        "openssl",
        "cms",
        "-sign",
        "-in",
        "data",
        "-binary",
        "-signer",
        pair.certificate,
        "-inkey",
        pair.key,
        "-outform",
        "DER",
        "-out",
        "sig",
    ]
    subprocess.run(list(map(str, sign)), cwd=tmp_path, check=True, capture_output=True)
    verify = [
        "openssl",
        "cms",
        "-verify",
        "-in",
        "sig",
        "-inform",
        "DER",
        "-content",
        "data",
        "-binary",
        "-CAfile",
        pair.certificate,
    ]
    subprocess.run(list(map(str, verify)), cwd=tmp_path, check=True, capture_output=True)


def named(key: str, certificate: str = "", pin: str = "", takes: signing.Takes = TAKES) -> signing.Pair:
    given = {"key": key, "cert": certificate, "pin_env": pin}
    return signing.named({name: value for name, value in given.items() if value}, takes)


def test_what_a_target_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN", "secret")
    key = made(tmp_path, "a", b"secret")
    pair = named(str(key), str(tmp_path / "a.crt"), "PIN")
    assert (pair.key, pair.in_token, pair.test) == (str(key), False, False)
    assert len(signing.public(pair)) == 64
    monkeypatch.delenv("PIN")
    assert len(signing.public(pair)) == 64  # the certificate alone will do
    assert "secret" not in str(pair.to_json())
    raw = made(tmp_path, "raw", key=ed25519.Ed25519PrivateKey.generate())
    assert named(str(raw), takes=RAW).key == str(raw)


def test_a_key_in_a_token_is_known_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its certificate, or where a kind takes none, by its public half: a plan asks no token."""
    monkeypatch.setenv("PIN", "secret")
    (tmp_path / "library.so").touch()
    uri = f"pkcs11:token=t;object=a?module-path={tmp_path / 'library.so'}"
    key = named(str(made(tmp_path, "a")), str(tmp_path / "a.crt"))
    pair = named(uri, str(tmp_path / "a.crt"), "PIN")
    assert signing.public(pair) == signing.public(key)
    assert signing.files(pair) == [str(tmp_path / "a.crt")]
    assert signing.pair_from_json(pair.to_json()) == pair
    assert {"PIN", "SOFTHSM2_CONF"} <= set(signing.variables(pair.to_json()))
    assert signing.variables(key.to_json()) == ()
    raw = named(str(made(tmp_path, "raw", key=ed25519.Ed25519PrivateKey.generate())), takes=RAW)
    (tmp_path / "raw.pub").write_bytes(signing.public_pem(raw))
    for public in ("raw.pub", "raw.crt"):
        assert signing.public(named(uri, str(tmp_path / public), "PIN", RAW)) == signing.public(raw)


def test_a_relative_path_is_one_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    assert named("a.key", "a.crt").key == str(tmp_path / "a.key")


URI = f"pkcs11:object=x?module-path={__file__}"  # a library that nobody opens


@pytest.mark.parametrize(
    ("key", "certificate", "pin", "message"),
    [
        ("none.key", "a.crt", "", "none.key cannot be read: No such file"),
        ("a.key", "", "", "needs `cert` too, the certificate of the key's public half; to make both: openssl req -x509 "),
        ("a.key", "none.crt", "", "none.crt cannot be read"),
        ("a.key", "b.crt", "", "b.crt is the certificate of another key than a.key"),
        ("a.key", "a.key", "", "a.key is no certificate in PEM"),
        ("a.crt", "a.crt", "", "a.crt is no private key in PEM"),
        ("locked.key", "locked.crt", "", "locked.key is encrypted: name `pin_env`"),
        ("locked.key", "locked.crt", "UNSET", "locked.key is encrypted: name `pin_env`, and set UNSET"),
        ("locked.key", "locked.crt", "WRONG", "locked.key is no private key in PEM that its password opens"),
        ("a.key", "a.crt", "WRONG", "a.key has no password"),
        (
            "raw.key",
            "raw.crt",
            "",
            "raw.key is of type Ed25519, and an update for Linux is signed with RSA or EC; to make one: openssl req",
        ),
        ("raw.key", "", "", "raw.key is of type Ed25519"),
        ("448.key", "448.crt", "", "448.key is of type Ed448, and"),
        ("pkcs11:object=x", "a.crt", "WRONG", "the key's URI names no library: pkcs11:token=NAME"),
        (f"{URI}&pin-value=1", "a.crt", "WRONG", "pin-value has no place in a key's URI"),
        (URI.replace(".py", ".so"), "a.crt", "WRONG", "the token's library .*test_signing.so is not there"),
        (URI, "", "WRONG", "needs `cert` too: a key in a token is known by its certificate"),
        (URI, "a.crt", "", "the PIN of a token is needed: name `pin_env`, and set that variable"),
        (URI, "a.crt", "UNSET", "the PIN of a token is needed: name `pin_env`, and set UNSET"),
        (URI, "raw.crt", "WRONG", "pkcs11:object=x.* is of type Ed25519, and an update for Linux is signed with RSA or EC"),
        (URI, "raw.pub", "WRONG", "raw.pub is no certificate in PEM"),
    ],
)
def test_what_is_refused(
    key: str, certificate: str, pin: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, password in (("a", b""), ("b", b""), ("locked", b"secret")):
        made(tmp_path, name, password)
    made(tmp_path, "raw", key=ed25519.Ed25519PrivateKey.generate())
    made(tmp_path, "448", key=ed448.Ed448PrivateKey.generate())
    (tmp_path / "raw.pub").write_bytes(signing.public_pem(signing.Pair(key=str(tmp_path / "raw.key"), certificate=None)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRONG", "wrong")
    with pytest.raises(ValueError, match=f"^{message}"):
        named(key, certificate, pin)


@pytest.mark.parametrize(
    ("kind", "facts", "name", "message"),
    [
        ("android", {}, "raw", "raw.key is of type Ed25519, and an APK is signed with RSA or EC"),
        ("firmware", {}, "raw", "raw.key is of type Ed25519, and an update for Linux is signed with RSA or EC"),
        (
            "firmware",
            {"bootloader": "mcuboot"},
            "a",
            "a.key is of type EC, and an MCUboot image is signed with Ed25519; to make one: openssl genpkey",
        ),
    ],
)
def test_types_that_a_kind_does_not_take(kind: str, facts: dict[str, str], name: str, message: str, tmp_path: Path) -> None:
    made(tmp_path, "raw", key=ed25519.Ed25519PrivateKey.generate())
    made(tmp_path, "a")
    with pytest.raises(ValueError, match=f"^{message}"):
        named(str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.crt"), takes=SIGNED[kind].signs(facts))


def test_a_plan_refuses_before_any_work_until_it_is_mended(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With file, line and what to do; also where what mends it is no file that a plan could have seen."""
    made(lab.root, "raw", key=ed25519.Ed25519PrivateKey.generate())
    made(lab.root, "a", b"secret")
    monkeypatch.chdir(lab.root)

    def problem(sign: str) -> str:
        (lab.root / "targets" / "one.yaml").write_text(f"{TARGET}package:\n  kind: firmware\n  sign: {{{sign}}}\n")
        return Project().problems.get("one", "")

    assert problem("key: raw.key").startswith("targets/one.yaml:7: package.sign: raw.key is of type Ed25519, and")
    assert "a.key is encrypted: name `pin_env`, and set that variable" in problem("key: a.key, cert: a.crt")
    locked = "key: a.key, cert: a.crt, pin_env: PIN"
    assert problem(locked) == problem(locked) != ""
    monkeypatch.setenv("PIN", "secret")
    assert Project().problems == {}
    token = f'key: "{URI}", cert: a.crt, pin_env: PIN'
    monkeypatch.setattr(firmware_linux, "TAKES", replace(TAKES, token={"sh": "dash"}))
    assert problem(token) == ""
    assert Project().recipes[Project().steps["package:one"].recipe]["params"]["programs"]["sh"], (
        "what reads a token is in the key"
    )
    monkeypatch.setattr(firmware_linux, "TAKES", replace(TAKES, token={"no-such-program": "no-such-package"}))
    assert problem(f"{token} ") == (
        "targets/one.yaml:7: package.sign: no-such-program is not installed: apt-get install no-such-package; "
        "an update for Linux is signed by it with a key in a token"
    )
    assert not (lab.root / "build").exists()


def test_a_key_that_signs_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may stand in a file that is for another kind too, which is signed; where none is, it is refused where it stands."""
    made(lab.root, "a")
    monkeypatch.chdir(lab.root)
    platform = (lab.root / "platforms" / "fake.yaml").read_text()
    sign = "{kind: firmware, sign: {key: a.key, cert: a.crt}}"

    def problems(package: str, own: str) -> dict[str, str]:
        (lab.root / "platforms" / "board.yaml").write_text(platform.replace("{kind: folder}", package))
        (lab.root / "targets" / "many.yaml").write_text(
            TARGET.replace("platform: fake", "matrix: {platform: [fake, board]}") + own
        )
        return Project().problems

    here = sign.replace("kind: firmware, ", "")
    assert problems("{kind: firmware}", f"package: {here}\n") == {}
    project = Project()
    assert (project.targets["many-fake"]["sign"], bool(project.targets["many-board"]["sign"])) == (None, True)
    said = "package.sign: a bundle of the kind folder is not signed; those of android and firmware are; remove it; "
    found = problems("{kind: folder}", f"package: {here}\n")
    assert {name: text.partition("edgebuild release")[0] for name, text in found.items()} == {
        f"many-{name}": f"targets/many.yaml:5: {said}" for name in ("fake", "board")
    }
    assert problems(sign, "package: {kind: folder}\n") == {}, "a platform's key is for those of its targets that are signed"
    found = problems(sign.replace("firmware", "folder"), "")
    assert list(found) == ["many-board"]
    assert found["many-board"].startswith(f"platforms/board.yaml:5: {said}")


def test_by_a_variable_the_test_key_signs_whatever_a_target_names(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CI, whose jobs have no key but the one that releases; which takes none of what they sign."""
    (lab.root / "targets" / "one.yaml").write_text(f"{TARGET}package: {{kind: firmware, sign: {{key: a.key, cert: a.crt}}}}\n")
    monkeypatch.chdir(lab.root)
    assert "package.sign: a.crt cannot be read: No such file" in Project().problems["one"]
    monkeypatch.setenv("EDGEBUILD_SIGN", "test")
    project = Project()
    assert project.problems == {}
    assert project.targets["one"]["sign"] == signing.users_pair(firmware_linux.TAKES).to_json()
    with pytest.raises(UserError, match="one's bundle is signed with your test key, as EDGEBUILD_SIGN says: unset it, or "):
        release._check_targets(project, keys.Key(id="", public=b"", sign=lambda data, comment: b""))
    made(lab.root, "a")
    monkeypatch.setenv("EDGEBUILD_SIGN", "")
    assert Project().targets["one"]["sign"]["key"] == str(lab.root / "a.key")
    monkeypatch.setenv("EDGEBUILD_SIGN", "tset")
    assert "EDGEBUILD_SIGN is tset; set it to test" in Project().problems["one"]


def test_a_cache_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"^the test key cannot be made in .*file/edgebuild: Not a directory; set XDG_CACHE_HOME to"
    ):
        signing.users_pair(TAKES)
    assert os.listdir(tmp_path) == ["file"]


def test_without_a_key_the_targets_that_need_one_are_told_and_others_are_built(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        TARGET.replace("kind: folder", "kind: firmware") if "kind: folder" in TARGET else f"{TARGET}package: {{kind: firmware}}\n"
    )
    (lab.root / "targets" / "signed.yaml").write_text(text)
    monkeypatch.chdir(lab.root)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    project = Project()
    assert list(project.problems) == ["signed"]
    assert project.problems["signed"].startswith("targets/signed.yaml")
    assert "package.sign: the test key cannot be made in /proc/nowhere/edgebuild" in project.problems["signed"]
    assert "build:one" in project.steps
    monkeypatch.setenv("XDG_CACHE_HOME", str(lab.root / "cache"))
    (lab.root / "cache" / "edgebuild" / "test-key").mkdir(parents=True)
    assert "test-key is not whole; remove that folder, and it is made anew" in Project().problems["signed"]
