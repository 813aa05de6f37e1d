"""What this machine is: its instruction set (which artifacts may depend on) and its fingerprint (which timings do)."""

import os
import sys
from functools import cache

# The x86-64 micro-architecture levels of the psABI (gitlab.com/x86-psABIs), by one flag that each adds, and the
# extensions that inference kernels dispatch on.
_LEVELS = (("avx512bw", "x86-64-v4"), ("avx2", "x86-64-v3"), ("sse4_2", "x86-64-v2"))
_EXTENSIONS = (
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


@cache
def isa() -> str:
    """The instruction set as one word: `x86-64-v4+avx512_vnni+avx512_bf16`, `arm64+asimddp+i8mm`."""
    machine = os.uname().machine.lower()
    flags = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    base = {"amd64": "x86-64", "x86_64": "x86-64", "aarch64": "arm64"}.get(machine, machine)
    if base == "x86-64":
        base = next((level for flag, level in _LEVELS if flag in flags), base)
    return "+".join([base, *(name for name in _EXTENSIONS if name in flags)])


def fingerprint() -> dict[str, str]:
    """What a timing depends on: processor, cores, memory, instruction set, system. In the key of measuring steps."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0
    return {
        "cpu": _cpuinfo("model name") or os.uname().machine,
        "cores": str(cores()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "isa": isa(),
        "system": f"{os.uname().sysname} {os.uname().machine}",
    }


def elsewhere() -> bool:
    """Whether a measurement holds that was taken on another machine, as EDGEBUILD_MEASURED=elsewhere says (in CI, whose machines vary)."""
    return os.environ.get("EDGEBUILD_MEASURED") == "elsewhere"


def measuring() -> dict[str, str]:
    """What the key of a measuring step says of the machine; what was measured names the machine in any case."""
    return {"any": "measured once, wherever that was"} if elsewhere() else fingerprint()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def threads(weights: int) -> int:
    """How many run a language model of so many bytes of weights.

    One below a gigabyte: a pass is over before threads have met, and on a busy machine they wait for each other.
    """
    return 1 if weights < 1_000_000_000 else cores()


def boot() -> str:
    """A word that changes when the machine or its boot does, for a few microseconds: what it is need not be read again."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip() + str(cores())
    except OSError:
        return " ".join(os.uname())


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""
