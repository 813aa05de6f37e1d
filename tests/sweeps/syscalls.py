"""A build broken at every system call that changes something on disk: killed there, or told ENOSPC or EIO.

    python -m tests.sweeps.syscalls [--kill | --error] [--part PART]… [--call NAME]… [--tenth SEED] [--jobs N] [--without GUARD]

After each: nothing is torn, the store is sound; the edit undone, built, done again, built, each time with what a clean
build makes; nothing is left behind. An error also ends the build with one line and status 1, or is one of a mere cache.
"""

import argparse
import functools
import multiprocessing
import multiprocessing.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgebuild.errors import EdgebuildError, StepFailed
from tests.conftest import TARGET, make_lab, perform_here, write_model
from tests.sweeps.audit import Contents, contents, leftovers, receipts, torn, unsound
from tests.sweeps.guards import GUARDS
from tests.sweeps.traced import TRACE, Call, Ended, calls, forked

# What each call is told. EIO only where a full disk cannot be the reason.
ERRORS = {
    "fsync": ["EIO", "ENOSPC"],
    "fdatasync": ["EIO"],
    "chmod": ["EIO"],
    "fchmod": ["EIO"],
    "fchmodat": ["EIO"],
    "unlink": ["EIO"],
}
ERRORS |= {"unlinkat": ["EIO"], "rmdir": ["EIO"], "utimensat": ["EIO"], "ioctl": ["EIO"], "sendfile": ["ENOSPC"]}
ANY = ["ENOSPC", "EIO"]
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would be waited for at every fsync
TICK = 0.03  # seconds
TRIES = 3  # a count may differ by what was still racy in a run: then the call is looked for again


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is broken: `words` of `edgebuild` after the edit; with workers as processes, traced as `who` says."""

    before: Callable[[Path], None]
    after: Callable[[Path], None]
    words: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()  # built after the edit, before what is broken
    who: str = "all in one"  # or `parent`, or `worker`


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What a part's builds make where nothing breaks."""

    states: list[tuple[Contents, dict[str, dict[str, str]]]]  # clean builds before and after the edit; what is broken, whole
    ended: list[Ended]
    calls: list[Call]
    root: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One fault: `error` (or KILL) at one call of one part."""

    part: str
    turn: int  # of the call, among those of its name and path; how many came before at other paths may differ a little
    call: Call
    error: str

    def __str__(self) -> str:
        return f"{self.part}: {self.error} at {self.call.name} {self.call.nth} of {self.call.path}"


def _one(root: Path, text: str, more: str = "") -> None:
    write_model(root / "model.gguf", text)
    (root / "targets" / "one.yaml").write_text(TARGET + more)
    time.sleep(TICK)  # past the clock's tick: else what is racy is read once more, and the count of calls differs


def _two(root: Path) -> None:
    (root / "targets" / "three.yaml").unlink(missing_ok=True)
    (root / "targets" / "two.yaml").write_text(TARGET)
    time.sleep(TICK)


def _three(root: Path) -> None:
    """A target less, whose bundle must go; a target more, whose steps are restored."""
    (root / "targets" / "two.yaml").unlink(missing_ok=True)
    (root / "targets" / "three.yaml").write_text(TARGET)
    time.sleep(TICK)


_hello, _world = partial(_one, text="hello"), partial(_one, text="world")
PARTS = {
    "build": Part(before=_hello, after=_world),
    "targets": Part(before=_two, after=_three),
    "gate": Part(before=_hello, after=partial(_one, text="hello", more="gates: {cosine: {min: 2}}\n")),
    "parent": Part(before=_hello, after=_world, words=("convert:one",), ready=("assess:one",), who="parent"),
    "worker": Part(before=_hello, after=_world, words=("convert:one",), ready=("assess:one",), who="worker"),
}


# -- a project that is broken and mended ---------------------------------------------------------------------------------
def edgebuild(root: Path, words: tuple[str, ...], guard: str, workers: bool = False, steady: bool = True) -> int:
    """`edgebuild WORDS` in this process, a guard of it switched off. Actions run here too, or in `workers` as always.

    `steady`: every file just written is taken for racy, so that the count of calls does not depend on the clock.
    """
    from edgebuild import cli, memo, process, project

    os.chdir(root)
    os.environ["XDG_CACHE_HOME"] = str(root.parent / "cache")
    os.environ.pop("EDGEBUILD_STORE", None)
    if not workers:
        process.Workers.perform = _perform  # type: ignore[assignment, method-assign]
    if steady:
        process._watch = _wait
        memo.racy, project.racy = (lambda *found: True), (lambda *found: False)  # type: ignore[attr-defined]
    if guard:
        GUARDS[guard]()
    return cli.main(list(words))


def _perform(self: object, *record: Any) -> Any:
    """As a worker would: whatever a framework raises is a step that failed."""
    try:
        return perform_here(*record)
    except (EdgebuildError, OSError):
        raise
    except Exception as error:
        raise StepFailed(f"unexpected {type(error).__name__}: {error}") from error


def _wait(
    process: "subprocess.Popen[bytes]", memory: int, deadline: float, look: Callable[[float], float]
) -> tuple[str, int | None]:
    """Without a look at the worker now and then, which would make the count of calls another one each time."""
    process.wait()
    return "", None


class Bench:
    """A project in `folder`/world, laid out anew for every fault of one part."""

    def __init__(self, name: str, guard: str = "") -> None:
        self.part, self.guard = PARTS[name], guard
        self._calls: list[Call] = []  # as this process makes them
        self.folder = Path(tempfile.mkdtemp(prefix="edgebuild-sweep-", dir=MEMORY))
        self.world, self.root = self.folder / "world", self.folder / "world" / "project"
        make_lab(self.root)
        self.part.before(self.root)
        assert self.build().status == 0
        self.part.after(self.root)
        assert not self.part.ready or self.build(*self.part.ready).status == 0
        self.world.rename(self.folder / "prepared")

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def build(self, *words: str) -> Ended:
        return forked(partial(edgebuild, self.root, words, self.guard, steady=False), self.folder)

    def known(self) -> Known:
        """What builds make where nothing breaks, and the calls of the one that is to be broken."""
        states, ended = [], []
        for edit in (self.part.before, self.part.after):
            shutil.rmtree(self.world, ignore_errors=True)
            make_lab(self.root)
            edit(self.root)
            ended.append(self.build())
            states.append((contents(self.root), receipts(self.root)))
        ended.append(self.broken(TRACE))
        states.append((contents(self.root), receipts(self.root)))
        seen = calls(self.folder / "strace", self.root, self.world)
        return Known(states=states, ended=ended, calls=seen, root=self.root)

    def broken(self, *inject: str) -> Ended:
        """The build that is broken, on a project laid out anew."""
        shutil.rmtree(self.world, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.folder / "prepared"), str(self.world)], check=True)
        time.sleep(TICK)
        options = tuple(word for one in inject for word in ("-e", one))
        if self.part.who == "worker":
            return forked(partial(self._with_traced_worker, options), self.folder)
        return forked(partial(edgebuild, self.root, self.part.words, self.guard, self.part.who == "parent"), self.folder, options)

    def _with_traced_worker(self, options: tuple[str, ...]) -> int:
        """-DD: strace stands aside, so that the worker is its parent's own child, and outlives it to end its log."""
        command = ["strace", "-DD", "-qq", "-y", "-o", str(self.folder / "strace"), *options, sys.executable]
        script = self.folder / "python"
        script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        script.chmod(0o755)
        sys.executable = str(script)
        return edgebuild(self.root, self.part.words, self.guard, workers=True)

    # -- one fault -------------------------------------------------------------------------------------------------------
    def problems(self, point: Point, known: Known) -> list[str] | None:
        """What did not hold after this fault; None where its call did not come."""
        how = "signal=KILL" if point.error == "KILL" else f"error={point.error}"
        for _ in range(TRIES):
            if not self._calls:
                self.broken(TRACE)
                self._calls = calls(self.folder / "strace", self.root, self.world)
            alike = [one for one in self._calls if _alike(one, point.call)]
            call = alike[min(point.turn, len(alike) - 1)] if alike else point.call
            ended = self.broken(TRACE, f"inject={call.name}:{how}:when={call.nth}")
            seen = calls(self.folder / "strace", self.root, self.world)
            hit = [one for one in seen if one.name == call.name and one.nth == call.nth]
            if hit and _alike(hit[0], call) and (hit[0].injected or (point.error == "KILL" and hit[0] == seen[-1])):
                break
            self._calls = []
        else:
            return None
        killed = point.error == "KILL" and self.part.who != "worker"  # a worker that is killed is an error of its step
        if killed:
            found = [] if ended.status == -signal.SIGKILL else [f"ended with {ended.status}, not by the signal"]
        else:
            found = list(self._message(ended, hit[0], known))
        found += [*torn(self.root, known.states), *unsound(self.root)]
        for edit, (clean, _), whole in zip((self.part.before, self.part.after), known.states, known.ended, strict=False):
            edit(self.root)
            ended = self.build()
            if (ended.status, ended.err) != (whole.status, whole.err):
                found.append(f"not recovered: status {ended.status}, {ended.err.strip()}")
            elif contents(self.root) != clean:
                found.append(f"wrong: {_differences(contents(self.root), clean)}")
            found += leftovers(self.root)
        return found + list(unsound(self.root))

    def _message(self, ended: Ended, call: Call, known: Known) -> Iterator[str]:
        """What a build that was told of an error must say, and leave."""
        if "Traceback" in ended.err:
            yield f"a traceback: {ended.err.strip()}"
        whole, (made, _) = known.ended[2], known.states[2]
        lines = [line for line in ended.err.splitlines() if not line.startswith(("  log: ", "    | "))]
        if ended.status == whole.status and set(whole.err.splitlines()) <= set(lines):
            if contents(self.root) != made:
                yield f"ended as if whole, and is wrong: {_differences(contents(self.root), made)}"
            if not self._survivable(call):
                yield f"ended as if whole, where its results may not lie on the disk: the call was at {call.path}"
        elif ended.status != 1 or len(lines) != 1:
            yield f"not one line and status 1: {ended.status} {ended.err!r}"
        if not call.removing:
            yield from leftovers(self.root)

    def _survivable(self, call: Call) -> bool:
        """A cache or the machine's lock may be lost; what cannot be removed is collected at the next start."""
        ours, state = call.path.startswith(f"{self.root}/"), self.root / ".edgebuild"
        cache = os.path.dirname(call.path) == str(state) or call.path.startswith(f"{state}/before")
        return not ours or cache or call.removing


