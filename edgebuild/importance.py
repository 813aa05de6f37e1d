"""An importance matrix: how much each input of a model's matrices is used, read out of llama.cpp's memory as a text runs through.

It is what llama.cpp's program llama-imatrix measures, which its library does not have; like that without the output matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgebuild.errors import StepFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OBJECT_BYTES = 32  # GGML_OBJECT_SIZE
F32 = 0  # GGML_TYPE_F32


class _Tensor(ctypes.Structure):
    """ggml_tensor, as ggml.h has it."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # elements of each dimension, the fastest first
        ("nb", ctypes.c_size_t * 4),  # bytes from one to the next
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    def array(self, dtype: str) -> NDArray[Any]:
        """Its elements where they lie, the fastest dimension last."""
        import numpy as np

        span = sum((length - 1) * step for length, step in zip(self.ne, self.nb, strict=True)) + self.nb[0]
        memory = (ctypes.c_char * span).from_address(self.data)
        return np.ndarray(tuple(self.ne)[::-1], dtype, memory, strides=tuple(self.nb)[::-1])


class Importance:
    """The mean square of each input of each matrix in the layers, over all tokens that it was given; for experts one set each.

    `operator` and `overhead` are ggml's ggml_op_desc and ggml_tensor_overhead. Raises StepFailed for another ggml's tensors.
    """

    def __init__(self, operator: Callable[[int], bytes], overhead: Callable[[], int]) -> None:
        if overhead() != ctypes.sizeof(_Tensor) + OBJECT_BYTES:
            raise StepFailed(
                "this llama.cpp has another ggml_tensor than an importance matrix can be read from; leave imatrix out"
            )
        self._operator = operator
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def hear(self, address: int, ask: bool, data: object) -> bool:
        """llama.cpp's cb_eval: asks whether the tensor at an address is wanted, and calls again when it is computed."""
        if ask and self._operator(address) not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return False
        weights, inputs, *others = (_Tensor.from_address(one) for one in _Tensor.from_address(address).src if one)
        name = weights.name.decode("utf-8", "replace")
        if ask:
            return bool(name.startswith("blk.") and inputs.type == F32)
        self._add(name, int(weights.ne[2]), inputs.array("f4"), others[0].array("i4") if others else None)
        return True

    def matrix(self) -> dict[str, NDArray[np.float32]]:
        """Tensor → its means, expert by expert; 1 for an expert that no token came to."""
        import numpy as np

        found = {}
        for name, sums in self._sums.items():
            counts = self._counts[name][:, None]
            means = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
            found[name] = np.ascontiguousarray(means, np.float32).reshape(-1)
        return found

    def _add(self, name: str, matrices: int, inputs: NDArray[Any], experts: NDArray[Any] | None) -> None:
        """`inputs` [1, tokens, slots, width], each slot going to the expert in `experts` [1, 1, tokens, slots].

        Without experts [a, b, tokens, width], of which every b-th part goes to the same of so many matrices.
        """
        import numpy as np

        width = inputs.shape[-1]
        sums = self._sums.setdefault(name, np.zeros((matrices, width)))
        counts = self._counts.setdefault(name, np.zeros(matrices, np.int64))
        for matrix in range(matrices):
            if experts is None:
                rows = inputs[:, matrix::matrices].reshape(-1, width)
            else:
                token, slot = np.nonzero(experts[0, 0] == matrix)
                rows = inputs[0, token, slot % inputs.shape[2]]
            sums[matrix] += np.square(rows.astype(np.float64)).sum(0)
            counts[matrix] += len(rows)
