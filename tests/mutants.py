"""Change single points of kitlib and list the changes that no test notices: `make mutants`.

Each change is made in a copy of the project and judged by the tests that run the changed line, in the test files of the
module's room and those that import the module themselves. The other tests of these files follow, because a test may use
what another one's fixture has computed, and then tests of other files that are known to run the line, if they have been
measured with the present code. Which tests run which lines is measured once per test file and kept in build/mutants
until the file changes; a new line is judged by the tests of its function, or else of its module. Lines that only run in
other processes count as not run.
"""

import argparse
import ast
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import coverage
import psutil
import pytest
from tqdm import tqdm

from tests import PROJECT
from tests.mutations import Mutation, mutations

# Slow imports, made once; each mutant is tested in a fork. None of them needs a setting that kitlib makes first.
LOADED = ("torch", "torchvision", "timm", "pytorch_lightning", "pandas", "sklearn.metrics", "scipy.stats", "cv2", "pydicom")
LOADED += ("matplotlib.pyplot", "PIL.Image", "hypothesis")
EXCLUDED = ("tests/notebooks/", "tests/test_mutants.py")
MOST_SECONDS = 30.0  # of tests for one mutant; slower tests beyond are left out
MAP_LIMIT_S = 900


class Tests:
    """Which tests run which lines of a project's package `kitlib`, by test file."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.files = root, root / "build" / "mutants", {}
        self.imports = cache(lambda path: frozenset(_imported(root, path)))
        modules = sorted((root / "kitlib").rglob("*.py"))
        self.code = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()

    def closure(self, path: str) -> set[str]:
        """Return the path and those of all files that it imports, also through others."""
        found, new = set(), {path}
        while new:
            found |= new
            new = {other for one in new for other in self.imports(one)} - found
        return found

    def judges(self, path: str, module: str) -> bool:
        """Return whether a test file is in the same room as a module that it uses, or imports the module itself."""
        same_room = Path(path).parts[1:-1] == Path(module).parts[1:-1] and module in self.closure(path)
        return same_room or module in self.imports(path)

    def digest(self, path: str) -> str:
        """Return a digest of a test file and the files of `tests` that it imports."""
        used = sorted(name for name in self.closure(path) if name.startswith("tests/"))
        return hashlib.sha256(b"".join((self.root / name).read_bytes() for name in used)).hexdigest()

    def measure(self, modules: Iterable[str], run: Callable) -> None:
        """Run the test files that judge these modules and are new or have changed; read what is known of all others."""
        paths = [path.relative_to(self.root).as_posix() for path in sorted((self.root / "tests").rglob("test_*.py"))]
        stale = []
        for path in [path for path in paths if not path.startswith(EXCLUDED)]:
            kept = json.loads(self._kept(path).read_text()) if self._kept(path).is_file() else {}
            is_fresh = kept.get("digest") == self.digest(path)
            if any(self.judges(path, module) for module in modules):
                if kept:
                    self.files[path] = kept
                if not is_fresh:
                    stale.append(path)
            elif is_fresh and kept.get("code") == self.code:
                self.files[path] = kept
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in stale:
            self._kept(path).unlink(missing_ok=True)
        jobs = [(path, None, [path], None, str(self._kept(path)), MAP_LIMIT_S) for path in stale]
        for path, _ in tqdm(run(jobs), "measuring test files", len(jobs), disable=not jobs):
            self.files[path] = {"tests": [], "ran": {}}  # also if it timed out or its process died
            with suppress(FileNotFoundError):
                self.files[path] = json.loads(self._kept(path).read_text())
            self.files[path]["digest"] = self.digest(path)
            self.passed(path)

    def passed(self, path: str) -> None:
        """Remember that the recorded tests of a file pass with the present code of kitlib."""
        self.files[path]["code"] = self.code
        self._kept(path).write_text(json.dumps(self.files[path]))

    def _kept(self, path: str) -> Path:
        return self.folder / f"{path.replace('/', '.')}.json"

    def judging(self, module: str, mutation: Mutation, text: str) -> tuple[list[str], list[str]]:
        """Return the tests that run the mutation's line `text`, and these followed by the others of their files.

        The files that judge the module come first, and among them quick ones; tests beyond MOST_SECONDS are left out. Of the
        other files, only tests that run the line are chosen. A line that runs on import is judged by all tests that run any
        line of the module, and then by all others of the files that judge it.
        """
        chosen, is_own = {}, {path: self.judges(path, module) for path in self.files}
        for depth in (2, 1, 0):
            for path, file in self.files.items():
                if depth < 2 and not is_own[path]:
                    continue
                ran = file["ran"].get(module, {})
                functions = [ran.get(mutation.function, {})] if depth else ran.values()
                lines = [tests for lines in functions for line, tests in lines.items() if depth < 2 or line == text]
                if indices := set().union(*lines):
                    chosen[path] = [file["tests"][index] for index in sorted(indices)]
            if not mutation.on_import and any(is_own[path] for path in chosen):
                break
        order = sorted(chosen, key=lambda path: (not is_own[path], sum(seconds for _, seconds in chosen[path])))
        groups = [chosen[path] for path in order]
        if mutation.on_import:  # a test may use a constant without running a line of its module
            unchosen = [path for path in self.files if is_own[path] and path not in chosen]
            order += sorted(unchosen, key=lambda path: sum(seconds for _, seconds in self.files[path]["tests"]))
        others = [
            [test for test in self.files[path]["tests"] if test not in chosen.get(path, ())]
            for path in order
            if is_own[path]
        ]
        names, exact, total = [], sum(len(group) for group in groups), 0.0
        for number, (name, seconds) in enumerate(test for group in [*groups, *others] for test in group):
            if not names or total + seconds <= MOST_SECONDS:
                names.append((name, number < exact))
                total += seconds
        return [name for name, ran in names if ran], [name for name, _ in names]


def _imported(root: Path, path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((root / path).read_bytes())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith(("kitlib", "tests")) and (root / name.replace(".", "/")).with_suffix(".py").is_file():
                yield f"{name.replace('.', '/')}.py"


class Plugin:
    """Runs the chosen tests in the chosen order; measures which lines they run if `out` is a file to write that to."""

    def __init__(self, copy: Path, names: list[str] | None, out: str | None) -> None:
        self.copy, self.names, self.out, self.passed, self.users, self.cov = copy, names, out, {}, {}, None

    def pytest_configure(self, config: pytest.Config) -> None:
        if "hypothesis" in sys.modules:  # a failing example need not be made smaller
            from hypothesis import Phase, settings

            settings.register_profile("mutants", settings(), phases=(Phase.explicit, Phase.generate))
            settings.load_profile("mutants")
        if self.out:
            self.cov = coverage.Coverage(data_file=None, config_file=False, include=[f"{self.copy}/kitlib/*"])
            self.cov.start()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for name in getattr(item, "fixturenames", ()):
                self.users.setdefault(name, []).append(item.nodeid)
        if self.names is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.names if name in by_name]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.cov:
            self.cov.switch_context(item.nodeid)
        started = time.perf_counter()
        result = yield
        if self.passed.get(item.nodeid):
            self.passed[item.nodeid] = time.perf_counter() - started
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[None]:
        """Attribute the lines of a fixture that several tests share to all of them."""
        if not self.cov or fixturedef.scope == "function":
            return (yield)
        self.cov.switch_context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.cov.switch_context(request._pyfuncitem.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed[report.nodeid] = 1.0
        elif report.failed or report.skipped:
            self.passed[report.nodeid] = 0.0

    def write(self) -> None:
        """Write the passed tests with their seconds, and per module, function and line the indices of tests that ran it."""
        self.cov.stop()
        tests = [(name, round(seconds, 3)) for name, seconds in self.passed.items() if seconds]
        index = {name: number for number, (name, _) in enumerate(tests)}
        data, ran = self.cov.get_data(), {}
        for path in data.measured_files():
            source = Path(path).read_text(encoding="utf-8")
            functions, lines = _functions(source), source.splitlines()
            module = ran.setdefault(Path(path).relative_to(self.copy).as_posix(), {})
            for line, contexts in data.contexts_by_lineno(path).items():
                users = [self.users.get(context.removeprefix("fixture "), [context]) for context in contexts]
                if indices := {index[name] for names in users for name in names if name in index}:
                    of_function = module.setdefault(functions.get(line, ""), {})
                    text = lines[line - 1].strip()
                    of_function[text] = sorted(indices.union(of_function.get(text, ())))
        Path(self.out).write_text(json.dumps({"tests": tests, "ran": ran}))


def _functions(source: str) -> dict[int, str]:
    """Return the name of the function or class that each line of a source is in, from its first line on."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                found.update(dict.fromkeys(range(child.lineno, child.end_lineno + 1), name))
            visit(child, name)

    visit(ast.parse(source), "")
    return found