def _alike(one: Call, other: Call) -> bool:
    """Whether both are of one name at one path, but for the parts of it that a process makes up."""
    return one.name == other.name and _named(one) == _named(other)


def _named(call: Call) -> str:
    return re.sub(r"^.*/edgebuild-sweep-[^/]+|\.tmp[^/]*|/(tmp|workers)/[^/]+", "", call.path)


def _turns(seen: list[Call]) -> Iterator[tuple[int, Call]]:
    """Each call with the count of those alike before it."""
    before: Counter[tuple[str, str]] = Counter()
    for call in seen:
        yield before[call.name, _named(call)], call
        before[call.name, _named(call)] += 1


def unsynced(calls: Iterable[Call], root: Path) -> Iterator[str]:
    """Files renamed into the store that were not brought to the disk before, or whose folder was not after."""
    store, synced = f"{root}/.edgebuild/", False
    waiting: Call | None = None
    for call in calls:
        if call.name == "fsync" and waiting is None:
            synced = call.path.startswith(f"{store}tmp/")
        if waiting is not None and (call.name != "fsync" or call.path != os.path.dirname(waiting.path)):
            yield f"the folder of {waiting.path} was not brought to the disk"
        waiting = None
        if call.name.startswith("rename") and call.path.startswith((f"{store}objects/", f"{store}records/")):
            if not synced:
                yield f"{call.path} was not brought to the disk before it had its name"
            waiting, synced = call, False


