"""The child process that runs one action record: `python -m edgebuild.worker RECORD.json`.

In: an immutable record. Out: files in the record's scratch folder, and `result.json` beside the record. The same record
can be run on another machine. It has no network where the kernel allows that, and dies with its parent.
"""

import atexit
import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import machinelock, tether
from edgebuild.errors import INTERRUPTED, BadInput, EdgebuildError, Refused, StepFailed, disk, said
from edgebuild.step import Action, Download, Image, Outcome

if TYPE_CHECKING:
    from edgebuild.signing import Pair

# Where frameworks run torch, if it is in their toolchain. Elsewhere transformers, which tokenizes, would import it wherever it is
# installed, for seconds.
TORCH = ("reference", "convert", "quantize", "smoke")
CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1  # linux/sched.h, linux/prctl.h


def perform(record: Mapping[str, Any]) -> Outcome:
    """Run an action record in this process. Raises EdgebuildError for what a user can mend: Refused for what its action says."""
    root = Path(record["root"])
    action = Action(
        verb=record["verb"],
        backend=record["backend"],
        params=record["params"],
        inputs=dict(files(root, record["inputs"])),
        outputs={name: Path(path) for name, path in record["outputs"].items()},
        download=_download(record["download"]) if record.get("download") else None,
        key=_pair(record["sign"]) if record.get("sign") else None,
        image=_image(record["image"]) if record.get("image") else None,
        alone=partial(_alone, record["alone"]) if record.get("alone") else nullcontext,
    )
    for path in action.outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _dispatch(action)
    except (BadInput, Refused):
        raise
    except StepFailed as error:
        raise Refused(str(error)) from error
    missing = [name for name, path in action.outputs.items() if not path.exists()]
    if missing:
        raise StepFailed(f"it ended without making its output {missing[0]}; this is a fault of edgebuild or of the framework")
    return outcome