class Copies:
    """Copies of a project, in each of which one change at a time is tested."""

    def __init__(self, root: Path, folder: Path, count: int) -> None:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.split("\0")
        self.root, self.free = root, [folder / str(number) for number in range(count)]
        for copy in self.free:
            for name in filter(None, names):
                if (root / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(root / name, copy / name)

    def run(self, jobs: list[tuple]) -> Iterator[tuple[object, str]]:
        """Run jobs (key, change, test files, tests, output or None, limit in seconds) in forks; yield each key and outcome.

        A change is (path, source). The outcome is "passed", "failed", "timed out" or "no tests".
        """
        waiting, running = list(jobs), {}
        try:
            while waiting or running:
                while waiting and self.free:
                    key, change, files, names, out, limit = waiting.pop(0)
                    copy = self.free.pop()
                    original = (copy / change[0]).read_bytes() if change else b""
                    if change:
                        (copy / change[0]).write_text(change[1], encoding="utf-8")
                    arguments = (self.root, copy, files, names, out)
                    process = multiprocessing.get_context("fork").Process(target=_test, args=arguments)
                    process.start()
                    running[process.sentinel] = (process, key, change, original, copy, time.monotonic() + limit)
                wait(list(running), timeout=max(0.0, min(end for *_, end in running.values()) - time.monotonic()))
                for sentinel, (process, key, change, original, copy, end) in list(running.items()):
                    ended = not process.is_alive()
                    if ended or end < time.monotonic():
                        del running[sentinel]
                        _kill(process)
                        if change:
                            (copy / change[0]).write_bytes(original)
                        shutil.rmtree(copy / "tmp", ignore_errors=True)
                        self.free.append(copy)
                        outcome = {0: "passed", 5: "no tests"}.get(process.exitcode, "failed")
                        yield key, outcome if ended else "timed out"
        finally:
            for process, *_ in running.values():
                _kill(process)


def _kill(process: multiprocessing.Process) -> None:
    """Kill a fork and the processes that it has started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.join()


def _test(root: Path, copy: Path, files: list[str], names: list[str] | None, out: str | None) -> None:
    """Run tests in a copy, in this process; ends it with pytest's exit code."""
    (copy / "tmp").mkdir()
    with open(os.devnull if not os.environ.get("MUTANTS_LOG") else os.environ["MUTANTS_LOG"], "a") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.chdir(copy)
    tempfile.tempdir = None
    os.environ.update(TMPDIR=str(copy / "tmp"), PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests need no plugin, and loading them takes seconds
    sys.dont_write_bytecode = True  # a changed file may have the size and time of the one that was compiled
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() not in (root, PROJECT, copy))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "kitlib")]:
        del sys.modules[name]
    plugin = Plugin(copy, names, out)
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--basetemp={copy}/tmp/pytest"]
    code = pytest.main([*options, *(() if out else ("-x",)), *files], plugins=[plugin])
    if out:
        plugin.write()
    os._exit(code)