def _differences(one: Contents, other: Contents) -> str:
    return ", ".join(sorted(path for path in {*one, *other} if one.get(path) != other.get(path)))


# -- the sweep -----------------------------------------------------------------------------------------------------------
class Sweep:
    """Some builds at a time, each in a process of its own that has everything imported."""

    def __init__(self, parts: Iterable[str], jobs: int, guard: str = "") -> None:
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        self._guard = guard
        self.known = {part: self._pool.submit(_know, part, guard).result() for part in parts}
        self.points = [
            Point(part=part, turn=turn, call=call, error=error)
            for part, known in self.known.items()
            for turn, call in _turns(known.calls)
            for error in ("KILL", *ERRORS.get(call.name, ANY))
        ]

    def run(self, points: Iterable[Point]) -> Iterator[tuple[Point, list[str] | None]]:
        """Break a build at each of these points; → each with what did not hold, None where its call did not come."""
        found = [(point, self._pool.submit(_check, point, self.known[point.part], self._guard)) for point in points]
        for point, problems in found:
            yield point, problems.result()

    def unsynced(self) -> list[str]:
        return [one for known in self.known.values() for one in unsynced(known.calls, known.root)]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@functools.cache
def _bench(part: str, guard: str) -> Bench:
    """This process's own, one a part; gone when the process ends."""
    bench = Bench(part, guard)
    multiprocessing.util.Finalize(bench, bench.close, exitpriority=1)
    return bench


