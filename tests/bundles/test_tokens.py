"""What closes and what does not, in each language whose compiler does not run where bundles are made."""

import pytest

from edgebuild.bundles.tokens import CMAKE, KOTLIN, SWIFT, C, Language, unbalanced

CLOSED = [
    (SWIFT, 'let a = "x \\(f("y (")) z"\n'),
    (SWIFT, 'let s = """\n a ( \\(b) "\n"""\n'),
    (SWIFT, "/* ( /* [ */ */ f()"),
    (SWIFT, 'let r = #"a " ( \\"#; f()'),
    (SWIFT, 'let r = ##"""\n " """# ( \n"""##; f()'),
    (SWIFT, "// (\n f() { [1] }"),
    (SWIFT, 'let e = "\\\\"; f("\\"")'),
    (KOTLIN, 'val a = "x ${f("y (") { "}" }} $z ("\n'),
    (KOTLIN, 'val s = """\n a ( ${b[0]} " \\ ""\n"""\n'),
    (KOTLIN, 'val s = """ends in a quote: """"; f()'),
    (KOTLIN, 'val s = """"begins with one"""; f()'),
    (KOTLIN, 'val e = ""; val r = """"""; f("\\"", "\\\\")'),
    (KOTLIN, "/* ( /* ' */ */ f('(', '\\'', '\\u0028', '\"')"),
    (KOTLIN, "// don't (\n fun `a ( name`() = [1]"),
    (KOTLIN, 'val d = "\\${(" + "$"'),
    (C, "f(\"a ( \\\" \\\n b\", '(', '\\'', '\"');"),
    (C, "/* ( /* ' */ int a[] = {1'000};"),
    (C, 'R"(a " ( \\)"; R"x(a )" ( )x"; f();'),
    (C, "// don't (\n#define A(x) #x"),
    (CMAKE, '# ( "\nset(A "b ) \\" \n c")\n#[[ ( ]] set(C [=[ ]] ( ]=])'),
]
OPEN = [
    (SWIFT, "\nf(", "line 2: ( is never closed"),
    (SWIFT, "f())", "line 1: ) closes nothing"),
    (SWIFT, "(]", "line 1: ] closes nothing"),
    (SWIFT, 'let a = "x\n"', "line 1: a string is not closed"),
    (SWIFT, 'let a = "\\(f("x")"\n', "line 1: a string is not closed"),
    (SWIFT, "/* a", "line 1: /* is never closed"),
    (SWIFT, "*/", "line 1: */ closes nothing"),
    (SWIFT, '"""\n x', 'line 1: """ is never closed'),
    (SWIFT, '#"abc"', 'line 1: #" is never closed'),
    (KOTLIN, "\nf {", "line 2: { is never closed"),
    (KOTLIN, 'val a = "${f("x")"\n', "line 1: a string is not closed"),
    (KOTLIN, 'val a = "x\n"', "line 1: a string is not closed"),
    (KOTLIN, 'val s = """ "" \\"', 'line 1: """ is never closed'),
    (KOTLIN, "val s = '\n'", "line 1: a character is not closed"),
    (KOTLIN, "val `a\nb` = 1", "line 1: a name in backticks is not closed"),
    (KOTLIN, "/* /* */", "line 1: /* is never closed"),
    (C, "f(]", "line 1: ] closes nothing"),
    (C, 'char *a = "x\n";', "line 1: a string is not closed"),
    (C, "char a = '\n", "line 1: a character is not closed"),
    (C, "/* /* */ */", "line 1: */ closes nothing"),
    (C, 'R"x(a )";', 'line 1: R"x( is never closed'),
    (CMAKE, "set(A", "line 1: ( is never closed"),
    (CMAKE, 'set(A "b)', 'line 1: " is never closed'),
    (CMAKE, "set(A [=[ ]] )", "line 1: [=[ is never closed"),
]


@pytest.mark.parametrize(("language", "text"), CLOSED)
def test_what_closes(language: Language, text: str) -> None:
    assert unbalanced(text, language) == ""


@pytest.mark.parametrize(("language", "text", "problem"), OPEN)
def test_what_does_not_close(language: Language, text: str, problem: str) -> None:
    assert unbalanced(text, language) == problem
