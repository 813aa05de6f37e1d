"""magika's published model, from its distribution on PyPI, and what it looks at."""

import numpy as np
from numpy.typing import NDArray

MAGIKA = "package:magika/magika/models/standard_v3_3/model.onnx"


def features(data: bytes) -> NDArray[np.int32]:
    """[2048]: the first and the last 1,024 bytes without white space, filled up with 256, as magika's config.min.json says."""
    first, last = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
    row = np.full(2048, 256, np.int32)
    row[: len(first)] = list(first)
    row[2048 - len(last) :] = list(last)
    return row
