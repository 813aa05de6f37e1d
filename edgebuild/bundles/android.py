"""The kind `android`: Gradle modules around a GGUF or ONNX model, as an asset pack or AI pack, and a signed APK that holds the model.

No Android SDK runs here: Kotlin, Gradle scripts and C++ are held against the rules of their tokens, and the proof says no more. The
APK holds no code; it shows that Android's own tools take the model as an application carries it.
"""

import platform
import re
import shutil
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving
from edgebuild.bundles import apk, apksigning
from edgebuild.bundles.tokens import LANGUAGES, unbalanced
from edgebuild.errors import StepFailed, WrongFact
from edgebuild.render import Identifier
from edgebuild.signing import Takes
from edgebuild.units import human

CODE: Sequence[str] = (
    "bundles.android",
    "bundles.apk",
    "bundles.apksigning",
    "bundles.pkcs11",
    "bundles.programs",
    "bundles.tokens",
)
COPIES = Copies(tests=1, scratch=1)  # in the pack; in the APK, and in an APK that is not signed yet
TOOLS: Mapping[str, str] = apk.TOOLS
LOCKS: Mapping[str, str] = {}
MODELS = {"llamacpp": "model.gguf", "onnxruntime": "model.onnx"}
APK = "test.apk"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """`plugin`: of Gradle; `library`: Google Play's, asked where a pack lies that is not installed with the application."""

    plugin: str
    library: str
    factory: str


# Google, "Play Asset Delivery" and "Play for On-device AI (beta)"; the versions are what published applications build with.
PACKS = {
    "asset-pack": Pack(
        plugin="com.android.asset-pack",
        library="com.google.android.play:asset-delivery:2.3.0",
        factory="com.google.android.play.core.assetpacks.AssetPackManagerFactory",
    ),
    "ai-pack": Pack(
        plugin="com.android.ai-pack",
        library="com.google.android.play:ai-delivery:0.2.0-beta01",
        factory="com.google.android.play.core.aipacks.AiPackManagerFactory",
    ),
}
ABI = "(arm64-v8a|armeabi-v7a|x86_64|x86)"
# A platform's facts: their defaults, and what they may be.
FACTS: Mapping[str, tuple[str, str, str]] = {
    "pack": ("asset-pack", "|".join(PACKS), "asset-pack or ai-pack"),
    "delivery": ("install-time", "install-time|fast-follow|on-demand", "install-time, fast-follow or on-demand"),
    "min_sdk": ("26", r"2[4-9]|[3-9]\d", f"an SDK level of {apk.OLDEST} or more, such as 26"),
    "compile_sdk": ("35", r"[3-9]\d", "an SDK level such as 35"),
    "abis": ("arm64-v8a", f"{ABI}( {ABI})*", "one ABI of Android or several with spaces between them, such as arm64-v8a"),
    "arm_arch": (
        "armv8-a",
        r"armv[89](\.\d)?-a(\+[a-z0-9]+)*",
        "an architecture as compilers name it, such as armv8.2-a+dotprod",
    ),
    "alignment": ("4", "4|4096|16384", "4, or a page of 4096 or 16384 bytes"),
    "onnxruntime_android": ("1.29.0", r"\d+(\.\d+){1,2}", "a version such as 1.29.0"),
    # b11312, which llama-cpp-python 0.3.36 is made of, and that is what edgebuild/locks/llamacpp.txt names.
    "llama_cpp": ("0c1e57098bba43ac29e6e3b677cdceebdd22334f", "[0-9a-f]{40}", "a commit of 40 hexadecimal digits"),
}


def refuse(framework: str, task: str) -> str:
    if framework not in MODELS:
        return (
            f"it holds a model for llama.cpp or ONNX Runtime, but the framework is {framework}; "
            "name framework: llamacpp or onnxruntime, or package.kind: folder"
        )
    if (framework == "llamacpp") != (task == "text-generation"):
        other = (
            "named arrays, not text; name framework: llamacpp" if framework == "onnxruntime" else f"text, but the task is {task}"
        )
        return f"its Kotlin hands {framework} {other}, or package.kind: folder"
    return ""


def signs(device: Mapping[str, Any]) -> Takes:
    return apk.TAKES


def settled(out: Path) -> Mapping[str, str]:
    """The APK where it is signed by ECDSA; signatures by RSA are the same each time."""
    same = apksigning.settled(out / APK) if (out / APK).exists() else ""
    return {APK: same} if same else {}


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts by name, and Google Play's names for them."""
    facts = {key: _fact(key, device) for key in FACTS}
    pack, apart = PACKS[facts["pack"]], facts["delivery"] != "install-time"
    return {
        **facts,
        **{key: int(facts[key]) for key in ("min_sdk", "compile_sdk", "alignment")},
        "abis": facts["abis"].split(),
        "pack_plugin": pack.plugin,
        "play_library": pack.library if apart else "",
        "play_import": Identifier(pack.factory) if apart else "",
        "play_factory": Identifier(pack.factory.rpartition(".")[2]) if apart else "",
        "runtime_library": f"com.microsoft.onnxruntime:onnxruntime-android:{facts['onnxruntime_android']}",
    }


