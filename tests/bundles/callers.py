"""Callers of a served model, well and ill behaved: `python callers.py SECONDS LIMIT REQUEST.json PATH`. Standard library alone: it runs beside a container.

It prints one line of JSON, what was answered how often, and ends with status 1 where something was answered otherwise than it should be.
"""

import http.client
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ADDRESS = ("127.0.0.1", 8080)
JSON = {"Content-Type": "application/json"}
CROWD, CROWDS = 150, 10  # callers at once, and how often at most, until one is told that there is no room
PATIENCE = 30  # seconds in which a slow sender must have been answered or cut off


def ask(path: str, body: bytes, headers: dict[str, str] = JSON, ready: Callable[[], object] = lambda: None) -> int:
    connection = http.client.HTTPConnection(*ADDRESS, timeout=120)
    try:
        connection.connect()
        ready()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def malformed(path: str, good: bytes, limit: int) -> dict[str, int]:
    """What is said to requests that are none; each 4xx or 5xx, and the server goes on."""
    found = {
        "not JSON": ask(path, b"{not json"),
        "empty": ask(path, b""),
        "a list": ask(path, b"[]"),
        "deep": ask(path, b"[" * 100_000),
        "of wrong keys": ask(path, b'{"inputs": [{"name": "x"}], "prompt": {}}'),
        "not UTF-8": ask(path, b'{"prompt": "\xff\xfe"}'),
        "too large": ask(path, b" " * (limit + 1000)),
        "no such path": ask("/v2/repository/models/x/unload", good),
        "of large headers": ask(path, good, {**JSON, "X-Large": "x" * 100_000}),
    }
    assert all(400 <= status < 600 for status in found.values()), found
    assert (found["too large"], found["no such path"], found["of large headers"]) == (413, 404, 431), found
    return found


def slow(path: str) -> dict[str, float]:
    """Seconds until a sender that says nothing, one that drips headers and one that drips a body are answered 408 or cut off."""
    begun = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n"
    drips = {"silent": (b"", b""), "headers": (b"POST / HTTP/1.1\r\nX: ", b"x"), "body": (begun.encode() + b"\r\n", b" ")}
    found: dict[str, float] = {}

    def send(name: str, first: bytes, then: bytes) -> None:
        start = time.monotonic()
        with socket.create_connection(ADDRESS) as connection:
            connection.settimeout(0.5)
            connection.sendall(first)
            said = b"?"
            while time.monotonic() - start < PATIENCE + 10:
                try:
                    connection.sendall(then)
                    said = connection.recv(64)
                except TimeoutError:
                    continue
                except OSError:
                    said = b""
                break
        if said == b"" or b" 408 " in said:
            found[name] = round(time.monotonic() - start, 1)

    together([lambda name=name, drip=drip: send(name, *drip) for name, drip in drips.items()])
    assert set(found) == set(drips), found
    assert max(found.values()) <= PATIENCE, found
    return found


def crowd(path: str, good: bytes) -> Counter[int]:
    """More at once than there is room for: some are answered, the others told so. All ask when the last of them is connected."""
    found: Counter[int] = Counter()
    connected = threading.Barrier(CROWD, timeout=PATIENCE)
    for _ in range(CROWDS):
        together([lambda: found.update([ask(path, good, ready=connected.wait)]) for _ in range(CROWD)])
        if len(found) > 1:  # a server may answer faster than they can ask
            break
    assert set(found) == {200, 503}, found
    return found


def load(path: str, good: bytes, seconds: float) -> dict[str, float]:
    """Sixteen callers, each with a connection of its own that it keeps: not one is refused."""
    took: list[float] = []
    wrong: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def call() -> None:
        connection = http.client.HTTPConnection(*ADDRESS, timeout=120)
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                connection.request("POST", path, good, JSON)
                answer = connection.getresponse()
                answer.read()
                wrong.update([str(answer.status)] if answer.status != 200 else [])
            except OSError as error:
                wrong[type(error).__name__] += 1
            took.append(time.monotonic() - start)

    together([call] * 16)
    assert not wrong, wrong
    ordered = sorted(took)
    return {"answered": len(took), "median": round(ordered[len(ordered) // 2], 4), "slowest": round(ordered[-1], 3)}


def together(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(seconds: str, limit: str, request: str, path: str) -> None:
    good = Path(request).read_bytes()
    assert ask(path, good) == 200
    found = {
        "malformed": malformed(path, good, int(limit)),
        "slow": slow(path),
        "crowd": crowd(path, good),
        "load": load(path, good, float(seconds)),
    }
    assert ask(path, good) == 200
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
