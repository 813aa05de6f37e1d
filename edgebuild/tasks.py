"""The only module that knows doit: steps → doit tasks, and what doit reports → terminal, last-run.json, exit status.

doit names, selects, orders and threads. It keeps no state: each task asks `fresh`, and runs `Builder.run`.
"""

import atexit
import gc
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from types import FrameType
from typing import TYPE_CHECKING, Any

from doit import get_var
from doit.cmd_base import DodoTaskLoader, DoitCmdBase
from doit.cmd_run import Run
from doit.exceptions import InvalidDodoFile, TaskError, TaskFailed

from edgebuild.errors import FAILED, FAULT, INTERRUPTED, OK, EdgebuildError, PartFailed, Refused, UserError, did_you_mean, shown
from edgebuild.files import locked, write_whole
from edgebuild.fresh import Fresh, remember
from edgebuild.journal import Journal
from edgebuild.noop import STATE
from edgebuild.project import Project
from edgebuild.step import SOURCES, VERBS, Step

if TYPE_CHECKING:
    from edgebuild.run import Builder, Done

DOCS = {
    "fetch": "bring a model's files where they lie elsewhere, list them by content, refuse what carries code",
    "assess": "read what a model is from its headers",
    "reference": "run the source once by transformers, for every conversion to be held against",
    "convert": "make it runnable in its framework",
    "quantize": "make it smaller by the target's scheme",
    "choose": "try recipes until the quality and size gates hold, and take the first that does",
    "evaluate": "measure quality against the unquantized model, and hold that against its source",
    "benchmark": "measure size, latency and memory against the unquantized model",
    "gate": "judge what was measured: PASS, FAIL or INCONCLUSIVE",
    "package": "write the bundle to dist/",
    "answer": "run one artifact of a model on the inputs that all of them answer",
    "agree": "hold every artifact of a model against the others on the same inputs",
}
COMMANDS = ("run", "list", "info", "clean", "forget", "ignore", "help", "strace", "dumpdb", "tabcompletion", "reset-dep")
OWN = (  # edgebuild's commands, which doit does not know
    *("init", "explain", "verify", "gc", "du", "plan", "recommend", "remeasure", "release", "key", "ci", "doctor", "toolchain"),
    "completion",
)
VARIABLES = ("package.version", "strict", "again")


