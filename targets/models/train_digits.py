"""Trains the digits example model and writes it with its two data files.

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece protobuf scikit-learn onnx onnxscript
    python targets/models/train_digits.py

Writes ``digits.onnx`` beside this file, and ``digits-eval.npz`` and
``digits-calibration.npz`` into ``targets/data``. The images are scikit-learn's
``load_digits``: 1,797 images of 8x8 pixels with the values 0..16.
"""

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SEED = 20
HELD_OUT = 597
CALIBRATION = 200
EPOCHS = 40
BATCH = 64
PEAK_RATE = 2e-3
OPSET = 18
LEAST_ACCURACY = 0.975
ZIP_DATE = (1980, 1, 1, 0, 0, 0)

Arrays = dict[str, NDArray[np.generic]]


def parse_arguments() -> argparse.Namespace:
    """The command line: where the model and the data go."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train the digits example model and write its data files.")
    parser.add_argument("--out", type=Path, default=here, help="folder for digits.onnx (default: beside this script)")
    parser.add_argument(
        "--data", type=Path, default=here.parent / "data", help="folder for the .npz files (default: targets/data)"
    )
    return parser.parse_args()


def load_split() -> tuple[Arrays, Arrays]:
    """The training part (1,200 images) and the held-out part (597).

    Each has ``pixels`` float32 [N, 1, 8, 8] in 0..1 and ``labels`` int64 [N].
    The split is a fixed shuffle, so both parts hold every writer's digits.
    """
    digits = load_digits()
    pixels = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    # argsort of random_raw: the raw stream of PCG64 is fixed, Generator.permutation may change between versions.
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(labels)), kind="stable")
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return {"pixels": pixels[train], "labels": labels[train]}, {"pixels": pixels[test], "labels": labels[test]}


def build_network() -> nn.Sequential:
    """A CNN of about 158,000 parameters: [N, 1, 8, 8] -> logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 384), nn.ReLU(), nn.Dropout(0.3), nn.Linear(384, 10),
    )  # fmt: skip


def train(pixels: Tensor, labels: Tensor) -> nn.Sequential:
    """The network after EPOCHS passes of AdamW with a one-cycle rate."""
    torch.manual_seed(SEED)
    network = build_network().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pixels)).split(BATCH):
            loss = functional.cross_entropy(network(pixels[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is their label."""
    with torch.no_grad():
        return float((network(pixels).argmax(1) == labels).double().mean())


def export_onnx(network: nn.Module, path: Path) -> None:
    """Write the network as one ONNX file with input ``pixels`` and output ``logits``."""
    example = torch.zeros(2, 1, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "digits.onnx"
        torch.onnx.export(
            network, (example,), raw, dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
            input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("N")},),
        )  # fmt: skip
        model = onnx.load(raw)
    strip_metadata(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    path.chmod(0o644)


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove doc strings and properties: the exporter puts stack traces with file paths there."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    model.graph.name = "digits"
    model.producer_name = "pytorch"


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write what ``numpy.savez_compressed`` writes, but with a fixed date, so that equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", ZIP_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, buffer.getvalue())
    path.chmod(0o644)


def main() -> int:
    """Train, write the three files, and fail where the model is not accurate enough."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the sum order, and so the weights, would follow the thread count
    torch.use_deterministic_algorithms(True)
    train_part, test_part = load_split()
    network = train(torch.from_numpy(train_part["pixels"]), torch.from_numpy(train_part["labels"]))
    reached = accuracy(network, torch.from_numpy(test_part["pixels"]), torch.from_numpy(test_part["labels"]))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"parameters {parameters}, held-out accuracy {reached:.4f} on {HELD_OUT} images")
    if reached < LEAST_ACCURACY:
        print(f"below {LEAST_ACCURACY}: nothing written")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.data.mkdir(parents=True, exist_ok=True)
    export_onnx(network, arguments.out / "digits.onnx")
    write_npz(arguments.data / "digits-eval.npz", test_part)
    write_npz(arguments.data / "digits-calibration.npz", {"pixels": train_part["pixels"][:CALIBRATION]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
