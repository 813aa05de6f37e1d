"""Where the data files that ship with edgebuild lie: beside the package in a checkout, inside it in a wheel."""

import os

PACKAGE = os.path.dirname(os.path.realpath(__file__))  # a worker may see the package through a link


def folder(name: str) -> str:
    """The folder `schemas`, `templates`, `platforms` or `example`."""
    inside = os.path.join(PACKAGE, name)
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(PACKAGE), name)
