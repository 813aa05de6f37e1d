"""What a terminal shows while steps run: rich's live display on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from edgebuild.units import human

HEARTBEAT = 15.0  # seconds after which a plain log says that a step is still running


class Display(Protocol):
    def more(self) -> None: ...
    def started(self, name: str) -> None: ...
    def told(self, name: str, what: str) -> None: ...
    def doing(self, name: str, what: str) -> None: ...
    def moved(self, name: str, here: int, total: int | None) -> None: ...
    def ended(self, name: str, outcome: str, seconds: float, summary: str) -> None: ...
    def failed(self, name: str, message: str, seconds: float) -> None: ...
    def close(self) -> None: ...


def display(total: int) -> Display:
    """For `total` steps, of which some may turn out to be up to date."""
    return Live(total) if sys.stdout.isatty() else Plain()


class _Speeds:
    """`1.2 GB of 7.64 GB, 85.3 MB/s`, from what was there when a download was first looked at."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def said(self, name: str, here: int, total: int | None) -> str:
        now = time.monotonic()
        start, before = self._first.setdefault(name, (now, here))
        speed = f", {human((here - before) / (now - start))}/s" if now > start else ""
        return f"{human(here)}{f' of {human(total)}' if total else ''}{speed}"


@contextmanager
def hashing(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over so many bytes on a terminal, nothing elsewhere; → what tells it of bytes that are done."""
    if not sys.stdout.isatty():
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("hashing", total=total)
        yield lambda size: progress.advance(bar, size)


class Plain:
    """One line a step, as it ends; and one now and then while a long one runs."""

    def __init__(self) -> None:
        self._running: dict[str, float] = {}
        self._doing: dict[str, str] = {}
        self._speeds = _Speeds()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def more(self) -> None:
        """It counts no steps."""

    def started(self, name: str) -> None:
        self._running[name] = time.monotonic()

    def told(self, name: str, what: str) -> None:
        self._line(f"{name:<32} {what}")

    def doing(self, name: str, what: str) -> None:
        self._doing[name] = what

    def moved(self, name: str, here: int, total: int | None) -> None:
        self.doing(name, self._speeds.said(name, here, total))

    def ended(self, name: str, outcome: str, seconds: float, summary: str) -> None:
        self._running.pop(name, None)
        self._line(f"{name:<32} {outcome:<8} {seconds:6.1f} s  {summary}")

    def failed(self, name: str, message: str, seconds: float) -> None:
        self._running.pop(name, None)
        self._line(f"{name:<32} failed   {seconds:6.1f} s")
        print(f"  {name}: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._stop.set()

    def _line(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            for name, start in list(self._running.items()):
                if time.monotonic() - start >= HEARTBEAT:
                    with self._lock:
                        print(
                            f"{name:<32} running  {time.monotonic() - start:6.0f} s … {self._doing.get(name, '')}".rstrip(),
                            flush=True,
                        )


class Live:
    """A bar over all steps, a spinner for each that runs, and a line for each that ended."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(highlight=False)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._all, self._total = self._progress.add_task("steps", total=total), total
        self._running: dict[str, Any] = {}
        self._speeds = _Speeds()
        self._progress.start()

    def more(self) -> None:
        self._total += 1
        self._progress.update(self._all, total=self._total)

    def started(self, name: str) -> None:
        self._running[name] = self._progress.add_task(name, total=None)

    def told(self, name: str, what: str) -> None:
        self._progress.update(self._running[name], description=f"{name} {what}")

    doing = told

    def moved(self, name: str, here: int, total: int | None) -> None:
        self._progress.update(
            self._running[name],
            description=f"{name} {self._speeds.said(name, here, total)}",
            completed=100 * here // total if total else None,
            total=100 if total else None,
        )

    def ended(self, name: str, outcome: str, seconds: float, summary: str) -> None:
        self._remove(name)
        colour = {"ran": "green", "restored": "cyan"}.get(outcome, "white")
        self._print(f"{name:<32} ", f"{outcome:<8} ", colour, f"{seconds:6.1f} s  {summary}")

    def failed(self, name: str, message: str, seconds: float) -> None:
        self._remove(name)
        self._print(f"{name:<32} ", "failed   ", "red", f"{seconds:6.1f} s\n  {message}")

    def close(self) -> None:
        self._progress.stop()

    def _remove(self, name: str) -> None:
        self._progress.remove_task(self._running.pop(name))
        self._progress.advance(self._all)

    def _print(self, before: str, word: str, colour: str, after: str) -> None:
        from rich.text import Text

        self._console.print(Text.assemble(before, (word, colour), after))  # Text: messages are never read as markup
