"""Malformed model and data files, 3,000 of them: ONNX, safetensors, GGUF, Hugging Face folders and .npz, by bombs made
from each format's structure and by mutation; a share goes through a real worker process.

Nothing may be raised but what is caught and told (StepFailed, and ValueError where a plan reads), messages and summaries
are one printable line, what must be refused is, none takes ten seconds, and none more than 1 GiB beyond what the process
had: the peak of resident memory (VmHWM, set back before each case).

    python -m tests.sweeps.malformed_models [--count 3000] [--seed N]
"""

import io
import json
import os
import random
import re
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgebuild import assess, formats, samples, source
from edgebuild.errors import EdgebuildError, StepFailed
from edgebuild.formats import gguf, onnx, safetensors
from edgebuild.process import Workers
from edgebuild.step import Action
from tests.sweeps.children import Finding, main

COUNT, SECONDS, MEMORY, LINE = 3_000, 10.0, 2**30, 1_000
UNPACKED = 64 * 2**20  # bytes: the bound on what an .npz holds, made small here so that bombs can be small
SHARE = 50  # every so many cases one goes through a worker
PYTHON = re.compile(
    r"Traceback|\b[A-Z]\w*(Error|Exception)\b|<class |object at 0x|codec can't|unhashable|not supported between|object is not"
)
INPUTS = [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`files`: name → content, the first is the model; `links`: name → where it points. `certain`: it must be refused.

    `holes`: name → bytes that a file is made long, with zeros that take no room.
    """

    kind: str
    files: Mapping[str, bytes]
    certain: bool = False
    links: Mapping[str, str] = field(default_factory=dict)
    holes: Mapping[str, int] = field(default_factory=dict)


# -- ONNX: the wire format by hand, so that it can lie ------------------------------------------------------------------
def varint(value: int) -> bytes:
    value &= 2**64 - 1
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def part(number: int, value: int | bytes, claimed: int | None = None) -> bytes:
    """A field; `claimed`: the length that it gives itself."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value) if claimed is None else claimed) + value


def tensor(dims: list[int], name: bytes = b"w", location: bytes | None = None, raw: bytes = b"") -> bytes:
    external = part(13, part(1, b"location") + part(2, location)) + part(14, 1) if location is not None else b""
    return b"".join(part(1, one) for one in dims) + part(2, 1) + part(8, name) + part(9, raw) + external


def info(name: bytes) -> bytes:
    return part(1, name) + part(2, part(1, part(1, 1) + part(2, part(1, part(2, b"N")) + part(1, part(1, 4)))))


def node(operator: bytes = b"Relu", inner: bytes = b"") -> bytes:
    return part(1, b"x") + part(2, b"y") + part(4, operator) + inner


def model(graph: bytes, ir: int = 8, opset: int = 17) -> bytes:
    return part(1, ir) + part(7, graph) + part(8, part(1, b"") + part(2, opset))


def graph(*nodes: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    head = b"".join(part(1, one) for one in nodes or (node(),)) + part(2, b"g") + b"".join(part(5, one) for one in tensors)
    return head + part(11, info(b"x")) + part(12, info(b"y"))


def onnx_bomb(rng: random.Random) -> Case:
    how = rng.randrange(11)
    certain, links, extra, data = False, {}, {}, b""
    if how == 0:  # subgraphs in subgraphs
        inner = graph()
        depth = rng.choice([31, 40, 200, 1200, 4000])
        for _ in range(depth):
            inner = part(1, node(b"If", part(5, part(6, inner))))
        data, certain = model(inner), depth > onnx_depth
    elif how == 1:  # data outside of the folder
        location = rng.choice(
            [
                b"/etc/passwd",
                b"../outside",
                b"a/../../outside",
                b"link",
                b"missing",
                b"",
                b".",
                b"a\0b",
                b"\xff",
                b"x" * 5000,
                b"/dev/zero",
            ]
        )
        data, links, certain = model(graph(tensors=(tensor([4], location=location),))), {"link": "/etc/passwd"}, True
    elif how == 2:  # as many dimensions as fit
        count = rng.choice([9, 1_000, 100_000, 1_000_000])
        packed = varint(rng.choice([1, 3, 2**31, 2**63 - 1])) * count
        data = model(graph(tensors=(part(1, packed) + part(2, 1) + part(8, b"w"),)))
    elif how == 3:
        data = model(graph(tensors=(tensor([rng.choice([-1, 2**63, 2**62, 0])] * rng.choice([1, 3, 60])),)))
    elif how == 4:  # a length that is not so
        data = part(1, 8) + part(7, graph(), claimed=rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
    elif how == 5:
        data = model(graph(*[node(b"Op%d" % n) for n in range(rng.choice([10, 30_000]))]))
    elif how == 6:  # names that a terminal or a log would obey
        data = model(graph(node(rng.choice([b"\x1b[2J", b"a\nb", b"\xff\xfe", "\u202eulaR".encode(), b"R" * 100_000, b""]))))
    elif how == 7:
        data = model(graph(), ir=rng.choice([0, 2**63, 99]), opset=rng.choice([0, 1, 12, 99, 2**63, 2**64 - 1]))
    elif how == 8:
        data = model(graph(tensors=tuple(tensor([1], b"w%d" % n, b"w.bin") for n in range(rng.choice([1, 20_000])))))
        extra = {"w.bin": bytes(4)}
    elif how == 9:  # types where others belong
        data = part(1, 8) + rng.choice(
            [
                part(7, 5),
                part(8, 5) + part(7, graph()),
                part(7, part(1, 7)),
                part(7, part(5, 7)),
                part(7, part(11, 7)),
                part(7, part(12, part(2, 9))),
            ]
        )
    else:
        data = b"\x08\x08" + varint(7 << 3 | 2) * rng.choice([1, 1000]) + b"\xff" * rng.choice([0, 9, 100])
    return Case(kind="onnx bomb", files={"m.onnx": data, **extra}, certain=certain, links=links)


onnx_depth = onnx.MAX_DEPTH


# -- safetensors --------------------------------------------------------------------------------------------------------
def safe(header: bytes | dict[str, Any], data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed % 2**64) + text + data


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_bomb(rng: random.Random) -> Case:
    how = rng.randrange(12)
    if how == 0:
        data = safe({"a": entry()}, bytes(16), claimed=rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, 60]))
    elif how == 1:
        data = safe(
            {
                "a": entry(
                    offsets=rng.choice(
                        [(0, 15), (16, 0), (-1, 15), (0, 2**63), (8, 24), (0,), (0, 1, 2), "ab", None, (0.0, 16.0), (True, 16)]
                    )
                )
            },
            bytes(16),
        )
    elif how == 2:
        data = safe({"a": entry(), "b": entry(offsets=rng.choice([(0, 16), (8, 24), (20, 36), (15, 31)]))}, bytes(40))
    elif how == 3:
        data = safe(
            {"a": entry(shape=rng.choice([(2**62, 4), (-4,), (4.0,), ("4",), None, 4, {}, ((4,),), (2**70,), (True,), "4"]))},
            bytes(16),
        )
    elif how == 4:
        data = safe({"a": entry(dtype=rng.choice(["F33", None, 4, [], {}, ["F32"], "f32", ""]))}, bytes(16))
    elif how == 5:
        depth = rng.choice([100, 2_000, 100_000, 2_000_000])
        data = safe(rng.choice([b'{"a":' + b"[" * depth + b"]" * depth + b"}", b'{"a":' * depth + b"1" + b"}" * depth]))
    elif how == 6:
        data = safe(
            b'{"a":'
            + rng.choice([b"1" * 5_000, b"NaN", b"Infinity", b"-0", b"1e999", b'"\\ud800"', b"nul", b'"\xff"', b"tru"])
            + b"}"
        )
    elif how == 7:  # a million names without a byte of data
        count = rng.choice([1_000, safetensors_tensors + 1])
        one = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        data = safe(("{" + ",".join(one % n for n in range(count)) + "}").encode())
        return Case(kind="safetensors bomb", files=huggingface(data), certain=count > safetensors_tensors)
    elif how == 8:
        data = safe({"a": entry(shape=[rng.choice([1, 2**62])] * rng.choice([100, 100_000, 1_000_000]))}, bytes(16))
    elif how == 9:
        data = safe(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            bytes(16),
        )
    elif how == 10:
        data = safe(
            {
                rng.choice(["../../x", "", "a\nb", "x" * 100_000, "\x1b[2J"]): entry(offsets=(0, 1)),
                "__metadata__": rng.choice([None, [], 5, {"a": 5}]),
            },
            bytes(16),
        )
    else:
        data = safe(
            rng.choice([b"[]", b"5", b"{}", b"null", b'"a"', b"{", b"{}  ", b'{"a":5}', b'{"a":null}', b'{"a":[]}', b'{"a":{}}'])
        )
    certain = how in (1, 4, 5, 6, 8, 9, 11)
    return Case(kind="safetensors bomb", files=huggingface(data), certain=certain)


safetensors_tensors = safetensors.MAX_TENSORS


def huggingface(weights: bytes, config: bytes = b'{"architectures":["A"],"model_type":"a"}', **more: bytes) -> dict[str, bytes]:
    return {"hf/config.json": config, "hf/model.safetensors": weights, **more}


def folder_bomb(rng: random.Random) -> Case:
    """A Hugging Face folder with sound weights and a configuration or index that is not."""
    values = [
        "null",
        "[]",
        "{}",
        '"a"',
        "5",
        "1e999",
        "NaN",
        "[[]]",
        '[{"a":1}]',
        '["\\ud800"]',
        '["\\u001b[2J"]',
        f'["{"x" * 50_000}"]',
        "9" * 5_000,
        "[" * 100_000,
    ]
    keys = [
        "architectures",
        "model_type",
        "num_hidden_layers",
        "quantization_config",
        "quantization",
        "tie_word_embeddings",
        "vocab_size",
        "auto_map",
    ]
    sound = safe({"a": entry()}, bytes(16))
    how = rng.randrange(3)
    if how == 0:
        config = rng.choice(
            ["", "{", "[]", "5", "null", '"a"', "\ufeff{}", "{}" * 2, "[" * 200_000, '{"a":' * 50_000, " " * 10_000_001]
        )
        return Case(kind="folder bomb", files=huggingface(sound, config.encode()), certain=True)
    if how == 1:
        config = '{"architectures":["A"],' + ",".join(f'"{rng.choice(keys)}":{rng.choice(values)}' for _ in range(3)) + "}"
        return Case(kind="folder bomb", files=huggingface(sound, config.encode()))
    index = rng.choice(
        [
            "{}",
            "[]",
            '{"weight_map":[]}',
            '{"weight_map":{"a":["b"]}}',
            '{"weight_map":{"a":"missing"}}',
            '{"weight_map":{"a":5,"b":"c","d":null}}',
        ]
    )
    index = rng.choice(
        [
            index,
            "[" * 200_000,
            '{"weight_map":{"a":"\\ud800"}}',
            '{"weight_map":{"a":"../../etc/passwd"}}',
            '{"weight_map":null}',
            "{",
            '{"weight_map":{"a":"\\u001b[2J"}}',
        ]
    )
    return Case(kind="folder bomb", files={**huggingface(sound), "hf/model.safetensors.index.json": index.encode()}, certain=True)


# -- GGUF, and what is no model -----------------------------------------------------------------------------------------
def text(value: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", (len(value) if claimed is None else claimed) % 2**64) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def texts(count: int, kind: int = 8) -> bytes:
    """The begin of an array: the type of its elements, and how many it claims."""
    return struct.pack("<IQ", kind, count % 2**64)


def blob(name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, claimed: int | None = None) -> bytes:
    shape = b"".join(struct.pack("<Q", one % 2**64) for one in dims)
    count = len(dims) if claimed is None else claimed
    return text(name) + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset)


def headed(keys: list[bytes], tensors: list[bytes], data: int = 64) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join([*keys, *tensors]) + bytes(data)


def gguf_bomb(rng: random.Random) -> Case:
    how, certain, holes = rng.randrange(9), True, {}
    if how <= 1:  # counts that are not so
        number = [0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1]
        version, tensors, keys = rng.choice([0, 1, 2, 3, 4, 2**32 - 1]), rng.choice(number), rng.choice(number)
        data = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + bytes(rng.choice([0, 1, 25, 1_000]))
        data = data[: rng.choice([len(data), 3, 4, 8, 12, 23])]
        certain = version not in (2, 3) or len(data) < 24 or max(tensors, keys) > 2**30
    elif how == 2:  # more keys than any model has
        count = rng.choice([1_000, gguf_keys + 1])
        data, certain = headed([key(b"%d" % n, 0, b"\1") for n in range(count)], []), count > gguf_keys
    elif how == 3:  # arrays that are longer than the file
        kind, count = rng.choice([0, 4, 8, 9, 12]), rng.choice([2**20, 2**31, 2**62, 2**63, 2**64 - 1])
        data = headed([key(b"a", 9, texts(count, kind))], [])
    elif how == 4:  # a text in every eight bytes of a file that takes no room
        count = rng.choice([1_000, gguf_texts + 1])
        data, certain = headed([key(b"a", 9, texts(count))], [], 0), count > gguf_texts
        holes = {"m.gguf": len(data) + 8 * count}
    elif how == 5:  # arrays in arrays
        depth = rng.choice([2, 40, 2_000, 50_000])
        data, certain = headed([key(b"a", 9, texts(1, 9) * depth + texts(0, 0))], []), depth > gguf.MAX_NESTING
    elif how == 6:  # tensors that no memory and no file holds
        dims = rng.choice([(2**63,), (2**62, 4), (2**40,), (100, 2**20)])
        many = blob(dims=(1,) * rng.choice([5, 1_000]))
        spoilt = [[blob(dims=dims)], [many], [blob(claimed=2**31)], [blob(offset=2**40)], [blob(kind=2)], [blob(), blob()]]
        data = headed([], rng.choice(spoilt))
    elif how == 7:  # types that there are not; names and texts that are none
        values = [key(b"a", 13, b""), key(b"a", 2**32 - 1, b""), key(b"a", 9, texts(4, 13)), key(b"\xff", 0, b"\1")]
        values += [key(b"a", 8, text(b"x", 2**63)), key(b"a" * 70_000, 0, b"\1"), text(b"x", 2**64 - 1)]
        values += [key(b"general.alignment", 4, struct.pack("<I", rng.choice([0, 2**31])))]
        data = headed([rng.choice(values)], [])
    else:  # what a terminal or a log would obey, and numbers where others belong
        names = [b"\x1b[2J", b"a\nb", "\u202eulaR".encode(), b"R" * 100_000, b"\xff\xfe", b""]
        values = [key(b"general.architecture", 8, text(rng.choice(names))), key(b"general.license", 8, text(rng.choice(names)))]
        values += [key(rng.choice(names[:3]) + b".block_count", 6, struct.pack("<f", rng.choice([float("nan"), 1e38])))]
        data, certain = headed(values, [blob(rng.choice(names[:3]))]), False
    return Case(kind="gguf bomb", files={"m.gguf": data}, certain=certain, holes=holes)


gguf_keys, gguf_texts = gguf.MAX_KEYS, gguf.MAX_TEXTS


def stranger(rng: random.Random) -> Case:
    data = [
        b"",
        b"\x80\x04K\x01.",
        b"cos\nsystem\n(S'x'\ntR.",
        b"\x89HDF\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x1c\0\0\0TFL3",
    ]
    data += [
        b"hello",
        b"\0" * 100,
        b"\xff" * 100,
        b"\x08",
        b"\x08\x08",
        b"{" * 64,
        b"(dp0",
        b"\x80\x05",
        zipped({"archive/data.pkl": b"x"}),
        zipped({"a.txt": b"x"}),
        b"\x1f\x8b\x08",
    ]
    return Case(kind="stranger", files={"m.onnx": rng.choice(data)}, certain=True)


# -- .npz ---------------------------------------------------------------------------------------------------------------
def zipped(members: Mapping[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), claimed: int | None = None) -> bytes:
    text = (header.encode("latin-1") if isinstance(header, str) else header) + b"\n"
    length = len(text) if claimed is None else claimed
    return (
        b"\x93NUMPY"
        + bytes(version)
        + struct.pack("<H" if version == (1, 0) else "<I", length % 2 ** (16 if version == (1, 0) else 32))
        + text
        + data
    )


def array(shape: str = "(8, 4)", dtype: str = "'<f4'", order: str = "False", data: bytes = bytes(128)) -> bytes:
    return npy(f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}", data)


@cache
def zip_bomb(lines: int) -> bytes:
    return zipped({"x.npy": array(f"({lines}, 4)", data=bytes(16 * lines))})


def npz_bomb(rng: random.Random) -> Case:
    how, certain = rng.randrange(13), True
    if how == 0:  # much from little
        data = zip_bomb(rng.choice([4_500_000, 6_000_000]))
    elif how == 1:
        shapes = [
            "(1099511627776, 4)",
            "(4611686018427387904,)",
            "(2**70, 4)",
            "(-1, 4)",
            "(8, -4)",
            "(8, 4.0)",
            "('8', 4)",
            "(99999999999999999999, 4)",
            "8",
            "None",
            "()",
            "(9, 4)",
        ]
        data = zipped({"x.npy": array(rng.choice([*shapes, "(True, 4)", f"({'1, ' * 1_000})", "[8, 4]", "(8, 4" + ")" * 2]))})
    elif how == 2:
        dtypes = [
            "'|O'",
            "'object'",
            "[('a', '|O')]",
            "'<U1000000'",
            "'|V0'",
            "'|V2147483647'",
            "'<M8[ns]'",
            "'<c16'",
            "'<f2'",
            "'nonsense'",
            "5",
            "None",
            "[('a', '<f4')]",
            "'<f4' * 99",
            "[]",
            "('<f4', (2, 2))",
        ]
        data = zipped({"x.npy": array(dtype=rng.choice(dtypes))})
    elif how == 3:
        texts = [
            "(" * 3_000,
            "-" * 5_000 + "1",
            "{" * 300,
            "__import__('os').system('x')",
            "{'descr': '<f4'}",
            "[]",
            "",
            "\\x00",
            "{'descr': lambda: 0}",
            "x" * 60_000,
            "[" * 99 + "]" * 99,
        ]
        data = zipped({"x.npy": npy(rng.choice(texts), bytes(128))})
    elif how == 4:
        data = zipped(
            {
                "x.npy": npy(
                    "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 4), }",
                    bytes(128),
                    rng.choice([(0, 0), (2, 1), (3, 0), (9, 9), (255, 255)]),
                )
            }
        )
        certain = True
    elif how == 5:
        data = zipped(
            {
                "x.npy": npy(
                    "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 4), }",
                    bytes(128),
                    (2, 0),
                    claimed=rng.choice([2**32 - 1, 2**31, 0, 5]),
                )
            }
        )
    elif how == 6:
        data = zipped({"x.npy": array(data=bytes(rng.choice([0, 1, 127])))})
    elif how == 7:
        data = zipped(
            {
                "x.npy": array(),
                rng.choice(["y.npy", "labels.npy"]): rng.choice([array("()", "'|O'"), array("(7,)"), npy("", b""), b"\x80\x04."]),
            }
        )
        certain = b"y.npy" not in data
    elif how == 8:
        data = zipped(
            {
                name: array()
                for name in rng.choice(
                    [["../x.npy"], ["/x.npy"], ["X.npy"], ["x"], ["x.npy", "x"], ["y.npy"], [f"{n}.npy" for n in range(3_000)]]
                )
            }
        )
        certain = b"PK" in data and zipfile.ZipFile(io.BytesIO(data)).namelist() != ["x"]
    elif how == 9:  # what the directory says of a member
        data = zipped({"x.npy": array()})
        spot = data.rindex(b"PK\x01\x02") + rng.choice([8, 10, 16, 20, 24, 42])
        data, certain = data[:spot] + rng.choice([b"\xff\xff\xff\xff", b"\1\0\0\0", b"\x63\0\0\0"]) + data[spot + 4 :], False
    elif how == 10:
        data = array() if rng.random() < 0.5 else b"PK\x03\x04" + bytes(rng.choice([0, 30, 1_000]))
    elif how == 11:
        values = np.full((8, 4), rng.choice([np.nan, np.inf, -np.inf]), dtype="<f4")
        data = zipped({"x.npy": array(data=values.tobytes())})
    else:
        data = zipped({"x.npy": array("(0, 4)", data=b"")})
    return Case(kind="npz bomb", files={"d.npz": data}, certain=certain)


# -- mutation -----------------------------------------------------------------------------------------------------------
def sound(rng: random.Random) -> dict[str, bytes]:
    return rng.choice(
        [
            {"m.onnx": model(graph(node(), node(b"Gemm"), tensors=(tensor([4, 4], raw=bytes(64)),)))},
            {"m.onnx": model(graph(tensors=(tensor([4], location=b"w.bin"),))), "w.bin": bytes(16)},
            huggingface(safe({"a": entry(), "b": entry(offsets=(16, 32)), "__metadata__": {"format": "pt"}}, bytes(32))),
            {"m.gguf": headed([key(b"general.architecture", 8, text(b"phi3"))], [blob()])},
            {"d.npz": zipped({"x.npy": array(), "labels.npy": array("(8,)", "'<i8'", data=bytes(64))}, rng.choice([0, 8]))},
        ]
    )


def mutated(rng: random.Random) -> Case:
    files = sound(rng)
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        spot, how = rng.randrange(len(data) + 1), rng.randrange(6)
        if how <= 1 and data:
            data[spot - 1] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256), data[spot - 1] ^ 1 << rng.randrange(8)])
        elif how == 2:
            del data[spot : spot + rng.choice([1, 4, 100])]
        elif how == 3:
            data[spot:spot] = rng.choice(
                [b"\xff" * 8, b"\0" * 8, b"\x80" * 9, bytes(data[: rng.randrange(40)]), rng.randbytes(4)]
            )
        elif how == 4:
            del data[spot:]
        elif len(data) >= 8:
            spot = rng.randrange(len(data) - 7)
            data[spot : spot + 8] = struct.pack("<Q", rng.choice([0, 2**31, 2**32, 2**63, 2**64 - 1, len(data), len(data) + 1]))
    return Case(kind=f"mutated {name.rpartition('.')[2]}", files={**files, name: bytes(data)})


