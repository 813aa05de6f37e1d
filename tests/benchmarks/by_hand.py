"""int8 by a framework's own functions, by the recipes that people found by trying which keep these models' quality.

Only the speed of what they make is asked for, so they are calibrated on made-up inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgebuild import samples
from edgebuild.backends import BACKENDS

Recipe = Callable[[Path, Path], None]  # (unquantized artifact, folder of the quantized one, which is there and empty)
CALIBRATED = 8  # inputs


def static(operators: list[str], **options: Any) -> Recipe:
    """ONNX Runtime's `quantize_static`: QDQ, by channel, activations in uint8 and weights in int8."""

    def make(model: Path, out: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._feeds: Iterator[Mapping[str, Any]] = iter(feeds("onnxruntime", model))

            def get_next(self) -> Mapping[str, Any] | None:
                return next(self._feeds, None)

        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        given = {"op_types_to_quantize": operators, "per_channel": True, "extra_options": options, **types}
        quantize_static(model / "model.onnx", out / "model.onnx", Reader(), **given)

    return make


def dynamic(model: Path, out: Path) -> None:
    """ONNX Runtime's `quantize_dynamic` of matrix products."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model / "model.onnx", out / "model.onnx", op_types_to_quantize=["MatMul"], per_channel=True)


def nncf(*, transformer: bool = False, without: tuple[str, ...] = ()) -> Recipe:
    """`nncf.quantize`, as for a transformer or as for any model, without some types of operators."""

    def make(model: Path, out: Path) -> None:
        import nncf
        import openvino

        given: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        if without:
            given["ignored_scope"] = nncf.IgnoredScope(types=list(without))
        graph = openvino.Core().read_model(model / "model.xml")
        openvino.save_model(
            nncf.quantize(graph, nncf.Dataset(feeds("openvino", model)), **given), out / "model.xml", compress_to_fp16=False
        )

    return make


def feeds(framework: str, model: Path) -> list[Mapping[str, Any]]:
    session = BACKENDS[framework].open(model)
    try:
        return [samples.golden(session.inputs, seed=seed) for seed in range(CALIBRATED)]
    finally:
        session.close()
