"""MLX models computed in float32, whatever their weights are stored in: the arithmetic that an artifact is judged by.

mlx is imported where it is used, in a worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LINUX = sys.platform == "linux"


def kept(floats: int, available: int) -> bool:
    """Whether float32 weights of so many bytes are kept: where memory has room for twice as many."""
    return 2 * floats < available


def compute(model: Any, again: Callable[[], Any]) -> None:
    """Have the layers that hold nearly all weights compute in float32, from weights as stored.

    Float32 weights are kept where memory has room for twice as many, else made anew for each pass, a layer at a time, and those
    as stored let go once they multiplied: the next pass reads them from the model that `again` gives. On Linux numpy multiplies:
    mlx-cpu's wheels hold the reference BLAS, with 2 billion operations a second where OpenBLAS has 20.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    import psutil
    from mlx.utils import tree_unflatten

    class Float32(nn.Module):  # type: ignore[misc]
        """A linear layer or an embedding: the first multiplies, the second looks rows up. One of `stored` and `kept` is there."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self._set(stored=layer, kept=None, rows=isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)))

        def _set(self, **values: Any) -> None:
            for name, value in values.items():
                object.__setattr__(self, name, value)  # beside the dict that a module is: no parameters, no modules of the model

        def __call__(self, x: Any) -> Any:
            return self._weight(x) if self.rows else self.as_linear(x)

        def as_linear(self, x: Any) -> Any:
            weight = self._weight(...)
            bias = of(self.stored.bias) if self.stored is not None and "bias" in self.stored else None
            self._set(stored=self.stored if keep else None, kept=weight if keep else None)
            y = mx.array(np.asarray(x) @ np.asarray(weight).T) if LINUX else x @ weight.T
            return y if bias is None else y + bias

        def _weight(self, which: Any) -> Any:
            if self.kept is not None:
                return self.kept[which]
            if self.stored is None:
                modules = dict(again().named_modules())
                for name, one in layers.items():
                    one._set(stored=modules[name] if one.stored is None else one.stored)
            layer = self.stored
            if "scales" not in layer:
                return of(layer.weight[which])
            scales, biases = (of(layer[part][which]) if layer.get(part) is not None else None for part in ("scales", "biases"))
            return mx.dequantize(layer.weight[which], scales, biases, layer.group_size, layer.bits, layer.mode)  # type: ignore[arg-type]

    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    layers = {name: Float32(module) for name, module in model.named_modules() if type(module) in kinds}
    size = sum(4 * one.stored.weight.size * (32 // one.stored.bits if "scales" in one.stored else 1) for one in layers.values())
    keep = kept(size, psutil.virtual_memory().available)
    model.update_modules(tree_unflatten(list(layers.items())))


def of(value: Any) -> Any:
    """An array; in float32, where it holds floats."""
    import mlx.core as mx

    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
