"""The part of kitlib that a notebook imports, as the compressed archive that its kernel carries."""

import ast
import base64
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import kitlib
from kitlib.runs.record import DIGEST_FILE, kitlib_digest

ROOT = Path(kitlib.__file__).parent.parent


def needed_files(sources: Iterable[str]) -> list[str]:
    """Files of kitlib that these sources of Python import, and what those import in turn: paths like "kitlib/tables.py".

    A module's data travel with it: the YAML file beside it that has its name. Imports count wherever they stand, in
    functions and for type checking alone, too. Raises SyntaxError for a source that is not Python, ImportError for a module
    that kitlib lacks.
    """
    found: set[str] = set()
    waiting = [name for source in sources for name in _imported(source)]
    while waiting:
        path = _file_of(waiting.pop())
        if path not in found:
            found.add(path)
            waiting += _imported((ROOT / path).read_text(encoding="utf-8"))
    # A module is imported through the packages around it.
    packages = {f"{folder.as_posix()}/__init__.py" for path in found for folder in Path(path).parents if folder.name}
    data = {path.removesuffix(".py") + ".yaml" for path in found}
    return sorted(found | packages | {path for path in data if (ROOT / path).is_file()})


def packed_library(sources: Iterable[str]) -> str:
    """The `needed_files` of these sources and the whole library's digest, as base64 of a tar.bz2.

    bzip2, because zlib's output differs between its implementations: the same library always gives the same archive.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:bz2", compresslevel=9) as archive:
        for path in needed_files(sources):
            _add(archive, path, (ROOT / path).read_bytes())
        _add(archive, f"kitlib/{DIGEST_FILE}", kitlib_digest().encode())
    return base64.b64encode(packed.getvalue()).decode("ascii")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of nobody, at the epoch, so that archives compare
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _imported(source: str) -> Iterator[str]:
    """Names of kitlib that a source imports: modules, or "module.name" for what may be either."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kitlib")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kitlib":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(name: str) -> str:
    """The file of a module, or of the module that has this name in it."""
    for module in (name, name.rpartition(".")[0]):
        for path in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
            if module and (ROOT / path).is_file():
                return path
    raise ImportError(f"kitlib has no module {name}")
