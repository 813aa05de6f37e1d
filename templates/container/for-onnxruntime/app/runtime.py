"""The model in ONNX Runtime, one thread a request, as it was measured."""

import os

import numpy
import onnxruntime

TYPES = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}


class Runtime:
    def __init__(self, folder, threads):
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = os.path.join(folder, "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [described(one) for one in self.session.get_inputs()]
        self.outputs = [described(one) for one in self.session.get_outputs()]

    def infer(self, feeds):
        names = [name for name, _, _ in self.outputs]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def described(one):
    kind = one.type.removeprefix("tensor(").removesuffix(")")
    return one.name, numpy.dtype(TYPES.get(kind, kind)), [size if isinstance(size, int) else None for size in one.shape]
