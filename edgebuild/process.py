"""Worker processes seen from their parent: started, watched, limited, ended; and what a crash left behind, collected."""

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from edgebuild import hub, machinelock, resources, shipped, signing, tether
from edgebuild.errors import INTERRUPTED, OutOfMemory, Refused, StepFailed, disk
from edgebuild.files import alive, make_folder, mine, process_name, remove_tree
from edgebuild.noop import STATE
from edgebuild.step import ENVIRONMENT
from edgebuild.units import human

# What a worker gets of its parent's environment: where programs and libraries are, and nothing that holds a secret.
PASSED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
# Where steps run beside one another, threads that wait for work sleep at once. Else they spin for a while, on a core that another step
# could have: OpenBLAS's for two to the power of this in cycles, of which it takes no fewer (its driver/others/blas_server.c). A step by
# itself is slower by it: it wakes them again and again. No bytes depend on that, so no key holds it; a benchmark is left alone.
SLEEPING = {"OPENBLAS_THREAD_TIMEOUT": "4", "OMP_WAIT_POLICY": "PASSIVE"}
SAMPLE_SECONDS = 0.1  # between two looks at the worker's memory
LOOK_SECONDS = 1.0  # between two looks for its children: a walk over all processes, 4 ms of a core for a hundred
LAST_LINES = 12
# How allocators of C, C++, Python and torch say that they get no more; the first bytes of a log are looked at for it.
NO_MEMORY = (b"cannot allocate memory", b"can't allocate memory", b"bad_alloc", b"memoryerror")
MAX_LOG = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a worker made of its record. `peak_memory`: bytes of RssAnon, largest process, sampled; None where unknown."""

    summary: str
    refused: str
    network: str
    seconds: float
    peak_memory: int | None
    kept: Mapping[str, str] = field(default_factory=dict)  # as an Outcome's


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watched:
    """`ended`: `memory` or `time` where a worker must be ended. `peak`: as of a Result. `waited`: seconds, for somebody else."""

    ended: str
    peak: int | None
    waited: float


class Workers:
    """The live workers of this process. One instance a run; `end` kills them all and lets no more start.

    `moved` is told (step, bytes that are here, bytes expected or None) while a step downloads, `tell` (step, what) where one
    waits to have the machine to itself, when it has, and where one stands still for it.
    """

    def __init__(
        self,
        moved: Callable[[str, int, int | None], None] = lambda step, here, total: None,
        tell: Callable[[str, str], None] = lambda step, what: None,
    ) -> None:
        self._moved, self._tell = moved, tell
        self._live: set[int] = set()
        self._lock = threading.Lock()
        self._ended = False

    def perform(
        self,
        record: Mapping[str, Any],
        scratch: str,
        log: str,
        memory: int | None,
        seconds: float,
        python: str = sys.executable,
        still: int | None = None,
    ) -> Result:
        """Run a record in a process of its own, by `python`. It stands `still` for measurements where that shares the machine.

        Raises StepFailed with one message, the end of the log and its path.
        """
        path = f"{scratch}/record.json"
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))
        make_folder(os.path.dirname(log))
        make_folder(f"{scratch}/tmp")
        start = time.monotonic()
        with open(log, "wb") as output:
            process = self._start(record, path, scratch, output, python)
        note = f"{STATE}/workers/{mine()}-{process_name(process.pid)}"
        try:
            make_folder(f"{STATE}/workers")
            with open(note, "xb"):
                pass  # its name says all
            watched = _watch(process, memory or _machine_memory(), seconds, self._looking(record, process, still))
        finally:
            self._finish(process)
            remove_tree(note)
        if self._ended:
            raise SystemExit(INTERRUPTED)
        return self._result(process, scratch, log, watched, time.monotonic() - start - watched.waited, memory, seconds)

    def command(self, words: Sequence[str], environment: Mapping[str, str], told: Callable[[str], None]) -> int:
        """Run a program that ends with us, and tell each line that it prints; → its exit status."""
        process = self._begin([sys.executable, "-I", tether.__file__, *words], stdout=subprocess.PIPE, env=dict(environment))
        try:
            for line in process.stdout or ():
                told(line.decode("utf-8", "replace").rstrip())
            status = process.wait()
        finally:
            self._finish(process)
        if self._ended:
            raise SystemExit(INTERRUPTED)
        return status

    def end(self) -> None:
        """Kill every live worker with all that it started."""
        self._ended = True
        for pid in list(self._live):
            _kill_group(pid)

    def _looking(
        self, record: Mapping[str, Any], process: "subprocess.Popen[bytes]", still: int | None
    ) -> Callable[[float], float]:
        """What is asked again and again while a worker runs, with the seconds since: → how many of them, and more, it waited for others."""
        waited = False

        def download(since: float) -> float:
            try:
                with open(record["download"]["progress"], encoding="ascii") as file:
                    here, total = json.load(file)
            except (OSError, ValueError):
                return 0.0
            self._moved(record["name"], here, total)
            return 0.0

        def alone(since: float) -> float:
            nonlocal waited
            waits = os.path.exists(record["alone"]["waits"])
            if waits != waited:
                self._tell(record["name"], machinelock.ALONE if waits else machinelock.MEASURES)
            waited = waits
            return since if waits else 0.0

        def beside(since: float) -> float:
            if still is None or not machinelock.wanted() or _exited(process, 0):
                return 0.0
            start = time.monotonic()
            self._tell(record["name"], machinelock.STANDS)
            _signal_group(process.pid, signal.SIGSTOP)
            try:
                machinelock.stand_aside(still)
            finally:
                _signal_group(process.pid, signal.SIGCONT)
            self._tell(record["name"], machinelock.GOES)
            return time.monotonic() - start

        return download if "download" in record else alone if "alone" in record else beside

    def _start(self, record: Mapping[str, Any], path: str, scratch: str, output: Any, python: str) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        environment |= ENVIRONMENT
        if record["verb"] != "benchmark" and threading.current_thread() is not threading.main_thread():  # as under `doit -n`
            environment |= SLEEPING
        if "download" in record:
            environment = {
                name: value for name, value in environment.items() if not name.endswith("_OFFLINE")
            } | hub.environment()
        if record.get("sign"):
            wanted = signing.variables(record["sign"])
            environment |= {name: os.environ[name] for name in wanted if name in os.environ}
        environment |= {"HOME": f"{scratch}/tmp", "TMPDIR": f"{scratch}/tmp", "XDG_CACHE_HOME": f"{scratch}/tmp"}
        environment["PYTHONPATH"] = _path(python, f"{scratch}/tmp/path")
        words = [*_dying_with_us(), python, "-m", "edgebuild.worker", path]
        handles = (record["alone"]["held"],) if "alone" in record else ()
        return self._begin(words, stdout=output, cwd=f"{scratch}/tmp", env=environment, pass_fds=handles)

    def _begin(self, words: Sequence[str], **how: Any) -> "subprocess.Popen[bytes]":
        """Start a process that leads a group, and whose input ends when we are gone."""
        with self._lock:
            if self._ended:
                raise SystemExit(INTERRUPTED)
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **how)
            self._live.add(process.pid)
        return process

    def _finish(self, process: "subprocess.Popen[bytes]") -> None:
        _kill_group(process.pid)  # children that it left behind go with it
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        self._live.discard(process.pid)

    def _result(
        self,
        process: "subprocess.Popen[bytes]",
        scratch: str,
        log: str,
        watched: _Watched,
        took: float,
        memory: int | None,
        seconds: float,
    ) -> Result:
        peak = watched.peak
        used = f"used {human(peak or 0)} of memory"
        whose = f"its limit of {human(memory)}" if memory else f"the {human(_machine_memory())} that may be used here"
        raised = "raise limits.memory" if memory else "build on a larger machine"
        advice = f"{raised}, or take a smaller model"
        if watched.ended == "memory":
            raise OutOfMemory(f"{used}, over {whose}, and was ended", advice)
        if watched.ended == "time":
            raise StepFailed(f"took longer than its limit of {seconds:.0f} s and was ended; raise limits.time{_tail(log)}")
        try:
            with open(f"{scratch}/result.json", encoding="utf-8") as file:
                result = json.load(file)
        except (OSError, ValueError) as error:
            if _full(scratch):
                raise StepFailed(disk(OSError(errno.ENOSPC, ""))) from error
            if process.returncode == -signal.SIGKILL:
                killed = "its process was killed (SIGKILL): the system ran out of memory, or somebody ended it"
                freed = "free memory, build with -n 1, or take a smaller model"
                raise OutOfMemory(f"{killed}; it {used} of {whose}", freed, _tail(log)) from error
            if _wants_memory(log):
                raise OutOfMemory(
                    f"{_no_result(process.returncode)}, for want of memory; it {used}", advice, _tail(log)
                ) from error
            raise StepFailed(_no_result(process.returncode) + _tail(log)) from error
        if "error" in result:
            unexpected, refused = result["error"].startswith("unexpected"), bool(result.get("refused"))
            said_so = os.strerror(errno.ENOSPC).lower() in result["error"].lower()  # and may have removed what it had written
            if (unexpected or refused) and (said_so or _full(scratch)):  # else in words of its own, or not at all
                raise StepFailed(disk(OSError(errno.ENOSPC, "")))
            if result.get("memory") or (unexpected and _wants_memory(log)):
                raise OutOfMemory(f"it got no more memory; it {used}", advice, f"\n  log: {os.path.relpath(log)}")
            told = "" if result.get("given") or not _printed(log) else _tail(log)
            raise (Refused if refused else StepFailed)(result["error"] + told)
        said = {key: result[key] for key in ("summary", "refused", "network", "kept")}
        return Result(**said, seconds=took, peak_memory=peak)


def collect(store: str) -> None:
    """End workers and remove temporary files that an earlier crash left behind, by the process that made them."""
    folder = f"{STATE}/workers"
    for name in _names(folder):
        owner, _, worker = name.partition("-")
        if alive(owner):
            continue
        number = int(worker.partition(".")[0])  # it is given to nobody else while one of its group lives, who may stand still
        if process_name(number) in (worker, f"{number}."):
            _kill_group(number)
        remove_tree(f"{folder}/{name}")
    for name in _names(f"{store}/tmp"):
        if not alive(name.split("-")[0]):
            remove_tree(f"{store}/tmp/{name}")
    for place in ("dist", STATE, *(f"build/{name}" for name in _names("build"))):
        _collect_temporaries(place)


def _path(python: str, folder: str) -> str:
    """Where a worker finds edgebuild. Another interpreter than this finds nothing else there: what is installed beside
    edgebuild is of this one, and would stand before what is installed in that."""
    if python == sys.executable:
        return os.path.dirname(shipped.PACKAGE)
    os.makedirs(folder)
    os.symlink(shipped.PACKAGE, f"{folder}/edgebuild")
    return folder


def _collect_temporaries(place: str) -> None:
    for name in _names(place):
        path = os.path.join(place, name)
        if name.startswith(".tmp-"):
            if not alive(name.removeprefix(".tmp-").split("-")[0]):
                remove_tree(path)
        elif place.count("/") == 1 and os.path.isdir(path) and not os.path.islink(path):
            _collect_temporaries(path)


def _watch(process: "subprocess.Popen[bytes]", memory: int, seconds: float, look: Callable[[float], float]) -> _Watched:
    """Wait for the worker to end; `look` now and then says how long it waited for somebody else, which does not count."""
    import psutil

    peak: int | None = None
    family: list[psutil.Process] = []
    last, waited = time.monotonic(), 0.0
    wait, search, deadline = 0.02, last + LOOK_SECONDS, last + seconds
    while True:
        exited = _exited(process, wait)
        waited += look(time.monotonic() - last)
        last = time.monotonic()
        if exited:
            return _Watched(ended="", peak=peak, waited=waited)
        wait = SAMPLE_SECONDS
        try:
            family = family or [psutil.Process(process.pid)]
            if last > search:
                family = [family[0], *family[0].children(recursive=True)]
                search = last + LOOK_SECONDS
            now = max(map(_anonymous, family))
            peak = max(peak or 0, now)
        except psutil.Error:
            continue
        if now > memory:
            return _Watched(ended="memory", peak=peak, waited=waited)
        if last > deadline + waited:
            return _Watched(ended="time", peak=peak, waited=waited)


def _exited(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether it ends within `seconds`. Told by the kernel where it can: Popen.wait with a timeout polls, up to 50 ms late."""
    try:
        handle = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)


