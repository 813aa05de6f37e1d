"""The list of backends. Read by plan, forecast, worker, assessment, recommend and doctor alone; importing it imports no framework."""

from edgebuild.backend import Backend
from edgebuild.backends import fake, llamacpp, mlx, olive, onnxruntime, openvino

BACKENDS: dict[str, Backend] = {
    "llamacpp": llamacpp,
    "mlx": mlx,
    "olive": olive,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "fake": fake,
}
