"""What tests of every backend that takes language models do: make one, ask it, build the example; and models of other architectures."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgebuild import original
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import BACKENDS
from edgebuild.step import Action, Outcome
from tests.backends import holding
from tests.backends.phi3 import MODEL, inputs
from tests.journeys.test_examples import BIN, copy_project, doit, outcomes

TEXT = MODEL.parents[1] / "data/eval.txt"
# As it is published: 3,821,079,552 parameters.
PHI3_MINI = ModelFacts(
    format="huggingface",
    parameters={"BF16": 3_821_079_552},
    layers=32,
    hidden=3072,
    vocabulary=32064,
    weights={"": 3_821_079_552 - 199_680},
    largest=98_500_608,
    tied_embeddings=False,
)


def convert(name: str, source: Path, out: Path, by_torch: bool = False) -> Outcome:
    """A folder, or one file; `by_torch`: the source is run first, for the conversion to be held against."""
    out.mkdir()
    files = inputs(source) if source.is_dir() else {"model": source}
    facts = assess(files)
    if by_torch:
        logits = out.with_name(f"{out.name}.logits")
        original.run(Action(verb="reference", backend="", params={}, inputs=files, outputs={"logits": logits}))
        files = {**files, "reference": logits}
    made = {"model": out / "model", "report": out / "report.json"}
    action = Action(verb="convert", backend=name, params={"task": "text-generation"}, inputs=files, outputs=made)
    return holding.convert(action, facts)


def quantize(
    name: str, model: Path, out: Path, scheme: str, calibration: Path | None = None, samples: int | None = None, **given: Any
) -> Outcome:
    out.mkdir()
    settings = BACKENDS[name].parameters(scheme, given, calibration is not None)
    params = {"task": "text-generation", "scheme": scheme, "samples": samples if calibration else None, **settings}
    made = {"model": out / "model", "report": out / "report.json"}
    files = {"model": model, **({"calibration": calibration} if calibration else {})}
    action = Action(verb="quantize", backend=name, params=params, inputs=files, outputs=made)
    return BACKENDS[name].quantize(action, ModelFacts(format="huggingface"))


def logits(name: str, out: Path, tokens: Any) -> Any:
    session = BACKENDS[name].open(out / "model")
    try:
        return session.logits(tokens)
    finally:
        session.close()


def transpose(weights: dict[str, Any]) -> None:
    weights["model.layers.2.self_attn.o_proj.weight"] = weights["model.layers.2.self_attn.o_proj.weight"].T


def permute(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"][::-1]


def random_weights(source: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """A model of the architecture `kind` of transformers, with grouped heads, and the example's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **ids, **settings})
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(source)
    for path in MODEL.glob("token*"):
        shutil.copy(path, source)


def byte_level(source: Path) -> None:
    """A tokenizer of Qwen's kind in the place of the one that is there: its class is read by a model's type, whatever the files say."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    for path in source.glob("token*"):
        path.unlink()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the small boat left the harbour"] * 3, vocab_size=300)
    model = json.loads(trained._tokenizer.to_str())["model"]
    Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).save_pretrained(source)


def example(folder: Path, name: str, level: str = "L4") -> dict[str, Any]:
    """The example target `name` through doit, with its bundle's own check; a second build runs nothing. → its evidence."""
    copy_project(folder, name)
    done = doit(folder, f"build:{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    evidence: dict[str, Any] = json.loads((folder / f"dist/{name}.evidence.json").read_text())
    judged = {gate["name"]: gate["verdict"] for gate in evidence["gates"]}
    assert judged == {"kl_mean": "PASS", "perplexity_ratio": "PASS", "same_top": "PASS"}
    assert evidence["bundle"]["level"] == level, evidence["bundle"]["why_not_higher"]
    assert evidence["conversion"]["verified"] is True
    assert doit(folder, f"build:{name}").returncode == 0
    assert set(outcomes(folder).values()) == {"fresh"}
    done = subprocess.run([str(BIN / "edgebuild"), "verify", name], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return evidence


def measured(evidence: Mapping[str, Any]) -> set[str]:
    """What was really measured of the candidate."""
    return {one["name"] for one in evidence["measurements"] if one["value"] is not None and one["of"] == "candidate"}


def shipped(backend: ModuleType, name: str, found: set[str]) -> set[str]:
    """What a backend's list of models says; it is what was found where EDGEBUILD_REWRITE is set."""
    path = Path(str(backend.__file__)).with_name(name)
    if os.environ.get("EDGEBUILD_REWRITE"):
        path.write_text("\n".join(sorted(found)) + "\n", encoding="ascii")
    return set(path.read_text(encoding="ascii").split())
