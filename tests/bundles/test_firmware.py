"""The kind `firmware` for Linux: installed by SWUpdate and extracted by RAUC in a sandbox, and refused once a byte or the key is another."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from edgebuild import bundle, digest, render, sandbox
from edgebuild.backends import onnxruntime
from edgebuild.bundles import BUNDLES, firmware, firmware_linux, pkcs11, programs
from edgebuild.errors import StepFailed
from edgebuild.signing import Pair
from tests import tokens
from tests.bundles import packing
from tests.bundles.hostile import WRITTEN
from tests.bundles.packing import FRAMEWORK, TEMPLATES, action, artifact, backend, files, own_pair, pack, report, require
from tests.bundles.test_templates import values as template_values
from tests.conftest import TARGET, Lab
from tests.test_cli import BIN
from tests.test_signing import made as key_made
from tests.test_verify import verify_here

DEVICES = {f"slot_{name}": path for name, path in zip("ab", firmware_linux.DEVICES, strict=True)}
VALUES = {"name": "small-firmware", "revisions": ["1.0"], **DEVICES}


@pytest.fixture(autouse=True)
def tools() -> None:
    require(firmware_linux.TOOLS)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle, packed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.environ.get("EDGEBUILD_TEST_CACHE", str(tmp_path_factory.getbasetemp() / "cache")))
        return pack("firmware", tmp_path_factory.mktemp("once"))


@pytest.fixture
def out(once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(once, tmp_path / "bundle")


def signed(place: Path, pair: Pair, **changes: Any) -> Path:
    """Packed with this pair."""
    made = replace(action("firmware", artifact("firmware", place / "artifact"), place / "out", **changes), key=pair)
    bundle.run(made, FRAMEWORK["firmware"], backend("firmware"), BUNDLES["firmware"])
    return made.outputs["bundle"]


def install(out: Path, scratch: Path, slot: str = "b") -> tuple["subprocess.CompletedProcess[bytes]", dict[str, bytes]]:
    """By SWUpdate, in the sandbox; → how it ended and what the slots hold then."""
    scratch.mkdir()
    slots = {name: scratch / f"slot_{name}" for name in "ab"}
    for path in slots.values():
        path.write_bytes(bytes(1 << 20))
    done = firmware_linux.install(out, VALUES, slot, slots, scratch)
    return done, {name: path.read_bytes() for name, path in slots.items()}


def extract(out: Path, scratch: Path) -> "subprocess.CompletedProcess[bytes]":
    scratch.mkdir()
    words = [
        "rauc",
        "--keyring",
        str(out / "certificate.pem"),
        "extract",
        str(out / "small-firmware.raucb"),
        str(scratch / "made"),
    ]
    return sandbox.run(words, scratch=scratch, read=(out,), environment={"TMPDIR": str(scratch)})


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def make_pair(folder: Path, name: str, issuer: "Pair | None" = None, password: str = "") -> Pair:
    """A P-256 pair by openssl; its certificate by `issuer`, else by itself."""
    folder.mkdir(exist_ok=True)
    key, certificate = folder / f"{name}.pem", folder / f"{name}.crt"
    words = ["openssl", "req", "-new", "-x509", "-days", "3650", "-subj", f"/CN={name}", "-newkey", "ec"]
    words += ["-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", str(key), "-out", str(certificate)]
    words += ["-passout", f"pass:{password}"] if password else ["-noenc"]
    if issuer:
        words += ["-CA", str(issuer.certificate), "-CAkey", issuer.key, "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(words, check=True, capture_output=True)
    return Pair(key=str(key), certificate=certificate)


# -- taken ------------------------------------------------------------------------------------------------------------------
def test_it_is_installed_and_extracted(once: Path) -> None:
    found = report(once)
    assert found["level"] == "L3"
    assert {"swupdate", "rauc", "openssl", "bwrap", "runtime"} <= set(found["tools"])
    assert all(any(character.isdigit() for character in version) for version in found["tools"].values())
    assert "no bootloader and no processor of the device took part" in found["why_not_higher"]


def test_the_image_tests_itself(tmp_path: Path) -> None:
    """As it arrived, by the self-test of the kind `folder`, which the plan gives to this kind too."""
    selftest = TEMPLATES / "folder" / "for-onnxruntime-olive" / "selftest.py"
    inputs = {"template/for-onnxruntime-olive/selftest.py": selftest}
    made = action("firmware", artifact("onnx", tmp_path / "artifact"), tmp_path / "out", inputs)
    bundle.run(made, "onnxruntime", onnxruntime, BUNDLES["firmware"])
    found = report(made.outputs["bundle"])
    assert found["level"] == "L3"
    assert found["tools"]["selftest.py"].startswith("Python 3")
    selftest = tmp_path / "fails.py"
    selftest.write_text("#!/usr/bin/env python3\nraise SystemExit('FAIL as asked')\n")
    inputs = {"template/for-onnxruntime-olive/selftest.py": selftest}
    made = action("firmware", tmp_path / "artifact", tmp_path / "again", inputs)
    with pytest.raises(StepFailed, match=r"self-test selftest\.py fails: FAIL as asked"):
        bundle.run(made, "onnxruntime", onnxruntime, BUNDLES["firmware"])


def test_the_precision_of_openvino_is_told(once: Path, tmp_path: Path) -> None:
    source = (TEMPLATES / "firmware/for-linux/README.md.j2").read_text(encoding="utf-8")
    values = template_values("firmware", tmp_path)
    assert "INFERENCE_PRECISION_HINT" in render.render(source, "README.md.j2", {**values, "framework": "openvino"})
    assert "INFERENCE_PRECISION_HINT" not in (once / "README.md").read_text()


@pytest.mark.parametrize("slot", ["a", "b"])
def test_one_slot_is_written_and_the_other_is_not(slot: str, out: Path, tmp_path: Path) -> None:
    done, slots = install(out, tmp_path / "device", slot)
    assert firmware_linux.succeeded(done), done.stdout
    written, other = slots[slot], slots["ba"["ab".index(slot)]]
    assert other == bytes(len(other))
    (tmp_path / "image").write_bytes(written)
    subprocess.run(["unsquashfs", "-quiet", "-dest", str(tmp_path / "mounted"), str(tmp_path / "image")], check=True)
    assert bundle.verify(tmp_path / "mounted") == []
    for place in ("model/payload.json", "golden.json"):
        assert (tmp_path / "mounted" / place).read_bytes() == (out / place).read_bytes()


def test_rauc_extracts_the_same_image(out: Path, tmp_path: Path) -> None:
    assert extract(out, tmp_path / "scratch").returncode == 0
    _, slots = install(out, tmp_path / "device")
    image = (tmp_path / "scratch" / "made" / "model.squashfs").read_bytes()
    assert slots["b"].startswith(image)
    assert image.startswith(b"hsqs")


def test_nothing_outside_the_scratch_changes(out: Path, tmp_path: Path) -> None:
    """An update that writes to absolute paths, and runs a script as root, leaves the machine as it was."""
    places = ("/etc/edgebuild-intruder", "/usr/edgebuild-intruder", f"{Path.home()}/edgebuild-intruder", "/edgebuild-intruder")
    entries = [f'{{ filename = "intruder"; path = "{place}"; sha256 = "DIGEST"; }}' for place in (places[0], places[3])]
    scripts = '{ filename = "intruder.sh"; type = "shellscript"; sha256 = "SCRIPT"; }'
    description = f"""software = {{ version = "1"; hardware-compatibility = [ "1.0" ]; stable = {{ b = {{
        files: ( {", ".join(entries)} ); scripts: ( {scripts} ); }}; }}; }};"""
    script = (
        "#!/bin/sh\n" + "".join(f"echo x >> {place}\n" for place in places) + "echo y > /dev/shm/edgebuild-intruder\nexit 0\n"
    )
    own_swu(out, description, {"intruder": b"i\n", "intruder.sh": script.encode()})
    before = state_of_the_machine()
    done, _ = install(out, tmp_path / "device")
    assert firmware_linux.succeeded(done), done.stdout
    assert (tmp_path / "device" / "root_b" / "edgebuild-intruder").read_text() == "i\nx\n"  # it was there that it wrote, and ran
    assert (tmp_path / "device" / "root_b" / "etc" / "edgebuild-intruder").read_text() == "i\nx\n"
    assert not [place for place in (*places, "/dev/shm/edgebuild-intruder") if os.path.lexists(place)]
    assert state_of_the_machine() == before


def own_swu(out: Path, description: str, members: dict[str, bytes]) -> None:
    """In the place of the bundle's, signed by the test key: what somebody who has the key could write."""
    folder = out.parent / "own"
    folder.mkdir()
    for name, data in members.items():
        (folder / name).write_bytes(data)
    for word, name in (("DIGEST", "intruder"), ("SCRIPT", "intruder.sh")):
        description = description.replace(word, hashlib.sha256(members[name]).hexdigest())
    (folder / "sw-description").write_text(description)
    pair = own_pair()
    words = ["openssl", "cms", "-sign", "-binary", "-nosmimecap", "-outform", "DER", "-inkey", pair.key]
    words += ["-signer", str(pair.certificate), "-in", "sw-description", "-out", "sw-description.sig"]
    subprocess.run(words, cwd=folder, check=True)
    names = "".join(f"{name}\n" for name in ("sw-description", "sw-description.sig", *members)).encode()
    swu = out / "small-firmware.swu"
    swu.unlink()
    subprocess.run(["cpio", "-o", "-H", "crc", "--quiet", "-F", str(swu)], cwd=folder, input=names, check=True)


