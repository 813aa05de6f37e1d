"""The work of the compared pipelines, a verb a process: what edgebuild's onnxruntime backend asks of the same functions.

    python step.py convert|quantize|evaluate|package INPUT… OUTPUT

Each process adds a line to the file that $STEP_LOG names, so that what really ran can be counted.
"""

import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPSET = 17


def convert(source: Path, output: Path) -> None:
    """The model as it is, or with its opset raised where per-channel QDQ asks for that."""
    import onnx
    import onnx.version_converter

    model = onnx.load(source)
    if next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx")) >= 13:
        shutil.copyfile(source, output)
    else:
        onnx.save(onnx.version_converter.convert_version(model, OPSET), output)


def quantize(model: Path, data: Path, samples: str, output: Path) -> None:
    """int8, QDQ, per channel, calibrated with the first `samples` of `data`."""
    import numpy
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            pixels = numpy.load(data)["pixels"][: int(samples)]
            self.feeds: Iterator[dict[str, Any]] = ({"pixels": one[None]} for one in pixels)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared,
            output,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": False},
        )


def evaluate(model: Path, data: Path, output: Path) -> None:
    """Accuracy, one sample at a time on one thread, as edgebuild measures it."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    arrays = numpy.load(data)
    right = [
        session.run(None, {"pixels": one[None]})[0].argmax() == label
        for one, label in zip(*map(arrays.get, ("pixels", "labels")), strict=True)
    ]
    output.write_text(json.dumps({"accuracy": float(numpy.mean(right)), "samples": len(right)}))


def package(model: Path, report: Path, output: Path) -> None:
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with tarfile.open(output, "w", dereference=True) as archive:  # `snakemake --cache` leaves links into its cache
        archive.add(model, "model.onnx", filter=plain)
        archive.add(report, "evaluation.json", filter=plain)


def main() -> None:
    verb, *words = sys.argv[1:]
    Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
    with open(os.environ.get("STEP_LOG", os.devnull), "a") as log:
        log.write(f"{verb} {words[-1]}\n")
    {"convert": convert, "quantize": quantize, "evaluate": evaluate, "package": package}[verb](
        *(word if word.isdigit() else Path(word) for word in words)  # type: ignore[operator]
    )


if __name__ == "__main__":
    main()
