"""Hugging Face repositories at a commit, through huggingface_hub. The only module that knows it.

Its cache, endpoint, token, proxies and offline mode are the user's own, by the variables that it reads itself. Files stay in
its cache and are read there. It checks sizes only, so contents are held here against their names: a blob in the cache is
called by its sha256 (files in LFS) or by its git object id (huggingface.co/docs/huggingface_hub, "Manage the cache").
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edgebuild.errors import StepFailed, first_line
from edgebuild.step import Download

# What a model in a repository's first folder is made of, and its licence. Python files and other forms of the weights are not.
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
)
TIMEOUT = 60  # seconds without a byte
ENVIRONMENT = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"),
    *("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_XET", "HF_XET_CACHE"),
    *(name for both in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (both, both.upper())),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)


def environment() -> dict[str, str]:
    """What of this process's environment a download needs: where caches and tokens are, proxies, certificates."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if "HF_HOME" not in found:  # a worker has no home of its own
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        found["HF_HOME"] = os.path.join(cache, "huggingface")
    return found


def fetch(repository: str, commit: str, path: str, what: Download, out: Path) -> None:
    """Make `out` a folder of links to the model's files in the cache, or, where `path` names one file, a link to that.

    Raises StepFailed with one sentence.
    """
    from huggingface_hub import snapshot_download

    with _hub(repository, commit):
        snapshot = Path(
            snapshot_download(
                repository,
                revision=commit,
                **_patterns(path),
                tqdm_class=_bar(what.moved),
            )
        )
    names = [path] if path else sorted(file.name for file in snapshot.iterdir() if file.is_file() and _wanted(file.name))
    for name in names:
        _check(snapshot / name, repository)
    if path:
        out.symlink_to(_blob(snapshot / path))
        return
    out.mkdir()
    for name in names:
        (out / name).symlink_to(_blob(snapshot / name))


def _patterns(path: str) -> dict[str, Any]:
    """Which files of a repository are a model, as huggingface_hub asks for them: one alone, or those WANTED at its top."""
    if path:
        return {"allow_patterns": [path], "ignore_patterns": None}
    return {"allow_patterns": list(WANTED), "ignore_patterns": ["*/*"]}


def cached(repository: str, commit: str, path: str = "") -> dict[str, Path]:
    """role → path of the model's files as the cache has them, of `path` alone where it is given; nobody is asked. Empty: not there."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                repository,
                revision=commit,
                **_patterns(path),
                local_files_only=True,
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return {}
    if path:
        return {"model": snapshot / path} if (snapshot / path).is_file() else {}
    return {f"model/{file.name}": file for file in sorted(snapshot.iterdir()) if file.is_file() and _wanted(file.name)}


def sizes(repository: str, commit: str) -> dict[str, int]:
    """Every file of a repository with its bytes. Raises StepFailed with one sentence."""
    from huggingface_hub import HfApi

    with _hub(repository, commit):
        tree = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_tree(repository, revision=commit, recursive=True)
        return {entry.path: entry.size for entry in tree if hasattr(entry, "size")}


def part(repository: str, commit: str, name: str, start: int, length: int) -> bytes:
    """That many bytes of a file; fewer where it ends. Nothing is kept. Raises StepFailed with one sentence."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    address = hf_hub_url(repository, name, revision=commit, endpoint=os.environ.get("HF_ENDPOINT"))
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with _hub(repository, commit), get_session().stream("GET", address, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        before = 0 if response.status_code == 206 else start  # a server without ranges begins at the begin
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= before + length:
                break
    return bytes(data[before : before + length])


def commit_now(repository: str, revision: str) -> str:
    """The commit for which a branch or tag stands at this moment, in words for a message; why it is not known, else."""
    try:
        from huggingface_hub import HfApi

        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repository, revision=revision, timeout=10).sha
    except Exception as error:  # noqa: BLE001 - whatever keeps the hub from answering is told, nothing more
        return f"the hub could not be asked for it: {first_line(error)}"
    return f"it stands for this one now: hf:{repository}@{found}"


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED)