def changed_lines(root: Path, revision: str) -> dict[str, set[int]]:
    """Return the lines of each module of kitlib that have been changed since a revision of git, or are in a new file."""
    diff = ["git", "diff", "--unified=0", "--no-color", "--no-ext-diff", "--no-renames", revision, "--", "kitlib"]
    found: dict[str, set[int]] = {}
    for line in subprocess.run(diff, cwd=root, capture_output=True, check=True, text=True).stdout.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(path, set()).update(range(first, first + count))
    new = ["git", "ls-files", "--others", "--exclude-standard", "kitlib"]
    for path in subprocess.run(new, cwd=root, capture_output=True, check=True, text=True).stdout.splitlines():
        found[path] = set(range(1, (root / path).read_bytes().count(b"\n") + 2))
    return {path: lines for path, lines in found.items() if path.endswith(".py") and lines}


def choose(
    root: Path, modules: Iterable[str], count: int, seed: int, lines: dict[str, set[int]] | None
) -> dict[str, list[Mutation]]:
    """Return at most `count` random changes of each module that has any; with `lines`, only those that touch these lines."""
    chosen = {}
    for module in modules:
        found = mutations((root / module).read_text(encoding="utf-8"))
        if lines is not None:
            found = [m for m in found if lines[module] & set(range(m.line, m.last_line + 1))]
        found = random.Random(f"{seed} {module}").sample(found, min(count, len(found)))
        chosen[module] = sorted(found, key=lambda mutation: mutation.start)
    return {module: found for module, found in chosen.items() if found}


