"""Inputs for models: calibration and evaluation data from `.npz` or text files, and golden inputs where there are none.

The only module that knows what such files look like. Imported in workers only, so numpy stands at its top.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebuild import digest
from edgebuild.backend import MAX_WINDOWS, WINDOW
from edgebuild.errors import BadInput, did_you_mean, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebuild.backend import Session
    from edgebuild.step import Action

MAX_BYTES = 4 * 2**30  # of an .npz, uncompressed: everything is read into memory
MAX_TEXT = 64 * 2**20  # bytes
LABELS = "labels"
MIN_WINDOWS = 2
SEED = 20
# A recipe is chosen on one part of the data and judged on the rest, else the choice would flatter itself: of samples a third
# (both parts need many for a narrow interval), of windows of text, which hold 256 tokens each, a fourth.
THIRD, FOURTH = 3, 4
GOLDEN_RATIO = 0x9E3779B1  # its fraction, times 2³²; prime
FREE_LENGTH, FREE_SIDE = 16, 64  # what golden inputs put for a free dimension: of sequences, and of images (four dimensions)
# Golden tokens: a text of our own, long enough for 64 tokens of any tokenizer that knows whole words.
GOLDEN_TEXT = (
    "The small boat left the harbour at seven in the morning. There were four people on board and a dog. "
    "At noon they reached the island, ate bread and cheese under a tree, and counted birds: three gulls, two herons, one owl. "
    "In the evening the wind turned. They came home late, tired and wet, and told the story twice. "
    "A number to remember: 12 and 30 make 42. A question to ask: who had seen the owl first?"
)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Arrays by input name, first axis = samples; `labels` [N] or None; `origin`: the file's sha256, or the golden seed.

    `whole`: the inputs whose samples are a whole input each (a state, a scalar), not a row of a batch.
    `batch`: how many samples the model takes at once; 1 wherever it may be, because that is what a device runs.
    `state`: of a model that is fed its own state, input → (the output that is fed back to it, what it is at first). Then a
    sample is a sequence, its steps are the second axis of every array, and labels are [N], [N, steps] or None.
    """

    inputs: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None
    origin: str
    whole: frozenset[str] = frozenset()
    batch: int = 1
    state: Mapping[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def length(self) -> int:
        """Steps of a sequence."""
        return int(next(iter(self.arrays.values())).shape[1])

    def only(self, kept: NDArray[np.intp] | None) -> Samples:
        """Some of the samples, by index; None: all."""
        if kept is None:
            return self
        arrays = {name: array[kept] for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, labels=None if self.labels is None else self.labels[kept])

    def feeds(self) -> Iterator[dict[str, NDArray[Any]]]:
        """One feed after the other, `batch` samples each; the last one is filled up with its last sample."""
        for start in range(0, len(self), self.batch):
            yield {name: self._part(name, array, start) for name, array in self.arrays.items()}

    def steps(
        self, infer: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], Mapping[str, NDArray[Any]]]]:
        """Each step of each sequence in turn: its feed and what `infer` made of it, outputs that are a state fed back and left out."""
        fed = {output for output, _ in self.state.values()}
        for sequence in range(len(self)):
            state = {name: first for name, (_, first) in self.state.items()}
            for step in range(self.length):
                parts = {name: array[sequence, step] for name, array in self.arrays.items()}
                feed = {name: np.asarray(part if name in self.whole else part[None]) for name, part in parts.items()}
                feed |= state
                outputs = infer(feed)
                if missing := sorted(fed - outputs.keys()):
                    has = ", ".join(map(shown, outputs))
                    raise BadInput(f"model.state: the model has no output {shown(missing[0])}; its outputs: {has}")
                state = {name: np.asarray(outputs[output]) for name, (output, _) in self.state.items()}
                yield feed, {name: value for name, value in outputs.items() if name not in fed}

    def _part(self, name: str, array: NDArray[Any], start: int) -> NDArray[Any]:
        if name in self.whole:
            return np.asarray(array[start])  # an element of a one-dimensional array is a numpy scalar, which ORT refuses
        part = array[start : start + self.batch]
        missing = self.batch - len(part)
        return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part


