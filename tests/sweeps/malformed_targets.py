"""Malformed target and platform files, 10,000 of them: valid ones spoilt by rule, and bytes and tokens at random.

Nothing may be raised but TargetError, each of its lines begins with the file, nothing of Python shows in it, what a rule
has spoilt for certain must be refused, what is accepted must plan, and none takes a second of processor time.

    python -m tests.sweeps.malformed_targets [--count 10000] [--seed N]
"""

import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgebuild import document, load, matrix, plan
from edgebuild.errors import TargetError, shown
from edgebuild.project import Project, _Seen
from tests.conftest import PLATFORM, ROOT, write_model
from tests.sweeps.children import Finding, main

COUNT, SECONDS, LINE = 10_000, 1.0, 5_000  # a path may have 4,096 characters
PYTHON = re.compile(
    r"Traceback|\b[A-Z]\w*(Error|Exception|Warning)\b|<class |object at 0x|\bNone\b|[{\[(]'|\bdict_|\\x[0-9a-f]{2}|NotImplemented"
)
Node = Any  # a scalar's text; a list of (key, Node) pairs for a map, so that keys may stand twice; a tuple of Nodes for a list


@dataclass(frozen=True, kw_only=True)
class Case:
    """`certain`: it must be refused. `name`: of the file, without `.yaml`."""

    kind: str
    data: bytes
    certain: bool = False
    name: str = "bad"
    folder: str = "targets"


# -- valid targets ------------------------------------------------------------------------------------------------------
def tree(rng: random.Random) -> list[tuple[str, Node]]:
    """A valid target with a random choice of keys."""
    source, task, platform = rng.choice(
        [
            ("model.gguf", "image-classification", "fake"),
            ("digits.onnx", "image-classification", "web"),
            ("hf", "text-generation", "ios"),
        ]
    )
    made: list[tuple[str, Node]] = [
        ("edgebuild", "1"),
        ("description", rng.choice(['"a deliverable"', "größer & schöner", "plain"])),
        ("model", [("source", source), ("task", task)]),
        ("platform", platform),
    ]
    scheme = "int4" if platform == "ios" else "int8"
    group = [("group_size", rng.choice(["32", "64"]))] if platform != "web" else []
    extra: list[tuple[str, Node]] = [
        ("default", rng.choice(["true", "false"])),
        ("quantize", [("scheme", scheme), *group]),
        ("evaluate", [("data", "data.npz" if platform != "ios" else "eval.txt")]),
        ("benchmark", [("profile", rng.choice(["rapid", "quick", "release"]))]),
        ("gates", [("cosine", [("min", rng.choice(["0.5", "0", "0.99"]))]), ("snr", [("min", "10"), ("required", "true")])]),
        ("package", [("version", "1.2.0"), ("archive", "true"), ("limits", [("shell", "50MB"), ("weights", '"2.5GB"')])]),
        ("limits", [("memory", "2GiB"), ("time", "90s")]),
    ]
    if platform == "web":
        extra.append(("calibration", [("data", "data.npz"), ("samples", "8")]))
    made += rng.sample(extra, rng.randrange(len(extra) + 1))
    if rng.random() < 0.2:
        key, values = rng.choice(
            [("package.kind", ("folder",)), ("limits.time", ("60s", "2min")), ("package.require_level", ("L0", "L1"))]
        )
        if key.split(".")[0] not in dict(made):
            made.append(("matrix", [(key, values)]))
    return made


def emit(node: Node, indent: int = 0, flow: bool = False) -> str:
    """As YAML: block style, or flow style on one line."""
    if isinstance(node, str):
        return node
    if isinstance(node, tuple):
        return "[" + ", ".join(emit(one, flow=True) for one in node) + "]"
    if flow or not node:
        return "{" + ", ".join(f"{key}: {emit(one, flow=True)}" for key, one in node) + "}"
    lines = []
    for key, one in node:
        inner = emit(one, indent + 2, flow=indent > 0)
        lines.append(" " * indent + f"{key}:" + (f"\n{inner}" if isinstance(one, list) and one and indent == 0 else f" {inner}"))
    return "\n".join(lines)


