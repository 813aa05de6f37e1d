"""The ios kind: a package whose files its readers take, and whose model runs from where it lies."""

import json
import plistlib
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_swift

from edgebuild import bundle, golden
from edgebuild.bundles import ios
from edgebuild.errors import StepFailed
from tests.bundles.packing import ROOT, TEMPLATES, Counting, Stub, action, artifact, files, pack, report

PRIVACY = TEMPLATES / "ios" / "Sources" / "__name__" / "Resources" / "PrivacyInfo.xcprivacy"


def test_package(tmp_path: Path) -> None:
    stub = Stub(Counting())
    folder = pack("ios", tmp_path, stub)
    package = (folder / "Package.swift").read_text()
    assert package.startswith("// swift-tools-version: 6.2\n")
    assert 'name: "SmallIosModel"' in package
    assert '.iOS("17.0"), .macOS("14.0")' in package
    resources = folder / "Sources" / "SmallIosModel" / "Resources"
    assert (resources / "model" / "config.json").exists()
    assert stub.opened[-1] == resources / "model"
    for place in ("Resources/model", "Resources/golden.json", "Resources/PrivacyInfo.xcprivacy"):
        assert f'.copy("{place}")' in package
        assert (resources.parent / place).exists()
    assert "public enum SmallIosModel {" in (resources.parent / "SmallIosModel.swift").read_text()


def test_proof_is_honest(tmp_path: Path) -> None:
    found = report(pack("ios", tmp_path))
    assert found["level"] == "L1"
    assert "no Swift toolchain here: nothing was compiled" in found["why_not_higher"]
    assert "loaded from the bundle by counting 1 and gave its golden output" in found["why_not_higher"]


def test_swift_by_its_grammar(tmp_path: Path) -> None:
    """By tree-sitter: no Swift compiler comes with Linux."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    found = [path for path in files(pack("ios", tmp_path)) if path.suffix == ".swift"]
    assert len(found) == 3
    assert not [path.name for path in found if parser.parse(path.read_bytes()).root_node.has_error]


def test_privacy_manifest() -> None:
    ios.check_privacy(PRIVACY.read_bytes())
    content = plistlib.loads(PRIVACY.read_bytes())
    assert content["NSPrivacyTracking"] is False
    assert not any(content[key] for key in content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NSPrivacyTracking": "no"}, "must have the keys"),
        ({"NSPrivacyTrackin": False}, "must have the keys"),
        ({"NSPrivacyAccessedAPITypes": ["x"]}, "other keys than its type and its reasons"),
        ({"NSPrivacyAccessedAPITypes": [{"NSPrivacyAccessedAPIType": "x", "Reasons": []}]}, "other keys"),
        ({"NSPrivacyAccessedAPITypes": ("UserDefaults", ["CA92.1"])}, ""),
        ({"NSPrivacyAccessedAPITypes": ("UserDefaults", ["C617.1"])}, "is no API with reasons that Apple lists"),
        ({"NSPrivacyAccessedAPITypes": ("UserDefaultz", ["CA92.1"])}, "is no API with reasons that Apple lists"),
        ({"NSPrivacyAccessedAPITypes": ("UserDefaults", [])}, "is no API with reasons that Apple lists"),
    ],
)
def test_privacy_manifests_that_apple_would_refuse(change: dict[str, object], message: str) -> None:
    content = plistlib.loads(PRIVACY.read_bytes())
    for key, value in change.items():
        if isinstance(value, tuple):
            name, reasons = value
            entry = {
                "NSPrivacyAccessedAPIType": f"NSPrivacyAccessedAPICategory{name}",
                "NSPrivacyAccessedAPITypeReasons": reasons,
            }
            value = [entry]
        content[key] = value
    if not message:
        ios.check_privacy(plistlib.dumps(content))
        return
    with pytest.raises(StepFailed, match=message):
        ios.check_privacy(plistlib.dumps(content))


def test_a_privacy_manifest_that_is_none() -> None:
    with pytest.raises(StepFailed, match="is no property list"):
        ios.check_privacy(PRIVACY.read_bytes().replace(b"<false/>", b""))


def test_swift_of_a_users_template_is_checked(tmp_path: Path) -> None:
    broken = tmp_path / "Broken.swift.j2"
    broken.write_text("func f( {}\n")
    made = action("ios", artifact("ios", tmp_path / "artifact"), tmp_path / "out", {"template/Broken.swift.j2": broken})
    with pytest.raises(StepFailed, match=r"^Broken.swift: line 1: \( is never closed"):
        bundle.run(made, "mlx", Stub(Counting()), ios)


def test_facts_that_are_no_versions(tmp_path: Path) -> None:
    facts = {"ios": "17", "macos": "14.0", "swift_tools": "6.2"}
    with pytest.raises(StepFailed, match=r"facts\.ios: '17' is no version such as 17\.0; correct the platform file"):
        pack("ios", tmp_path, platform={"name": "p", "description": "", "facts": facts})
    with pytest.raises(StepFailed, match=r"facts\.swift_tools"):
        ios.values({"facts": {"swift_tools": "6.2;x"}})
    assert ios.values({"facts": {}})["ios"] == "17.0"


def test_an_artifact_that_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with pytest.raises(StepFailed, match=r"it holds no config\.json"):
        pack("ios", tmp_path)


@pytest.mark.slow
def test_the_example_model_runs_from_the_bundle(tmp_path: Path) -> None:
    """tiny-phi3, int4: loaded by mlx-lm from the bundle, its golden output; the same bytes twice."""
    from edgebuild.backends import mlx
    from tests.backends import language

    language.convert("mlx", ROOT / "targets/models/tiny-phi3", tmp_path / "convert")
    language.quantize("mlx", tmp_path / "convert/model", tmp_path / "quantize", "int4", group_size=64)
    made = []
    for place in ("a", "b"):
        step = action("ios", tmp_path / "quantize/model", tmp_path / place)
        bundle.run(step, "mlx", mlx, ios)
        made.append((step.outputs["archive"].read_bytes(), step.outputs["report"].read_bytes()))
    assert made[0] == made[1]
    resources = tmp_path / "a" / "bundle" / "Sources" / "SmallIosModel" / "Resources"
    example = json.loads((resources / "golden.json").read_text())
    assert len(example["prompt"]) == golden.PROMPT
    assert example["certain"] >= 3
    assert "int4 kernels" in golden.hold(example, mlx, resources / "model")
    example["top"][0]["logit"] += 2
    with pytest.raises(StepFailed, match="misses its golden logits"):
        golden.hold(example, mlx, resources / "model")
