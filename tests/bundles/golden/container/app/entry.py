"""Runs the model's server and Envoy, which stands before it; where one of the two ends, so does the container.

Usage: entry.py COMMAND…, the server's. PID 1: it passes SIGTERM and SIGINT on and takes every child's end.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVOY = [str(Path(sys.executable).with_name("envoy")), "-c", str(HERE / "envoy.yaml"), "--concurrency", "1"]
ENVOY += ["--disable-hot-restart", "--log-level", "warning"]
GRACE = 30  # seconds for requests that are being answered


def main(command):
    children = {child.pid: child for child in (subprocess.Popen(command), subprocess.Popen(ENVOY))}

    def stop(number, frame):
        for pid in children:
            os.kill(pid, signal.SIGTERM)  # Popen's own would take the end of one that is just gone
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def kill(number, frame):
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, kill)
    first = None
    while children:
        pid, status = os.wait()
        child = children.pop(pid, None)  # others are children of theirs, left to PID 1
        if child is None:
            continue
        child.returncode = os.waitstatus_to_exitcode(status)
        if first is None:
            first = child.returncode
            print(f"{Path(child.args[0]).name} ended with status {first} at {time.strftime('%FT%TZ', time.gmtime())}", flush=True)
            stop(signal.SIGTERM, None)
    return first if first >= 0 else 128 - first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