def places(node: Node, above: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where every pair of a tree stands."""
    found = []
    for number, (_, inner) in enumerate(node):
        found.append((*above, number))
        if isinstance(inner, list):
            found += places(inner, (*above, number))
    return found


def at(node: Node, place: tuple[int, ...]) -> tuple[list[tuple[str, Node]], int]:
    for number in place[:-1]:
        node = node[number][1]
    return node, place[-1]


def put(node: Node, path: str, leaf: Node) -> None:
    """Set a dotted key, whether or not the map is there."""
    key, _, rest = path.partition(".")
    for number, (name, inner) in enumerate(node):
        if name == key:
            if rest and isinstance(inner, list):
                put(inner, rest, leaf)
                return
            del node[number]
            break
    node.append((key, leaf))
    if rest:
        node[-1] = (key, [])
        put(node[-1][1], rest, leaf)


# -- rules that spoil a tree: each says whether what it makes must be refused -------------------------------------------
def drop(rng: random.Random, made: Node) -> bool:
    container, number = at(made, rng.choice(places(made)))
    key = container.pop(number)[0]
    return key in ("edgebuild", "model", "source", "task", "platform")


def duplicate(rng: random.Random, made: Node) -> bool:
    container, number = at(made, rng.choice(places(made)))
    key, inner = container[number]
    container.insert(rng.randrange(len(container) + 1), (rng.choice([key, f'"{key}"']), inner))
    return True


def retype(rng: random.Random, made: Node) -> bool:
    container, number = at(made, rng.choice(places(made)))
    key, inner = container[number]
    other = rng.choice([[("a", "b")], ("a", "b"), (), "", "~", "null", "5", "-1.5", "true", "text", '"5"', "''", [("", "")]])
    container[number] = (key, other)
    return isinstance(inner, str) and not (isinstance(other, str) and other not in ("", "~", "null"))


def bound(rng: random.Random, made: Node) -> bool:
    path, values = rng.choice(
        [
            ("calibration.samples", ["0", "-1", "1000000000000", "1.5", "9" * 19]),
            ("quantize.group_size", ["0", "65537", "-64", "64.0"]),
            ("quantize.ratio", ["1.5", "-0.1", "9" * 400 + ".0"]),
            ("quantize.exclude", [tuple(["a"] * 1001), ("a" * 501,), ((),)]),
            ("quantize.scheme", ["a" * 33, "Int8", "int 8", '""']),
            ("description", ["a" * 201, '"a\\nb"', '"\\u202e"', '"\\0"', '"\\x1b[2J"']),
            ("model.source", ["a" * 4097, '""', '"a\\0b"', "hf:nobody", "http://a.b/c", "s3://a/b"]),
            ("model.sha256", ["0" * 63, "g" * 64, '"' + "A" * 64 + '"']),
            ("model.task", ["classification", "Image-Classification", '"text-generation "']),
            ("platform", ["nosuch", "../fake", "/etc/passwd", "Fake", "con", "fake/../fake", "x" * 65, '"fake\\n"']),
            ("framework", ["tensorflow", "a-b", "ONNXRUNTIME", "fake2", '""']),
            ("prefer", ["speed", "Enterprise", "1", '""', ("enterprise",)]),
            ("evaluate.data", ["nosuch.npz", '""', "a" * 4097, "a/" * 2000 + "b"]),
            ("benchmark.profile", ["slow", "RAPID", "1"]),
            ("gates.cosine.min", ["-1", "1" + "0" * 18 + "1" * 300 + ".5", "high", '"0.5"']),
            ("gates.cosine", [[], [("min", "0.9"), ("max", "0.1")], [("waive", [("reason", "x")])], [("waive", "true")]]),
            ("gates.kl_mean.min", ["-0.1"]),
            ("package.kind", ["nosuch", "IOS", "a b", "x" * 33]),
            ("package.version", ["1.0", '"1.0"', "v1.0.0", "01.0.0", "1.0.0-01", "1." * 60, '"1.0.0\\n"']),
            ("package.limits.shell", ["0MB", '"0B"', "-5MB", "5", "5 megabytes", "1e3MB", '"5MB\\n"', "0.0000001B"]),
            ("package.require_level", ["L9", "l0", "0"]),
            ("limits.memory", ["0GB", "1", "much"]),
            ("limits.time", ["0s", "1 year", "60", "12:30"]),
            ("edgebuild", ["2", "0", "true", '"1"', "1.5", "-1"]),
            ("default", ["maybe", "1", '"true"']),
        ]
    )
    put(made, path, rng.choice(values))
    return True


def stranger(rng: random.Random, made: Node) -> bool:
    """A key that is not known: misspelt, look-alike letters, zero width, very long, of another type."""
    container, number = at(made, rng.choice(places(made)))
    key, inner = container[number]
    words = [
        key + "s",
        key.upper(),
        f"{key} ",
        key.replace("e", "е"),
        f"{key}\u200b",
        f'"{key}\\u0000"',
        f'"{key}\\n"',
        f'"{key}\\e[31m"',
    ]
    words += [
        "x" * 300,
        "x" * 900,
        "1",
        "true",
        "null",
        "0.5",
        "'\u202e'",
        "é",
        "[a]",
        "{a: b}",
        "? a",
        "__proto__",
        "a.b",
        '""',
        "$ref",
        "%s",
    ]
    other = rng.choice(words)
    if other == key or other.strip() == key:
        other = "unknown"
    container.insert(number, (other, inner))
    return True


def ambiguous(rng: random.Random, made: Node) -> bool:
    words = ["yes", "no", "ON", "Off", "y", "N", "True", "FALSE", "Null", "010", "0o17", "0x1F", "0b1", "1e3", "1E-5", "12:30"]
    words += [
        "12:30:45",
        "1_000",
        "+1",
        ".5",
        "5.",
        ".inf",
        "-.INF",
        ".NaN",
        "2026-01-31",
        "2026-1-1 10:00",
        "9" * 20,
        "-0_1",
        "+.5",
    ]
    put(made, rng.choice(["description", "model.source", "package.version", "quantize.scheme", "platform"]), rng.choice(words))
    return True


def anchored(rng: random.Random, made: Node) -> bool:
    container, number = at(made, rng.choice(places(made)))
    key, inner = container[number]
    text = emit(inner, flow=True)
    how = rng.randrange(5)
    if how == 0:
        container[number] = (key, f"&a {text}")
    elif how == 1:
        container[number] = (key, "*nothing")
    elif how == 2:
        container[number] = (f"&k {key}", text)
    elif how == 3:
        container.append(("<<", "{default: true}"))
    else:
        bomb = ["&a0 [x,x,x,x,x,x,x,x,x]", *(f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
        put(made, "quantize.exclude", tuple(bomb))
    return True


def tagged(rng: random.Random, made: Node) -> bool:
    container, number = at(made, rng.choice(places(made)))
    key, inner = container[number]
    tags = [
        "!!python/object/apply:os.system",
        "!!python/name:os.system",
        "!!str",
        "!!int",
        "!!binary",
        "!mine",
        "!<tag:x>",
        "!!set",
        "!!",
    ]
    container[number] = (key, f"{rng.choice(tags)} {emit(inner, flow=True)}")
    return True


def deep(rng: random.Random, made: Node) -> bool:
    depth = rng.choice([33, 64, 500, 1_000, 5_000, 20_000, 100_000])
    opening, closing = rng.choice([("[", "]"), ("{a: ", "}"), ("[{a: ", "}]"), ("[", ""), ("{", "")])
    depth = min(depth, 250_000 // len(opening + closing))
    put(made, rng.choice(["quantize.exclude", "quantize.layers", "gates", "matrix"]), opening * depth + closing * depth)
    return True


def huge(rng: random.Random, made: Node) -> bool:
    length = rng.choice([5_000, 70_000, 250_000, 300_000])
    how = rng.randrange(6)
    if how == 0:
        put(made, "description", "a" * length)
    elif how == 1:
        put(made, "calibration.samples", "1" * length)
    elif how == 2:
        put(made, "gates.cosine.min", "1" * length + ".5")
    elif how == 3:
        made.append(("k" * length, "1"))
    elif how == 4:
        put(made, "quantize.exclude", "[" + "a," * (length // 2) + "a]")
    else:
        put(made, "quantize.layers", "{" + ", ".join(f"l{n}: int8" for n in range(min(length // 4, 12_000))) + "}")
    return True


def matrices(rng: random.Random, made: Node) -> bool:
    many = tuple(f"p{n:03}" for n in range(101))
    misuse: list[Node] = [
        [], (), "", "text", "5", ("platform",), [("platform", "fake")], [("platform", ())], [("platform", ("fake", "fake"))],
        [("platfrom", ("fake",))], [("quantize", ("int8",))], [("description", ("a", "b"))], [("edgebuild", ("1",))], [("matrix", ("a",))],
        [("package.kind", (("folder",),))], [("package.kind", ("",))], [("package.kind", ("~", "folder"))], [("quantize.scheme", ("int8", "010"))],
        [("quantize.group_size", ("0", "64"))], [("quantize.group_size", ("64", '"64"'))], [("platform", many), ("framework", many)],
        [("platform.x", ("a",))], [("", ("a",))], [(".", ("a",))], [("model", ([("source", "a")],))], [("a" * 500, ("a",))],
        [("package.limits.shell", ("'5 MB'",))], [("evaluate.data", ("a/data.npz", "b/data.npz"))], [("evaluate.data", ("größe",))],
        [("evaluate.data", ("a/" + "x" * 70,))], [("evaluate.data", (".", "/"))], [("gates.cosine.min", ("-1",))], [("gates.cosine", ("0.5",))],
        [("default", ("true", "false"))], [("platform", tuple(f"p{n}" for n in range(1001)))],
        [(f"gates.{name}.min", ("0", "1")) for name in ("cosine", "snr", "quality", "flip_rate", "kl_mean", "same_top", "consistency", "latency_ratio", "weights_ratio")],
    ]  # fmt: skip
    made[:] = [(key, inner) for key, inner in made if key != "matrix"]
    made.append(("matrix", rng.choice(misuse)))
    return True


def twice(rng: random.Random, made: Node) -> bool:
    key, values = rng.choice([("platform", ("fake", "web")), ("model.source", ("model.gguf", "digits.onnx"))])
    made[:] = [(name, inner) for name, inner in made if name != "matrix"]
    made.append(("matrix", [(key, values)]))
    return True


def tricked(rng: random.Random, made: Node) -> bool:
    paths = [
        "../../../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/dev",
        "/proc/self/mem",
        "/proc/self",
        "/",
        ".",
        "..",
        "~",
        "fifo",
        "loop",
        "a/" * 1000,
    ]
    paths += [
        "model.gguf/",
        "model.gguf/x",
        "hf/../model.gguf",
        "./model.gguf",
        "//etc/passwd",
        "x" * 300,
        "$HOME",
        "%00",
        "C:\\x",
        "CON",
        "closed",
        "-rf",
    ]
    paths += [
        "hf",
        "empty",
        "file:///etc/passwd",
        "package:os/../x",
        "model.gguf#",
        "'model.gguf '",
        "mödel.gguf",
        "targets/bad.yaml",
        "digits.onnx",
    ]
    put(made, rng.choice(["model.source", "evaluate.data", "calibration.data"]), rng.choice(paths))
    return False


RULES = [
    drop,
    duplicate,
    retype,
    bound,
    bound,
    bound,
    stranger,
    ambiguous,
    anchored,
    tagged,
    deep,
    huge,
    matrices,
    twice,
    tricked,
    tricked,
]
# What the refusal must say, so that no later check hides a guard that is gone.
SAYS = {
    "deep": "nested deeper than|a key must be a word",
    "duplicate": "stands twice",
    "anchored": "anchors|merge keys",
    "tagged": "tags such as|not valid YAML",
    "ambiguous": "YAML versions read",
    "matrices": "matrix|not valid YAML",
    "twice": "stands twice",
}
# -- what spoils bytes --------------------------------------------------------------------------------------------------
NAMES = [
    "-x",
    "x",
    "a..b",
    "con",
    "nul.x",
    "x.tar",
    "x.evidence.json",
    "x.report.html",
    "Upper",
    "a b",
    "a" * 80,
    "ünï",
    "a\nb",
    "a\x1b[31mb",
    "a=b",
]
NAMES += [
    "a\u202eb",
    "a'b",
    'a"b',
    "a:b",
    "a*b",
    "a%sb",
    "{a}",
    "$(id)",
    "a\udcffb",
    ".",
    "_a",
    "a_",
    "lpt1.b",
    "e\u0301a",
    "None",
    "a\\b",
    "\t",
]
TOKENS = [
    b":",
    b"- ",
    b"? ",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"&a ",
    b"*a",
    b"!x ",
    b"|",
    b">",
    b"'",
    b'"',
    b"%YAML 1.1\n---\n",
    b"---\n",
    b"...\n",
]
TOKENS += [
    b"#",
    b"\t",
    b"\r",
    b"\0",
    b"\x07",
    b"\x85",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"\xf0\x9f\x98\x80",
    b"<<: ",
    b"@",
    b"`",
    b"~",
    b"\\",
]


def at_random(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes to bytes or tokens."""
    for _ in range(rng.randrange(1, 9)):
        tokens = re.findall(rb"\s+|\w+|[^\w\s]", data) or [b""]
        spot, other = rng.randrange(len(data) + 1), rng.randrange(len(tokens))
        how = rng.randrange(8)
        if how == 0 and data:
            data = data[: spot - 1] + bytes([rng.randrange(256)]) + data[spot:]
        elif how == 1:
            data = data[:spot] + rng.choice(TOKENS) + data[spot:]
        elif how == 2:
            data = data[:spot] + data[spot + rng.randrange(1, 12) :]
        elif how == 3:
            data = data[:spot]
        elif how == 4:
            data = data[:spot] + data[rng.randrange(len(data) + 1) :][:40] + data[spot:]
        elif how == 5:
            tokens[other] = rng.choice(TOKENS)
            data = b"".join(tokens)
        elif how == 6:
            tokens[other], tokens[-1 - other] = tokens[-1 - other], tokens[other]
            data = b"".join(tokens)
        else:
            data = data[:spot] + rng.choice(TOKENS) * rng.choice([2, 40, 3000]) + data[spot:]
    return data[:400_000]


def encoded(rng: random.Random, text: str) -> bytes:
    """A whole file that is not what it should be; each must be refused."""
    data = text.encode()
    wholes = [
        b"",
        b"\n",
        b"# only a comment\n",
        text.encode("utf-16"),
        text.encode("utf-32-be"),
        b"\xef\xbb\xbf" + data,
        data + b"\0",
        data + b"\xff",
    ]
    wholes += [
        data + b"\n---\n" + data,
        b"- " + data.replace(b"\n", b"\n  "),
        b"|\n " + data.replace(b"\n", b"\n "),
        b"\x80\x04K\x01.",
        b"PK\x03\x04" + data,
    ]
    wholes += [
        data + b"\n#" + b"x" * 270_000,
        b"{" * 200_000,
        b"[" * 262_000,
        b"%TAG ! tag:x:\n---\n" + data + b"\n...\nx",
        b"\x1f\x8b\x08\0",
        b"null",
        b"5",
        b"text",
    ]
    wholes += [
        data.replace(b":", b": :"),
        data.replace(b" ", b"\t"),
        b"\x07" + data,
        data + b"\n? [a, b]\n: c\n",
        data + b"\n<<: {a: b}\n",
        data + b"\n\x85\x07",
    ]
    return rng.choice(wholes)


def make(seed: int, number: int) -> Case:
    """The case of this number: the same for a seed."""
    rng = random.Random(f"{seed}:{number}")
    made = tree(rng)
    sort = rng.random()
    if sort < 0.70:
        rules = rng.sample(RULES, rng.choice([1, 1, 1, 2, 3]))
        certain = [rule(rng, made) for rule in rules]  # a second rule may undo what the first has spoilt
        return Case(
            kind=rules[0].__name__,
            data=emit(made, flow=rng.random() < 0.3).encode("utf-8", "surrogatepass"),
            certain=certain == [True],
        )
    if sort < 0.74:
        return Case(kind="names", data=emit(made).encode(), certain=True, name=rng.choice(NAMES))
    if sort < 0.80:
        return Case(kind="encoding", data=encoded(rng, emit(made)), certain=True)
    if sort < 0.85:
        return Case(kind="platform", data=at_random(rng, PLATFORM.encode()), folder="platforms")
    return Case(kind="random", data=at_random(rng, emit(made, flow=rng.random() < 0.3).encode()))


# -- what must hold -----------------------------------------------------------------------------------------------------
def open_sweep(folder: str) -> Callable[[Case, int], Finding]:
    """Make a project in `folder`; → what examines one case in it."""
    root = Path(folder)
    for name in ("targets", "platforms", "hf", "empty"):
        (root / name).mkdir()
    (root / "platforms" / "fake.yaml").write_text(PLATFORM)
    (root / "digits.onnx").write_bytes((ROOT / "targets" / "models" / "digits.onnx").read_bytes())
    (root / "hf" / "config.json").write_text("{}")
    for name in ("data.npz", "eval.txt", "hf/model.safetensors", "closed"):
        (root / name).write_bytes(b"PK\x03\x04")
    (root / "closed").chmod(0)
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    write_model(root / "model.gguf", "hello")
    os.chdir(root)
    around = _Seen(Project()).surroundings()
    return lambda case, number: examine(case, around)


def examine(case: Case, around: Any) -> Finding:
    """Load the file and plan its targets; what must hold is in this module's docstring."""
    spoilt = f"{case.folder}/{case.name}.yaml"
    Path(spoilt).write_bytes(case.data)
    name = case.name
    if case.folder == "platforms":
        name = "good"
        Path("targets/good.yaml").write_text("edgebuild: 1\nmodel: {source: model.gguf, task: other}\nplatform: bad\n")
    violations: list[str] = []
    problems: list[str] = []
    start = time.process_time()
    try:
        problems, planned = _plan(name, around)
    except Exception as error:  # whatever it is: nothing but TargetError may leave load and plan
        planned, outcome = 0, "raised"
        violations.append(f"raised {type(error).__name__}: {str(error)[:200]}")
    else:
        outcome = "refused" if problems else "accepted"
    seconds = time.process_time() - start
    Path(spoilt).unlink()
    if case.certain and not problems and not violations:
        violations.append(f"accepted, {planned} steps planned: {case.data[:200]!r}")
    if case.certain and problems and not re.search(SAYS.get(case.kind, ""), "\n".join(problems)):
        violations.append(f"refused for another reason: {problems[0][:200]!r}")
    if seconds > SECONDS:
        violations.append(f"took {seconds:.1f} s")
    begins = re.compile(rf"(targets|platforms)/({re.escape(shown(case.name))}|good)\.yaml(:[1-9][0-9]*)?: ")
    for line in "\n".join(problems).split("\n") if problems else ():
        if not begins.match(line):
            violations.append(f"does not begin with its file: {line[:200]!r}")
        if not line.isprintable() or len(line) > LINE:
            violations.append(f"not one printable line of at most {LINE} characters ({len(line)}): {line[:200]!r}")
        if found := PYTHON.search(line.replace(case.name, "")):
            violations.append(f"shows {found[0]!r}: {line[:200]!r}")
    return Finding(kind=case.kind, outcome=outcome, violations=violations, seconds=seconds)


def _plan(name: str, around: Any) -> tuple[list[str], int]:
    """(messages, number of steps planned)."""
    targets, whole = load.Targets(".", [name]), plan.Plan()
    problems = list(targets.problems.values())
    for one in (one for names in targets.files.values() for one in names):
        try:
            plan.add(whole, targets.target(one), around, False)
        except TargetError as error:
            problems.append(str(error))
    return problems, len(whole.steps)


# -- negative controls: each switches one guard off, and the sweep must then fail ---------------------------------------
def _without_aliases() -> None:
    events = yaml.parse

    def plain(text: str, Loader: Any) -> Any:
        for event in events(text, Loader=Loader):
            if isinstance(event, yaml.AliasEvent):
                event = yaml.ScalarEvent(None, None, (True, False), event.anchor, event.start_mark, event.end_mark)
            elif getattr(event, "anchor", None):
                event.anchor = None
            yield event

    document.yaml.parse = plain  # type: ignore[assignment]


def _set(module: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


GUARDS: dict[str, tuple[str, Callable[[], None]]] = {
    "depth": ("deep", _set(document, "MAX_DEPTH", 10**9)),
    "size": ("encoding", _set(document, "MAX_BYTES", 10**9)),
    "aliases": ("anchored", _without_aliases),
    "ambiguous": ("ambiguous", _set(document, "_AMBIGUOUS", re.compile("(?!)"))),
    "names": ("names", _set(load, "name_problem", lambda name: "")),
    "schema": ("bound", _set(document.Document, "check", lambda self, schema, key="": None)),
    "matrix": ("twice", _set(matrix, "problems", lambda file, given, texts: ())),
}

if __name__ == "__main__":
    sys.exit(main("tests.sweeps.malformed_targets", COUNT, f"bound {SECONDS:.0f} s of processor time each"))