def files(root: Path, inputs: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """A role that ends in "/" is a folder: each file in it is an input."""
    for role, path in inputs.items():
        if not role.endswith("/"):
            yield role, root / path
            continue
        for file in sorted((root / path).rglob("*")):
            if file.is_file():
                yield role + file.relative_to(root / path).as_posix(), file


def _pair(given: Mapping[str, Any]) -> "Pair":
    from edgebuild.signing import taken

    return taken(given)


def _image(given: Mapping[str, str]) -> Image:
    base = Path(given["base"]) if given["base"] else None
    return Image(wheels=Path(given["wheels"]), base=base, no_base=given["no_base"])


@contextmanager
def _alone(given: Mapping[str, Any]) -> Iterator[None]:
    """The lock of the machine, from whoever started us, who looks whether a file says that we wait for it."""
    waiting = Path(given["waits"])
    with machinelock.exclusive(given["folder"], given["held"], waiting.touch):
        waiting.unlink(missing_ok=True)
        yield


def _download(given: Mapping[str, str]) -> Download:
    """How far it is goes to a file that the parent looks at, five times a second at most."""
    told = 0.0

    def moved(here: int, total: int | None) -> None:
        nonlocal told
        if time.monotonic() - told >= 0.2 or here == total:
            told = time.monotonic()
            Path(given["progress"]).write_text(json.dumps([here, total]), encoding="ascii")  # a torn one is not read

    return Download(url=given["url"], partial=Path(given["partial"]), moved=moved)


def _dispatch(action: Action) -> Outcome:
    """Each verb's module, imported when it is needed: a gate needs no numpy, a fetch no framework."""
    verb = action.verb
    if verb == "fetch":
        from edgebuild import source

        return source.run(action)
    if verb == "assess":
        from edgebuild import assess

        return assess.run(action)
    if verb == "reference":
        from edgebuild import original

        return original.run(action)
    if verb == "gate":
        from edgebuild import gates

        return gates.run(action)
    if verb == "agree":
        from edgebuild import agree

        return agree.run(action)
    if verb == "build":
        from edgebuild import evidence

        return evidence.run(action)
    from edgebuild.backends import BACKENDS

    backend = BACKENDS[action.backend]
    if verb == "smoke":
        return Outcome(summary=backend.smoke())
    if verb in ("convert", "quantize"):
        from edgebuild.backend import facts_from_json

        facts = facts_from_json(json.loads(action.inputs["facts"].read_text(encoding="utf-8")))
        if reason := backend.refuse(facts, action.params):
            raise StepFailed(f"{action.backend} refuses this model: {reason}")
        return backend.convert(action, facts) if verb == "convert" else backend.quantize(action, facts)
    if verb in ("evaluate", "answer"):
        from edgebuild import quality

        return quality.run(action, backend)
    if verb == "benchmark":
        from edgebuild import bench

        return bench.run(action, action.backend, backend)
    from edgebuild import bundle
    from edgebuild.bundles import BUNDLES

    return bundle.run(action, action.backend, backend, BUNDLES[action.params["kind"]])


def main(path: str) -> int:
    """Run the record at `path` and write `result.json` beside it. What is printed goes to the log."""
    _ask_for_death()  # first: a network namespace may be waited for, while others are taken down
    if _leads() and tether.input_ended():
        return INTERRUPTED  # whoever started us was gone before we could ask
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    network = "host's network: it downloads" if record.get("download") else _leave_network()
    _die_with_parent()
    os.umask(0o022)
    if record["verb"] not in TORCH or "torch" not in record["toolchain"]:
        sys.modules["torch"] = None  # type: ignore[assignment]  # to Python: not found
    result: dict[str, Any] = {"network": network}
    try:
        outcome = perform(record)
        result |= {"summary": outcome.summary, "refused": outcome.refused, "kept": dict(outcome.kept)}
    except EdgebuildError as error:
        result |= {"error": str(error), "status": error.status, "refused": isinstance(error, Refused)}
        result |= {"given": isinstance(error, BadInput) or record["verb"] == "fetch"}  # then its log says no more
    except MemoryError:
        result |= {"error": "it got no more memory", "status": StepFailed.status, "memory": True}
    except OSError as error:
        traceback.print_exc()
        result |= {"error": disk(error), "status": StepFailed.status}
    except Exception as error:  # noqa: BLE001 - the outer edge: a framework may raise anything
        traceback.print_exc()
        result |= {"error": f"unexpected {type(error).__name__}: {said(error)}", "status": StepFailed.status}
    sys.stdout.flush()
    sys.stderr.flush()
    temporary = Path(path).with_name("result.tmp")
    try:
        temporary.write_text(json.dumps(result), encoding="utf-8")
        temporary.rename(Path(path).with_name("result.json"))
    except OSError as error:
        return error.errno or 1  # all that a full disk lets us say
    return 0


def _leave_network() -> str:
    """Enter a network namespace without a network; says which protection is in force."""
    if sys.platform != "linux":
        return "host's network: this system has no network namespaces"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) == 0:
        return "none"
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return f"host's network: {os.strerror(ctypes.get_errno())}"
    try:  # stay who we are: files keep their owner
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    except OSError:
        pass
    return "none"


def _ask_for_death() -> None:
    """A signal when our parent dies, where the kernel has one. Entering a user namespace takes it away again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _die_with_parent() -> None:
    """By that signal, and by the end of the input pipe, which every system has."""
    _ask_for_death()
    if _leads():
        tether.end_with_input()


def _leads() -> bool:
    """Whether it leads its own group, as a worker does; started by hand it does not."""
    return os.getpgrp() == os.getpid()


if __name__ == "__main__":
    ended = [StepFailed.status]
    # The first to be registered is the last to be called: after those of frameworks.
    atexit.register(lambda: tether.leave(ended[0]))
    gc.set_threshold(10_000, 50, 50)  # of 700, 10 and 10: a sixth of the time in which torch and transformers are imported
    ended[0] = main(sys.argv[1])