def part(name: str, count: int, share: int) -> NDArray[np.intp] | None:
    """Which of `count` are of a part: about one of `share` for `choosing`, the others for the `verdict`. None: all of them.

    Multiples of the golden ratio's fraction are spread evenly and have no period, so that data in which the classes take
    turns give every class to both parts; every third sample would give one class alone to one of them.
    """
    if not name or count < 2:
        return None
    first = np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN_RATIO) % np.uint64(2**32) < np.uint64(2**32 // share)
    return np.flatnonzero(first if name == "choosing" else ~first)


def is_npz(path: Path) -> bool:
    """Whether the file begins as a zip archive does; what else it holds, `read` finds out."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def calibration(action: Action, session: Session) -> Iterator[dict[str, NDArray[Any]]]:
    """The calibration samples of a quantize step as feeds, one sample each; of sequences each step, as `session` runs them.

    Raises BadInput.
    """
    given = read(action.inputs["calibration"], session.inputs, action.params["samples"], action.params.get("state", {}))
    return (feed for feed, _ in given.steps(session.infer)) if given.state else given.feeds()


def read(
    path: Path, inputs: Sequence[Mapping[str, Any]], count: int | None = None, state: Mapping[str, str] = MappingProxyType({})
) -> Samples:
    """The samples of an `.npz`, each array read once and held against the model's inputs; with `state` they are sequences.

    Raises BadInput.
    """
    name = path.name
    if unknown := sorted(state.keys() - {str(one["name"]) for one in inputs}):
        has = ", ".join(shown(str(one["name"])) for one in inputs)
        raise BadInput(f"model.state: the model has no input {shown(unknown[0])}; its inputs: {has}")
    first = {str(one["name"]): (state[str(one["name"])], _zeros(one)) for one in inputs if one["name"] in state}
    inputs = [one for one in inputs if one["name"] not in state]
    wanted = [str(one["name"]) for one in inputs]
    if not wanted:
        raise BadInput("the model has no inputs to give data to")
    stored = _load(path, [*wanted, LABELS])
    if state:
        _spread(name, inputs, stored)
    flat = {key: array.reshape(-1, *array.shape[2:]) if state else array for key, array in stored.items() if key in wanted}
    whole = {str(one["name"]) for one in inputs if _check(name, one, flat[str(one["name"])])}
    lengths = {key: len(array) for key, array in stored.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{key} {length}" for key, length in sorted(lengths.items()))
        raise BadInput(f"{name}: the first axis of every array is the sample, but the arrays differ in length: {each}")
    length = next(iter(lengths.values()))
    if not length:
        raise BadInput(f"{name}: holds 0 samples; give at least one")
    if count is not None and count > length:
        raise BadInput(f"{name}: {count} samples were asked for, but it holds {length}")
    cut = {key: array[:count] for key, array in stored.items()}
    labels = cut.pop(LABELS, None)
    batch = _batch(name, inputs, whole)
    origin = digest.of_file(str(path))
    if state and batch != 1:
        raise BadInput(
            f"{name}: the model takes {batch} samples at once, and a state is fed back to one alone; export it for one"
        )
    return Samples(inputs=inputs, arrays=cut, labels=labels, origin=origin, whole=frozenset(whole), batch=batch, state=first)


def _zeros(one: Mapping[str, Any]) -> NDArray[Any]:
    """What a state is before the first step: zeros, where a free dimension (the batch) is 1."""
    return np.zeros([length if isinstance(length, int) else 1 for length in one["shape"]], dtype=np.dtype(one["dtype"]))


def _spread(name: str, inputs: Sequence[Mapping[str, Any]], stored: dict[str, NDArray[Any]]) -> None:
    """Hold arrays of sequences against one another: [samples, steps, …]. A scalar input may be given once for each sample."""
    lengths = {key: array.shape[1] for key, array in stored.items() if key != LABELS and array.ndim > 1}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        each = ", ".join(f"{key} {_text(array.shape)}" for key, array in stored.items() if key != LABELS)
        raise BadInput(
            f"{name}: with model.state a sample is a sequence, and every array is [samples, steps, …], but here: {each}"
        )
    steps = next(iter(lengths.values()))
    for one in inputs:
        key = str(one["name"])
        if not one["shape"] and stored[key].ndim == 1:
            stored[key] = np.repeat(stored[key][:, None], steps, axis=1)
        elif stored[key].ndim not in (len(one["shape"]) + 1, len(one["shape"]) + 2):
            expected = _text(["samples", "steps", *one["shape"][1:]])
            raise BadInput(f"{name}: {key} has the shape {_text(stored[key].shape)}, but sequences of it are {expected}")


def _batch(name: str, inputs: Sequence[Mapping[str, Any]], whole: set[str]) -> int:
    """How many samples the model takes at once: what its first dimensions say."""
    first = {one["shape"][0] for one in inputs if one["name"] not in whole and isinstance(one["shape"][0], int)} or {1}
    if len(first) > 1 or (whole and first != {1}):
        shapes = ", ".join(f"{one['name']} {_text(one['shape'])}" for one in inputs)
        raise BadInput(f"{name}: the model's inputs ({shapes}) share no first axis; give each sample whole, with one axis more")
    return int(first.pop())


def _load(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The wanted arrays of an `.npz`; the last one wanted, the labels, may be missing."""
    name = path.name
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise BadInput(f"{name}: holds two arrays of one name; save it again with numpy.savez")
            total = sum(info.file_size for info in members.values())
            if total > MAX_BYTES:
                limit = f"over the limit of {MAX_BYTES // 2**30} GiB"
                raise BadInput(f"{name}: holds {total / 2**30:.1f} GiB when unpacked, {limit}; take fewer samples")
            _check_names(name, members, wanted)
            return {key: _array(name, key, archive, members[key]) for key in wanted if key in members}
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        said = f" ({str(error)[:120]})" if str(error) else ""
        raise BadInput(f"{name}: {_no_npz(path)}{said}") from error


def _no_npz(path: Path) -> str:
    try:
        with path.open("rb") as file:
            begin = file.read(6)
    except OSError:
        return "cannot be read"
    if begin == b"\x93NUMPY":
        return "is a lone .npy array; save it by name: numpy.savez(path, INPUT=array)"
    if begin.startswith(b"PK"):
        return "is truncated or damaged; copy or write it again"
    return "is no .npz file; write one with numpy.savez(path, INPUT=array, labels=labels)"


def _check_names(name: str, members: Mapping[str, Any], wanted: Sequence[str]) -> None:
    held = ", ".join(shown(key) for key in sorted(members)[:20]) or "nothing"
    for key in wanted[:-1]:
        if key not in members:
            others = [other for other in members if other not in wanted]
            hint = did_you_mean(key, others)
            raise BadInput(f'{name}: no array "{key}", which the model takes as an input; the file holds: {held}.{hint}')
    for other in members:
        if other not in wanted and LABELS not in members and did_you_mean(other.lower(), [LABELS]):
            raise BadInput(f'{name}: the array "{shown(other)}" is no input of the model. Did you mean "{LABELS}"?')


def _array(name: str, key: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """One member, its header held against its size first: numpy allocates what a header claims."""
    try:
        with archive.open(info) as file:
            dtype = _header(info.file_size, file)
        if dtype.hasobject:
            raise BadInput(
                f"{name}: {key} holds Python objects (dtype object), which are never loaded: they can run code; "
                "save it with a numeric dtype"
            )
        with archive.open(info) as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise BadInput(f"{name}: {key} is no array in NumPy's format ({str(error)[:120]}); save it with numpy.savez") from error
    if array.ndim == 0:
        raise BadInput(f"{name}: {key} is a single value; the first axis of every array is the sample")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        count = int((~np.isfinite(array)).sum())
        raise BadInput(f"{name}: {key} holds {count} values that are not finite, the first at {list(at)}; remove those samples")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _header(size: int, file: Any) -> np.dtype[Any]:
    """The dtype of an .npy member. Raises ValueError where its header claims more than the member holds."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version[0]}.{version[1]}")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = reader(file)
    except Exception as error:
        raise ValueError("its header cannot be read") from error
    if any(type(length) is not int or length < 0 for length in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header claims the shape {shape}, more than its {size} bytes")
    return dtype


def _check(name: str, one: Mapping[str, Any], array: NDArray[Any]) -> bool:
    """Hold an array against an input; → whether each sample is a whole input. Raises BadInput."""
    key, dtype, shape = str(one["name"]), str(one["dtype"]), list(one["shape"])
    if array.dtype.name != dtype:
        raise BadInput(f"{name}: {key} is {array.dtype.name}, but the model takes {dtype}; {_cast(key, array, dtype)}")
    if array.ndim == len(shape) + 1 and _fits(array.shape[1:], shape):
        return True
    if array.ndim == len(shape) and shape and _fits(array.shape[1:], shape[1:]):
        return False
    expected = ["samples", *shape[1:]] if shape else ["samples"]
    message = f"{name}: {key} has the shape {_text(array.shape)}, but the model takes {_text(expected)}"
    fixed = [length for length in expected[1:] if isinstance(length, int)]
    if len(fixed) == len(expected) - 1 and array.shape and math.prod(fixed) == math.prod(array.shape[1:]):
        message += f"; {key}.reshape({', '.join(map(str, (array.shape[0], *fixed)))}) would do, if that is the order of its axes"
    raise BadInput(message)


def _cast(key: str, array: NDArray[Any], dtype: str) -> str:
    """What would mend a wrong dtype, as far as that can be told."""
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        return "such inputs cannot be given in an .npz"
    line = f"{key}.astype(numpy.{dtype})"
    if wanted.kind not in "fiub" or array.dtype.kind not in "fiub":
        return "convert it before saving"
    if array.dtype.kind == "f" and wanted.kind != "f":
        return f"{line} would cut fractions off: is it the right array?"
    if array.dtype.kind != "f" and wanted.kind == "f":
        return f"{line} would do, if the values are scaled as the model was trained (pixels often divided by 255)"
    return f"save {line}"


def _fits(found: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    pairs = zip(found, expected, strict=True)
    return len(found) == len(expected) and all(have == want or not isinstance(want, int) for have, want in pairs)


def _text(shape: Sequence[Any]) -> str:
    return f"[{', '.join('any' if length is None else str(length) for length in shape)}]"


def windows(path: Path, session: Session, most: int = MAX_WINDOWS) -> NDArray[np.int32]:
    """A UTF-8 text as windows of tokens [W, 256], at most so many, spread evenly over it. Raises BadInput.

    No window shares a token with another one; the rest of the text, behind the last whole window, is not used.
    """
    name = path.name
    size = path.stat().st_size
    if size > MAX_TEXT:
        used = f"{most * WINDOW:,} tokens are used in all"
        raise BadInput(f"{name}: {size:,} bytes of text, over the limit of {MAX_TEXT:,}; {used}")
    if is_npz(path):
        raise BadInput(f"{name}: a language model takes UTF-8 text, and this is an archive; give the text as a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise BadInput(f"{name}: is no UTF-8 text: {byte}; save it as UTF-8") from error
    if "\0" in text:
        raise BadInput(f"{name}: holds NUL characters, so it is no text; give a text file")
    tokens = session.tokens(text)
    whole = len(tokens) // WINDOW
    if whole < MIN_WINDOWS:
        raise BadInput(
            f"{name}: {len(text):,} characters are {len(tokens):,} tokens, but {MIN_WINDOWS * WINDOW} are the least "
            f"({MIN_WINDOWS} windows of {WINDOW}) and {most * WINDOW:,} are used where there are so many; give a longer text"
        )
    taken = min(whole, most)
    starts = [i * whole // taken for i in range(taken)]
    return np.stack([np.asarray(tokens[start * WINDOW : (start + 1) * WINDOW], dtype=np.int32) for start in starts])


def golden(inputs: Sequence[Mapping[str, Any]], count: int = 1, seed: int = SEED) -> dict[str, NDArray[Any]]:
    """One feed of made-up inputs, the same on every machine: floats close to standard normal, whole numbers 0…7, masks 1, token types 0.

    A free first dimension becomes `count`; another free one 16, in four dimensions (images) 64. Raises BadInput.
    """
    return {str(one["name"]): _golden(one, count, seed * 1000 + index) for index, one in enumerate(inputs)}


def golden_samples(inputs: Sequence[Mapping[str, Any]], count: int, seed: int = SEED) -> Samples:
    """`count` golden inputs, each a feed of its own."""
    feeds = [golden(inputs, 1, seed * 1000 + i) for i in range(count)]
    arrays = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    return Samples(inputs=inputs, arrays=arrays, labels=None, origin=f"golden inputs, seed {seed}", whole=frozenset(arrays))


def _golden(one: Mapping[str, Any], count: int, seed: int) -> NDArray[Any]:
    free = FREE_SIDE if len(one["shape"]) >= 4 else FREE_LENGTH
    shape = [length if isinstance(length, int) else free for length in one["shape"]]
    if shape and not isinstance(one["shape"][0], int):
        shape[0] = count
    try:
        dtype = np.dtype(one["dtype"])
    except TypeError:
        dtype = np.dtype(object)
    size = math.prod(shape)
    if dtype.kind == "f":
        return _normal(size, seed).reshape(shape).astype(dtype)
    if dtype.kind not in "iub":
        raise BadInput(f"inputs cannot be made up for {one['name']}, which takes {one['dtype']}; give evaluate.data")
    if "mask" in str(one["name"]).lower():
        return np.ones(shape, dtype)
    if "token_type" in str(one["name"]).lower():  # of two types at most, of one in many models
        return np.zeros(shape, dtype)
    raw = np.atleast_1d(np.random.PCG64(seed).random_raw(size)) >> np.uint64(61)
    return (raw % 2 if dtype.kind == "b" else raw).reshape(shape).astype(dtype)


def _normal(size: int, seed: int) -> NDArray[np.float64]:
    """Close to standard normal: the sum of twelve uniform numbers less 6 (Irwin–Hall), so in -6…6.

    PCG64's raw stream is fixed by NumPy's compatibility policy and sums of multiples of 2⁻⁵³ are exact enough to be equal
    everywhere, which Generator.standard_normal is not promised to be.
    """
    generator = np.random.PCG64(seed)
    total = np.zeros(size)
    for _ in range(12):
        total += (np.atleast_1d(generator.random_raw(size)) >> np.uint64(11)) * 2.0**-53
    return total - 6.0


def golden_tokens(session: Session, count: int = 64) -> NDArray[np.int32]:
    """The first `count` tokens [T] of a fixed text, repeated where it has fewer. Raises BadInput."""
    tokens = np.asarray(session.tokens(GOLDEN_TEXT), dtype=np.int32)
    if not len(tokens):
        raise BadInput("the model's tokenizer makes no tokens of a plain English text")
    return np.resize(tokens, count)
