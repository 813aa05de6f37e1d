"""Sizes, durations, versions and names, as people write and read them."""

import re
import unicodedata

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\Z")
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s?(ms|s|min|h|d)\Z")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}[a-z0-9]\Z")
SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?\Z"
)  # semver.org, "Is there a suggested regular expression", without named groups
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}
_DEVICES = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10))}
_RESERVED_ENDS = (".tar", ".evidence.json", ".report.html")


def size(text: str) -> int:
    """`50MB` = 50·10⁶ bytes, `50MiB` = 50·2²⁰. Raises ValueError where `text` is no size above 0."""
    match = SIZE.match(text)
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value <= 0:
        raise ValueError('a size above 0 such as "50MB" or "1.5GiB"')
    return value


def duration(text: str) -> float:
    """`90s`, `10min`, `2h` in seconds. Raises ValueError where `text` is no time above 0."""
    match = DURATION.match(text)
    value = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if value <= 0:
        raise ValueError('a time above 0 such as "90s", "10min" or "2h"')
    return value


def human(value: float) -> str:
    """Bytes for people, decimal units: `2.96 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def name_problem(name: str) -> str:
    """Why `name` may not be a target's name; empty where it may."""
    if not NAME.match(name) or ".." in name:
        return "a name has 2 to 64 of a-z, 0-9, '.', '_', '-', begins and ends with a letter or digit and holds no '..'"
    if name.split(".")[0] in _DEVICES:
        return "Windows reserves this name for a device"
    for end in _RESERVED_ENDS:
        if name.endswith(end):
            return f"a name may not end in {end}: that is what edgebuild puts beside a bundle"
    return ""


def folded(name: str) -> str:
    """The form in which two names must differ: file systems fold case and Unicode forms."""
    return unicodedata.normalize("NFC", name).casefold()
