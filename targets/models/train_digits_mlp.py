"""Trains the digits example model for microcontrollers: a small MLP, a chain of Gemm and Relu.

    pip install scikit-learn onnx
    python targets/models/train_digits_mlp.py

Writes ``digits-mlp.onnx`` beside this file. The images and their split are those of ``train_digits.py``, whose data files serve
this model too; numpy does the training.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the sum order, and so the weights, would follow the thread count

import argparse
import itertools
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

SEED = 20
HELD_OUT = 597
SIZES = (64, 32, 16, 10)
EPOCHS = 60
BATCH = 32
PEAK_RATE = 5e-3
DECAY = 2e-2
OPSET = 18
LEAST_ACCURACY = 0.96

Floats = NDArray[np.float64]
Layers = list[tuple[Floats, Floats]]


def load_split() -> tuple[tuple[Floats, NDArray[np.int64]], tuple[Floats, NDArray[np.int64]]]:
    """Pixels [N, 64] in 0..1 and labels [N]: the training part (1,200 images) and the held-out part (597)."""
    digits = load_digits()
    pixels, labels = digits.data / 16.0, digits.target.astype(np.int64)
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(labels)), kind="stable")
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> Floats:
    """In -1..1, by the raw stream of PCG64, which no version of numpy may change."""
    raw = np.asarray(bits.random_raw(int(np.prod(shape))), dtype=np.float64)
    return (raw / 2.0**63 - 1.0).reshape(shape)


def forward(layers: Layers, pixels: Floats) -> list[Floats]:
    """What goes into each layer, and the logits."""
    values = [pixels]
    for number, (weights, biases) in enumerate(layers):
        out = values[-1] @ weights + biases
        values.append(np.maximum(out, 0.0) if number < len(layers) - 1 else out)
    return values


def gradients(layers: Layers, pixels: Floats, labels: NDArray[np.int64]) -> Layers:
    """Of the mean cross-entropy."""
    values = forward(layers, pixels)
    shares = np.exp(values[-1] - values[-1].max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1.0
    error, found = shares / len(labels), []
    for number in reversed(range(len(layers))):
        found.append((values[number].T @ error, error.sum(axis=0)))
        error = (error @ layers[number][0].T) * (values[number] > 0.0)
    return found[::-1]


def train(pixels: Floats, labels: NDArray[np.int64]) -> Layers:
    """EPOCHS passes of AdamW (Loshchilov and Hutter 2019) with a rate that falls as a cosine."""
    bits = np.random.PCG64(SEED)
    layers = [(uniform(bits, pair) * np.sqrt(6.0 / pair[0]), np.zeros(pair[1])) for pair in itertools.pairwise(SIZES)]
    means = [[np.zeros_like(one) for one in layer] for layer in layers]
    squares = [[np.zeros_like(one) for one in layer] for layer in layers]
    step, steps = 0, EPOCHS * -(-len(pixels) // BATCH)
    for _ in range(EPOCHS):
        order = np.argsort(bits.random_raw(len(labels)), kind="stable")
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            rate = PEAK_RATE * 0.5 * (1.0 + np.cos(np.pi * step / steps))
            step += 1
            for layer, slopes, mean, square in zip(
                layers, gradients(layers, pixels[batch], labels[batch]), means, squares, strict=True
            ):
                for index, (values, slope) in enumerate(zip(layer, slopes, strict=True)):
                    mean[index] += 0.1 * (slope - mean[index])
                    square[index] += 0.001 * (slope * slope - square[index])
                    move = mean[index] / (1.0 - 0.9**step) / (np.sqrt(square[index] / (1.0 - 0.999**step)) + 1e-8)
                    values -= rate * (move + (DECAY * values if values.ndim == 2 else 0.0))
    return layers


def accuracy(layers: Layers, pixels: Floats, labels: NDArray[np.int64]) -> float:
    """The share of images whose largest logit is their label, in float32 as it is shipped."""
    single = [(weights.astype(np.float32), biases.astype(np.float32)) for weights, biases in layers]
    return float((forward(single, pixels.astype(np.float32))[-1].argmax(axis=1) == labels).mean())


def export_onnx(layers: Layers, path: Path) -> None:
    """Write the network as one ONNX file with input ``pixels`` [N, 1, 8, 8] and output ``logits`` [N, 10]."""
    nodes, tensors, value = [helper.make_node("Flatten", ["pixels"], ["flat"], axis=1)], [], "flat"
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        names = [f"weights{number}", f"biases{number}"]
        tensors += [numpy_helper.from_array(one.astype(np.float32), name) for one, name in zip(layer, names, strict=True)]
        nodes.append(helper.make_node("Gemm", [value, *names], ["logits" if last else f"sum{number}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"sum{number}"], [f"hidden{number}"]))
            value = f"hidden{number}"
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
    graph = helper.make_graph(nodes, "digits-mlp", [pixels], [logits], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="edgebuild")
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    path.chmod(0o644)


def main() -> int:
    """Train, write the file, and fail where the model is not accurate enough."""
    parser = argparse.ArgumentParser(description="Train the digits example model for microcontrollers.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for digits-mlp.onnx (default: beside this script)"
    )
    out = parser.parse_args().out
    train_part, test_part = load_split()
    layers = train(*train_part)
    reached = accuracy(layers, *test_part)
    parameters = sum(one.size for layer in layers for one in layer)
    print(f"parameters {parameters}, held-out accuracy {reached:.4f} on {HELD_OUT} images")
    if reached < LEAST_ACCURACY:
        print(f"below {LEAST_ACCURACY}: nothing written")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    export_onnx(layers, out / "digits-mlp.onnx")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
