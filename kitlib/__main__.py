"""The command line, `python -m kitlib COMMAND`: thin commands that import what they need, so that none waits for torch."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kitlib.errors import PlanError, ScoringError, SubmissionError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Folder = Annotated[Path, typer.Option(exists=True, file_okay=False)]
File = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
# A submission that is not there is what `validate` is to find, not a mistake in the call.
Submission = Annotated[Path, typer.Option()]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def score(truth: Folder, submission: Submission, as_json: Json = False) -> None:
    """Score SUBMISSION against train_study_level.csv and train_image_level.csv in TRUTH, as the competition does.

    With --json: the score, the six APs and opacity_boxed, null where the truth lacks a class.
    """
    from kitlib.scoring.score import score_files

    try:
        precision = score_files(truth, submission)
    except (ScoringError, SubmissionError) as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps({name: None if math.isnan(value) else value for name, value in precision.items()}))
        return
    for name, value in precision.items():
        typer.echo(f"{name:<14}{value:7.4f}")


@app.command()
def validate(sample: File, submission: Submission, as_json: Json = False) -> None:
    """Exit with 0 only if Kaggle would accept SUBMISSION for the ids of SAMPLE; otherwise name every fault and its row.

    With --json: valid, and faults as a list of row, id and problem.
    """
    from kitlib.scoring import validate as validator

    try:
        faults = validator.validate(sample, submission)
    except SubmissionError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps({"valid": not faults, "faults": [vars(fault) for fault in faults]}))
    else:
        for fault in faults:
            typer.echo(str(fault))
        typer.echo(f"{submission}: {f'{len(faults)} faults' if faults else 'valid'}")
    if faults:
        raise typer.Exit(1)


class Layout(StrEnum):
    SIIM = "siim"
    NIH = "nih"
    RSNA = "rsna"
    JSRT = "jsrt"
    MONTGOMERY = "montgomery"
    SHENZHEN = "shenzhen"
    DARWIN = "darwin"
    KERMANY = "kermany"
    COVID_CHESTXRAY = "covid_chestxray"


@app.command()
def phantom(
    folder: Annotated[Path, typer.Option()],
    layout: Annotated[Layout, typer.Option(help="Whose files they are.")] = Layout.SIIM,
    truth: Annotated[Path | None, typer.Option(help="siim: where the test set's labels go.")] = None,
    train_studies: Annotated[int | None, typer.Option(help="siim: 240 unless told.")] = None,
    test_studies: Annotated[int | None, typer.Option(help="siim: 80 unless told.")] = None,
    images: Annotated[int | None, typer.Option(help="All but siim: 400 unless told; jsrt: 24, of 8 MB each.")] = None,
    side: Annotated[int | None, typer.Option(help="Pixels, 320 unless told; jsrt: always 2048.")] = None,
    seed: int = 0,
) -> None:
    """Write phantoms into a folder of FOLDER.

    siim, nih and rsna make siim-covid19-detection, nih-chest-xrays and rsna-pneumonia-detection-challenge; the sets of lung
    masks and of diagnoses a folder of their own name.
    """
    given = {"truth": truth, "train_studies": train_studies, "test_studies": test_studies, "images": images, "side": side}
    sizes: dict[str, Any] = {"images": 24 if layout is Layout.JSRT else 400}
    if layout is Layout.SIIM:
        sizes = {"train_studies": 240, "test_studies": 80}
    if layout is not Layout.JSRT:
        sizes["side"] = 320
    for name in [name for name, value in given.items() if value is not None]:
        if name not in sizes and (name != "truth" or layout is not Layout.SIIM):
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no meaning with --layout {layout}")
        sizes[name] = given[name]
    if layout is Layout.SIIM and truth is None:
        raise typer.BadParameter("--layout siim wants --truth, a folder for the test set's labels")
    write: Callable[..., Path]
    try:
        if layout is Layout.SIIM:
            from kitlib.phantoms.siim import write_competition as write
        elif layout is Layout.NIH:
            from kitlib.phantoms.nih import write_nih as write
        elif layout is Layout.RSNA:
            from kitlib.phantoms.rsna import write_rsna as write
        elif layout in (Layout.KERMANY, Layout.COVID_CHESTXRAY):
            from kitlib.phantoms.diagnoses import write_diagnoses

            write = partial(write_diagnoses, layout=layout.value)
        else:
            from kitlib.phantoms.lungs import write_lungs

            write = partial(write_lungs, layout=layout.value)

        typer.echo(str(write(folder, **sizes, seed=seed)))
    except (ValueError, FileExistsError) as error:
        _fail(error)


class FileFormat(StrEnum):
    COCO = "coco"
    YOLO = "yolo"


Format = Annotated[FileFormat, typer.Option("--format")]


@app.command()
def export(
    run: Folder,
    file_format: Format,
    out: Annotated[Path, typer.Option()],
    images: Annotated[bool, typer.Option("--images", help="Also write every image as PNG, at its original size.")] = False,
) -> None:
    """Write the boxes of RUN, a run of notebook 10, as OUT/annotations.json (coco) or OUT/labels (yolo)."""
    from kitlib.runs.export import export_run

    try:
        for line in export_run(run, out, file_format, images):
            typer.echo(line, err=True)
    except (ValueError, FileExistsError) as error:
        _fail(error)
    typer.echo(str(out))


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Option(exists=True, help="coco: the JSON file. yolo: the folder with labels.")],
    file_format: Format,
    out: Annotated[Path, typer.Option()],
    run: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="The run that was exported.")] = None,
) -> None:
    """Write the boxes of SOURCE as OUT/boxes.parquet; of coco without RUN also its images and folds."""
    from kitlib.runs.export import import_tables

    try:
        for name, rows in import_tables(source, out, file_format, run).items():
            typer.echo(f"{out / name}.parquet: {rows} rows")
    except ValueError as error:
        _fail(error)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="Such as submissions/plans/demo.yaml.")],
    engine: Annotated[list[str] | None, typer.Argument(help="After --: arguments of Snakemake.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of one of its variables, in YAML.")] = None,
    runs: Annotated[Path | None, typer.Option(help="The folder of the runs' folders, instead of the plan's own.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A step; it and what it needs are done, nothing else.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Of this machine; all unless told.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Of this machine, the visible ones unless told; 0: all runs use the CPU.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that failed is tried again.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be done.")] = False,
    graph: Annotated[Path | None, typer.Option(help="Only draw the plan into this .png or .svg file.")] = None,
) -> None:
    """Do what is not done yet of PLAN: runs of notebooks and what they need, on this machine or a cluster."""
    import yaml
    from rich.console import Console

    from kitlib.atomic import replacing
    from kitlib.plans.engine import describe_plan, run_plan
    from kitlib.plans.graph import draw_plan
    from kitlib.plans.plan import read_plan

    logging.getLogger("papermill").setLevel(logging.WARNING)
    pairs = [change.partition("=") for change in changes or []]
    if not all(separator for _, separator, _ in pairs):
        raise typer.BadParameter("--set wants NAME=VALUE")
    try:
        read = read_plan(plan, runs, {name: yaml.safe_load(value) for name, _, value in pairs})
        if graph:
            with replacing(graph) as beside:
                draw_plan(read).savefig(beside, dpi=110)
        if dry_run:
            Console().print(describe_plan(read))
        if not (graph or dry_run):
            run_plan(read, Console(), only or (), cores, gpus, retries, engine or ())
    except PlanError as error:
        _fail(error)


@app.command(hidden=True)
def run_planned(described: Annotated[Path, typer.Argument(exists=True)], name: str) -> None:
    """One run of a plan, as the engine calls it."""
    from kitlib.plans.one_run import run_planned as work

    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        work(described, name)
    except PlanError as error:
        _fail(error)


@app.command()
def demo(
    whole: Annotated[
        bool, typer.Option("--whole", help="Pre-train and pseudo-label, too, on NIH's and RSNA's phantoms.")
    ] = False,
) -> None:
    """From a phantom competition's DICOM files to a scored submission.csv, through every notebook and an offline kernel."""
    from rich.console import Console

    from kitlib.errors import PlanError
    from kitlib.plans.demo import demo_plan, run_demo

    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        run_demo(demo_plan(whole), Console())
    except PlanError as error:
        _fail(error)


@app.command()
def page(
    runs: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="runs/demo, which `make demo` makes, unless told."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Only in a container is it another: 0.0.0.0, with the port published on 127.0.0.1.")
    ] = "127.0.0.1",
) -> None:
    """Serve a page on this computer that shows what the models of RUNS say of a chest X-ray. Not for diagnosis."""
    from kitlib.page.server import quiet_gradio

    try:
        typer.echo("Starting, which takes some ten seconds ...")
        with quiet_gradio() as folder:
            from kitlib.page.blocks import open_page

            open_page(runs, folder, port, host, lambda address: typer.echo(f"{address}  (Ctrl-C ends it)"))
        code = 0
    except (ImportError, OSError, ValueError) as error:
        _fail(error)
    except SystemExit as ended:  # SIGTERM's
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    # Python's own end would wait for a model that is at work in a thread, or stumble over it.
    sys.stdout.flush()
    os._exit(code)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m kitlib")
