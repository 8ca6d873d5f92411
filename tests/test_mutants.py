"""`make mutants` on a tiny project: what is changed, which changes its tests notice, and what the exit code says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT, mutants
from tests.mutants import changed_lines, main
from tests.mutations import mutations

SOURCE = """
    import logging

    LIMIT = 3


    def shorter(values: "list[int]", limit: int = LIMIT + 0) -> "list[int] | None":
        '''Docstring of 1 line.'''
        if not values or limit < 1:
            raise ValueError(f"limit is {limit}, expected more than {1 - 1}")
        logging.info("%d", 5)
        return sorted(values, key=None, reverse=True)[:limit]
"""
TESTS = """
    import pytest
    from kitlib.tiny import shorter

    @pytest.fixture(scope="module")
    def short():
        return shorter([1, 2, 3])

    def test_an_empty_list_is_refused():
        with pytest.raises(ValueError):
            shorter([], 2)

    def test_the_fixture_is_a_list(short):
        assert type(short) is list

    def test_the_largest_come_first(short):
        assert short == [3, 2, 1]
"""


def dedented(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.strip("\n").splitlines()) + "\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for path, text in (("kitlib/tiny.py", SOURCE), ("tests/test_tiny.py", TESTS), (".gitignore", "    build/")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(dedented(text))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", "tiny")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True)


def test_each_kind_of_change_is_made_and_texts_stay():
    found = {(mutation.before, mutation.after) for mutation in mutations(dedented(SOURCE))}
    assert found == {
        ("3", "(4)"),
        ("LIMIT + 0", "(LIMIT - 0)"),
        ("0", "(1)"),
        ("not values or limit < 1", "(not values and limit < 1)"),
        ("not values", "(values)"),
        ("limit < 1", "(limit <= 1)"),
        ("1", "(2)"),
        ('raise ValueError(f"limit is {limit}, expected more than {1 - 1}")', "pass"),
        ("return sorted(values, key=None, reverse=True)[:limit]", "return"),
        ("sorted(values, key=None, reverse=True)[:limit]", "(sorted(values, key=None, reverse=True)[:])"),
        ("sorted(values, key=None, reverse=True)", "(sorted(values, reverse=True))"),
        ("sorted(values, key=None, reverse=True)", "(sorted(values, key=None))"),
        ("True", "(False)"),
    }


def test_every_change_of_real_modules_is_valid_python_and_alters_the_program():
    for path in ("kitlib/fusion/box_fusion.py", "kitlib/plans/graph.py"):
        source = (PROJECT / path).read_text(encoding="utf-8")
        changed = [ast.dump(ast.parse(mutation.apply(source))) for mutation in mutations(source)]
        assert len(changed) > 20 and ast.dump(ast.parse(source)) not in changed and len(set(changed)) == len(changed)


def run(project: Path, *arguments: str) -> tuple[int, str]:
    """Run in a process of its own, because the tool changes the environment and forks."""
    call = f"main(sys.argv[1:], Path({str(project)!r}), ())"
    code = f"import sys; from pathlib import Path; from tests.mutants import main; sys.exit({call})"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_survivors_are_listed_with_the_tests_that_ran_them(project):
    before = (project / "kitlib" / "tiny.py").read_text()
    code, printed = run(project, "--count", "20", "--bar", "0.9")
    # No test has a limit of 1, or more values than the limit.
    survivors = [line for line in printed.splitlines() if line.startswith("kitlib/")]
    assert survivors == [
        "kitlib/tiny.py:3: 3  ->  (4)",
        "kitlib/tiny.py:6: LIMIT + 0  ->  (LIMIT - 0)",
        "kitlib/tiny.py:6: 0  ->  (1)",
        "kitlib/tiny.py:8: limit < 1  ->  (limit <= 1)",
        "kitlib/tiny.py:8: 1  ->  (2)",
        "kitlib/tiny.py:11: sorted(values, key=None, reverse=True)  ->  (sorted(values, reverse=True))",
        "kitlib/tiny.py:11: sorted(values, key=None, reverse=True)[:limit]  ->  (sorted(values, key=None, reverse=True)[:])",
    ]
    assert code == 1 and "6 of 13 changes noticed (46.2%)" in printed
    assert "2 tests ran it\n        tests/test_tiny.py::test_the_fixture_is_a_list\n" in printed  # both share the fixture
    assert (project / "kitlib" / "tiny.py").read_text() == before

    # The measured lines are used again; a lower bar is reached; only changed lines are changed.
    (project / "kitlib" / "tiny.py").write_text(before.replace("limit < 1", "limit < 2"))
    assert changed_lines(project, "HEAD") == {"kitlib/tiny.py": {8}}
    code, printed = run(project, "--changed", "HEAD", "--bar", "0.5")
    assert code == 0 and "2 of 4 changes noticed (50.0%)" in printed


def test_tests_that_fail_without_a_change_are_named(project):
    assert run(project, "--count", "1")[0] in (0, 1)
    (project / "kitlib" / "tiny.py").write_text("def shorter(values, limit=3):\n    return values[:limit] + [4 - limit]\n")
    code, printed = run(project)
    assert code == 2 and "tests/test_tiny.py" in printed


def test_a_constant_is_judged_by_all_tests_of_its_module(project):
    """No test of the module runs the constant's line, because the file is imported before; one of another room does."""
    (project / "tests" / "far").mkdir()
    (project / "tests" / "far" / "test_far.py").touch()
    ran = {"tests/test_tiny.py": {"shorter": {"raise": [0]}}, "tests/far/test_far.py": {"": {"LIMIT = 3": [0]}}}
    tests = mutants.Tests(project)
    tests.files = {path: {"tests": [[path, 1.0]], "ran": {"kitlib/tiny.py": lines}} for path, lines in ran.items()}
    constant = mutations(dedented(SOURCE))[0]
    _, names = tests.judging("kitlib/tiny.py", constant, "LIMIT = 3")
    assert constant.before == "3" and names == list(ran)
    # Of a module of constants, no line runs in a test of the module.
    tests.files["tests/test_tiny.py"]["ran"] = {}
    assert sorted(tests.judging("kitlib/tiny.py", constant, "LIMIT = 3")[1]) == sorted(ran)


def test_an_unknown_module_is_an_error(project, capsys):
    with pytest.raises(SystemExit):
        main(["kitlib/big.py"], project, ())
    assert "kitlib/big.py do not exist" in capsys.readouterr().err