class Tasks:
    """One run of doit over one project. Raises InvalidDodoFile, which doit prints as one line with status 3."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        # At its end Python looks through all that is left for cycles: a tenth of the time of an edit undone. The process ends anyway.
        atexit.register(gc.freeze)
        self.journal = Journal()
        self.config = {
            "default_tasks": ["build"],
            "backend": "json",  # nothing of doit's own is kept: there is nothing to lose or to go stale
            "dep_file": os.devnull,
            "codec_cls": _Nothing,
            "par_type": "thread",
            "continue": True,  # a target that fails leaves the others alone
            "verbosity": 2,
            "reporter": _Reporter(self),
        }
        version, strict = get_var("package.version", None), get_var("strict", "0")
        if strict not in ("0", "1", "false", "true", ""):
            raise InvalidDodoFile(f'strict: must be 1 or 0, not "{shown(strict)}"')
        try:
            self.project = Project(version=version, strict=strict not in ("0", "", "false"))
        except EdgebuildError as error:
            raise InvalidDodoFile(str(error)) from error
        again = [name for name in get_var("again", "").split(",") if name]
        for name in again:
            if name not in self.project.steps:
                known = did_you_mean(name, self.project.steps)
                raise InvalidDodoFile(f'again: there is no step "{name}"; `doit list --all` shows them.{known}')
        self.fresh = Fresh(self.project, again)
        self._builder: Builder | None = None
        self._lock = threading.Lock()
        self._turn = ExitStack()  # held from the first step until the process ends
        self._interrupted = False
        self._matrices: list[str] = []  # that were asked for
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def generate(self) -> Iterator[dict[str, Any]]:
        """Every task, as doit wants them."""
        self._check_words(sys.argv[1:])
        defaults = [f"build:{_word(name)}" for name in self.project.defaults()]
        yield {"basename": "build", "actions": None, "doc": "build every default target", "task_dep": defaults}
        for file, names in self.project.groups.items():
            builds = [f"build:{name}" for name in names]
            yield {
                "basename": f"build:{file}",
                "actions": None,
                "doc": f"the {len(names)} of targets/{file}.yaml",
                "task_dep": builds,
            }
        for verb in DOCS:
            yield {"basename": verb, "name": None, "doc": DOCS[verb]}
        for name, problem in self.project.problems.items():
            for verb in (*VERBS, "build"):
                yield self._bad(_word(name), verb, problem)
        for step in self.project.steps.values():
            yield self._task(step)
            if step.verb == "choose":  # as far as quantizing goes
                yield {
                    "basename": "quantize",
                    "name": step.target,
                    "actions": None,
                    "doc": DOCS["choose"],
                    "task_dep": [step.name],
                }

    @property
    def builder(self) -> "Builder":
        """Made when the first step has work: a no-op imports nothing of it."""
        with self._lock:  # under -n, two threads may come here at once
            if self._builder is None:
                from edgebuild.process import Workers
                from edgebuild.run import Builder

                self._workers = Workers(moved=self.journal.moved, tell=self.journal.tell)
                self._builder = Builder(
                    self.project,
                    self.fresh,
                    self._workers,
                    tell=self.journal.tell,
                    watcher=self.journal,
                    within=self._within,
                )
            return self._builder

    def begin(self, names: Collection[str]) -> dict[str, str]:
        """Before the first of these is judged; → which of them are the same work as another one.

        Of two builds of one project the second waits, so that no two write one output.

        The system takes the lock back from who is killed. Where it cannot be written, the first step says so. Then what an
        earlier crash left behind is collected, even if it left nothing to do.
        """
        self._matrices = [self.project.steps[name].outputs["matrix"] for name in sorted(names) if name.startswith("agree:")]
        if self.fresh.remembered and all(map(self.fresh.known, filter(None, map(self.project.steps.get, names)))):
            return {}
        try:
            self._turn.enter_context(locked(f"{STATE}/build.lock", waits=_waits))
        except OSError:
            pass
        self.project.memo.forget_all()  # who was waited for may have touched what the plan was made from
        from edgebuild.process import collect
        from edgebuild.twins import twins

        collect(self.project.store.root)
        return twins(self.project, names)

    def twin_of_failed(self, name: str, first: str) -> None:
        """A step that is not tried, because it is the same work as one that failed."""
        step = self.project.steps[name]
        if step.verb == "choose":  # its record holds that no recipe does: that stops each target for itself
            self._run(step)
            return
        self.journal.started(name)
        reason = f"the same work as {first}, which failed; `doit {name}` tries it by itself"
        self.journal.ended(name, "blocked", 0.0, reason, reason)

    def finish(self) -> int:
        """After the last step: what is no more goes, and the memos are kept. → the exit status."""
        if not self._interrupted:
            if not self.fresh.remembered:
                from edgebuild.run import sweep

                for target, problem in sweep(self.project).items():
                    self.journal.stays(target, problem)
            remember(self.project, self.fresh)
        self.project.memo.save()
        self.journal.write(time.monotonic() - self.start, self._matrices)
        return INTERRUPTED if self._interrupted else self.journal.status()

    def _task(self, step: Step) -> dict[str, Any]:
        # `build:NAME` is a task of its own, not one of a group, so that `doit list` shows targets and their descriptions.
        own = {"basename": step.verb, "name": step.name.split(":", 1)[1]}
        doc = DOCS.get(step.verb) or self.project.targets[step.target]["description"]
        return {
            **({"basename": step.name} if step.verb == "build" else own),
            "doc": doc or f"build {step.target}",
            "actions": [_Call(self._run, step)],
            "uptodate": [self.fresh.known(step) or _Call(self.fresh, step)],
            "targets": [path for path in step.outputs.values() if not path.startswith(SOURCES)],  # several targets share those
            "task_dep": list(step.after),
            "clean": [self._cleaner(step)],
            "io": {"capture": False},
        }

    def _bad(self, name: str, verb: str, problem: str) -> dict[str, Any]:
        own = {"basename": f"build:{name}"} if verb == "build" else {"basename": verb, "name": name}
        return {
            **own,
            "doc": "cannot be built: " + problem.splitlines()[0],
            "actions": [_Call(self._fail, f"{verb}:{name}", problem)],
            "io": {"capture": False},
        }

    def _run(self, step: Step) -> "TaskFailed | TaskError | None":
        """doit shows what is returned; nothing is raised through it but an interrupt."""
        start = time.monotonic()
        self.journal.started(step.name)
        try:
            self.journal.done(self.builder.run(step))
        except EdgebuildError as error:
            told = f"{error.part} failed" if isinstance(error, PartFailed) else ""  # and why, just before
            self.journal.failed(step.name, str(error), time.monotonic() - start, told=told)
            return TaskFailed(str(error), report=False)
        except Exception as error:  # noqa: BLE001 - the outer edge: a fault of ours, its traceback in a file
            message = f"unexpected {type(error).__name__}: {error}; the traceback is in {_save_traceback()}"
            self.journal.failed(step.name, message, time.monotonic() - start, fault=True)
            return TaskError(message, report=False)
        return None

    def _within(self, step: Step, run: Callable[[Step], "Done"]) -> "Done":
        """A step that another one runs: shown and noted like any; that its recipe is refused fails nothing by itself."""
        start, fresh = time.monotonic(), self.fresh(step)
        self.journal.started(step.name, more=True)
        try:
            done = run(step)
        except EdgebuildError as error:
            tell = self.journal.refused if isinstance(error, Refused) else self.journal.failed
            tell(step.name, str(error), time.monotonic() - start)
            raise
        self.journal.done(replace(done, outcome="fresh") if fresh and done.outcome == "restored" else done)
        return done

    def _fail(self, name: str, problem: str) -> TaskFailed:
        self.journal.bad(name, problem)
        return TaskFailed(problem, report=False)

    def _cleaner(self, step: Step) -> Callable[[], None]:
        """`doit clean build:NAME` removes what the whole target made; of another task, what its step made."""

        def remove() -> None:
            from edgebuild.run import clean

            try:
                for one in reversed(self.project.of(step.target) if step.verb == "build" else [step]):
                    clean(self.project, one)
            except OSError as error:
                print(f"{step.name}: {error.filename} cannot be removed: {error.strerror}", file=sys.stderr)
                raise SystemExit(FAILED) from error
            self.project.memo.save()

        remove.__qualname__ = f"remove what {step.name} made"  # doit prints it
        return remove

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if self._builder is not None:
            self._workers.end()
        raise SystemExit(INTERRUPTED)

    def _check_words(self, words: list[str]) -> None:
        """A mistyped name is answered with a close one, which doit itself does not do."""
        known = {
            "build",
            *DOCS,
            *self.project.steps,
            *(f"quantize:{step.target}" for step in self.project.steps.values() if step.verb == "choose"),
            *(f"build:{name}" for name in (*self.project.problems, *self.project.groups)),
        }
        known |= {f"{verb}:{name}" for name in self.project.problems for verb in VERBS}
        for before, word in zip(["", *words], words, strict=False):
            name, equals, _ = word.partition("=")
            if equals and not word.startswith("-") and name not in VARIABLES:
                raise InvalidDodoFile(f'no variable "{name}"; there are: {", ".join(VARIABLES)}.{did_you_mean(name, VARIABLES)}')
            verb = word.partition(":")[0]
            if equals or word.startswith("-") or os.path.sep in word:
                continue
            if ":" not in word:
                if before.startswith("-"):
                    continue  # the value of an option
                if word in (*self.project.names(), *self.project.groups):
                    raise InvalidDodoFile(f'"{word}" is a target, and a task is a verb and a target: doit build:{word}')
                if word in OWN:
                    raise InvalidDodoFile(f'"{word}" is a command of edgebuild: edgebuild {word} …; see edgebuild {word} --help')
                if word not in (*COMMANDS, *known) and (near := did_you_mean(word, (*COMMANDS, *OWN, "build", *DOCS))):
                    raise InvalidDodoFile(f'there is no command or task "{word}".{near}')
                continue
            if word not in known and not any(fnmatch(one, word) for one in known):
                near = did_you_mean(word, known) or did_you_mean(verb, [*DOCS, "build"])
                raise InvalidDodoFile(f'there is no "{word}"; `doit list` shows the targets.{near}')


def asks(words: list[str]) -> list[str]:
    """`COMMAND --help` as doit knows it."""
    return ["help", words[0]] if len(words) == 2 and words[0] in COMMANDS and words[1] in ("--help", "-h") else words


def check_option(words: list[str]) -> None:
    """Raises UserError where the words begin with an option that neither a build nor edgebuild has: doit would list its classes."""
    name = words[0].partition("=")[0] if words else ""
    options = (*Run.cmd_options, *DoitCmdBase.base_options, *DodoTaskLoader.cmd_options)
    known = [f"--{word}" for option in options for word in (option.get("long"), option.get("inverse")) if word]
    if name.startswith("--") and not any(word.startswith(name) for word in known):
        from edgebuild.completion import OPTIONS

        near = did_you_mean(name, [*OPTIONS, *known])
        raise UserError(f'there is no option "{shown(name)}"; `edgebuild --help` and `edgebuild help run` show them.{near}')


class _Call:
    """A function and what it is called with. doit asks for the signature of each: of a partial, that takes 0.1 ms every time."""

    __signature__ = inspect.Signature()

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self._function, self._given = function, given

    def __call__(self) -> Any:
        return self._function(*self._given)


class _Nothing:
    """doit's codec protocol (doit/dependency.py, JSONCodec), of a database that holds nothing. Its SQLite is asked by a query a task."""

    @staticmethod
    def encode(data: object) -> str:
        return ""

    @staticmethod
    def decode(data: str) -> dict[str, Any]:
        return {}


