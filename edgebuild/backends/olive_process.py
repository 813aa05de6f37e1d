"""Starts a workflow of Olive's in a process of its own (olive_workflow), reads its answer, and takes what it made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import reference
from edgebuild.backends import olive_workflow
from edgebuild.backends.olive_text import FILE
from edgebuild.errors import StepFailed
from edgebuild.step import ENVIRONMENT

DATA = "calibration"  # what a pass calls the calibration data
OWN = ("model_config.json",)  # what Olive leaves beside a model for itself: it holds paths of this machine


def run(
    scratch: Path,
    model: Mapping[str, Any],
    passes: Sequence[Mapping[str, Any]],
    feeds: Path | None = None,
    auto: str = "",
    copied: Path | None = None,
) -> dict[str, Any]:
    """One workflow, with everything that it keeps below `scratch`; `copied` becomes the model's folder first.

    `feeds`: calibration samples as `olive_workflow.Feeds` reads them, for passes whose `data_config` is DATA. `auto`: the scheme for
    which Olive itself chooses the passes. Raises StepFailed where no model came out, and OSError where the disk was full.
    """
    own = scratch / "olive"
    own.mkdir()
    data = {
        "name": DATA,
        "load_dataset_config": {"type": olive_workflow.DATASET, "path": str(feeds)},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }
    cpu = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
    config = {
        "input_model": dict(model),
        "data_configs": [data] if feeds else [],
        "systems": {"here": cpu},
        "host": "here",
        "target": "here",
        "passes": {f"pass_{at}": dict(one) for at, one in enumerate(passes)},
        "cache_dir": str(own / "cache"),
        "output_dir": str(own / "output"),
        "no_artifacts": True,
        "evaluate_input_model": False,
    }
    order, answer, log = (own / name for name in ("order.json", "answer.json", "log"))
    told = {"config": config, "auto": auto, "copied": str(copied or ""), "answer": str(answer)}
    order.write_text(json.dumps(told), encoding="utf-8")
    status = _start(own, order, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    sys.stderr.write(text)
    if status in olive_workflow.FULL:
        raise OSError(status, os.strerror(status))
    if status or not answer.is_file():
        ended = f"its process died of signal {-status}" if status < 0 else f"its process ended with status {status}"
        raise StepFailed(f"Olive made no model: {ended}; the end of its log: {_end(text)}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if found["error"] or not found["model"]:
        problem = " ".join(found["error"].replace(f"{scratch}/", "").split())[:300]
        raise StepFailed(f"Olive made no model: {problem}; see the log, name other passes, or another framework")
    return found


def _start(own: Path, order: Path, log: Path) -> int:
    """→ its status. All that Olive, transformers and onnxruntime-genai keep goes below `own`; its telemetry is off where CI is set."""
    folders = {"HOME": own, "XDG_CACHE_HOME": own, "HF_HOME": own / "hf", "TMPDIR": own}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OLIVE_"))}
    environment |= {**ENVIRONMENT, **{name: str(path) for name, path in folders.items()}, "OLIVE_DISABLE_TELEMETRY": "1"}
    code = f"import sys; from {olive_workflow.__name__} import main; main(sys.argv[1])"
    words = [sys.executable, "-P", "-c", code, str(order)]  # -P: nothing that lies in its folder is imported
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=own, env=environment
        )
        try:
            return process.wait()  # its input stays open so long: it ends with us
        finally:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()


def _end(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def take(answer: Mapping[str, Any], folder: Path) -> None:
    """What a workflow made, into the step's own folder. Raises StepFailed where there is no model among it."""
    made = Path(answer["model"])
    if made.is_file():
        made = made.parent
    for path in made.iterdir():
        if path.name not in OWN:
            shutil.move(path, folder / path.name)
    if not (folder / FILE).is_file():
        has = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise StepFailed(f"Olive's workflow ended well and left {has}, but no {FILE}; name other passes, or another framework")
    reference.set_modes(folder)
