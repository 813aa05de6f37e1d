"""The process in which Olive runs one workflow, as an order says that lies in a file.

The only module that imports Olive. It has a process of its own, whose cache, home and temporary folders the caller makes anew
for each workflow and throws away: what Olive's cache holds it takes for true, whatever became of weights, data and versions.
Olive ends with status 0 where a pass failed, so that an answer is written, which says what came out or why nothing did.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgebuild import tether

DATASET = "edgebuild_feeds"  # what the calibration data are called in a workflow
WARNINGS = 3  # of the last ones, where no exception says why
MAPPED = "OnnxBlockWiseRtnQuantization"  # the pass that only reads the weights it is given
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what its user may have of it


class Heard(logging.Handler):
    """Why Olive gave up: the first exception that it told of, else its last warnings. `full`: the errno of a full disk, or 0."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.error = ""
        self.full = 0
        self._warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.hear(record.exc_info[1])
        else:
            self._warnings.append(" ".join(record.getMessage().split()))

    def hear(self, error: BaseException) -> None:
        self.error = self.error or said(error)
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in FULL:
            self.full = cause.errno

    def why(self) -> str:
        return self.error or "; ".join(self._warnings[-WARNINGS:])


def said(error: BaseException) -> str:
    """`TYPE: message`, of what caused it where it only wraps that."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


class Feeds:
    """Calibration samples from an .npz, one whole feed each; names are in the order of its array `names`."""

    def __init__(self, path: str) -> None:
        import numpy as np

        self._file = np.load(path, allow_pickle=False)
        self._names = [str(one) for one in self._file["names"]]
        self._count = int(self._file["count"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return {name: self._file[f"{number}.{at}"] for at, name in enumerate(self._names)}


def main(path: str) -> None:
    """ORDER.json: `config`, Olive's own; `auto`: the precision for which Olive chooses the passes, else empty; `copied`: the folder
    that is to be copied to the model's first, else empty; `answer`: where that goes. Ends the process, by the errno of a full disk.
    """
    tether.end_with_input()
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    heard = Heard()
    answer: dict[str, Any] = {"model": None, "passes": [], "error": ""}
    try:
        answer |= _run(order, heard)
    except Exception as error:  # whatever Olive raises is its refusal
        logging.getLogger(__name__).exception("the workflow failed")
        heard.hear(error)
        answer["error"] = heard.error
    status = 0 if answer["model"] else heard.full
    try:
        Path(order["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    except OSError as error:
        status = error.errno or 1  # all that a full disk lets us say
    tether.leave(status)


def _run(order: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
    config = order["config"]
    source, folder = Path(order["copied"]), Path(config["input_model"]["model_path"])
    mapped = bool(order["copied"]) and {one["type"] for one in config["passes"].values()} == {MAPPED}
    # onnx reads no external data that have a second hard link, as what lies in a store has: copied while Olive is imported, where not mapped.
    pattern = config["input_model"]["onnx_file_name"] if mapped else "**/*"
    with ThreadPoolExecutor(1) as beside:
        copy = beside.submit(_copy, source, folder, pattern) if order["copied"] else None
        import olive
        from olive.data.registry import Registry
        from olive.workflows import run

        if copy:
            copy.result()
    logging.getLogger("olive").addHandler(heard)
    Registry.register_dataset(DATASET)(_feeds)
    if order["auto"]:
        config["passes"] = _chosen(config, order["auto"])
    _check_options(config["passes"])
    if config["input_model"]["type"] == "ONNXModel":
        _keep_names(folder / config["input_model"]["onnx_file_name"])
        if mapped:
            _map(source, folder)
    passes = [
        {"type": one["type"], **{key: one[key] for key in sorted(one) if key != "type"}} for one in config["passes"].values()
    ]
    made = run(config)
    best = made.get_best_candidate() if made is not None and made.has_output_model() else None
    return {
        "olive": olive.__version__,
        "passes": passes,
        "model": best.model_path if best else None,
        "error": "" if best else heard.why() or "it gave no reason",
    }


def _copy(source: Path, target: Path, pattern: str) -> None:
    """What there is in a folder under such names. Raises OSError, whose errno shutil.copytree would hide."""
    target.mkdir()
    for path in source.glob(pattern):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            shutil.copyfile(path, place)


def _keep_names(model: Path) -> None:
    """What Olive saves by onnxscript has the model's own names of outputs: a pass makes `logits` `logits_Q4`, which who runs it does not know.

    Afterwards it would be a file of gigabytes that is written again.
    """
    import onnx
    from onnxscript import ir

    wanted = [one.name for one in onnx.load(model, load_external_data=False).graph.output]
    save = ir.save

    def named(made: Any, *given: Any, **words: Any) -> None:
        others = {value.name for node in made.graph.all_nodes() for value in node.outputs} - {
            one.name for one in made.graph.outputs
        }
        if len(made.graph.outputs) == len(wanted) and others.isdisjoint(wanted):
            for value, name in zip(made.graph.outputs, wanted, strict=True):
                value.name = name
        save(made, *given, **words)

    ir.save = named


def _map(source: Path, folder: Path) -> None:
    """The weights of the model in `folder` lie in `source`, and are mapped: they are neither copied nor read before they are quantized.

    The pass reads all into memory first, from a folder in which onnx_ir takes no file of two names; by its absolute place it does.
    What nothing has quantized is read to be saved.
    """
    from onnxscript import ir

    read, save = ir.external_data.load_to_model, ir.save

    def mapped(model: Any) -> Any:
        for value in (value for graph in model.graphs() for value in graph.initializers.values()):
            one = value.const_value
            if isinstance(one, ir.ExternalTensor) and Path(one.base_dir).resolve() == folder.resolve():
                place = source.absolute() / one.location
                value.const_value = ir.ExternalTensor(place, one.offset, one.length, one.dtype, shape=one.shape, name=one.name)
        return model

    def whole(made: Any, *given: Any, **words: Any) -> None:
        read(made)
        save(made, *given, **words)

    ir.external_data.load_to_model, ir.save = mapped, whole


def _check_options(passes: Mapping[str, Mapping[str, Any]]) -> None:
    """Olive takes no notice of an option that a pass does not have. Raises ValueError."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.package_config import OlivePackageConfig

    known = OlivePackageConfig.load_default_config()
    for one in passes.values():
        options = known.import_pass_module(one["type"]).default_config(DEFAULT_CPU_ACCELERATOR)
        if unknown := sorted(set(one) - set(options) - {"type"}):
            raise ValueError(f'{one["type"]} has no option "{unknown[0]}"; it has: {", ".join(sorted(options))}')


def _feeds(path: str, **_: Any) -> Feeds:
    return Feeds(path)


def _chosen(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The passes that `olive auto-opt` takes for a precision on a CPU."""
    from argparse import ArgumentParser

    from olive.cli.auto_opt import AutoOptCommand

    parser = ArgumentParser()
    AutoOptCommand.register_subcommand(parser.add_subparsers())
    out = Path(config["output_dir"]).with_name("auto")
    model = config["input_model"]["model_path"]
    words = ["auto-opt", "--model_name_or_path", model, "--output_path", str(out), "--precision", precision]
    words += ["--device", "cpu", "--provider", "CPUExecutionProvider", "--save_config_file", "--dry_run"]
    AutoOptCommand(parser, parser.parse_args(words)).run()
    found: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))["passes"]
    return found
