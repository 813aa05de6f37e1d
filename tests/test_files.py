"""Files of our own are whole or not there: what is told where the system takes only a part; and the digests of files."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from edgebuild import digest

LIMITED = """
import resource, sys
from edgebuild.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # write(2) then takes the first 1000 bytes, and says so
try:
    write_whole(sys.argv[1], b"x" * 2000)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of resources")
def test_a_write_that_the_system_takes_a_part_of_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "memo.json").write_text("before")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "memo.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"memo.json": "before"}


@pytest.mark.parametrize(
    "size", [0, 1, digest.ONE_READ - 1, digest.ONE_READ, digest.ONE_READ + 1, digest.ONE_READ + 3 * digest.BUFFER + 7]
)
def test_the_digest_of_a_file_of_any_size(size: int, tmp_path: Path) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert digest.of_file(str(tmp_path / "file")) == hashlib.sha256(data[:size]).hexdigest()