def state_of_the_machine() -> dict[str, tuple[int, int, int]]:
    """Everything that an update could be after: path → mode, size, mtime. What others work in meanwhile is left out."""
    found = {}
    for top in ("/etc", "/usr/bin", "/usr/sbin", "/usr/lib/systemd", "/boot", "/opt", "/srv", "/var/spool", "/usr/local/bin"):
        for place, folders, names in os.walk(top):
            for name in (*folders, *names):
                stat = os.lstat(os.path.join(place, name))
                found[os.path.join(place, name)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found | dict.fromkeys(os.listdir("/"), (0, 0, 0))


# -- refused ----------------------------------------------------------------------------------------------------------------
def test_another_key_is_refused(out: Path, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "keys", "other")
    assert other.certificate
    shutil.copyfile(other.certificate, out / "certificate.pem")
    done, slots = install(out, tmp_path / "device")
    assert done.returncode != 0
    assert not firmware_linux.succeeded(done)
    assert slots["b"] == bytes(1 << 20)
    assert extract(out, tmp_path / "scratch").returncode != 0
    with pytest.raises(StepFailed, match="openssl fails"):
        firmware.verify(out)


def _places(out: Path) -> Iterator[tuple[str, int]]:
    """A byte of every part: of the .swu its description, signature and image; of the .raucb its image, tree of hashes and signature."""
    swu, raucb = (out / "small-firmware.swu").read_bytes(), (out / "small-firmware.raucb").read_bytes()
    yield "swu", swu.index(b"/dev/disk")
    yield "swu", swu.index(b"sw-description.sig\0") + 300
    yield "swu", swu.index(b"hsqs") + 100
    yield "swu", swu.index(b"hsqs") + 2000
    yield "raucb", 200
    yield "raucb", len(raucb) // 3
    yield "raucb", len(raucb) - 3000
    yield "raucb", len(raucb) - 40


@pytest.mark.parametrize("number", range(8))
def test_one_flipped_byte_is_refused(number: int, out: Path, tmp_path: Path) -> None:
    suffix, place = list(_places(out))[number]
    flip(out / f"small-firmware.{suffix}", place)
    if suffix == "swu":
        done, _ = install(out, tmp_path / "device")
        assert not firmware_linux.succeeded(done)
    else:
        done = extract(out, tmp_path / "scratch")
    assert done.returncode != 0, done.stdout + done.stderr
    assert bundle.verify(out) == [f"small-firmware.{suffix}: was changed"]


def test_hardware_of_another_revision_is_refused(tmp_path: Path) -> None:
    out = pack("firmware", tmp_path, platform={"name": "p", "description": "", "facts": {"hardware_revisions": "2.0 2.1"}})
    done, slots = install(out, tmp_path / "device")
    assert done.returncode != 0
    assert not firmware_linux.succeeded(done)
    assert slots["b"] == bytes(1 << 20)


# -- two builds -------------------------------------------------------------------------------------------------------------
def a_second_later() -> None:
    """A signature of CMS says when it was made, in whole seconds (RFC 5652 §11.3): two within one second are the same."""
    time.sleep(1.0)


def test_two_builds_differ_in_signatures_alone(once: Path, tmp_path: Path) -> None:
    a_second_later()
    one, other = once, pack("firmware", tmp_path / "other")
    trees = [{path.relative_to(out).as_posix(): path.read_bytes() for path in files(out)} for out in (one, other)]
    assert {place for place in trees[0] if trees[0][place] != trees[1][place]} <= {
        "small-firmware.swu",
        "small-firmware.raucb",
        "manifest.json",
    }
    members = [swu_members(out, tmp_path / f"swu-{number}") for number, out in enumerate((one, other))]
    assert members[0].pop("sw-description.sig") != members[1].pop("sw-description.sig")
    assert members[0] == members[1]
    assert set(members[0]) == {"sw-description", "model.squashfs"}
    payloads = [squashfs(out / "small-firmware.raucb") for out in (one, other)]
    assert payloads[0] == payloads[1]  # the image, and RAUC's manifest beside it
    assert b"hsqs" in payloads[0][:4]
    manifests = [rauc_manifest(out, tmp_path / f"raucb-{number}") for number, out in enumerate((one, other))]
    assert manifests[0] == manifests[1]
    written = (one / "rauc" / "manifest.raucm").read_bytes().splitlines()
    assert set(written) <= set(manifests[0].splitlines())  # and what rauc adds: the image's digest and size
    assert firmware.settled(one) == firmware.settled(other)


def test_what_is_settled_tells_another_payload(once: Path, tmp_path: Path) -> None:
    artifact("firmware", tmp_path / "other" / "artifact")
    (tmp_path / "other" / "artifact" / "payload.json").write_text('{"a": 1}\n')
    other = firmware.settled(pack("firmware", tmp_path / "other"))
    assert all(other[place] != digest for place, digest in firmware.settled(once).items())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:300], lambda data: b"0" * 200, lambda data: data[:94] + b"F" * 8 + data[102:]]
)
def test_an_archive_that_is_none_has_nothing_settled(damage: Callable[[bytes], bytes], out: Path) -> None:
    swu = out / "small-firmware.swu"
    swu.write_bytes(damage(swu.read_bytes()))
    with pytest.raises(ValueError, match="is no such archive, or is cut off"):
        firmware.settled(out)