def make(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed}:{number}")
    bombs = [onnx_bomb, safetensors_bomb, npz_bomb, npz_bomb, gguf_bomb, folder_bomb, stranger]
    return rng.choice(bombs)(rng) if rng.random() < 0.5 else mutated(rng)


# -- what must hold -----------------------------------------------------------------------------------------------------
def open_sweep(folder: str) -> Callable[[Case, int], Finding]:
    """→ what examines one case, in a folder of its own below `folder`."""
    os.chdir(folder)
    if samples.MAX_BYTES == 4 * 2**30:
        samples.MAX_BYTES = UNPACKED

    def run(case: Case, number: int) -> Finding:
        shutil.rmtree("case", ignore_errors=True)
        for name, data in case.files.items():
            path = Path("case", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for name, size in case.holes.items():
            os.truncate(Path("case", name), size)
        for name, points in case.links.items():
            Path("case", name).symlink_to(points)
        return examine(case, worker=number % SHARE == 0)

    return run


def examine(case: Case, worker: bool) -> Finding:
    first = Path("case", next(iter(case.files)))
    place = first.parent if first.parent.name == "hf" else first
    violations: list[str] = []
    told: list[str] = []  # what was refused, and why
    before = _memory_now()
    start = time.process_time()

    def attempt(what: Callable[[], Any], allowed: tuple[type[Exception], ...]) -> Any:
        try:
            return what()
        except allowed as error:
            told.append(str(error))
        except Exception as error:  # whatever it is
            violations.append(f"{getattr(what, '__name__', what)} raised {type(error).__name__}: {str(error)[:200]}")
        return None

    planning = (ValueError, OSError)
    if place.suffix == ".npz":
        attempt(lambda: samples.read(place, INPUTS), (EdgebuildError,))
    else:
        for path in sorted(Path("case").rglob("*")):
            if path.is_file() and not path.is_symlink():
                attempt(lambda path=path: formats.detect(str(path)), (OSError,))
        told.clear()
        for reader in (onnx, safetensors, gguf):
            attempt(lambda reader=reader: reader.read(str(first)), planning)
        readers = list(told)
        told.clear()
        found = attempt(lambda: source.find(".", str(place), "t", ""), planning)
        if found is not None:
            attempt(lambda: _act("fetch", found.files, source.run), (EdgebuildError,))
            attempt(lambda: _act("assess", found.files, assess.run), (EdgebuildError,))
            if worker:
                violations += _in_worker(found.files)
        violations += [f"message: {line}" for line in _unfit(readers)]
    seconds, memory = time.process_time() - start, _memory_peak() - before
    violations += [f"message: {line}" for line in _unfit(told)]
    if case.certain and not told and not violations:
        violations.append(f"accepted: { {name: data[:120] for name, data in case.files.items()} }")
    if seconds > SECONDS:
        violations.append(f"took {seconds:.1f} s")
    if memory > MEMORY:
        violations.append(f"took {memory / 2**20:.0f} MiB")
    return Finding(
        kind=case.kind, outcome="refused" if told else "accepted", violations=violations, seconds=seconds, memory=memory
    )


def _act(verb: str, files: Mapping[str, str], run: Callable[[Action], Any]) -> None:
    output = Path("case-out.json").absolute()
    inputs = {role: Path(path) for role, path in files.items()}
    action = Action(verb=verb, backend="", params={}, inputs=inputs, outputs={"source": output, "facts": output})
    summary = run(action).summary
    if unfit := _unfit([summary]):
        raise RuntimeError(f"its summary: {unfit[0]}")


def _in_worker(files: Mapping[str, str]) -> list[str]:
    """fetch, assess and (of ONNX) convert by each backend, in real worker processes: whatever they do, StepFailed or a result."""
    violations = []
    scratch = Path("scratch").absolute()
    converts = [("convert", name) for name in ("onnxruntime", "openvino") if files.get("model", "").endswith(".onnx")]
    for verb, backend in [("fetch", ""), ("assess", ""), *converts]:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        outputs = {"fetch": ["source"], "assess": ["facts"], "convert": ["model", "report"]}[verb]
        inputs = dict(files) | ({"facts": "facts.json"} if verb == "convert" else {})
        record = {
            "verb": verb,
            "backend": backend,
            "params": {"task": "other"} if verb == "convert" else {},
            "toolchain": {},
            "root": os.getcwd(),
            "inputs": inputs,
        }
        record["outputs"] = {name: str(scratch / "out" / name) for name in outputs}
        try:
            Workers().perform(record, str(scratch), str(scratch / "log"), 2 * 2**30, 60.0)
        except StepFailed as error:
            told = str(error).splitlines()[0]
            if ("unexpected" in told and verb != "convert") or not told.isprintable():
                violations.append(f"worker, {verb} {backend}: {told[:300]!r}")
            if verb != "convert":
                break
        except Exception as error:  # whatever it is
            violations.append(f"worker, {verb}: raised {type(error).__name__}: {str(error)[:300]}")
            break
        if verb == "assess":
            shutil.copyfile(scratch / "out" / "facts", "facts.json")
    return violations


def _unfit(messages: list[str]) -> list[str]:
    """Those that are not one printable line of moderate length, or show Python."""
    return [repr(one[:200]) for one in messages if not one.isprintable() or len(one) > LINE or not one or PYTHON.search(one)]


def _memory_now() -> int:
    """Bytes resident, with the peak set back to them."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _memory_peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


# -- negative controls --------------------------------------------------------------------------------------------------
def _set(module: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


def _dtype_alone(size: int, file: Any) -> Any:
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)[2]


GUARDS: dict[str, tuple[str, Callable[[], None]]] = {
    "subgraph-depth": ("onnx bomb", _set(onnx, "MAX_DEPTH", 10**9)),
    "external-data": ("onnx bomb", _set(onnx, "external_files", lambda path: [])),
    "tensor-count": ("safetensors bomb", _set(safetensors, "MAX_TENSORS", 10**9)),
    "gguf-counts": ("gguf bomb", _set(gguf, "_check_counts", lambda tensors, keys, size: None)),
    "gguf-texts": ("gguf bomb", _set(gguf, "MAX_TEXTS", 10**9)),
    "npz-bytes": ("npz bomb", _set(samples, "MAX_BYTES", 10**15)),
    "npz-header": ("npz bomb", _set(samples, "_header", _dtype_alone)),
}

if __name__ == "__main__":
    sys.exit(
        main(
            "tests.sweeps.malformed_models", COUNT, f"bounds {SECONDS:.0f} s of processor time and {MEMORY / 2**20:.0f} MiB each"
        )
    )
