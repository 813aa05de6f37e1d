"""How processes end. With whoever started them, however they ended: `python -I tether.py WORD…` runs a command so, with all that it
starts. And at once, when their work is done.

This module is run as a file, and imports nothing of edgebuild. The end of a process's input says that whoever started it is gone: a
pipe ends with its last holder on every system, where a signal of the parent's death (prctl(2)) reaches one process, and none that it
started.
"""

import os
import select
import signal
import subprocess
import sys
import threading


def input_ended() -> bool:
    """Whether the other end of our input is closed."""
    poll = select.poll()
    poll.register(0, 0)  # that it hung up is told in any case
    return bool(poll.poll(0))


def end_with_input() -> None:
    """Kill this process and its group, which it leads, when its input ends: at once where it has, before anything keeps a thread waiting."""

    def kill() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        kill()

    if input_ended():
        kill()
    threading.Thread(target=watch, daemon=True).start()


def leave(status: int) -> None:
    """End without taking the interpreter and its frameworks apart, which takes some of them seconds.

    Nothing printed is lost, but where it goes to a disk that is full.
    """
    import ctypes

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    ctypes.CDLL(None).fflush(None)
    os._exit(status)


if __name__ == "__main__":
    end_with_input()
    sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode)
