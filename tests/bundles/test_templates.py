"""Values in templates: refused, or one whole token that reads back as what it was. Parsed back by each format's own reader."""

import ast
import json
import plistlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebuild import bundle, render
from edgebuild.bundle import Proof
from edgebuild.bundles import BUNDLES, firmware_mcu, programs
from edgebuild.bundles.tokens import SWIFT, unbalanced
from edgebuild.errors import StepFailed
from edgebuild.render import Identifier, Token, Word
from tests.bundles.hostile import VALUES, WRITTEN
from tests.bundles.packing import MADE_WITH, TEMPLATES, files, pack, require

EXAMPLES = 400


def from_swift(token: str) -> str:
    assert token[0] == token[-1] == '"'
    assert not unbalanced(f"let a = {token}\nlet b = [1]", SWIFT)
    body = re.sub(r"\\(.)", lambda match: {"\\": "\\", '"': '"'}[match[1]], token[1:-1])
    assert re.fullmatch(r'(?:[^"\\]|\\["\\])*', token[1:-1])
    return body


def from_markdown(token: str) -> str:
    """The text of a paragraph, which must hold text alone, as CommonMark with GitHub's tables and links reads it."""
    from markdown_it import MarkdownIt

    blocks = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"before {token}\n\n| {token} |\n|---|\n\n{token}\n")
    )
    inline = [block for block in blocks if block.type == "inline"]
    assert [block.type for block in blocks if block.type.endswith("_open")][:2] == ["paragraph_open", "table_open"]
    last = inline[-1].children or []
    for block in inline:
        assert all(child.type in ("text", "text_special") for child in block.children or []), block
    return "".join(child.content for child in last) if token else ""


def from_escapes(escaped: str) -> Callable[[str], str]:
    """A literal in double quotes with a backslash before each of these characters, and none of them bare."""

    def read(token: str) -> str:
        assert token[0] == token[-1] == '"'
        assert re.fullmatch(rf"(?:[^{escaped}]|\\[{escaped}])*", token[1:-1])
        return re.sub(r"\\(.)", r"\1", token[1:-1])

    return read


def from_c(token: str) -> str:
    assert re.fullmatch(r'"(?:[ !#->@-\[\]-~]|\\[0-7]{3})*"', token)
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), token[1:-1].encode()).decode()


def from_shell(token: str) -> str:
    (word,) = shlex.split(token)
    return word


def from_key_file(token: str) -> str:
    assert token == token.strip(" ")
    return re.sub(r"\\(.)", lambda match: {"\\": "\\", "s": " "}[match[1]], token)


def from_properties(token: str) -> str:
    assert re.fullmatch(r"(?:[\"-9;<>-\[\]-~]|\\u[0-9a-f]{4})*", token)
    units = re.findall(r"\\u(....)|(.)", token)
    return b"".join((int(unit, 16) if unit else ord(plain)).to_bytes(2, "big") for unit, plain in units).decode("utf-16-be")


READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".py": ast.literal_eval,
    ".yaml": lambda token: yaml.safe_load(f"a: {token}")["a"],
    ".toml": lambda token: tomllib.loads(f"a = {token}")["a"],
    ".plist": lambda token: plistlib.loads(f'<plist version="1.0"><string>{token}</string></plist>'.encode()),
    ".swift": from_swift,
    ".md": from_markdown,
    ".c": from_c,
    ".kt": from_escapes(r"\\\"$"),
    ".sh": from_shell,
    ".raucm": from_key_file,
    ".properties": from_properties,
    "CMakeLists.txt": from_escapes(r"\\\"$"),
    "Dockerfile": from_escapes(r"\\\"$"),
    "sw-description": from_escapes(r"\\\""),
}


def survives(value: str) -> bool:
    """Whether the value is taken at all; what is refused is not rendered."""
    try:
        render.check_values(value, "value")
    except StepFailed:
        return False
    return True