def _know(part: str, guard: str) -> Known:
    return _bench(part, guard).known()


def _check(point: Point, known: Known, guard: str) -> list[str] | None:
    return _bench(point.part, guard).problems(point, known)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.syscalls", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kill", action="store_true", help="SIGKILL alone")
    parser.add_argument("--error", action="store_true", help="ENOSPC and EIO alone")
    parser.add_argument("--part", action="append", choices=[*PARTS], help="of these parts alone")
    parser.add_argument("--call", action="append", metavar="NAME", help="at these system calls alone")
    parser.add_argument("--tenth", metavar="SEED", type=int, help="a tenth of the points, drawn by this seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without", choices=[*GUARDS], default="", help="with this guard switched off, to see that it is missed")
    chosen = parser.parse_args(words)
    start = time.monotonic()
    sweep = Sweep(chosen.part or PARTS, chosen.jobs, chosen.without)
    found = [
        one for one in sweep.points if (one.error == "KILL" or not chosen.kill) and (one.error != "KILL" or not chosen.error)
    ]
    found = [one for one in found if not chosen.call or one.call.name in chosen.call]
    found = random.Random(chosen.tenth).sample(found, len(found) // (1 if chosen.tenth is None else 10))
    unsure = sweep.unsynced()
    print(*unsure, sep="\n", end="\n" if unsure else "")
    bad, missed = len(unsure), 0
    for done, (point, problems) in enumerate(sweep.run(found), 1):
        missed += problems is None
        bad += bool(problems)
        if problems or problems is None:
            print(f"{point}: {'; '.join(problems or ['did not come'])}", flush=True)
        if done % 100 == 0:
            print(f"{done} of {len(found)}", flush=True)
    sweep.close()
    by = ", ".join(f"{sum(one.error == error for one in found)} {error}" for error in ("KILL", "ENOSPC", "EIO"))
    print(f"{len(found)} points ({by}): {bad} bad, {missed} did not come ({time.monotonic() - start:.0f} s)")
    return 1 if bad or missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
