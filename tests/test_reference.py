"""The source of a language model is run once, in its own toolchain, whichever of its targets asks first."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from edgebuild import original, reference
from edgebuild.project import Project
from edgebuild.step import Action
from tests.backends.phi3 import MODEL, copied, edit, inputs
from tests.test_cli import BIN

TARGET = "edgebuild: 1\nmodel: {source: model, task: text-generation}\nplatform: generic-cpu\n"
STEPS = ("reference", "convert")  # of different toolchains
INT4 = "quantize: {scheme: int4}\npackage: {kind: folder}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two targets of a model without golden logits, by two frameworks."""
    copied(tmp_path / "model", golden=False)
    (tmp_path / "targets").mkdir()
    shutil.copy(Path(__file__).parents[1] / "dodo.py", tmp_path)
    for name in ("mlx", "openvino"):
        (tmp_path / "targets" / f"by-{name}.yaml").write_text(f"{TARGET}framework: {name}\n{INT4}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_targets_of_one_model_share_one_step_in_its_own_toolchain(project: Path) -> None:
    planned = Project()
    by_mlx, by_openvino = (planned.steps[f"reference:by-{name}"] for name in ("mlx", "openvino"))
    assert (by_mlx.recipe, by_mlx.inputs) == (by_openvino.recipe, by_openvino.inputs)
    toolchain = planned.recipes[by_mlx.recipe]["toolchain"]
    assert toolchain["torch"].startswith("2.")
    assert "backend" not in planned.recipes[by_mlx.recipe]
    for name, step in (("mlx", by_mlx), ("openvino", by_openvino)):
        baseline = planned.steps[f"evaluate:by-{name}.baseline"]
        assert baseline.inputs["source/reference"] == step.outputs["logits"] == f"build/by-{name}/reference/logits.safetensors"
        assert step.name in baseline.after


def test_golden_logits_beside_the_model_need_no_run(project: Path) -> None:
    shutil.copy(MODEL / reference.GOLDEN, project / "model")
    assert not any(step.verb == "reference" for step in Project().steps.values())


def test_plan_names_both_toolchains(project: Path) -> None:
    done = subprocess.run([BIN / "edgebuild", "plan", "by-openvino", "--json"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    planned = Project()
    labels = [planned.recipes[planned.steps[f"{verb}:by-openvino"].recipe]["toolchain"].get("lock", "") for verb in STEPS]
    assert [one["name"] for one in found["toolchains"]] == [label.partition(" ")[0] for label in labels if label]
    (step,) = (one for one in found["steps"] if one["verb"] == "reference")
    assert step["memory"]["bytes"] == original.IMPORTED + 4 * 4_196_608


def test_what_transformers_does_not_know_is_said(tmp_path: Path) -> None:
    source = copied(tmp_path / "source", golden=False)
    edit(source / "config.json", lambda config: config.update(model_type="own"))
    out = tmp_path / "logits.safetensors"
    done = original.run(Action(verb="reference", backend="", params={}, inputs=inputs(source), outputs={"logits": out}))
    assert done.summary == "transformers has no language model of type 'own', and no golden.safetensors lies beside the model"
    with safe_open(out, "np") as file:
        assert list(file.keys()) == []
        assert file.metadata() == {"reason": f"conversion unverified: {done.summary}"}


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        ({"max_position_embeddings": 4096, "sliding_window": None, "rope_parameters": {"rope_type": "default"}}, []),
        ({"max_position_embeddings": 4096, "sliding_window": 128}, [192]),
        ({"max_position_embeddings": 150, "sliding_window": 128}, [150]),
        ({"max_position_embeddings": 64, "sliding_window": 32}, []),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, []),  # longer than what is run
        ({"text_config": {"max_position_embeddings": 4096, "sliding_window": 512}}, [576]),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}}, [640]),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}, "sliding_attention": {"rope_type": "default"}}}, [640]),
    ],
)
def test_a_second_text_is_as_long_as_what_the_config_names(tmp_path: Path, config: dict[str, object], lengths: list[int]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert original.longer({"model/config.json": path}) == lengths