def _anonymous(process: Any) -> int:
    """Bytes that must exist in memory: resident without mapped file pages, which the kernel can drop."""
    import psutil

    try:
        info = process.memory_info()
    except psutil.Error:
        return 0
    return int(info.rss) - int(getattr(info, "shared", 0))


def _dying_with_us() -> list[str]:
    """Words before a program that has the kernel end it with its parent; none where no setpriv can.

    A worker asks for that itself, but only once its interpreter has started: seconds, on a machine that is busy. Where the
    parent was gone before the kernel was asked, a shell sees that it has another one, and starts nothing.
    """
    words = _setpriv()
    return [*words, "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())] if words else []


@cache
def _setpriv() -> list[str]:
    """A shell behind setpriv(1) of util-linux, which take 3 ms; nothing where that is another one (busybox's), which cannot."""
    program = shutil.which("setpriv")
    words = [program, "--pdeathsig", "KILL", "/bin/sh"] if program else []
    if words and subprocess.run([*words, "-c", "exit 0"], capture_output=True, check=False).returncode != 0:
        return []
    return words


@cache
def _machine_memory() -> int:
    found = resources.memory()
    return int(min(found.total, found.cgroup_limit or found.total) * 0.95)


def _kill_group(pid: int) -> None:
    _signal_group(pid, signal.SIGKILL)


def _signal_group(pid: int, what: signal.Signals) -> None:
    try:
        os.killpg(pid, what)
    except (ProcessLookupError, PermissionError):
        pass


def _no_result(code: int) -> str:
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}: a crash in the framework"
    return f"its process ended with status {code} and no result"


