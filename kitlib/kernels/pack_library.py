"""Pack the part of kitlib that a notebook imports into a compressed archive, which is embedded in the kernel."""

import ast
import base64
import io
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import kitlib
from kitlib.runs.record import DIGEST_FILE, kitlib_digest

ROOT = Path(kitlib.__file__).parent.parent


def find_needed_files(sources: Iterable[str]) -> list[str]:
    """Return the sorted paths of the kitlib files that these Python sources import, directly or indirectly.

    `sources` are source texts. Paths are relative to the project's root, such as "kitlib/tables.py". If a YAML file next to
    a needed module has the same name, it is included. Imports inside functions and under TYPE_CHECKING count too. Raises
    SyntaxError if a source is not Python, and ImportError if it imports a kitlib module that does not exist.
    """
    files: set[str] = set()
    waiting = [name for source in sources for name in _imported_names(source)]
    while waiting:
        path = _find_module_file(waiting.pop())
        if path not in files:
            files.add(path)
            waiting += _imported_names((ROOT / path).read_text(encoding="utf-8"))
    # Importing a module also imports its parent packages.
    packages = {f"{folder.as_posix()}/__init__.py" for path in files for folder in Path(path).parents if folder.name}
    data = {path.removesuffix(".py") + ".yaml" for path in files}
    return sorted(files | packages | {path for path in data if (ROOT / path).is_file()})


def pack_library(sources: Iterable[str], files: Mapping[str, bytes]) -> str:
    """Pack the kitlib files that `sources` import, then `files`, then a digest of kitlib; return a tar.bz2 as base64 text.

    `sources` are texts of Python code. `files` maps paths in the archive to the contents of further files. The result is
    always the same for the same arguments and the same kitlib code. The compression is bzip2, because zlib's output
    differs between implementations.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:bz2") as archive:
        for path in find_needed_files(sources):
            _add_file(archive, path, (ROOT / path).read_bytes())
        for path, content in files.items():
            _add_file(archive, path, content)
        _add_file(archive, f"kitlib/{DIGEST_FILE}", kitlib_digest().encode())
    return base64.b64encode(packed.getvalue()).decode("ascii")


def _add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without owner and at date 0, so that archives are reproducible
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@cache  # several kernels are often built from the same library
def _imported_names(source: str) -> tuple[str, ...]:
    """Return the kitlib names that a source imports: "module", or "module.name", where `name` may be a submodule."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "kitlib"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kitlib":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def _find_module_file(name: str) -> str:
    """Return the path, relative to the project's root, of the file of a module.

    `name` is the module's name or "module.attribute", where the part before the last dot is the module. Raises ImportError
    if no such module exists.
    """
    for module in (name, name.rpartition(".")[0]):
        for path in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
            if module and (ROOT / path).is_file():
                return path
    raise ImportError(f"kitlib has no module {name}")
