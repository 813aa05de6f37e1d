"""Joins targets/ to doit: `doit build:NAME`, `doit list`, … Everything is in edgebuild.tasks."""

from collections.abc import Iterator
from typing import Any

from edgebuild.tasks import Tasks

_tasks = Tasks()
DOIT_CONFIG = _tasks.config


def task_edgebuild() -> Iterator[dict[str, Any]]:
    """Every step of every target."""
    yield from _tasks.generate()
