"""Speed and memory of the web page, without a browser: the first prediction, later ones, pictures, and many visits.

Part of `make bench`. Needs the runs of `make demo`, or others by --runs. Every upload is a new file, so that no prediction
comes from a cache.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import typer
from rich.console import Console
from rich.table import Table

from kitlib.leaderboard.listing import list_runs
from kitlib.page.opened_study import DecodedCopies
from kitlib.page.systems import find_systems
from kitlib.page.view import BOXES, HEAT, LUNGS, TRUTH, Viewer
from kitlib.page.warm_models import WarmModels

# Arguments of `main` for the tests, with which it takes a few seconds; the tests add their own runs.
SMALLEST = {"uploads": 1, "visits": 1}


def main(
    runs: Annotated[Path, typer.Option(exists=True)] = Path("runs/demo"),
    images: Annotated[Path, typer.Option(exists=True, help="folder with DICOM files, also in sub-folders")] = Path(
        "inputs/demo"
    ),
    uploads: Annotated[int, typer.Option(help="number of uploads, of which the median time is printed")] = 12,
    visits: Annotated[int, typer.Option(help="memory is measured after this many visits, and after twice as many")] = 100,
) -> None:
    files = sorted(images.rglob("*.dcm"))[:uploads]
    table = Table("", "models", "first prediction", "warm prediction", "of this, models", "per model", title="Seconds")
    with tempfile.TemporaryDirectory() as folder:
        copies, systems = DecodedCopies(Path(folder) / "copies"), find_systems(list_runs([runs]))
        new = (_renewed(file, Path(folder), number) for number in range(10**6) for file in files)
        for system in systems:
            viewer = Viewer([system], WarmModels(), copies, None, Path(folder))
            first, _ = _timed(lambda viewer=viewer, name=system.name: viewer.upload([next(new)], name))
            views = [_timed(lambda viewer=viewer, name=system.name: viewer.upload([next(new)], name)) for _ in files]
            warm = statistics.median(seconds for seconds, _ in views)
            of_models = statistics.median(view.answer.models.seconds.sum() for _, view in views)
            count = len(system.models)
            numbers = (f"{seconds:.3f}" for seconds in (first, warm, of_models, of_models / count))
            table.add_row(system.name, str(count), *numbers)
        Console().print(table)

        viewer = Viewer(systems, WarmModels(), copies, None, Path(folder))
        view = viewer.upload(files[:1], systems[0].name)
        for layers in ((BOXES, TRUTH), (BOXES, LUNGS), (BOXES, HEAT)):
            viewer.draw(view, view.study.images[0], 0.2, layers)
            times = [_timed(lambda layers=layers: viewer.draw(view, view.study.images[0], 0.2, layers))[0] for _ in files]
            print(f"a picture with {' and '.join(layers)}: {1000 * statistics.median(times):.0f} ms")

        used = []
        for _ in range(2):
            for _ in range(visits):
                viewer.files(viewer.upload([next(new)], systems[0].name))
            used.append(psutil.Process().memory_info().rss / 1e6)
        print(f"memory after {visits} visits {used[0]:.0f} MB, after {2 * visits} {used[1]:.0f} MB")
        copies.close()


def _timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _renewed(file: Path, folder: Path, number: int) -> Path:
    """Write a copy of `file` with the same pixels but other bytes (padding at the end), and return its path."""
    path = folder / f"{file.stem}-{number}.dcm"
    shutil.copyfile(file, path)
    with open(path, "ab") as opened:
        # (FFFC,FFFC) Data Set Trailing Padding, OB, 8 bytes, little endian: explicit and implicit readers skip it.
        opened.write(b"\xfc\xff\xfc\xffOB\0\0\x08\0\0\0" + number.to_bytes(8, "little"))
    return path


if __name__ == "__main__":
    typer.run(main)
