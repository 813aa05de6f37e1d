"""Writes the golden folders anew: `python -m tests.bundles.rewrite`, then read what `git diff` shows before you commit it."""

import shutil
import tempfile
from pathlib import Path

from tests.bundles.packing import FRAMEWORK, GOLDEN, as_text, pack


def main() -> None:
    for kind in sorted(FRAMEWORK):
        shutil.rmtree(GOLDEN / kind, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            for place, text in as_text(pack(kind, Path(folder))).items():
                target = GOLDEN / kind / place
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text.encode())
        print(f"wrote {GOLDEN / kind}")


if __name__ == "__main__":
    main()