class _Reporter:
    """doit's reporter protocol (doit/reporter.py). Prints nothing of its own but through the journal."""

    desc = "edgebuild"

    def __init__(self, tasks: Tasks) -> None:
        self._tasks, self._journal = tasks, tasks.journal
        self._twins: dict[str, str] = {}
        self._errors: list[str] = []

    def initialize(self, tasks: Any, selected: Any) -> None:
        wanted, waiting = set(), list(selected)
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting.extend(tasks[name].task_dep)
        self._twins = self._tasks.begin(wanted)
        for name, first in self._twins.items():
            tasks[name].task_dep.append(first)
        self._journal.expect(sum(1 for name in wanted if ":" in name and tasks[name].actions))

    def add_failure(self, task: Any, fail: Any) -> None:
        """What `_run` and `_fail` noted already, or a task that waits for one that failed."""
        if type(fail).__name__ == "UnmetDependency":
            first = self._twins.get(task.name)
            if first and fail.get_msg().split() == [first]:
                self._tasks.twin_of_failed(task.name, first)
            elif ":" in task.name:
                self._journal.blocked(task.name, f"waits for a step that failed: {str(fail.get_msg()).strip()}")
        elif fail.report:
            self._errors.append(str(fail.get_msg()))

    def skip_uptodate(self, task: Any) -> None:
        if ":" in task.name:
            self._journal.fresh(task.name)

    def runtime_error(self, message: str) -> None:
        self._errors.append(message)

    def cleanup_error(self, exception: Any) -> None:
        self._errors.append(str(exception.get_msg()))

    def complete_run(self) -> None:
        for message in self._errors:
            print(message, file=sys.stderr)
        status = self._tasks.finish()
        raise SystemExit(FAULT if self._errors and status == OK else status)

    def _nothing(self, *_: Any) -> None:
        """Told by doit, of no interest here."""

    get_status = execute_task = add_success = skip_ignore = teardown_task = _nothing


def _word(name: str) -> str:
    """A target's name in a task's; that of a file which may not be one too, where doit would refuse it or the terminal obey."""
    return shown(name).replace("=", "%3d")


def _waits() -> None:
    print("waits for another build of this project", flush=True)


def _save_traceback() -> str:
    import traceback

    path = f"{STATE}/fault.txt"
    try:
        write_whole(path, traceback.format_exc().encode())
    except OSError:
        return "no file: the disk takes none"
    return path
