"""kitlib's rooms are ordered, and a room imports only from rooms before it; ROOMS is the map of the library."""

import ast
import graphlib
from functools import cache
from pathlib import Path

from tests import PROJECT

KITLIB = PROJECT / "kitlib"
# Root modules ("") come first and import only one another; the command line comes last and may import everything.
ROOMS = (
    *("", "recipes", "xrays", "datasets", "scoring", "competitions", "phantoms", "lungs", "fusion", "models", "runs"),
    *("inference", "training", "reports", "kernels", "plans", "leaderboard", "page"),
)
COMMAND_LINE = "kitlib.__main__"


def room_of(module: str) -> str:
    """Return the room of "kitlib.room.file" or "kitlib.room"; "" for a root module."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (KITLIB / parts[-1]).is_dir() else ""


@cache
def imported(path: Path) -> frozenset[str]:
    """Return the modules of kitlib that a file imports anywhere, also in functions and for type checking."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("kitlib.")}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: use absolute imports, which name the room"
            for alias in node.names if (node.module or "").split(".")[0] == "kitlib" else ():
                inner = PROJECT / node.module.replace(".", "/") / alias.name
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                modules.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return frozenset(modules)


def files() -> dict[str, Path]:
    """Return the path of every file of kitlib by module name."""
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in sorted(KITLIB.rglob("*.py"))}


def test_every_folder_is_a_room_with_a_description():
    folders = {path.relative_to(KITLIB).as_posix() for path in KITLIB.rglob("*") if path.is_dir()}
    assert {folder for folder in folders if not folder.endswith("__pycache__")} == set(ROOMS[1:])
    for room in ROOMS[1:]:
        head = ast.parse((KITLIB / room / "__init__.py").read_text())
        assert len(ast.get_docstring(head).splitlines()) >= 3 and len(head.body) == 1, room


def test_a_room_imports_only_from_rooms_before_it():
    upward = [
        (module, name)
        for module, path in files().items()
        if module != COMMAND_LINE
        for name in imported(path)
        if ROOMS.index(room_of(name)) > ROOMS.index(room_of(module))
    ]
    assert upward == []


def test_files_have_no_circular_imports():
    graph = {module: imported(path) for module, path in files().items()}
    assert "kitlib.tables" in graph["kitlib.datasets.base"]  # imports are detected
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - {"notebooks"} <= set(ROOMS)