def main(arguments: list[str], root: Path = PROJECT, loaded: Iterable[str] = LOADED) -> int:
    """Run `make mutants`; return 0 if the noticed share reaches the bar, 1 if not, 2 if unchanged code fails its tests."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="files or folders of kitlib (default: all)")
    parser.add_argument("--changed", help="only lines changed since this revision of git")
    parser.add_argument("--count", type=int, default=12, help="changes per module (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of changes (default: 0)")
    parser.add_argument("--bar", type=float, default=0.9, help="share of changes that must be noticed (default: 0.9)")
    parser.add_argument("--processes", type=int, default=2, help="changes that are tested at once (default: 2)")
    options = parser.parse_args(arguments)
    lines = changed_lines(root, options.changed) if options.changed else None
    modules = sorted(path.relative_to(root).as_posix() for path in (root / "kitlib").rglob("*.py"))
    wanted = [name.rstrip("/") for name in options.modules or ["kitlib"]]
    if unknown := [name for name in wanted if not (root / name).exists()]:
        parser.error(f"{', '.join(unknown)} do not exist; name files or folders such as kitlib/fusion or kitlib/tables.py")
    modules = [module for module in modules if any(module == name or module.startswith(f"{name}/") for name in wanted)]
    modules = [module for module in modules if lines is None or module in lines]
    # conftest.py sets them before it imports anything, but the imports below come first.
    os.environ.update(OMP_NUM_THREADS="1", NUMBA_DISABLE_JIT="1", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")
    for name in loaded:
        importlib.import_module(name)
    gc.freeze()  # otherwise the first garbage collection of each fork would write to, and so copy, all loaded memory
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies, tests = Copies(root, Path(folder), options.processes), Tests(root)
        pristine = copies.free[0]  # unlike `root`, it is not edited meanwhile
        chosen = choose(pristine, modules, options.count, options.seed, lines)
        if not chosen:
            print("nothing to change")
            return 0
        tests.measure(chosen, copies.run)
        return _judge(pristine, chosen, tests, copies, options.bar)


def _judge(root: Path, chosen: dict[str, list[Mutation]], tests: Tests, copies: Copies, bar: float) -> int:
    seconds = {name: seconds for file in tests.files.values() for name, seconds in file["tests"]}

    def job(key: object, change: tuple[str, str] | None, names: list[str]) -> tuple:
        limit = 30 + 6 * sum(seconds[name] for name in names)  # generous, because machines are shared
        return key, change, list(dict.fromkeys(name.split("::")[0] for name in names)), names, None, limit

    needed, jobs, ran, survivors = set(), [], {}, []
    for module, found in chosen.items():
        source = (root / module).read_text(encoding="utf-8")
        for mutation in found:
            text = source.splitlines()[mutation.line - 1].strip()
            ran[module, mutation], names = tests.judging(module, mutation, text)
            needed |= {name.split("::")[0] for name in names}
            if names:
                jobs.append(job((module, mutation), (module, mutation.apply(source)), names))
            else:
                survivors.append((module, mutation))
    # Tests that fail anyway would notice everything.
    unchanged = [path for path in sorted(needed) if tests.files[path]["code"] != tests.code]
    checks = [job(path, None, [name for name, _ in tests.files[path]["tests"]]) for path in unchanged]
    bad = []
    for path, outcome in tqdm(copies.run(checks), "unchanged code", len(checks), disable=not checks):
        if outcome == "passed":
            tests.passed(path)
        else:
            bad.append(path)
    if bad:
        print(f"Tests of unchanged code fail or were renamed: {', '.join(bad)}. Mend them, or remove {tests.folder}.")
        return 2
    outcomes = {}
    for key, outcome in tqdm(copies.run(jobs), "changes", len(jobs)):
        outcomes[key] = outcome
        survivors += [key] if outcome in ("passed", "no tests") else []
    for module, mutation in sorted(survivors, key=lambda key: (key[0], key[1].start)):
        names = ran[module, mutation]
        print(f"{module}:{mutation.line}: {mutation.before}  ->  {mutation.after}")
        print(f"    {len(names)} tests ran it" if names else "    no test ran it", *names[:3], sep="\n        ")
    total = sum(map(len, chosen.values()))
    share, late = 1 - len(survivors) / total, sum(outcome == "timed out" for outcome in outcomes.values())
    noticed = total - len(survivors)
    print(f"{noticed} of {total} changes noticed ({share:.1%}), {late} of them because tests took too long; bar {bar:.0%}")
    return int(share < bar)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