def test_verify_compares_what_signatures_leave_alone(lab: Lab) -> None:
    """`edgebuild verify` of such a target: equal; not where a signature alone was changed after the build, nor where more was."""
    platform = lab.root / "platforms" / "fake.yaml"
    platform.write_text(platform.read_text().replace("kind: folder", "kind: firmware"))
    lab.build()
    a_second_later()
    equal, said = verify_here(lab)
    assert equal
    assert "files, but for signatures in one.raucb, one.swu\n" in said
    for place in (-30, 200):
        raucb = lab.root / "dist" / "one" / "one.raucb"
        raucb.chmod(0o644)
        flip(raucb, place)
        equal, said = verify_here(lab)
        assert not equal
        assert "dist/one" in said
        assert "what lies here was changed after it was built" in said
        lab.build()
        assert verify_here(lab)[0]


def swu_members(out: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    subprocess.run(["cpio", "-i", "--quiet", "-F", str(out / "small-firmware.swu")], cwd=folder, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def squashfs(raucb: Path) -> bytes:
    data = raucb.read_bytes()
    return data[: int.from_bytes(data[40:48], "little")]


def rauc_manifest(out: Path, folder: Path) -> bytes:
    assert extract(out, folder).returncode == 0
    return (folder / "made" / "manifest.raucm").read_bytes()


def test_the_time_of_a_build_is_in_no_archive(out: Path) -> None:
    listed = subprocess.run(
        ["cpio", "-itvn", "--quiet", "-F", str(out / "small-firmware.swu")], capture_output=True, check=True, env={"TZ": "UTC"}
    )
    lines = listed.stdout.decode().splitlines()
    assert [line.split()[-1] for line in lines] == ["sw-description", "sw-description.sig", "model.squashfs"]
    assert all("Jan  1  1980" in line and line.startswith("-rw-r--r--   1 0        0") for line in lines)


# -- keys -------------------------------------------------------------------------------------------------------------------
def test_the_test_key_is_named(once: Path, tmp_path: Path) -> None:
    assert "Test key: not for release" in (once / "README.md").read_text()
    own = make_pair(tmp_path / "keys", "own")
    assert "Test key" not in (signed(tmp_path / "b", own) / "README.md").read_text()


def test_a_key_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = replace(make_pair(tmp_path / "keys", "locked", password="open $(sesame)"), pin="SIGNING_PIN")
    monkeypatch.setenv("SIGNING_PIN", "open $(sesame)")
    out = signed(tmp_path / "packed", pair)
    assert report(out)["level"] == "L3"
    assert not [path for path in files(out) if b"PRIVATE KEY" in path.read_bytes()]
    monkeypatch.setenv("SIGNING_PIN", "closed")
    with pytest.raises(StepFailed, match="openssl fails"):
        signed(tmp_path / "again", pair)


def test_a_certificate_that_another_one_issued(tmp_path: Path) -> None:
    root = make_pair(tmp_path / "keys", "root")
    leaf = make_pair(tmp_path / "keys", "leaf", root)
    with pytest.raises(StepFailed, match=r"leaf.crt does not hold the certificates that issued its first one; append them to it"):
        signed(tmp_path / "refused", leaf)
    assert leaf.certificate
    assert root.certificate
    leaf.certificate.write_text(leaf.certificate.read_text() + root.certificate.read_text())
    assert report(signed(tmp_path / "packed", leaf))["level"] == "L3"


def test_a_key_in_a_token(lab: Lab, tmp_path: Path) -> None:
    """By a real build: the worker finds token and PIN; SWUpdate and RAUC take it; the PIN is in no argument and no file."""
    require(pkcs11.PACKAGES)
    token = tokens.make(tmp_path / "hsm")
    pair = make_pair(tmp_path, "mine")
    token.take(1, Path(pair.key), "mine")
    sign = {"key": token.uri("mine"), "cert": str(pair.certificate), "pin_env": "TOKEN_PIN"}
    (lab.root / "targets" / "one.yaml").write_text(f"{TARGET}package: {json.dumps({'kind': 'firmware', 'sign': sign})}\n")
    build = [str(BIN / "edgebuild")]
    given = {
        **os.environ,
        **token.environment,
        "TOKEN_PIN": tokens.PIN,
        "PATH": f"{spying(tmp_path / 'bin')}:{os.environ['PATH']}",
    }
    done = subprocess.run(build, cwd=lab.root, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((lab.root / "build/one/evidence.json").read_text())["bundle"]["level"] == "L3"
    assert (lab.root / "dist/one/certificate.pem").read_bytes() == (tmp_path / "mine.crt").read_bytes()
    said = (tmp_path / "bin" / "said").read_text()
    assert {line.split()[0] for line in said.splitlines()} == {"openssl", "rauc", "cpio"}
    assert tokens.PIN not in (tmp_path / "bin" / "cpio-found").read_text(), "what signs nothing is told nothing"
    assert "pkcs11:token=t;object=mine" in said
    assert tokens.PIN not in said + done.stdout + done.stderr
    assert not [path for path in files(lab.root) if tokens.PIN.encode() in path.read_bytes()]
    unset = {name: value for name, value in given.items() if name != "TOKEN_PIN"}
    done = subprocess.run(build, cwd=lab.root, env=unset, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "what is fresh asks for no PIN"


def spying(folder: Path) -> Path:
    """Programs that write down what they are called with and their environment, and become the real ones."""
    folder.mkdir()
    for name in ("openssl", "rauc", "cpio"):
        notes = f'echo {name} "$@" >> {folder / "said"}\nenv > {folder / name}-found'
        (folder / name).write_text(f'#!/bin/sh\n{notes}\nexec {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def test_what_a_token_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another PIN, a key that is not there, another key than the certificate's, and a token that the engine cannot read."""
    require(pkcs11.PACKAGES)
    token = tokens.make(tmp_path / "hsm")
    for number, name in ((1, "mine"), (2, "other")):
        token.take(number, key_made(tmp_path, name), name)
    for name, value in {**token.environment, "TOKEN_PIN": tokens.PIN, "WRONG": "0000"}.items():
        monkeypatch.setenv(name, value)
    pair = Pair(key=token.uri("mine"), certificate=tmp_path / "mine.crt", pin="TOKEN_PIN")
    refuses(tmp_path / "1", replace(pair, pin="WRONG"), "PIN incorrect")
    refuses(tmp_path / "2", replace(pair, key=token.uri("none")), "object not found")
    refuses(tmp_path / "3", replace(pair, key=token.uri("other")), "private key does not match certificate")
    token.take(3, key_made(tmp_path, "raw", key=ed25519.Ed25519PrivateKey.generate()), "raw")
    refuses(tmp_path / "4", pair, "OpenSSL's engine takes no token that an Ed25519 key is in too")


def refuses(place: Path, pair: Pair, message: str) -> None:
    """By the first tool that signs, with nothing else made."""
    place.mkdir()
    (place / "image").write_bytes(b"image")
    (place / firmware_linux.DESCRIPTION).parent.mkdir()
    (place / firmware_linux.DESCRIPTION).write_text("software = { };\n")
    with pytest.raises(
        StepFailed, match=rf"^package\.sign: pkcs11:token=t;object=\w+ cannot be signed with: openssl fails: .*{message}"
    ):
        firmware_linux._swu(place, place / "image", pair, place, place / "made.swu")
    assert not (place / "made.swu").exists()


# -- values -----------------------------------------------------------------------------------------------------------------
def test_hostile_descriptions_are_read_back_by_the_tools(out: Path, tmp_path: Path) -> None:
    """By rauc as they were written; swupdate takes each of them, and finds the two slots and no more."""
    sources = {
        place: (TEMPLATES / "firmware" / "for-linux" / f"{place}.j2").read_text()
        for place in (firmware_linux.MANIFEST, firmware_linux.DESCRIPTION)
    }
    taken = [value for value in WRITTEN if not refused(value)]
    assert len(taken) > 35
    key, image = own_pair(), tmp_path / "model.squashfs"
    image.write_bytes(extracted_image(out, tmp_path / "scratch"))
    for number, value in enumerate(taken):
        values = {**VALUES, "version": render.Word("1.0.0"), "description": value, "compatible": "board"}
        values["image_sha256"] = digest.of_file(str(image))
        place = tmp_path / str(number)
        for rel, source in sources.items():
            (place / rel).parent.mkdir(parents=True)
            (place / rel).write_text(render.render(source, rel, values))
        scratch = place / "scratch"
        scratch.mkdir()
        assert key.certificate
        firmware_linux._raucb(place, image, key, scratch, place / "a.raucb")
        shutil.copy(scratch / "raucb" / "model.squashfs", image)
        firmware_linux._swu(place, image, key, scratch, place / "a.swu")
        words = ["rauc", "--keyring", str(key.certificate), "info", "--output-format=json", str(place / "a.raucb")]
        done = subprocess.run(words, capture_output=True, check=True)
        said = json.loads(done.stdout)
        assert (said["description"] or "") == value, value
        assert [list(one) for one in said["images"]] == [["model"]]
        words = ["swupdate", "-c", "-k", str(key.certificate), "-H", "board:1.0", "-e", "stable,a", "-i", str(place / "a.swu")]
        done = sandbox.run(words, scratch=scratch, read=(place, key.certificate.parent))
        assert firmware_linux.succeeded(done), (value, done.stdout)


def refused(value: str) -> bool:
    try:
        render.check_values(value, "value")
    except StepFailed:
        return True
    return False


def extracted_image(out: Path, scratch: Path) -> bytes:
    assert extract(out, scratch).returncode == 0
    return (scratch / "made" / "model.squashfs").read_bytes()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"slot_a": "/etc/passwd"}, "facts.slot_a: '/etc/passwd' is no device of its own"),
        ({"slot_a": "/dev/../etc/passwd"}, "facts.slot_a"),
        ({"slot_b": "/dev/a;b"}, "facts.slot_b"),
        ({"slot_a": "/dev/x", "slot_b": "/dev/x"}, "is no device of its own"),
        ({"hardware_revisions": ""}, "facts.hardware_revisions"),
        ({"hardware_revisions": '1.0"'}, "facts.hardware_revisions"),
        ({"compatible": "a b"}, "facts.compatible"),
    ],
)
def test_facts_that_are_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=message):
        pack("firmware", tmp_path, platform={"name": "p", "description": "", "facts": facts})


def test_a_template_that_leaves_the_digest_out(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("software = { };\n")
    made = action(
        "firmware",
        artifact("firmware", tmp_path / "artifact"),
        tmp_path / "out",
        {"template/for-linux/swupdate/sw-description.j2": own},
    )
    with pytest.raises(StepFailed, match="it names no image_sha256"):
        bundle.run(made, "fake", backend("firmware"), BUNDLES["firmware"])


# -- tools that are missing -------------------------------------------------------------------------------------------------
def test_without_swupdate_it_is_proven_less_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "require", lambda tools: None)  # they were there a moment ago
    monkeypatch.setattr(programs, "absent", lambda names: [name for name in names if name == "swupdate"])
    found = report(signed(tmp_path, own_pair()))
    assert found["level"] == "L2"
    assert found["why_not_higher"] == "swupdate is not installed: apt-get install swupdate"


def test_without_rauc_there_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "require", lambda tools: None)
    for name in ("mksquashfs", "cpio", "openssl"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="rauc is not installed: apt-get install rauc; this bundle is made with it"):
        signed(tmp_path / "packed", own_pair())
