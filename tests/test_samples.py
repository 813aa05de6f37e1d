"""Data files that are right, and those that are not with what is said about them; golden inputs that never change."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import samples
from edgebuild.errors import StepFailed

GOLDEN_FLOATS = [1.929450830697582, -0.3414965326595407, -1.7185032855538251, -2.2458489924910396]
GOLDEN_INTS = [0, 6, 7, 3]
PIXELS: dict[str, Any] = {"name": "pixels", "dtype": "float32", "shape": ["N", 1, 8, 8]}


class Letters:
    """A tokenizer: one token a character."""

    runtime = "test"
    inputs = ()

    def infer(self, feeds: Any) -> Any:
        raise NotImplementedError

    def logits(self, tokens: Any) -> Any:
        raise NotImplementedError

    def tokens(self, text: str) -> Any:
        return np.array([ord(letter) % 128 for letter in text], dtype=np.int32)

    def close(self) -> None: ...


def pixels(count: int = 3) -> Any:
    return np.arange(count * 64, dtype=np.float32).reshape(count, 1, 8, 8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_samples_are_fed_one_at_a_time_as_arrays(tmp_path: Path) -> None:
    given = samples.read(save(tmp_path / "a.npz", pixels=pixels(), labels=np.array([2, 0, 1])), [PIXELS])
    feeds = list(given.feeds())
    assert len(given) == len(feeds) == 3
    assert [feed["pixels"].shape for feed in feeds] == [(1, 1, 8, 8)] * 3
    assert np.array_equal(np.concatenate([feed["pixels"] for feed in feeds]), pixels())
    assert given.labels is not None
    assert given.labels.tolist() == [2, 0, 1]
    assert given.origin == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()


def test_what_has_no_batch_axis_is_given_whole(tmp_path: Path) -> None:
    inputs: list[dict[str, Any]] = [
        {"name": "audio", "dtype": "float32", "shape": [1, None]},
        {"name": "state", "dtype": "float32", "shape": [2, 1, 4]},
        {"name": "rate", "dtype": "int64", "shape": []},
    ]
    path = save(
        tmp_path / "a.npz", audio=np.zeros((5, 7), np.float32), state=np.ones((5, 2, 1, 4), np.float32), rate=np.full(5, 16000)
    )
    feed = next(samples.read(path, inputs, 2).feeds())
    assert {name: array.shape for name, array in feed.items()} == {"audio": (1, 7), "state": (2, 1, 4), "rate": ()}
    assert all(isinstance(array, np.ndarray) for array in feed.values())
    assert len(list(samples.read(path, inputs, 2).feeds())) == 2


def test_a_fixed_batch_is_filled_up_with_its_last_sample(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.arange(6, dtype=np.float32).reshape(3, 2))
    given = samples.read(path, [{"name": "x", "dtype": "float32", "shape": [2, 2]}])
    assert [feed["x"].tolist() for feed in given.feeds()] == [[[0, 1], [2, 3]], [[4, 5], [4, 5]]]


def test_other_byte_and_axis_orders_are_the_same_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", pixels=np.asfortranarray(pixels()).astype(">f4"))
    given = samples.read(path, [PIXELS])
    assert np.array_equal(given.arrays["pixels"], pixels())
    assert given.arrays["pixels"].dtype.isnative
    assert given.arrays["pixels"].flags.c_contiguous


def truncated(path: Path) -> None:
    save(path, pixels=pixels())
    path.write_bytes(path.read_bytes()[:-100])


def lone(path: Path) -> None:
    np.save(path.with_suffix(".npy"), pixels())
    path.with_suffix(".npy").rename(path)


def lying(path: Path) -> None:
    """A header that claims 2³⁸ bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**30, 1, 8, 8)})
        archive.writestr("pixels.npy", header.getvalue() + bytes(100))