def check(suffix: str, value: str) -> None:
    if not survives(value):
        assert any(render._forbidden(character) for character in value)
        return
    token = render.finalize(suffix)(value)
    assert "\n" not in token
    assert "\r" not in token
    assert READERS[suffix](token) == (value.strip() if suffix == ".md" else value)


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_written_hostile_values(suffix: str) -> None:
    for value in WRITTEN:
        check(suffix, value)


@pytest.mark.parametrize("suffix", sorted(READERS))
@settings(max_examples=EXAMPLES, deadline=None)
@given(value=VALUES)
def test_made_up_hostile_values(suffix: str, value: str) -> None:
    check(suffix, value)


@settings(max_examples=5, deadline=None)
@given(values=st.lists(VALUES, min_size=100, max_size=100))
def test_javascript_reads_back(values: list[str], node: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    taken = [value for value in [*WRITTEN, *values] if survives(value)]
    module = tmp_path_factory.mktemp("js") / "values.mjs"
    token = render.finalize(".mjs")
    lines = ",\n".join(map(token, taken))
    module.write_text(f"console.log(JSON.stringify([\n{lines}\n]));\n", encoding="utf-8")
    done = subprocess.run([node, str(module)], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout) == taken


def test_numbers_truth_and_nothing() -> None:
    for suffix, reader in (*READERS.items(),):
        token = render.finalize(suffix)
        if suffix in (".json", ".py", ".yaml", ".toml"):
            for number in (0, -7, 2**60, 1.5, -0.001, 1e-05, 1e300, 3.0):
                assert reader(token(number)) == number
                assert type(reader(token(number))) is type(number)
            assert reader(token(True)) is True
            assert reader(token(False)) is False
        for wrong in (None, float("nan"), float("inf"), [1], {"a": 1}, b"x"):
            with pytest.raises(StepFailed, match="a placeholder's value is"):
                token(wrong)
    assert render.finalize(".plist")(True) == "<true/>"


def test_words_stand_bare_only_where_nothing_can_follow() -> None:
    for suffix in READERS:
        token = render.finalize(suffix)
        assert token(Token("as it is")) == "as it is"
        assert (token(Word("a-1")) == "a-1") == (suffix in (".md", ".plist", ".raucm", ".properties"))
        assert (token(Identifier("Name")) == "Name") == (
            suffix not in (".json", ".yaml", ".toml", "Dockerfile", "sw-description")
        )
    with pytest.raises(StepFailed, match="x: 'a b' may hold"):
        render.word("x", "a b")


@pytest.mark.parametrize(
    ("source", "rel", "message"),
    [
        ("{{ missing }}", "a.json.j2", r"^template a.json.j2: UndefinedError: 'missing' is undefined$"),
        ("{{ x.y }}", "a.json.j2", "has no attribute 'y'"),
        ("\n{% if %}", "a.json.j2", r"^template a.json.j2, line 2: Expected an expression"),
        ("{{ 1 / 0 }}", "a.json.j2", "ZeroDivisionError"),
        ("{{ x.__class__.__mro__ }}", "a.json.j2", "SecurityError"),
        ("{{ x.append(1) }}", "a.json.j2", "UndefinedError"),
        ("{{ facts.update(a=1) }}", "a.json.j2", "SecurityError"),
        ("{{ lipsum() }}", "a.json.j2", "'lipsum' is undefined"),
        ("{{ [1] | random }}", "a.json.j2", "No filter named 'random'"),
        ("{% include 'other' %}", "a.json.j2", "no loader"),
        ("{{ x }}", "a.bat.j2", r"^template a.bat.j2: edgebuild knows no way to write values into such a file \(.bat\)"),
        ("{{ x }}", "a.ld.j2", r"^template a.ld.j2: a placeholder's value is 'text'; this format takes names and numbers alone"),
        ("{{ x }}", "Makefile.j2", r"into such a file \(no suffix\)"),
    ],
)
def test_what_templates_may_not_do(source: str, rel: str, message: str) -> None:
    with pytest.raises(StepFailed, match=message):
        render.render(source, rel, {"x": "text", "facts": {}})


def test_safe_is_no_way_around() -> None:
    assert render.render('{{ "<a" | safe }}{{ x }}', "a.md.j2", {"x": "*"}) == "\\<a\\*"


# -- whole templates --------------------------------------------------------------------------------------------------------
ALL = [path for path in files(TEMPLATES) if path.suffix == ".j2"]
FREE = ("description", "platform_description")  # what a target or platform can set to any text


def values(kind: str, place: Path) -> dict[str, Any]:
    """What templates of this kind may name, taken from a run of the step."""
    seen: dict[str, Any] = {}

    def watch(source: str, rel: str, given: dict[str, Any]) -> str:
        seen.update(given)
        return render.render(source, rel, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "render", watch)
        for name, nothing in (("assemble", {}), ("verify", {}), ("consume", Proof(level="L0", tools={}))):  # of empty files
            patch.setattr(BUNDLES[kind], name, lambda _, nothing=nothing: nothing)
        pack(kind, place)
    if kind == "firmware":  # its other form
        seen |= firmware_mcu.values(seen)
    return seen


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each kind that can be packed here."""
    there = [kind for kind in sorted(BUNDLES) if not programs.absent(MADE_WITH.get(kind, {}))]
    return {kind: values(kind, tmp_path_factory.mktemp(kind)) for kind in there}


def takes_text(token: Callable[[Any], str]) -> bool:
    """Whether the format has a way to write text; else no template of it can name what is free."""
    try:
        token("")
    except StepFailed:
        return False
    return True


@pytest.mark.parametrize("template", ALL, ids=lambda path: path.relative_to(TEMPLATES).as_posix())
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_value_changes_its_own_token_and_nothing_else(
    template: Path, known: dict[str, dict[str, Any]], data: st.DataObject
) -> None:
    """Rendered with hostile values, a template is what it is with harmless ones but for the tokens of those values."""
    kind, _, rel = template.relative_to(TEMPLATES).as_posix().partition("/")
    require(MADE_WITH.get(kind, {}))
    source, token = template.read_text(encoding="utf-8"), render.finalize(template.with_suffix("").name)
    harmless, hostile = dict(known[kind]), dict(known[kind])
    marks = {}
    for key in (*FREE, "licence", "input"):
        value = data.draw(VALUES.filter(bool).filter(survives), label=key)
        mark = f"MARK{key.upper().replace('_', '')}MARK"
        if takes_text(token):
            marks[token(mark)] = token(value)
        for filled, one in ((harmless, mark), (hostile, value)):
            if key == "licence":
                filled["licences"] = [one]
            elif key == "input":
                filled["inputs"] = filled["outputs"] = [{"name": one, "dtype": "float32", "shape": "1"}]
            else:
                filled[key] = one
    expected = render.render(source, rel, harmless)
    for mark, made in marks.items():
        expected = expected.replace(mark, made)
    assert render.render(source, rel, hostile) == expected


# -- placeholders in quotes and comments ------------------------------------------------------------------------------------
HOLE = "\ue000"
_SLASHES = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/'
_HASHES = r'"(?:\\.|[^"\\\n])*"|\'[^\']*\'|#[^\n]*'
QUOTED = {
    **dict.fromkeys((".c", ".h", ".cpp", ".kt", ".kts", ".ld", "sw-description"), _SLASHES + "|#[^\n]*"),
    **dict.fromkeys((".sh", ".yaml", ".yml", ".toml", "CMakeLists.txt", ".cmake", "Dockerfile"), _HASHES),
    **dict.fromkeys((".raucm", ".ini", ".properties"), r"^[#!;][^\n]*|\[[^\n]*\]"),
    ".swift": _SLASHES,
    ".mjs": _SLASHES + r"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`",
    ".json": r'"(?:\\.|[^"\\\n])*"',
    ".py": r"\"\"\".*?\"\"\"|'''.*?'''|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|#[^\n]*",
    **dict.fromkeys((".xcprivacy", ".xml"), r'<!--.*?-->|"[^"]*"|\'[^\']*\'|<[^>]*>'),
    ".md": r"<!--.*?-->|<[a-zA-Z/][^>]*>|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|\]\([^)]*\)",
}
BARE = {"{{ module }}", "{{ package }}", "{{ run }}"}  # identifiers, which may stand in examples of code in a README


def misplaced(rel: str, source: str) -> set[str]:
    """Placeholders of a template that are not whole tokens: in quotes or comments, or grown together with something."""
    name = Path(rel.removesuffix(".j2")).name
    suffix = name if name in QUOTED else Path(name).suffix
    holes = re.findall(r"\{\{.*?\}\}", source)
    text = re.sub(r"\{%.*?%\}|\{#.*?#\}", "", re.sub(r"\{\{.*?\}\}", HOLE, source))
    found = []
    if suffix == ".md":
        for fence in re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL):
            before = text[: text.index(fence)].count(HOLE)
            found += [hole for hole in holes[before : before + fence.count(HOLE)] if hole not in BARE]
            text = text.replace(fence, "fence" + HOLE * fence.count(HOLE))
    for match in re.finditer(QUOTED[suffix], text, re.DOTALL | re.MULTILINE):
        before = text[: match.start()].count(HOLE)
        found += holes[before : before + match[0].count(HOLE)]
    if suffix != ".md":
        for match in re.finditer(rf"[\w'\"`\\]{HOLE}|{HOLE}[\w'\"`\\]|{HOLE}{HOLE}", text):
            found.append(holes[text[: match.end()].count(HOLE) - 1])
    return set(found)


@pytest.mark.parametrize("template", ALL, ids=lambda path: path.relative_to(TEMPLATES).as_posix())
def test_placeholders_are_whole_tokens(template: Path) -> None:
    assert misplaced(template.name, template.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("rel", "source"),
    [
        ("a.json", '{"a": "x {{ name }}"}'),
        ("a.json", '{"a": "{{ name }}"}'),
        ("a.json", '{"a": v{{ name }}}'),
        ("a.swift", 'let a = "\\({{ name }})"'),
        ("a.swift", "// {{ name }}"),
        ("a.swift", "/* \n {{ name }} */"),
        ("a.swift", "struct X{{ name }} {}"),
        ("a.mjs", "const a = `{{ name }}`;"),
        ("a.mjs", "const a = '{{ name }}';"),
        ("a.py", "# {{ name }}"),
        ("a.kt", 'val a = "${{ name }}"'),
        ("a.c", "#include {{ name }}"),
        ("a.sh", 'echo "{{ name }}"'),
        ("a.sh", "echo x{{ name }}"),
        ("Dockerfile", "LABEL a='{{ name }}'"),
        ("Dockerfile", "# {{ name }}"),
        ("sw-description", 'version = "{{ name }}";'),
        ("manifest.raucm", "# {{ name }}"),
        ("manifest.raucm", "[image.{{ name }}]"),
        ("a.yaml", "a: '{{ name }}'"),
        ("a.py", '"""{{ name }}"""'),
        ("a.xcprivacy", '<a b="{{ name }}"/>'),
        ("a.xcprivacy", "<!-- {{ name }} -->"),
        ("a.md", "`{{ name }}`"),
        ("a.md", "```sh\necho {{ name }}\n```"),
        ("a.md", "[x]({{ name }})"),
        ("a.md", "<!-- {{ name }} -->"),
    ],
)
def test_misplaced_placeholders_are_found(rel: str, source: str) -> None:
    assert misplaced(rel, source) == {"{{ name }}"}
