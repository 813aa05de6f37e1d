"""Runs an image under runc, in the sandbox that this program is started in: `python running.py SPEC.json`. Standard library alone.

The container has the sandbox's network, which is loopback, a root that is read-only, and no capability.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START = 120  # seconds until it must be ready
NAME = "edgebuild-trial"


def main(path: str) -> int:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    place = Path(path).parent / "container"
    place.mkdir(exist_ok=True)
    config = _image(spec)
    source = _said([*spec["buildah"], "from", "--pull-never", spec["image"]])
    root = _said([*spec["buildah"], "mount", source])
    (place / "config.json").unlink(missing_ok=True)
    subprocess.run(["runc", "spec"], cwd=place, check=True)
    written = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(_configured(written, root, config)), encoding="utf-8")
    with (place / "log").open("wb") as log:
        words = ["runc", "--rootless", "true", "--root", str(place / "state"), "run", "--bundle", str(place), NAME]
        runc = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen = _tried(spec, config, place, runc)
        except Failed as error:
            print((place / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
            print(error)
            return 1
        finally:
            runc.kill()
    Path(spec["seen"]).write_text(json.dumps(seen), encoding="utf-8")
    return 0


class Failed(Exception):
    """It does not do what it should; says what."""


def _said(words: Sequence[str]) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        print(done.stderr.decode("utf-8", "replace"))
        raise SystemExit(1)
    return done.stdout.decode().strip()


def _image(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_said([*spec["buildah"], "inspect", "--type", "image", spec["image"]]))["OCIv1"]["config"]
    return found


def _configured(written: dict[str, Any], root: str, config: dict[str, Any]) -> dict[str, Any]:
    """runc's own defaults, and of the image what it runs as (opencontainers/runtime-spec, config.md)."""
    user, _, group = config["User"].partition(":")
    written["root"] = {"path": root, "readonly": True}
    written["process"].update(
        args=[*config["Entrypoint"], *config.get("Cmd", [])],
        env=config["Env"],
        cwd=config.get("WorkingDir", "/"),
        user={"uid": int(user), "gid": int(group or user)},
        terminal=False,
        noNewPrivileges=True,
        capabilities={},
    )
    linux = written["linux"]
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] not in ("network", "cgroup")]
    linux.pop("resources", None)
    written["mounts"] = [one for one in written["mounts"] if one["type"] != "cgroup"]
    return written


def _tried(spec: dict[str, Any], config: dict[str, Any], place: Path, runc: "subprocess.Popen[bytes]") -> dict[str, Any]:
    health = [config["Entrypoint"][0], "/app/health.py"]
    start = time.monotonic()
    while _within(place, health).returncode:
        if runc.poll() is not None:
            raise Failed(f"it ended with status {runc.returncode} before it was ready")
        if time.monotonic() - start > START:
            raise Failed(f"it was not ready within {START} s: {_within(place, health).stdout.decode()}")
        time.sleep(0.25)
    seen: dict[str, Any] = {"ready": round(time.monotonic() - start, 2), "said": []}
    for words in spec["callers"]:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        seen["said"].append(done.stdout.decode("utf-8", "replace"))
        if done.returncode:
            raise Failed(f"{Path(words[-1]).name}: {done.stdout.decode()[-300:]}{done.stderr.decode()[-300:]}")
    probe = "import os; print(os.getuid(), os.getgid(), os.access('/app', os.W_OK), os.statvfs('/').f_flag & os.ST_RDONLY)"
    uid, gid, writable, read_only = _within(place, [config["Entrypoint"][0], "-c", probe]).stdout.decode().split()
    if int(uid) < spec["first_user"] or int(gid) < spec["first_user"] or writable == "True" or read_only != "1":
        raise Failed(f"it runs as {uid}:{gid}, its programs writable: {writable}, its root read-only: {read_only}")
    seen |= {"uid": int(uid), "peak_memory": _peak(place)}
    if runc.poll() is not None:
        raise Failed(f"it ended with status {runc.returncode} while it was asked")
    _within_runc(place, ["kill", NAME, "TERM"])
    try:
        status = runc.wait(60)
    except subprocess.TimeoutExpired as error:
        raise Failed("it does not end within 60 s of SIGTERM") from error
    if status:
        raise Failed(f"it ends with status {status} after SIGTERM")
    return seen


def _within(place: Path, words: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
    return _within_runc(place, ["exec", NAME, *words])


def _within_runc(place: Path, words: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
    command = ["runc", "--rootless", "true", "--root", str(place / "state"), *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _peak(place: Path) -> int:
    """Bytes: the most that each of the container's processes has had (proc(5), VmHWM), together."""
    first = json.loads(_within_runc(place, ["state", NAME]).stdout)["pid"]
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                lines = (entry / "status").read_text(encoding="ascii", errors="replace").splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except OSError:  # it has just ended
            continue
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