def bomb(path: Path) -> None:
    """A member that says it unpacks to 5 GiB; zipfile reads no more than a member says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("pixels.npy", b"x")
        archive.infolist()[0].file_size = 5 * 2**30


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pixels.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("pixels.npy", b"")


def spoiled() -> Any:
    wrong = pixels()
    wrong[1, 0, 2, 3] = np.nan
    wrong[2] = np.inf
    return wrong


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "misspelt": (
        lambda p: save(p, pixel=pixels()),
        'no array "pixels", which the model takes as an input; the file holds: pixel. Did you mean "pixel"?',
    ),
    "missing": (
        lambda p: save(p, unlike=pixels()),
        'no array "pixels", which the model takes as an input; the file holds: unlike.',
    ),
    "label": (
        lambda p: save(p, pixels=pixels(), label=np.zeros(3, int)),
        'the array "label" is no input of the model. Did you mean "labels"?',
    ),
    "double": (
        lambda p: save(p, pixels=pixels().astype(float)),
        "pixels is float64, but the model takes float32; save pixels.astype(numpy.float32)",
    ),
    "bytes": (lambda p: save(p, pixels=pixels().astype(np.uint8)), "would do, if the values are scaled as the model was trained"),
    "complex": (
        lambda p: save(p, pixels=pixels().astype(complex)),
        "pixels is complex128, but the model takes float32; convert it before saving",
    ),
    "no channel": (
        lambda p: save(p, pixels=pixels()[:, 0]),
        "pixels has the shape [3, 8, 8], but the model takes [samples, 1, 8, 8]; pixels.reshape(3, 1, 8, 8) would do",
    ),
    "wrong shape": (
        lambda p: save(p, pixels=pixels()[..., :7]),
        "pixels has the shape [3, 1, 8, 7], but the model takes [samples, 1, 8, 8]",
    ),
    "lengths": (lambda p: save(p, pixels=pixels(), labels=np.zeros(2, int)), "the arrays differ in length: labels 2, pixels 3"),
    "none": (lambda p: save(p, pixels=pixels(0)), "holds 0 samples"),
    "single": (lambda p: save(p, pixels=np.float32(1)), "pixels is a single value"),
    "objects": (
        lambda p: save(p, pixels=np.array([{}, {}], dtype=object)),
        "holds Python objects (dtype object), which are never loaded",
    ),
    "not finite": (lambda p: save(p, pixels=spoiled()), "pixels holds 65 values that are not finite, the first at [1, 0, 2, 3]"),
    "truncated": (truncated, "is truncated or damaged"),
    "lone": (lone, "is a lone .npy array; save it by name"),
    "text": (lambda p: p.write_text("hello"), "is no .npz file; write one with numpy.savez"),
    "empty": (lambda p: p.write_bytes(b""), "is no .npz file"),
    "lying": (lying, "its header claims the shape (1073741824, 1, 8, 8), more than its 228 bytes"),
    "bomb": (bomb, "holds 5.0 GiB when unpacked, over the limit of 4 GiB"),
    "twice": (twice, "holds two arrays of one name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    make, expected = BAD[case]
    path = tmp_path / "eval.npz"
    make(path)
    with pytest.raises(StepFailed) as caught:
        samples.read(path, [PIXELS])
    assert str(caught.value).startswith("eval.npz: ")
    assert expected in str(caught.value)


def test_fractions_are_not_cut_off(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", ids=np.zeros((2, 4), np.float32))
    with pytest.raises(StepFailed, match="would cut fractions off"):
        samples.read(path, [{"name": "ids", "dtype": "int64", "shape": ["N", 4]}])


def test_more_samples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="9 samples were asked for, but it holds 3"):
        samples.read(save(tmp_path / "a.npz", pixels=pixels()), [PIXELS], 9)


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + bytes(65 + (i // 256) % 26 for i in range(256 * 40 + 9)))
    found = samples.windows(path, Letters())
    assert found.shape == (16, 256)
    assert found.dtype == np.int32
    assert found[:, 0].tolist() == [65 + (i * 40 // 16) % 26 for i in range(16)]


def test_a_short_text_is_used_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab" * 300)
    assert samples.windows(path, Letters()).shape == (2, 256)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"",
            "0 characters are 0 tokens, but 512 are the least (2 windows of 256) and 4,096 are used where there are so many; give a longer text",
        ),
        (b"word " * 60, "300 characters are 300 tokens"),
        (b"gr\xfcn" * 400, "is no UTF-8 text: byte 2 is 0xfc; save it as UTF-8"),
        (b"a\0b" * 400, "holds NUL characters"),
        (b"PK\x03\x04" + bytes(2000), "a language model takes UTF-8 text, and this is an archive; give the text as a file"),
    ],
)
def test_bad_texts(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.txt"
    path.write_bytes(content)
    with pytest.raises(StepFailed) as caught:
        samples.windows(path, Letters())
    assert str(caught.value).startswith("eval.txt: ")
    assert expected in str(caught.value)


def test_golden_inputs_follow_the_model() -> None:
    inputs: list[dict[str, Any]] = [
        PIXELS,
        {"name": "image", "dtype": "float32", "shape": [1, 3, None, "H"]},
        {"name": "ids", "dtype": "int64", "shape": ["batch", "length"]},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"]},
        {"name": "token_type_ids", "dtype": "int64", "shape": ["batch", "length"]},
        {"name": "flag", "dtype": "bool", "shape": [4]},
        {"name": "rate", "dtype": "float16", "shape": []},
    ]
    feed = samples.golden(inputs, count=4)
    shapes = {
        "pixels": (4, 1, 8, 8),
        "image": (1, 3, 64, 64),
        "ids": (4, 16),
        "attention_mask": (4, 16),
        "token_type_ids": (4, 16),
        "flag": (4,),
        "rate": (),
    }
    assert {name: array.shape for name, array in feed.items()} == shapes
    assert {name: array.dtype.name for name, array in feed.items()} == {str(one["name"]): one["dtype"] for one in inputs}
    assert set(feed["ids"].ravel().tolist()) <= set(range(8))
    assert feed["attention_mask"].all()
    assert not feed["token_type_ids"].any()  # which index a table of two rows, or of one
    assert abs(feed["image"].mean()) < 0.05
    assert abs(feed["image"].std() - 1) < 0.05


def test_golden_inputs_never_change() -> None:
    """They are in bundles, so another stream of numbers would make every bundle another one."""
    feed = samples.golden([{"name": "x", "dtype": "float64", "shape": [2, 2]}, {"name": "i", "dtype": "int32", "shape": [4]}])
    assert feed["x"].ravel().tolist() == GOLDEN_FLOATS
    assert feed["i"].tolist() == GOLDEN_INTS
    again = samples.golden([{"name": "x", "dtype": "float64", "shape": [2, 2]}], seed=21)
    assert again["x"].ravel().tolist() != GOLDEN_FLOATS


def test_golden_samples_differ_from_one_another() -> None:
    given = samples.golden_samples([PIXELS], 5)
    feeds = [feed["pixels"] for feed in given.feeds()]
    assert len(feeds) == len(given) == 5
    assert {array.shape for array in feeds} == {(1, 1, 8, 8)}
    assert len({array.tobytes() for array in feeds}) == 5


def test_inputs_that_cannot_be_made_up() -> None:
    with pytest.raises(StepFailed, match=r"cannot be made up for text, which takes object; give evaluate\.data"):
        samples.golden([{"name": "text", "dtype": "object", "shape": [1]}])


def test_golden_tokens_are_of_a_plain_text() -> None:
    assert samples.golden_tokens(Letters(), 3).tolist() == [ord(letter) for letter in "The"]
    assert len(samples.golden_tokens(Letters(), 5000)) == 5000
    assert len(samples.GOLDEN_TEXT.split()) >= 64
