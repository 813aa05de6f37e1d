"""The signing block of an APK, between its files and their directory: what two builds have in common where signatures are by ECDSA.

Its form, and all numbers below: source.android.com, "APK Signature Scheme v2" and "v3". It may be anybody's, and is read alone.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgebuild import digest

READ = 1 << 20  # bytes at once
LARGEST = 1 << 24  # bytes of a signing block
MAGIC = b"APK Sig Block 42"
# Of the end of a zip (PKWARE's APPNOTE, 4.3.16): how it begins, where it says where the directory begins, its own size, a comment's.
END, OFFSET, SIZE, COMMENT = b"PK\5\6", 16, 22, 0xFFFF
SCHEMES = {0x7109871A: 0, 0xF05368C0: 8, 0x1B93AD61: 8}  # v2, v3 and v3.1 → bytes of the SDK levels that a signer states
PADDING = 0x42726577  # to whole pages
ECDSA = (0x0201, 0x0202)  # with SHA-256, with SHA-512


def settled(apk: Path) -> str:
    """A digest of all but ECDSA's signatures, and where the directory begins behind them; empty where it has none.

    What they sign is in it, and their certificate. Raises ValueError where the file is damaged, OSError.
    """
    with apk.open("rb") as file:
        start, directory, end = _places(file)
        pairs = [_pair(one) for one in _parts(_read(file, start + 8, directory - 24), 8)]
        if not any(varies for _, varies in pairs):
            return ""
        around = hashlib.sha256()
        for begin, stop in ((0, start), (directory, end + OFFSET), (end + OFFSET + 4, end + SIZE + COMMENT)):
            for place in range(begin, stop, READ):
                around.update(_read(file, place, min(place + READ, stop)))
    return digest.tagged("apk", [around.hexdigest(), [kept for kept, _ in pairs if kept]])


def _places(file: BinaryIO) -> tuple[int, int, int]:
    """Where the signing block, the directory and its end begin."""
    last = max(0, file.seek(0, 2) - SIZE - COMMENT)
    tail = _read(file, last, last + SIZE + COMMENT)
    end = tail.rfind(END)
    directory = _number(tail[end + OFFSET : end + OFFSET + 4])
    foot = _read(file, max(0, directory - 24), directory)
    start = directory - _number(foot[:8]) - 8
    if end < 0 or foot[8:] != MAGIC or not max(0, directory - LARGEST) <= start <= directory - 32:
        raise ValueError("it has no signing block")
    return start, directory, last + end


def _read(file: BinaryIO, begin: int, stop: int) -> bytes:
    file.seek(begin)
    return file.read(stop - begin)


def _pair(pair: bytes) -> tuple[list[object], bool]:
    """A pair of ID and value, of a scheme without ECDSA's signatures; and whether it had any."""
    scheme = _number(pair[:4])
    if scheme not in SCHEMES:
        return ([] if scheme == PADDING else [pair.hex()]), False
    kept, varies = list[object]([scheme]), False
    (signers,) = _parts(pair[4:])
    for signer in _parts(signers):
        signed, rest = _part(signer)
        levels, (made, key) = rest[: SCHEMES[scheme]], _part(rest[SCHEMES[scheme] :])
        random = [_number(one[:4]) in ECDSA for one in _parts(made)]
        signatures = [(one[:4] if left_out else one).hex() for one, left_out in zip(_parts(made), random, strict=True)]
        kept.append([signed.hex(), levels.hex(), key.hex(), signatures])
        varies |= any(random)
    return kept, varies


def _parts(data: bytes, width: int = 4) -> Iterator[bytes]:
    """What is in a sequence: parts, each behind its length, a number of so many bytes."""
    while data:
        part, data = _part(data, width)
        yield part


def _part(data: bytes, width: int = 4) -> tuple[bytes, bytes]:
    """The first part, and what is behind it. Raises ValueError where it is cut off."""
    stop = width + _number(data[:width])
    if len(data) < stop:
        raise ValueError("its signing block is cut off")
    return data[width:stop], data[stop:]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