def _wants_memory(log: str) -> bool:
    """Whether a worker that failed says that it got no memory: frameworks say so far above their last line, if there."""
    try:
        with open(log, "rb") as file:
            said = file.read(MAX_LOG).lower()
    except OSError:
        return False
    return any(words in said for words in NO_MEMORY)


def _full(folder: str) -> bool:
    """Whether the file system has no room left, in bytes or in files: a framework's own message need not say so."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < 64 * 1024 or (found.f_files > 0 and found.f_favail < 8)


def _printed(log: str) -> bool:
    """Whether anything was printed to a log."""
    try:
        return os.path.getsize(log) > 0
    except OSError:
        return False


def _tail(log: str) -> str:
    """The end of a worker's log, and where it lies."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = list(_without_tracebacks(line.rstrip() for line in file.readlines()[-200:] if line.strip()))[-LAST_LINES:]
    except OSError:
        return ""
    shown = "".join(f"\n    | {line[:200]}" for line in lines)
    return f"\n  log: {os.path.relpath(log)}{shown}"


def _without_tracebacks(lines: Iterable[str]) -> Iterator[str]:
    """What Python says of its calls goes; the line that ends it, with the exception, stays."""
    inside = False
    for line in lines:
        inside = line.startswith("Traceback (most recent call last)") or (inside and line.startswith(" "))
        if not inside:
            yield line


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
