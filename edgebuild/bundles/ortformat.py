"""ORT-format files put into one canonical order, and the operators that they need. Knows the format's tables, not ONNX Runtime.

ONNX Runtime writes what it holds in hash tables in the order of their addresses, so two runs give two files (measured
with 1.32.0: five runs, five digests). Nothing refers to those entries by position: they are read, sorted by name, written.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any

# FlatBuffers tables by slot (source: onnxruntime/core/flatbuffers/schema/ort.fbs, format version 6; flatbuffers.dev,
# "FlatBuffer internals"). A number is a scalar of so many bytes, "[" a vector, "{" a vector whose order means nothing.
_TABLES: Mapping[str, tuple[str, ...]] = {
    "InferenceSession": ("string", "Model", "-", "KernelTypeStrResolver"),
    "Model": ("8", "{OperatorSetId", "string", "string", "string", "8", "string", "Graph", "string", "{StringStringEntry"),
    "OperatorSetId": ("string", "8"),
    "StringStringEntry": ("string", "string"),
    "Graph": ("{Tensor", "{ValueInfo", "[Node", "4", "[NodeEdge", "[string", "[string", "{SparseTensor", "-"),
    "Tensor": ("string", "string", "[8", "4", "[1", "[string", "8"),
    "SparseTensor": ("Tensor", "Tensor", "[8"),
    "ValueInfo": ("string", "string", "TypeInfo"),
    "TypeInfo": ("string", "1", "union"),
    "TensorTypeAndShape": ("4", "Shape"),
    "SequenceType": ("TypeInfo",),
    "MapType": ("4", "TypeInfo"),
    "Shape": ("[Dimension",),
    "Dimension": ("DimensionValue", "string"),
    "DimensionValue": ("1", "8", "string"),
    "Node": (
        *("string", "string", "string", "4", "4", "string", "4", "string"),
        *("[string", "[string", "{Attribute", "[4", "[string"),
    ),
    "Attribute": (
        *("string", "string", "4", "4", "8", "string", "Tensor", "Graph"),
        *("[4", "[8", "[string", "[Tensor", "[Graph"),
    ),
    "NodeEdge": ("4", "[12", "[12"),
    "KernelTypeStrResolver": ("{OpIdKernelTypeStrArgsEntry",),
    "OpIdKernelTypeStrArgsEntry": ("string", "{KernelTypeStrArgsEntry"),
    "KernelTypeStrArgsEntry": ("string", "[ArgTypeAndIndex"),
    "ArgTypeAndIndex": ("1", "4"),
}
_UNION = {1: "TensorTypeAndShape", 2: "SequenceType", 3: "MapType"}  # TypeInfoValue
_IDENTIFIER = b"ORTM"
_DOMAIN, _SINCE, _OPERATOR, _ATTRIBUTES = 2, 3, 5, 10  # slots of Node
_ALIGNMENT = 16  # of weights, which are read in place

Table = list[Any]  # one entry a slot, None where it is absent


def canonical(data: bytes) -> tuple[bytes, str]:
    """An ORT-format file in canonical order, and the text of its required_operators.config.

    Raises ValueError where it has a table or slot that this module does not know.
    """
    if data[4:8] != _IDENTIFIER:
        raise ValueError("no ORT-format file: its identifier is missing")
    session = _read(memoryview(data), _number(data, 0), "InferenceSession")
    return _Writer().file(session), _required(session)


def _required(session: Table) -> str:
    found: dict[tuple[bytes, int], set[bytes]] = {}
    for node in _nodes(session[1][7]):
        version = struct.unpack("<i", node[_SINCE])[0]
        found.setdefault((node[_DOMAIN] or b"ai.onnx", version), set()).add(node[_OPERATOR])
    lines = [
        f"{domain.decode()};{version};{b','.join(sorted(names)).decode()}" for (domain, version), names in sorted(found.items())
    ]
    return "\n".join(["# Operators of model.ort, for a build of ONNX Runtime with --include_ops_by_config", *lines, ""])


def _nodes(graph: Table) -> Iterator[Table]:
    for node in graph[2] or ():
        yield node
        for attribute in node[_ATTRIBUTES] or ():
            for inner in (attribute[7], *(attribute[12] or ())):
                if inner is not None:
                    yield from _nodes(inner)


def _number(data: bytes | memoryview, place: int) -> int:
    return int(struct.unpack_from("<I", data, place)[0])


def _read(data: memoryview, place: int, kind: str) -> Table:
    """The table at `place`."""
    slots = _TABLES[kind]
    shape = place - int(struct.unpack_from("<i", data, place)[0])
    count = (int(struct.unpack_from("<H", data, shape)[0]) - 4) // 2
    offsets = struct.unpack_from(f"<{count}H", data, shape + 4)
    table: Table = [None] * len(slots)
    for slot, offset in enumerate(offsets):
        if not offset:
            continue
        if slot >= len(slots) or slots[slot] == "-":
            raise ValueError(
                f"its table {kind} has slot {slot}, which is not known here: another version of ONNX Runtime wrote it"
            )
        wanted = _UNION.get(table[1][0], "") if slots[slot] == "union" else slots[slot]
        table[slot] = _value(data, place + offset, wanted)
    return table


def _value(data: memoryview, place: int, kind: str) -> Any:
    if kind.isdigit():
        return bytes(data[place : place + int(kind)])
    target = place + _number(data, place)
    if kind == "string":
        return bytes(data[target + 4 : target + 4 + _number(data, target)])
    if kind in _TABLES:
        return _read(data, target, kind)
    if kind[:1] not in ("[", "{"):
        raise ValueError("it holds a type that is neither tensor, sequence nor map")
    element, count = kind[1:], _number(data, target)
    if element.isdigit():
        return data[target + 4 : target + 4 + count * int(element)]
    values = [_value(data, target + 4 + 4 * index, element) for index in range(count)]
    return sorted(values, key=_name) if kind[0] == "{" else values


def _name(table: Table) -> bytes:
    first = table[0]
    return _name(first) if isinstance(first, list) else first or b""


class _Writer:
    """Writes tables front to back, and every string once, sorted, at the end."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._strings: dict[bytes, list[int]] = {}  # text → the places that refer to it
        self._shapes: dict[bytes, int] = {}  # which slots a table has (its "vtable") → where that is written

    def file(self, session: Table) -> bytes:
        self._data += bytes(4) + _IDENTIFIER
        self._patch(0, self._table(session, "InferenceSession"))
        for text, places in sorted(self._strings.items()):
            self._pad(4, 0)
            for place in places:
                self._patch(place, len(self._data))
            self._data += struct.pack("<I", len(text)) + text + b"\0"
        self._pad(8, 0)
        return bytes(self._data)

    def _pad(self, alignment: int, remainder: int) -> None:
        self._data += bytes((remainder - len(self._data)) % alignment)

    def _patch(self, place: int, target: int) -> None:
        struct.pack_into("<I", self._data, place, target - place)

    def _table(self, table: Table, kind: str) -> int:
        slots = _TABLES[kind]
        present = [slot for slot, value in enumerate(table) if value is not None]
        sizes = {slot: int(slots[slot]) if slots[slot].isdigit() else 4 for slot in present}
        offsets, end = [0] * (max(present, default=-1) + 1), 4
        for slot in sorted(present, key=lambda slot: (-sizes[slot], slot)):  # wide ones first: then each lies aligned
            offsets[slot] = end
            end += sizes[slot]
        shape = self._shape(struct.pack(f"<HH{len(offsets)}H", 4 + 2 * len(offsets), end, *offsets))
        self._pad(8, 4)
        place = len(self._data)
        self._data += struct.pack("<i", place - shape) + bytes(end - 4)
        for slot in present:
            wanted = _UNION[table[1][0]] if slots[slot] == "union" else slots[slot]
            self._field(place + offsets[slot], table[slot], wanted)
        return place

    def _shape(self, shape: bytes) -> int:
        if shape not in self._shapes:
            self._pad(2, 0)
            self._shapes[shape] = len(self._data)
            self._data += shape
        return self._shapes[shape]

    def _field(self, place: int, value: Any, kind: str) -> None:
        if kind.isdigit():
            self._data[place : place + len(value)] = value
        elif kind == "string":
            self._strings.setdefault(value, []).append(place)
        elif kind in _TABLES:
            self._patch(place, self._table(value, kind))
        else:
            self._vector(place, value, kind[1:])

    def _vector(self, place: int, value: Any, element: str) -> None:
        if element.isdigit():
            alignment = {"1": _ALIGNMENT, "8": 8}.get(element, 4)
            self._pad(alignment, alignment - 4)
            self._patch(place, len(self._data))
            self._data += struct.pack("<I", len(value) // int(element))
            self._data += value
            return
        self._pad(4, 0)
        start = len(self._data)
        self._patch(place, start)
        self._data += struct.pack("<I", len(value)) + bytes(4 * len(value))
        for index, one in enumerate(value):
            self._field(start + 4 + 4 * index, one, element)
