"""`edgebuild toolchain`: what toolchains there are, and their environments made and removed by hand, before a build or after.

Wheels of images are made, shown and removed as toolchains are, and so is the base image, which is made when it is named.
"""

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from edgebuild import baseimage, environment, toolchain
from edgebuild.environment import Environment
from edgebuild.errors import FAILED, OK, StepFailed, UserError, did_you_mean
from edgebuild.install import Command, install, summary, works
from edgebuild.process import Workers
from edgebuild.progress import Display, display
from edgebuild.provide import check_online, kept, no_base
from edgebuild.units import human


def takes(parser: ArgumentParser) -> None:
    parser.add_argument("what", choices=("install", "list", "remove"), help="make environments, show them, or remove them")
    named = f"toolchains, as `edgebuild toolchain list` names them; {baseimage.NAME}: what images of containers are tried on"
    parser.add_argument("names", metavar="NAME", nargs="*", help=named)
    every = f"every toolchain; install: all but {baseimage.NAME}, which takes root and {baseimage.PROGRAM}"
    parser.add_argument("--all", action="store_true", help=every)
    parser.add_argument("--offline", action="store_true", help="ask no package index: say what is missing")


def run(options: Namespace) -> int:
    """→ exit status."""
    if options.offline:
        os.environ["EDGEBUILD_OFFLINE"] = "1"
    if options.what == "list":
        print("\n".join(show()))
        return OK
    locks = toolchain.names()
    known = [*locks, baseimage.NAME]
    if options.what == "install":
        names = meant(options.names, options.all, known)
        return make(locks if options.all else names)
    here = {found.name for found in environment.present()}
    print("\n".join(drop(meant(options.names, options.all, sorted({*known, *here})))))
    return OK


def meant(names: Sequence[str], everything: bool, known: Sequence[str]) -> Sequence[str]:
    """Those of the known names. Raises UserError for none, and for another one."""
    if everything and names:
        raise UserError("give names of toolchains or --all, not both")
    if not everything and not names:
        raise UserError(f"name a toolchain, or --all; there are: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f'there is no toolchain "{name}"; there are: {", ".join(known)}.{did_you_mean(name, known)}')
    return known if everything else names


def make(wanted: Sequence[str]) -> int:
    """Install each that is not there, or does not work; → the exit status. One that fails leaves the others alone."""
    workers, terminal = Workers(), display(len(wanted))
    try:
        made = [_make(name, workers, terminal) for name in wanted]
        return OK if all(made) else FAILED
    finally:
        workers.end()
        terminal.close()


def drop(names: Sequence[str]) -> list[str]:
    """Remove what lies here by these names, also of earlier locks; → a line for each. Raises StepFailed for one in use."""
    gone, lines = set[str](), []
    environment.sweep()
    for found in environment.present():
        if found.name in names:
            environment.remove(found)
            lines.append(f"removed {found.name}: {human(found.bytes)}")
            gone.add(found.name)
    return lines + [f"{name} is not installed" for name in sorted({*names} - gone)]


def show() -> list[str]:
    """A line for each toolchain and the base image, then one for each environment of another Python, or of a lock no longer shipped."""
    environment.sweep()
    locks = [lock for name in toolchain.names() if (lock := toolchain.read(name))]
    known = [(lock.name, len(lock.pins), lock.digest) for lock in locks]
    known.append((baseimage.NAME, len(baseimage.PACKAGES), baseimage.key()))
    others = kept()
    wide = max([16, *(len(name) for name, _, _ in known), *(len(other.name) for other, _ in others)])
    lines = [f"{'toolchain':<{wide}} {'packages':>8} {'':<17} {'size':>8}"]
    for name, packages, digest in known:
        found = environment.note(digest)
        state, size = ("installed", human(found.bytes)) if found else ("not installed", "")
        lines.append(f"{name:<{wide}} {packages:>8} {state:<17} {size:>8}  {_where(digest) if found else ''}".rstrip())
    own = {digest for _, _, digest in known}
    for other, current in others:
        if other.digest not in own:
            state = "of another lock" if not current else f"of {other.python}" if other.python else other.form
            lines.append(f"{other.name:<{wide}} {other.packages:>8} {state:<17} {human(other.bytes):>8}  {_where(other.digest)}")
    return lines


def _make(name: str, workers: Workers, terminal: Display) -> bool:
    start, step, command = time.monotonic(), f"toolchain:{name}", workers.command

    def doing(what: str) -> None:
        terminal.doing(step, what)

    terminal.started(step)
    try:
        made, there = _base(command, doing) if name == baseimage.NAME else _toolchain(name, command, doing)
    except StepFailed as error:
        terminal.failed(step, str(error), time.monotonic() - start)
        return False
    terminal.ended(step, "is there" if there else "ran", time.monotonic() - start, summary(made))
    return True


def _toolchain(name: str, command: Command, doing: Callable[[str], None]) -> tuple[Environment, bool]:
    """What is there now, and whether it was there before, and works. Raises StepFailed."""
    lock = toolchain.read(name)
    assert lock is not None  # it was listed
    found = environment.note(lock.digest)
    if found and (problem := works(lock, command)):
        doing(problem)
        environment.remove(found)
        found = None
    if found:
        return found, True
    check_online(lock)
    return install(lock, command, doing), False


def _base(command: Command, doing: Callable[[str], None]) -> tuple[Environment, bool]:
    """As `_toolchain`."""
    if found := environment.note(baseimage.key()):
        return found, True
    if reason := no_base():
        wants = f"it takes root, a network and {baseimage.PROGRAM} (edgebuild doctor --apt prints what installs that)"
        raise StepFailed(f"the base image cannot be made here: {reason}; {wants}")
    return baseimage.make(command, doing), False


def _where(digest: str) -> str:
    home, path = os.path.expanduser("~"), environment.place(digest)
    return f"~{path.removeprefix(home)}" if path.startswith(f"{home}/") else path