def _fact(key: str, device: Mapping[str, Any]) -> str:
    default, allowed, expected = FACTS[key]
    found = str(device.get(key, default))
    if not re.fullmatch(allowed, found):
        raise WrongFact(key, f"{found!r} is not {expected}")
    return found


def payload(model: Path, module: str) -> Payload:
    """The pack's assets, below a folder of its name: an application merges those of all its packs."""
    assets = f"{module}/src/main/assets/{module}"
    found = bundle.lay(model, assets)
    names = sorted(place.removeprefix(f"{assets}/") for place in found)
    if len(names) != 1 or names[0] not in MODELS.values():
        beside = next((name for name in names if name not in MODELS.values()), "nothing")
        raise StepFailed(
            f"the model is not one file: {beside} lies in the artifact, and an application maps a model alone; "
            "keep weights inside the model, or name package.kind: folder"
        )
    (size,) = (path.stat().st_size for path in found.values())
    if size > apk.LARGEST:
        raise StepFailed(
            f"{names[0]} has {human(size)}, and a package of Android holds files of up to {human(apk.LARGEST)}: "
            "choose a smaller scheme or model, or name package.kind: folder"
        )
    return Payload(files=found, model=assets, golden=f"library/src/main/assets/{module}/golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """`package`: of the Kotlin; `apk`: its path, empty where no tools are."""
    package = Identifier(common["module"].lower())
    return {
        **stated(common["facts"]),
        "package": package,
        "namespace": f"edgebuild.{package}",
        "native_class": f"edgebuild/{package}/Native",
        "apk": "" if apk.unmade() else APK,
    }


def make(making: Making) -> Mapping[str, bool]:
    return {}


def assemble(making: Making) -> Mapping[str, bool | None]:
    """The APK, with the assets of both modules and the licences; where a tool is missing there is none."""
    values, out, scratch = making.values, making.out, making.scratch
    if not values["apk"] or making.key is None:
        return {}
    more = scratch / "assets" / values["module"]
    more.mkdir(parents=True)
    shutil.copyfile(out / "NOTICE.md", more / "NOTICE.md")
    for name in values["licences"]:
        shutil.copyfile(out / "licences" / name, more / f"licence-{name}")
    apk.make(
        out / APK,
        sources=out / "test-apk",
        assets=[out / values["module"] / "src/main/assets", out / "library/src/main/assets", more.parent],
        about={**_about(values), "--version-code": "1"},
        alignment=values["alignment"],
        key=making.key,
        scratch=scratch,
    )
    return {APK: None}


def _about(values: Mapping[str, Any]) -> dict[str, str]:
    """What the APK is called, as aapt2 takes it."""
    return {
        "--rename-manifest-package": f"{values['namespace']}.test",
        "--version-name": str(values["version"]),
        "--min-sdk-version": str(values["min_sdk"]),
        "--target-sdk-version": str(values["compile_sdk"]),
    }


def verify(out: Path) -> Mapping[str, str]:
    """Kotlin, Gradle scripts, C++ and CMake by their tokens, XML by its parser, and the pack's name by Google's rule."""
    for path in bundle.walk(out):
        place = path.relative_to(out).as_posix()
        language = LANGUAGES.get(path.name) or LANGUAGES.get(path.suffix)
        if language and (problem := unbalanced(_text(path), language)):
            raise StepFailed(f"{place}: {problem}")
        if path.suffix == ".xml":
            try:
                xml.etree.ElementTree.fromstring(path.read_bytes())
            except xml.etree.ElementTree.ParseError as error:
                raise StepFailed(f"{place} is no XML: {error}") from error
        if path.name == "build.gradle.kts":
            for name in re.findall(r'\bpackName\s*=\s*"([^"]*)"', _text(path)):
                if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name != path.parent.name:
                    raise StepFailed(
                        f"{place}: a pack is named as its folder, of letters, digits and _ with a letter first, not {name!r}"
                    )
    return {"Kotlin, C++ and CMake tokens": "edgebuild's own reading", "expat": platform.python_version()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def consume(proving: Proving) -> Proof:
    """L1, for want of an Android SDK. By themselves the APK would be L3, and the model, which runs from where it lies, L4."""
    runtime = proving.runs()
    values, tools = proving.values, {"runtime": runtime, **proving.tools}
    if values["apk"] and proving.key and proving.key.certificate:
        (model,) = proving.payload.files
        package = proving.out / APK
        expected = {"name": f"{values['namespace']}.test", "versionName": str(values["version"])}
        tools |= apk.verify(package, proving.key.certificate, expected, proving.scratch)
        apk.check(package, model.removeprefix(f"{values['module']}/src/main/"), proving.out / model, values["alignment"])
        made = f"{APK} was verified by apksigner and aapt2 and holds the same model, uncompressed and aligned (L3)"
    else:
        made = f"there is no {APK}, {apk.unmade()}"
    return Proof(
        level="L1",
        tools=tools,
        why_not_higher=f"no Android SDK here: Kotlin, Gradle scripts and C++ were held against their tokens alone (L1); {made}; "
        f"the model was loaded from the pack by {runtime} and gave its golden output (L4)",
    )
