"""`edgebuild toolchain`: what toolchains there are, and their environments made and removed by hand, before a build or after."""

import os
import time
from collections.abc import Sequence

from edgebuild import environment, toolchain
from edgebuild.errors import FAILED, OK, StepFailed, UserError, did_you_mean
from edgebuild.install import install, summary, works
from edgebuild.process import Workers
from edgebuild.progress import Display, display
from edgebuild.provide import check_online
from edgebuild.toolchain import Lock
from edgebuild.units import human


def locks(names: Sequence[str], everything: bool) -> list[Lock]:
    """Those that are meant. Raises UserError for none, and for a name that there is no lock of."""
    known = toolchain.names()
    if everything and names:
        raise UserError("give names of toolchains or --all, not both")
    if not everything and not names:
        raise UserError(f"name a toolchain, or --all; there are: {', '.join(known)}")
    found = []
    for name in known if everything else names:
        lock = toolchain.read(name) if name in known else None
        if lock is None:
            raise UserError(f'there is no toolchain "{name}"; there are: {", ".join(known)}.{did_you_mean(name, known)}')
        found.append(lock)
    return found


def make(wanted: Sequence[Lock]) -> int:
    """Install each that is not there, or does not work; → the exit status. One that fails leaves the others alone."""
    workers, terminal = Workers(), display(len(wanted))
    try:
        made = [_make(lock, workers, terminal) for lock in wanted]
        return OK if all(made) else FAILED
    finally:
        workers.end()
        terminal.close()


def drop(wanted: Sequence[Lock]) -> list[str]:
    """Remove the environments of these toolchains, also of earlier locks; → a line for each. Raises StepFailed for one in use."""
    names, lines = {lock.name for lock in wanted}, []
    environment.sweep()
    for found in environment.present():
        if found.name in names:
            environment.remove(found)
            lines.append(f"removed {found.name}: {human(found.bytes)}")
            names.discard(found.name)
    return lines + [f"{name} is not installed" for name in sorted(names)]


def show() -> list[str]:
    """A line for each toolchain, then one for each environment of another Python, or of a lock that is no longer shipped."""
    environment.sweep()
    known = [lock for name in toolchain.names() if (lock := toolchain.read(name))]
    lines = [f"{'toolchain':<16} {'packages':>8} {'':<17} {'size':>8}"]
    for lock in known:
        found = environment.note(lock.digest)
        state, size = ("installed", human(found.bytes)) if found else ("not installed", "")
        lines.append(
            f"{lock.name:<16} {len(lock.pins):>8} {state:<17} {size:>8}  {_where(lock.digest) if found else ''}".rstrip()
        )
    current, texts = {lock.digest for lock in known}, {lock.text for lock in known}
    for other in environment.present():
        if other.digest not in current:
            state = f"of {other.python}" if other.lock in texts else "of another lock"
            lines.append(f"{other.name:<16} {other.packages:>8} {state:<17} {human(other.bytes):>8}  {_where(other.digest)}")
    return lines


def _make(lock: Lock, workers: Workers, terminal: Display) -> bool:
    start, name = time.monotonic(), f"toolchain:{lock.name}"
    terminal.started(name)
    try:
        found = environment.note(lock.digest)
        if found and (problem := works(lock, workers.command)):
            terminal.doing(name, problem)
            environment.remove(found)
            found = None
        if not found:
            check_online(lock)
        made = found or install(lock, workers.command, lambda what: terminal.doing(name, what))
    except StepFailed as error:
        terminal.failed(name, str(error), time.monotonic() - start)
        return False
    terminal.ended(name, "is there" if found else "ran", time.monotonic() - start, summary(made))
    return True


def _where(digest: str) -> str:
    home, path = os.path.expanduser("~"), environment.place(digest)
    return f"~{path.removeprefix(home)}" if path.startswith(f"{home}/") else path
