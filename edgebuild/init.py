"""`edgebuild init DIR`: a folder with a project that builds at once, from the files that ship with edgebuild."""

import os
import shutil

from edgebuild import shipped
from edgebuild.errors import UserError

FILES = (
    "dodo.py",
    "targets/web-digits.yaml",
    "targets/models/digits.onnx",
    "targets/data/digits-calibration.npz",
    "targets/data/digits-eval.npz",
    "targets/data/README.md",
)
IGNORED = "build/\ndist/\n.edgebuild/\n__pycache__/\n"


def init(directory: str) -> str:
    """Make `directory` and the example in it; → what to do next. Raises UserError where it exists and holds anything."""
    if os.path.lexists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise UserError(f"{directory} exists already and is not an empty folder; name another one")
    example = os.path.join(shipped.PACKAGE, "example")
    if not os.path.isdir(example):  # a checkout: its own files are the example
        example = os.path.dirname(shipped.PACKAGE)
    try:
        for name in FILES:
            target = os.path.join(directory, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(example, name), target)
        with open(os.path.join(directory, ".gitignore"), "w", encoding="utf-8") as file:
            file.write(IGNORED)
    except OSError as error:
        raise UserError(f"{error.filename or directory} cannot be written: {error.strerror}") from error
    return f"made {directory} with the target web-digits (ONNX Runtime int8). Next:\n  cd {directory} && doit"
