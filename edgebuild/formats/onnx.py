"""ONNX headers: the graph's inputs, outputs, operators and initialisers, without their data and without the onnx package.

Reads the protobuf wire format (protobuf.dev/programming-guides/encoding) of the messages in onnx/onnx.proto, over a
memory map: a 2 GB model costs its graph, not its weights. Field numbers stand beside each use.
"""

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

MAX_DEPTH = 32  # of subgraphs in If and Loop
MAX_DIMENSIONS = 64  # a product of a million large numbers takes hours
DTYPES = {1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "STRING", 9: "BOOL", 10: "F16", 11: "F64"}
DTYPES |= {12: "U32", 13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2", 21: "U4", 22: "I4"}
Field = tuple[int, int, Any]  # number, wire type, int or memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or output: `shape` holds an int, a name, or None for each dimension."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(kw_only=True, slots=True)
class Header:
    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    parameters: Counter[str] = field(default_factory=Counter)  # elements by dtype
    external: set[str] = field(default_factory=set)  # locations of external data, as written
    sizes: dict[str, int] = field(default_factory=dict)  # elements of each initialiser of the graph itself, and of its constants
    weights: Counter[str] = field(default_factory=Counter)  # elements of those of two or more dimensions, by who reads them


def looks_like(path: str) -> bool:
    """Whether the file begins as a ModelProto: ir_version, then only fields that it has, and a graph among them (cut or not)."""
    try:
        view = _mapped(path)
        if view[0] != 0x08:
            return False
        for number, _, _ in _fields(view, whole=False):
            if number == 7:
                return True
            if not (number <= 8 or number in (14, 20, 25, 26)):
                return False
    except (ValueError, OSError, IndexError):
        pass
    return False


def read(path: str) -> Header:
    """Raises ValueError with one sentence where the file is no ONNX model, OSError where unreadable."""
    if os.path.getsize(path) == 0:
        raise ValueError("it is empty; copy or download it again")
    header = Header()
    try:
        found = False
        for number, _, value in _fields(_mapped(path)):
            if number == 1:  # ir_version
                header.ir_version = int(value)
            elif number == 8:  # opset_import
                opset = {n: v for n, _, v in _fields(value)}
                header.opsets[_text(opset.get(1, b""))] = int(opset.get(2, 0))
            elif number == 7:  # graph
                found = True
                _graph(value, header, 0)
    except (IndexError, TypeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError("its graph cannot be read: truncated or damaged; copy or download it again") from error
    if not found:
        raise ValueError("it holds no graph: truncated or damaged; copy or download it again")
    return header


def external_files(path: str) -> list[str]:
    """The files of external data, relative to the model's folder.

    Raises ValueError where one would lie outside that folder: absolute, `..`, or a link.
    """
    folder = os.path.dirname(os.path.abspath(path))
    files = []
    for location in sorted(read(path).external):
        whole = os.path.normpath(os.path.join(folder, location))
        if os.path.isabs(location) or "\0" in location or not whole.startswith(folder + os.sep):
            raise ValueError(f"its external data {location[:80]!r} lie outside the model's folder; move them beside the model")
        if os.path.islink(whole) or not os.path.isfile(whole):
            raise ValueError(f"its external data file {location[:80]!r} is missing or a link; put the file beside the model")
        files.append(os.path.relpath(whole, folder))
    return files


def _graph(view: memoryview, header: Header, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"its subgraphs are nested deeper than {MAX_DEPTH}; export it without If, Loop and Scan")
    readers: dict[str, str] = {}  # name of a value → the operator that reads it
    matrices: list[str] = []
    for number, _, value in _fields(view):
        if number == 1:  # node
            node = _node(value, header, depth)
            readers |= dict.fromkeys(node.reads, node.operator)
            if depth == 0 and node.operator == "Constant" and len(node.dims) > 1:
                header.sizes[node.makes] = prod(node.dims)
                matrices.append(node.makes)
        elif number == 5:  # initializer
            name, dims = _tensor(value, header)
            if depth == 0:
                header.sizes[name] = prod(dims)
                matrices += [name] if len(dims) > 1 else []
        elif number == 11 and depth == 0:
            header.inputs.append(_value_info(value))
        elif number == 12 and depth == 0:
            header.outputs.append(_value_info(value))
    if depth == 0:
        header.inputs = [one for one in header.inputs if one.name not in header.sizes]
        for name in matrices:
            header.weights[readers.get(name, "")] += header.sizes[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """`dims` are those of its last tensor: a Constant has just one."""

    operator: str
    reads: list[str]
    makes: str
    dims: list[int]


def _node(view: memoryview, header: Header, depth: int) -> _Node:
    """Count a node and all inside it."""
    operator, domain, makes = "", "", ""
    reads = []
    dims: list[int] = []
    for number, _, value in _fields(view):
        if number == 1:  # input
            reads.append(_text(value))
        elif number == 2:  # output
            makes = _text(value)
        elif number == 4:  # op_type
            operator = _text(value)
        elif number == 7:  # domain
            domain = _text(value)
        elif number == 5:  # attribute
            for kind, _, inner in _fields(value):
                if kind in (6, 11):  # g, graphs
                    _graph(inner, header, depth + 1)
                elif kind in (5, 10):  # t, tensors
                    dims = _tensor(inner, header)[1]
    operator = f"{domain}.{operator}" if domain not in ("", "ai.onnx") else operator
    header.operators[operator] += 1
    return _Node(operator=operator, reads=reads, makes=makes, dims=dims)


def _tensor(view: memoryview, header: Header) -> tuple[str, list[int]]:
    """Count a tensor; → its name and dimensions."""
    dims: list[int] = []
    dtype, name, external = 0, "", False
    location = ""
    for number, wire, value in _fields(view):
        if number == 1:  # dims: packed or not
            dims.extend(_varints(value) if wire == 2 else [int(value)])
        elif number == 2:  # data_type
            dtype = int(value)
        elif number == 8:
            name = _text(value)
        elif number == 14:  # data_location: 1 is EXTERNAL
            external = value == 1
        elif number == 13:  # external_data: key, value
            pair = {n: v for n, _, v in _fields(value)}
            if _text(pair.get(1, b"")) == "location":
                location = _text(pair.get(2, b""))
    if external or location:
        header.external.add(location)
    if len(dims) > MAX_DIMENSIONS or any(length >= 2**63 for length in dims) or prod(dims) >= 2**63:
        raise ValueError("a tensor of it has dimensions that no memory holds: damaged; copy or download it again")
    header.parameters[DTYPES.get(dtype, f"type {dtype}")] += prod(dims)
    return name, dims


def _value_info(view: memoryview) -> Tensor:
    name, dtype = "", ""
    shape: list[int | str | None] = []
    for number, _, value in _fields(view):
        if number == 1:
            name = _text(value)
        elif number == 2:  # type → tensor_type → elem_type, shape → dim → dim_value, dim_param
            for kind, _, tensor in _fields(value):
                if kind != 1:
                    continue
                for part, _, inner in _fields(tensor):
                    if part == 1:
                        dtype = DTYPES.get(int(inner), f"type {inner}")
                    elif part == 2:
                        for _, _, dim in _fields(inner):
                            sizes = {n: v for n, _, v in _fields(dim)}
                            size = int(sizes[1]) if 1 in sizes else -1
                            known = 0 <= size < 2**63  # some exporters write -1 for what is free
                            shape.append(size if known else _text(sizes[2]) if 2 in sizes else None)
    return Tensor(name=name, dtype=dtype, shape=tuple(shape))


def _mapped(path: str) -> memoryview:
    """The file as a memory map, unmapped when the last slice of it is gone."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _fields(view: Any, whole: bool = True) -> Iterator[Field]:
    """The fields of one message. Raises ValueError where a length runs past its end (if `whole`), IndexError where it is cut."""
    position, end = 0, len(view)
    while position < end:
        tag, position = _varint(view, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(view, position)
            yield number, wire, value
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            if position + width > end:
                raise ValueError("it ends within a field: truncated; copy or download it again")
            yield number, wire, 0
            position += width
        elif wire == 2:
            length, position = _varint(view, position)
            if whole and position + length > end:
                raise ValueError("it ends within a field: truncated or damaged; copy or download it again")
            yield number, wire, view[position : position + length]
            position += length
        else:
            raise ValueError("it is no protobuf message: wrong format or damaged; copy or download it again")


def _varint(view: Any, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = view[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
        if shift > 63:
            raise ValueError("it is no protobuf message: wrong format or damaged; copy or download it again")


def _varints(view: Any) -> list[int]:
    values, position = [], 0
    while position < len(view):
        value, position = _varint(view, position)
        values.append(value)
    return values


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8")
