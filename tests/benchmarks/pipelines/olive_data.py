"""Calibration samples for Olive, registered by the name that `olive.json` gives."""

from typing import Any

import numpy
from olive.data.registry import Registry
from torch.utils.data import Dataset


class Digits(Dataset):  # type: ignore[misc]
    def __init__(self, path: str, samples: int) -> None:
        self.pixels = numpy.load(path)["pixels"][:samples]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Any:
        return {"pixels": self.pixels[number]}, 0  # Olive takes a label beside the inputs


@Registry.register_dataset()
def digits(path: str, samples: int, **_: Any) -> Digits:
    return Digits(path, samples)
