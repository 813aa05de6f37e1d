"""How MLX's weights get from file to file: read and computed when they are written, not at all where they stay as they are.

mlx_lm.utils.save_model holds a whole file of weights, up to 5 GiB, until it is written, and quantizes by one core of a CPU.
mlx is imported where it is used, in a worker.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from edgebuild.formats import safetensors

AHEAD = 100_000_000  # bytes of weights that are computed while others are written
# safetensors' names of the dtypes that MLX saves (mlx/io/safetensors.cpp).
DTYPES = {"bool": "BOOL", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "complex64": "C64"}
DTYPES |= {f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
INDEX = "model.safetensors.index.json"


@contextmanager
def saved(cores: int = 1) -> Iterator[list[str]]:
    """Meanwhile mlx-lm saves what it loads so, and quantizes by several cores of a CPU, a layer by each.

    → names of the files, of those that it loaded, which hold all that it would save, byte for byte: it writes their index, and not
    them. Empty where it wrote files of its own.
    """
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm import utils

    read, load_model, save_model, quantize = mx.load, utils.load_model, utils.save_model, nn.quantize
    files: dict[str, Mapping[str, Any]] = {}  # by name, while a model is loaded: what was read
    stored: dict[str, tuple[str, Any]] = {}  # weight → the file that it lies in, and its dtype there; all of them, or none
    stay: list[str] = []

    def reading(path: str, *more: Any, **words: Any) -> Any:
        found: Any = read(path, *more, **words)
        files[Path(path).name] = found
        return found

    def loading(*given: Any, **words: Any) -> Any:
        files.clear()
        model, config = load_model(*given, **words)
        weights = dict(tree_flatten(model.parameters()))
        every = [(name, file, one) for file, found in files.items() for name, one in found.items()]
        stored.clear()
        if all(weights.get(name) is one for name, _, one in every):
            stored.update({name: (file, one.dtype) for name, file, one in every})
        files.clear()  # what is held here would stay in memory
        return model, config

    def quantizing(*given: Any, class_predicate: Callable[[str, Any], Any], **words: Any) -> None:
        before = mx.default_stream(mx.default_device())
        streams = cycle([mx.new_stream(mx.default_device()) for _ in range(cores)])

        def spread(name: str, module: Any) -> Any:
            mx.set_default_stream(next(streams))
            return class_predicate(name, module)

        quantize(*given, class_predicate=spread, **words)
        mx.set_default_stream(before)

    def saving(path: Path, model: Any, **words: Any) -> None:
        kinds = {name: one.dtype for name, one in tree_flatten(model.parameters())}
        if kinds == {name: dtype for name, (_, dtype) in stored.items()}:
            stay[:] = sorted({file for file, _ in stored.values()})
        with replaced(mx, save_safetensors=(lambda *given, **words: None) if stay else _written):
            save_model(path, model, **words)
        if stay:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] = {name: stored[name][0] for name in sorted(stored)}
            (path / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")

    with replaced(mx, load=reading), replaced(utils, load_model=loading, save_model=saving), replaced(nn, quantize=quantizing):
        yield stay


@contextmanager
def replaced(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """A module with other functions in the place of its own, for a while."""
    before = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def _written(path: str, arrays: dict[str, Any], metadata: Mapping[str, str]) -> None:
    """`arrays` as a safetensors file; each is let go when it is written."""
    tensors = {name: (DTYPES[str(one.dtype).removeprefix("mlx.core.")], tuple(one.shape)) for name, one in arrays.items()}
    safetensors.write(path, tensors, _computed(arrays), metadata)


def _computed(arrays: dict[str, Any]) -> Iterator[memoryview]:
    import mlx.core as mx

    started: deque[Any] = deque()
    names, ahead = iter(list(arrays)), 0
    while True:
        while ahead <= AHEAD and (name := next(names, None)) is not None:
            started.append(arrays[name])
            arrays[name] = None
            ahead += started[-1].nbytes
            mx.async_eval(started[-1])  # type: ignore[no-untyped-call]
        if not started:
            return
        one = started.popleft()
        ahead -= one.nbytes
        data: Any = mx.contiguous(one).flatten().view(mx.uint8)
        mx.eval(data)
        del one
        yield memoryview(data)
        del data
