"""MLX models computed in float32, whatever their weights are stored in: the arithmetic that an artifact is judged by.

mlx is imported where it is used, in a worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgebuild.backends.mlx_weights import replaced

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


@contextmanager
def attention() -> Iterator[None]:
    """Meanwhile numpy multiplies in attention too, on Linux: it was most of the time of the example's passes."""
    import mlx.core as mx
    import numpy as np

    def scaled(queries: Any, keys: Any, values: Any, *, scale: float, mask: Any = None, sinks: Any = None, **more: Any) -> Any:
        """Softmax(Q Kᵀ · scale + mask) V of [B, heads, T, D] and [B, heads of keys, S, D], as mlx.core.fast documents it."""
        if sinks is not None:
            return own(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **more)
        q, k, v = (np.asarray(of(one)) for one in (queries, keys, values))
        (batch, heads, length, width), (groups, other) = q.shape, k.shape[1:3]
        scores = (q.reshape(batch, groups, heads // groups, length, width) * np.float32(scale)) @ k[:, :, None].swapaxes(-1, -2)
        scores = scores.reshape(batch, heads, length, other)
        if isinstance(mask, str):  # causal: the last query is that of the last key
            mask = np.tri(length, other, other - length, dtype=bool)
        elif mask is not None:
            mask = np.asarray(of(mask))
        if mask is not None:
            scores = np.where(mask, scores, np.finfo(np.float32).min) if mask.dtype == bool else scores + mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        y = scores.reshape(batch, groups, heads // groups, length, other) @ v[:, :, None]
        return mx.array(y.reshape(batch, heads, length, -1))

    own = mx.fast.scaled_dot_product_attention
    with replaced(mx.fast, scaled_dot_product_attention=scaled if LINUX else own):
        yield


def of(value: Any) -> Any:
    """An array; in float32, where it holds floats."""
    import mlx.core as mx

    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
