"""The list of backends. Read by plan, forecast, worker, assessment, recommend and doctor alone; importing it imports no framework."""

from edgebuild.backend import Backend
from edgebuild.backends import fake, mlx, onnxruntime, openvino

BACKENDS: dict[str, Backend] = {
    "mlx": mlx,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "fake": fake,
}
