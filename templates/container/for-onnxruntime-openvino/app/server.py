"""Serves the model over the open inference protocol (/v2) by KServe's own server, on the loopback address: Envoy stands before it."""

import asyncio
import os
import socket

from kserve import InferOutput, InferResponse, Model, ModelRepository
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer
from kserve.utils.numpy_codec import from_np_dtype
from runtime import Runtime

ADDRESS = ("127.0.0.1", 8001)
MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model")


class Served(Model):
    """`Runtime` opens the model: `inputs` and `outputs` are (name, numpy type, sizes, None where free), `infer` may run in threads."""

    def __init__(self, name, threads):
        super().__init__(name)
        self.runtime = Runtime(MODEL, threads)
        self.free = asyncio.Semaphore(threads)
        self.ready = True

    def get_input_types(self):
        return [described(*one) for one in self.runtime.inputs]

    def get_output_types(self):
        return [described(*one) for one in self.runtime.outputs]

    async def predict(self, request, headers=None):
        feeds = self.feeds(request)
        wanted = {one.name for one in getattr(request, "request_outputs", None) or ()}
        names = [name for name, _, _ in self.runtime.outputs]
        if unknown := sorted(wanted - set(names)):
            raise InvalidInput(f"there is no output {unknown[0]!r}; there are: {', '.join(names)}")
        async with self.free:
            try:
                found = await asyncio.to_thread(self.runtime.infer, feeds)
            except (RuntimeError, ValueError) as error:  # of sizes that are free one by one and not together
                raise InvalidInput(f"the model does not take these inputs: {str(error).splitlines()[0][:200]}") from error
        outputs = []
        for name, array in found.items():
            if not wanted or name in wanted:
                output = InferOutput(name=name, shape=list(array.shape), datatype=from_np_dtype(array.dtype))
                output.set_data_from_numpy(array, binary_data=False)
                outputs.append(output)
        return InferResponse(
            response_id=request.id or "", model_name=self.name, infer_outputs=outputs, requested_outputs=request.request_outputs
        )

    def feeds(self, request):
        """The inputs as the model names them. Raises InvalidInput, which is answered with 400."""
        if not hasattr(request, "inputs"):
            raise InvalidInput("this server speaks the open inference protocol, version 2")
        given = {one.name: one for one in request.inputs}
        names = [name for name, _, _ in self.runtime.inputs]
        if sorted(given) != sorted(names) or len(request.inputs) != len(names):
            raise InvalidInput(f"the inputs are {', '.join(names)}; given: {', '.join(one.name for one in request.inputs)}")
        feeds = {}
        for name, kind, sizes in self.runtime.inputs:
            one = given[name]
            if one.datatype != from_np_dtype(kind):
                raise InvalidInput(f"{name}: its datatype is {from_np_dtype(kind)}, not {one.datatype}")
            if len(one.shape) != len(sizes) or any(
                got < 0 or size not in (None, got) for size, got in zip(sizes, one.shape, strict=True)
            ):
                raise InvalidInput(f"{name}: its shape is {shown(sizes)}, not {list(one.shape)}")
            try:
                feeds[name] = one.as_numpy()
            except (ValueError, TypeError, OverflowError) as error:
                raise InvalidInput(f"{name}: {str(error)[:200]}") from error
        return feeds


def described(name, kind, sizes):
    return {"name": name, "datatype": from_np_dtype(kind), "shape": shown(sizes)}


def shown(sizes):
    return [-1 if size is None else size for size in sizes]


def main():
    threads = int(os.environ.get("THREADS") or len(os.sched_getaffinity(0)))
    models = ModelRepository()
    models.update(Served(os.environ["MODEL_NAME"], threads))
    server = RESTServer("kserve.model_server:app", DataPlane(model_registry=models), ModelRepositoryExtension(models), ADDRESS[1])
    listening = socket.create_server(ADDRESS)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
