"""Compares detectors on images held out from all of them: AP with interval, and paired difference to the first run.

PYTHONPATH=. python benchmarks/real/compare.py --prepared runs/real/rsna runs/real/yolo_scratch runs/real/yolo_nih
"""

from pathlib import Path
from typing import Annotated

import typer

from kitlib.reports.competition import detection_draws, interval
from kitlib.runs.finished_run import read_prepared
from kitlib.tables import read_table


def main(
    runs: Annotated[list[Path], typer.Argument(help="run folders of notebook 40; the others are compared with the first")],
    prepared: Annotated[Path, typer.Option(help="the run of notebook 10 that they were trained on")],
    samples: int = 1000,
) -> None:
    tables = read_prepared(prepared)
    covered = [set(read_table("coverage", run / "tables" / "coverage.parquet").image_id) for run in runs]
    shared = set.intersection(*covered)
    first = None
    print("| run | AP at IoU 0.5 | difference to the first |\n|---|---|---|")
    for run in runs:
        detections, coverage = (read_table(name, run / "tables" / f"{name}.parquet") for name in ("detections", "coverage"))
        coverage = coverage[coverage.image_id.isin(shared)]
        draws = detection_draws(detections, coverage, tables["images"], tables["boxes"], samples)
        first = draws if first is None else first
        precision = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval(draws))
        difference = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**interval(draws - first)) if run != runs[0] else ""
        print(f"| {run.name} | {precision} | {difference} |")
    print(f"\n{len(shared)} images were held out by every run")


if __name__ == "__main__":
    typer.run(main)
