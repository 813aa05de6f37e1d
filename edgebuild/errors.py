"""Every error that a user can cause, in one place: what is wrong, where, what to do; an exit status each."""

import errno
import json
from collections.abc import Iterable

OK, FAILED, FAULT, USAGE, INTERRUPTED = 0, 1, 2, 3, 130


class EdgebuildError(Exception):
    """A message for the user; never shown with a traceback."""

    status = FAULT


class UserError(EdgebuildError):
    """Wrong usage: a command, an option or a name that does not exist."""

    status = USAGE


class TargetError(EdgebuildError):
    """A target or platform file that cannot be used: `FILE:LINE: KEY: what is wrong; what to do`."""

    status = USAGE

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class StepFailed(EdgebuildError):
    """A step could not make what it was asked for."""

    status = FAILED


class BadInput(StepFailed):
    """What a user gave to a step is wrong, whatever the step makes of it: its data, a name of a layer."""


class WrongFact(StepFailed):
    """A fact of a platform that no bundle can state: a plan says where it stands."""

    def __init__(self, key: str, wrong: str) -> None:
        super().__init__(f"facts.{key}: {wrong}; correct the platform file")
        self.key, self.wrong = key, wrong


class PartFailed(StepFailed):
    """A step that this one runs failed, the one called `part`; where it ran it was told why."""

    def __init__(self, part: str, why: Exception) -> None:
        super().__init__(f"{part} failed: {why}")
        self.part = part


class Refused(StepFailed):
    """A framework does not take this model or recipe, or what came out is no use: another recipe may do."""


class OutOfMemory(StepFailed):
    """A worker had not the memory that it wanted: `what` happened, what to do, and where more stands."""

    def __init__(self, what: str, advice: str, more: str = "") -> None:
        super().__init__(f"{what}; {advice}{more}")
        self.what, self.advice, self.more = what, advice, more


class InputChanged(StepFailed):
    """An input was edited while its step ran."""


def shown(text: str, limit: int = 100) -> str:
    """Somebody else's word in a message: one line of ASCII, never long."""
    word = json.dumps(text)[1:-1]
    return word if len(word) <= limit else word[: limit - 3] + "..."


def said(words: BaseException | str) -> str:
    """What somebody else's exception or server says, on one line and cut; what cannot be printed as escapes."""
    nothing = "" if isinstance(words, str) else type(words).__name__
    words = " ".join(str(words).split()) or nothing
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in words)[:300]


def first_line(words: BaseException | str) -> str:
    """The first line of that."""
    lines = str(words).strip().splitlines()
    return said(lines[0] if lines else words)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean "…"?` where a known word is close, else the empty text."""
    from difflib import get_close_matches  # 5 ms that a no-op does not pay

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{shown(close[0])}"?' if close else ""


def disk(error: OSError) -> str:
    """What the file system refused, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing was kept; free space (the store lies in .edgebuild, or where EDGEBUILD_STORE says)"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename or 'a folder'} cannot be written ({error.strerror}); nothing was kept; make it writable"
    return f"{error.filename or 'a file'}: {error.strerror or error}; nothing was kept"
