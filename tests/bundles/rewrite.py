"""Writes the golden folders anew: `python -m tests.bundles.rewrite`, then read what `git diff` shows before you commit it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bundles import test_firmware_mcu
from tests.bundles.packing import FRAMEWORK, GOLDEN, as_text, pack


def main() -> None:
    for kind in sorted(FRAMEWORK):
        rewrite(kind, lambda folder, kind=kind: pack(kind, folder))
    rewrite("firmware-mcuboot", test_firmware_mcu.pack_exact)


def rewrite(name: str, packed: Callable[[Path], Path]) -> None:
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for place, text in as_text(packed(Path(folder))).items():
            target = GOLDEN / name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.encode())
    print(f"wrote {GOLDEN / name}")


if __name__ == "__main__":
    main()
