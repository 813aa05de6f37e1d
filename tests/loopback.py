"""A small Hugging Face hub and a file server on 127.0.0.1, which misbehave on demand. For tests, and to look at by hand.

    python -m tests.loopback FOLDER   # serves FOLDER as hf:org/model@COMMIT until it is ended, and prints how to use it

The hub answers what huggingface_hub asks: model info, tree, and files by HEAD and GET with ranges.
"""

import contextlib
import hashlib
import json
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"
LFS = (".safetensors", ".onnx", ".gguf", ".model")


class Loopback:
    """What is served, and how it misbehaves: `faults[path suffix] = fault`, used up where it ends in "once".

    Faults: a status such as "401"; "slow"; "cut" and "cut once" (the connection ends after half of what was asked);
    "wrong" (bytes of the same size); "ignore range"; "redirect ADDRESS"; "raw STATUS AND HEADERS"; "endless"; "silent" (no answer at all).

    Without `hub` it is also a package index: a file whose name ends in "/" is the page of a folder.
    """

    def __init__(self, files: dict[str, bytes] | Path, hub: bool) -> None:
        self.files, self.hub = files, hub
        self.faults: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.tokens: list[str] = []
        self._digests: dict[str, str] = {}

    def names(self) -> list[str]:
        if isinstance(self.files, dict):
            return sorted(self.files)
        return sorted(path.relative_to(self.files).as_posix() for path in self.files.rglob("*") if path.is_file())

    def size(self, name: str) -> int:
        return len(self.files[name]) if isinstance(self.files, dict) else (self.files / name).stat().st_size

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if isinstance(self.files, dict):
            return self.files[name][start : None if length is None else start + length]
        with (self.files / name).open("rb") as file:
            file.seek(start)
            return file.read(length if length is not None else -1)

    def sha256(self, name: str) -> str:
        if name not in self._digests:
            total = hashlib.sha256()
            for start in range(0, self.size(name), 1 << 22):
                total.update(self.read(name, start, 1 << 22))
            self._digests[name] = total.hexdigest()
        return self._digests[name]

    def git(self, name: str) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size(name) + self.read(name)).hexdigest()

    def fault(self, path: str) -> str:
        for suffix, fault in list(self.faults.items()):
            if path.endswith(suffix):
                if fault.endswith(" once"):
                    del self.faults[suffix]
                return fault.removesuffix(" once")
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loopback: Loopback

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        path = self.path.partition("?")[0]
        self.loopback.asked[f"{self.command} {path}"] += 1
        if token := self.headers.get("Authorization"):
            self.loopback.tokens.append(token)
        fault = self.loopback.fault(path)
        if fault == "silent":
            time.sleep(3600)  # its thread is a daemon
        elif fault.isdigit():
            self._plain(
                int(fault),
                b'{"error": "as asked"}',
                {"Retry-After": "0", **({"X-Error-Code": "RepoNotFound"} if fault == "404" else {})},
            )
        elif fault.startswith("raw "):
            self.wfile.write(f"HTTP/1.1 {fault.removeprefix('raw ')}\r\n\r\n".encode("latin-1"))
            self.close_connection = True
        elif fault.startswith("redirect "):
            self._plain(302, b"", {"Location": fault.removeprefix("redirect ")})
        elif self.loopback.hub and path.startswith("/api/models/"):
            self._api(path)
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2] if self.loopback.hub else path.removeprefix("/")
            if name in self.loopback.names():
                self._file(name, fault, head)
            else:
                self._plain(404, b"{}", {"X-Error-Code": "EntryNotFound"} if self.loopback.hub else {})

    def _api(self, path: str) -> None:
        _, _, rest = path.partition("/api/models/")
        repository, what, revision = rest.rpartition("/")[0].rpartition("/")[0], rest.split("/")[-2], rest.split("/")[-1]
        if repository not in ("org/model", "microsoft/Phi-3-mini-4k-instruct"):
            self._plain(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif what == "tree" and revision != COMMIT:
            self._plain(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._plain(200, json.dumps([self._entry(name) for name in self.loopback.names()]).encode())
        else:
            siblings = [{"rfilename": name} for name in self.loopback.names()]
            self._plain(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": self.loopback.size(name)}
        if name.endswith(LFS):
            return {
                **entry,
                "oid": "0" * 40,
                "lfs": {"oid": self.loopback.sha256(name), "size": entry["size"], "pointerSize": 134},
            }
        return {**entry, "oid": self.loopback.git(name)}

    def _file(self, name: str, fault: str, head: bool) -> None:
        size, start, status = self.loopback.size(name), 0, 200
        end = size
        headers = {"Accept-Ranges": "bytes", **({"Content-Type": "text/html"} if name.endswith("/") else {})}
        if self.loopback.hub:
            headers["X-Repo-Commit"] = COMMIT
            headers["ETag"] = f'"{self.loopback.sha256(name) if name.endswith(LFS) else self.loopback.git(name)}"'
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and fault != "ignore range":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1, size) if last else size, 206
            if start >= size:
                self._plain(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if fault == "endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not head:
            self._send(name, fault, start, end)

    def _send(self, name: str, fault: str, start: int, end: int) -> None:
        end = start + (end - start) // 2 if fault == "cut" else end
        with contextlib.suppress(OSError):
            for here in range(start, end, 1 << 20):
                data = self.loopback.read(name, here, min(1 << 20, end - here))
                self.wfile.write(bytes(255 - byte for byte in data) if fault == "wrong" else data)
                self.loopback.sent += len(data)
                if fault == "slow":
                    time.sleep(0.2)
            while fault == "endless":
                self.wfile.write(bytes(1 << 20))
        if fault in ("cut", "endless"):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    def _plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serve(files: dict[str, bytes] | Path, hub: bool = True, tls: ssl.SSLContext | None = None) -> Iterator[tuple[Loopback, str]]:
    """A server in a thread of this process; → what it serves, and its address."""
    loopback = Loopback(files, hub)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"loopback": loopback}))
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield loopback, f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve(Path(sys.argv[1])) as (_, address):
        print(f"HF_ENDPOINT={address} serves hf:org/model@{COMMIT}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
