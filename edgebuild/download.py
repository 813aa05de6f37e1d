"""One file from an https address, by its sha256: resumed where it was cut, bounded in size and redirects."""

import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from edgebuild import digest
from edgebuild.errors import StepFailed, first_line
from edgebuild.step import Download
from edgebuild.units import human

MAX_BYTES = 500 * 10**9
REDIRECTS = 5
TRIES = 5  # in a row that bring no byte
TIMEOUT = 30.0  # seconds without a byte
LONGEST_WAIT = 60.0
_CHUNK = 1 << 20
_AGAIN = (408, 429, 500, 502, 503, 504)


def download(what: Download, sha256: str, out: Path) -> None:
    """Bring the file to `out`. What was downloaded stays at `what.partial` until it is whole, unless its bytes are wrong.

    Raises StepFailed with one sentence, which names the host and the path and never a query, which may hold a token.
    """
    what.partial.parent.mkdir(parents=True, exist_ok=True)
    found = ""
    if what.partial.exists():
        found = digest.of_file(str(what.partial))
        if found != sha256:
            _receive(what)
            found = digest.of_file(str(what.partial))
        if found != sha256:
            what.partial.unlink()  # what an earlier try had left may have been of another file
    if found != sha256:
        _receive(what)
        found = digest.of_file(str(what.partial))
    if found != sha256:
        size = what.partial.stat().st_size
        what.partial.unlink()
        raise StepFailed(
            f"{_shown(what.url)}: its {size:,} bytes have the sha256 {found}, not {sha256} as model.sha256 says; nothing was kept; "
            "if the publisher changed the file on purpose, put its new sha256 in the target"
        )
    what.partial.replace(out)


def _receive(what: Download) -> None:
    """Append to the unfinished file until it is whole. A server's refusal ends it, a cut connection is tried again."""
    opener = urllib.request.build_opener(_Redirects)
    tries = 0
    while True:
        before = what.partial.stat().st_size if what.partial.exists() else 0
        wait, problem = 2.0**tries, ""
        try:
            if _try(opener, what, before):
                return
            problem = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing lies behind what is here: the file is whole, or another one
                return
            problem = f"the server says {error.code} {first_line(error.reason)}".rstrip()
            if error.code // 100 == 3:  # what urllib says of that names the address, with its query
                nowhere = f"it is redirected to nowhere, in a circle, more than {REDIRECTS} times, or to what is not https"
                raise StepFailed(f"{_shown(what.url)}: {nowhere}; not followed; {_advice(error.code)}") from error
            if error.code not in _AGAIN:
                raise StepFailed(f"{_shown(what.url)}: {problem}; {_advice(error.code)}") from error
            wait = _wait(error.headers, wait)
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, _Refused):
                raise StepFailed(f"{_shown(what.url)}: {error.reason}") from error
            problem = first_line(getattr(error, "reason", error))
            if getattr(error, "errno", None) and error.__class__ is OSError:
                raise  # the disk, not the network
        after = what.partial.stat().st_size if what.partial.exists() else 0
        tries = 0 if after > before else tries + 1
        if tries == TRIES:
            raise StepFailed(
                f"{_shown(what.url)}: {problem}, {TRIES} times; {human(after)} are here and stay: build again to go on from there"
            )
        time.sleep(wait if tries else 0)


def _try(opener: urllib.request.OpenerDirector, what: Download, start: int) -> bool:
    """One connection; whether the file is whole after it."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(what.url, headers={"User-Agent": "edgebuild", "Accept-Encoding": "identity", **headers})
    with opener.open(request, timeout=TIMEOUT) as response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # a server that knows no ranges sends all of it
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if _number(length) else None
        room = min(MAX_BYTES, start + shutil.disk_usage(what.partial.parent).free)
        if total and total > room:
            raise StepFailed(f"{_shown(what.url)}: it has {human(total)}, and there is room for {human(room)}; free space")
        with what.partial.open("ab" if start else "wb") as file:
            return _copy(response, file, start, total, room, what)


def _copy(response: Any, file: IO[bytes], here: int, total: int | None, room: int, what: Download) -> bool:
    while chunk := response.read1(_CHUNK):
        here += len(chunk)
        if here > room or (total is not None and here > total):
            raise StepFailed(f"{_shown(what.url)}: it sends more than {human(total or room)}; not taken")
        file.write(chunk)
        what.moved(here, total)
    return total is None or here == total


class _Refused(Exception):
    """A redirect that is not followed."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError as error:
            raise urllib.error.URLError(_Refused("it is redirected to what is no address; not followed")) from error

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(_Refused(f"it is redirected to {_shown(newurl)}, which is not https; not followed"))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _wait(headers: Any, otherwise: float) -> float:
    asked = headers.get("Retry-After", "")
    return min(float(asked) if _number(asked) else otherwise, LONGEST_WAIT)


def _number(text: str) -> bool:
    """Not `isdigit` alone: to that ² is a digit too."""
    return text.isascii() and text.isdigit()


def _advice(code: int) -> str:
    if code in (401, 403):
        return "it asks for an account, which edgebuild does not have: download the file yourself and give its path"
    if code in (404, 410):
        return "there is no such file (any more): check model.source"
    return "check model.source, or give a local path"


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
