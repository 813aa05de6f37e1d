"""The model in OpenVINO, one thread a request, in float32, as it was measured: by itself it takes bfloat16 where the processor can."""

import os
import queue

import openvino


class Runtime:
    def __init__(self, folder, threads):
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
        model = openvino.Core().read_model(os.path.join(folder, "model.xml"))
        self.inputs = [described(port) for port in model.inputs]
        self.outputs = [described(port) for port in model.outputs]
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self.idle = queue.SimpleQueue()
        for _ in range(threads):
            self.idle.put(compiled.create_infer_request())

    def infer(self, feeds):
        request = self.idle.get()
        try:
            found = request.infer([feeds[name] for name, _, _ in self.inputs])
            return {name: found[index].copy() for index, (name, _, _) in enumerate(self.outputs)}
        finally:
            self.idle.put(request)


def described(port):
    sizes = [one.get_length() if one.is_static else None for one in port.get_partial_shape()]
    name = port.get_any_name() if port.get_names() else port.get_node().get_friendly_name()
    return name, port.get_element_type().to_dtype(), sizes