def _blob(file: Path) -> str:
    return os.path.realpath(file)


def _check(file: Path, repository: str) -> None:
    """Raises StepFailed where a file's content is not what its name in the cache says; then it is removed from there."""
    blob = Path(_blob(file))
    if not blob.is_file():
        raise StepFailed(f"hf:{repository} has no file {file.name} at this commit; check model.source")
    kind = {64: "sha256", 40: "sha1"}.get(len(blob.name))
    if kind is None:
        return  # a cache without links (some file systems) keeps no names by content
    total = hashlib.new(kind)
    if kind == "sha1":
        total.update(b"blob %d\0" % blob.stat().st_size)  # git-scm.com/book, "Git Objects"
    with blob.open("rb") as content:
        while chunk := content.read(1 << 20):
            total.update(chunk)
    if total.hexdigest() != blob.name:
        file.unlink()
        blob.unlink()
        raise StepFailed(
            f"{file.name} of hf:{repository} is not what the hub says it is ({kind} {total.hexdigest()}, not {blob.name}): damaged on "
            "its way or in the cache; it was removed from the cache; build again"
        )


def _bar(moved: Callable[[int, int | None], None]) -> Any:
    """A progress bar, as huggingface_hub wants one, that shows nothing and tells how far it is; files come in several threads."""
    from tqdm import tqdm

    one = threading.Lock()

    class Told(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and "transfer" not in str(options.get("name", ""))
            options.pop("name", None)
            super().__init__(*args, **{**options, "file": _Nowhere(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            with one:  # else bytes are lost of its count, and what is told last is not what was counted last
                shown = super().update(n)
                if self._counts:
                    moved(int(self.n), int(self.total) if self.total else None)
            return shown

    return Told


class _Nowhere:
    """What a bar that nobody sees is written to."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


@contextmanager
def _hub(repository: str, commit: str) -> Iterator[None]:
    """What huggingface_hub raises, as one sentence: what is wrong and what to do."""
    from huggingface_hub import errors

    what = f"hf:{repository}@{commit[:12]}…"
    try:
        yield
    except errors.GatedRepoError as error:
        raise StepFailed(f"{what}: its owner asks you to accept conditions: do so on its page, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise StepFailed(f"{what}: the repository has no such commit; check model.source") from error
    except errors.RepositoryNotFoundError as error:
        raise StepFailed(
            f"{what}: no such repository, or not for you: check the name; set HF_TOKEN where it is private"
        ) from error
    except errors.IncompleteSnapshotError as error:
        raise StepFailed(
            f"{what}: not all of its files are in the cache, and the hub cannot be reached: {_cause(error)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise StepFailed(f"{what}: not in the cache, and the hub cannot be reached: {_cause(error)}") from error
    except errors.HfHubHTTPError as error:
        raise StepFailed(f"{what}: {_status(error)}; what was downloaded stays in the cache") from error
    except errors.HFValidationError as error:
        raise StepFailed(f"{what}: {first_line(error)}; check model.source") from error
    except OSError as error:
        if error.errno:
            raise  # the disk
        raise StepFailed(f"{what}: the download failed: {first_line(error)}; build again") from error
    except Exception as error:
        raise StepFailed(f"{what}: the download failed: {first_line(error)}; what was downloaded stays; build again") from error


def _status(error: Any) -> str:
    code = error.response.status_code
    advice = {
        401: "set HF_TOKEN to a valid token",
        403: "your token may not read it",
        429: "too many requests: wait, then build again",
    }
    return f"the hub answers {code}: {advice.get(code, 'build again, later')}"


def _cause(error: BaseException) -> str:
    """Why: offline mode, or what the connection met."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set; unset it, or copy the files into the cache"
    cause = error.__cause__
    if cause is not None and hasattr(cause, "response"):
        return _status(cause)
    return f"{first_line(cause or error)}; check the network and HF_ENDPOINT"
