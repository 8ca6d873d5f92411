"""The kit's command line, `python -m kitlib COMMAND`. Commands import only what they need: most start without torch."""

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

from kitlib.errors import KitError, PlanError, SettingsError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

CompetitionName = Annotated[str, typer.Option(help="The competition's name; docs/competitions.md lists them.")]
Folder = Annotated[Path, typer.Option(exists=True, file_okay=False)]
File = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
# Without exists=True, because `validate` reports a missing submission as a fault, not as a wrong option.
Submission = Annotated[Path, typer.Option(help="The submission.csv to read.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def main() -> None:
    """Configure logging for every command."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def score(
    truth: Annotated[Path, typer.Option(exists=True, help="The ground truth: the competition's file, or its folder.")],
    submission: Submission,
    competition: CompetitionName = "siim-covid19",
    as_json: Json = False,
) -> None:
    """Score SUBMISSION against TRUTH with the competition's metric; print the score and its parts.

    TRUTH has the format of the training data. For siim-covid19, it is the folder with train_study_level.csv and
    train_image_level.csv. The parts of that competition's score are the average precision of each class, and
    `opacity_boxed`, the average precision of opacity on only the images that have boxes. An undefined score, such as that of
    a class that occurs nowhere in TRUTH, is nan, or null with --json.
    """
    from kitlib.competitions.registry import find_competition

    try:
        scores = find_competition(competition).score_files(truth, submission)
    except KitError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps({name: None if math.isnan(value) else value for name, value in scores.items()}))
        return
    width = max(map(len, scores)) + 1
    for name, value in scores.items():
        typer.echo(f"{name:<{width}}{value:7.4f}")


LISTED_FAULTS = 20  # one mistake in the code that writes a submission often makes every row faulty


@app.command()
def validate(
    submission: Submission,
    sample: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The competition's sample submission.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(exists=True, help="A ground truth, as for `score`, whose ids are used instead of SAMPLE's."),
    ] = None,
    competition: CompetitionName = "siim-covid19",
    as_json: Json = False,
) -> None:
    """Check whether Kaggle would accept SUBMISSION for the ids of SAMPLE or TRUTH; print the first 20 faults.

    Exits with 0 only if there is no fault. With --json, prints an object: `valid` is true or false, and `faults` lists all
    faults, each with `row`, `id` and `problem`.
    """
    from kitlib.competitions.registry import find_competition

    if (sample is None) == (truth is None):
        raise typer.BadParameter("either --sample or --truth is required, but not both")
    try:
        faults = find_competition(competition).validate_file(submission, sample, truth)
    except KitError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps({"valid": not faults, "faults": [vars(fault) for fault in faults]}))
    else:
        for fault in faults[:LISTED_FAULTS]:
            typer.echo(str(fault))
        if len(faults) > LISTED_FAULTS:
            typer.echo(f"... and {len(faults) - LISTED_FAULTS} more, which --json lists")
        verdict = "valid" if not faults else "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        typer.echo(f"{submission}: {verdict}")
    if faults:
        raise typer.Exit(1)


class Layout(StrEnum):
    """Data sets whose file layout `phantom` can write."""

    SIIM = "siim"
    NIH = "nih"
    RSNA = "rsna"
    JSRT = "jsrt"
    MONTGOMERY = "montgomery"
    SHENZHEN = "shenzhen"
    DARWIN = "darwin"
    KERMANY = "kermany"
    COVID_CHESTXRAY = "covid_chestxray"
    COVIDX = "covidx"
    COVIDGR = "covidgr"
    RICORD = "ricord"
    BIMCV = "bimcv"
    CHEXPERT = "chexpert"


@app.command()
def phantom(
    folder: Annotated[Path, typer.Option(help="The data set is written into a new folder below this one.")],
    layout: Annotated[Layout, typer.Option(help="The data set whose files are imitated.")] = Layout.SIIM,
    competition: Annotated[
        str, typer.Option(help="Instead of --layout: a competition, such as vinbigdata, with training and test images.")
    ] = "",
    truth: Annotated[
        Path | None, typer.Option(help="siim and competitions only, required there: folder for the labels of the test set.")
    ] = None,
    train_studies: Annotated[
        int | None, typer.Option(help="siim only: number of studies to train on (default: 240).")
    ] = None,
    test_studies: Annotated[int | None, typer.Option(help="siim only: number of test studies (default: 80).")] = None,
    images: Annotated[
        int | None, typer.Option(help="All but siim: number of images (default: 400; jsrt: 24, of 8 MB each).")
    ] = None,
    test_images: Annotated[int | None, typer.Option(help="Competitions only: number of test images (default: 100).")] = None,
    side: Annotated[
        int | None, typer.Option(help="Side length of images, pixels (default: 320; jsrt: always 2048, siim-acr: 1024).")
    ] = None,
    seed: int = 0,
) -> None:
    """Write a data set of phantoms, that is, simulated X-rays, and print its folder.

    The folder of a competition has the competition's name on Kaggle. The folder for nih is nih-chest-xrays. The folder of a
    data set of lung masks or of diagnoses has the layout's name.
    """
    if competition and layout is not Layout.SIIM:
        raise typer.BadParameter("--competition and --layout cannot be used together; remove one")
    chosen = competition or str(layout)
    has_studies = chosen in ("siim", "siim-covid19")
    options: dict[str, Any] = {"truth": truth, "train_studies": train_studies, "test_studies": test_studies}
    options |= {"images": images, "test_images": test_images, "side": side}
    sizes: dict[str, Any] = {"images": 24 if chosen == "jsrt" else 400}
    if has_studies:
        sizes = {"train_studies": 240, "test_studies": 80}
    elif competition:
        sizes["test_images"] = 100
    if chosen not in ("jsrt", "siim-acr"):
        sizes["side"] = 320
    has_test = has_studies or bool(competition)
    for name in [name for name, value in options.items() if value is not None]:
        if name not in sizes and (name != "truth" or not has_test):
            raise typer.BadParameter(f"--{name.replace('_', '-')} cannot be used for {chosen}")
        sizes[name] = options[name]
    if has_test and truth is None:
        raise typer.BadParameter(f"{chosen} requires --truth, a folder for the labels of the test set")
    write: Callable[..., Path]
    try:
        if has_studies:
            from kitlib.phantoms.siim import write_competition as write
        elif competition or layout is Layout.RSNA:
            from kitlib.phantoms.challenges import write_challenge

            write = partial(write_challenge, name=competition or "rsna-pneumonia")
        elif layout is Layout.NIH:
            from kitlib.phantoms.nih import write_nih as write
        elif layout in (Layout.JSRT, Layout.MONTGOMERY, Layout.SHENZHEN, Layout.DARWIN):
            from kitlib.phantoms.lungs import write_lungs

            write = partial(write_lungs, layout=layout.value)
        else:
            from kitlib.phantoms.diagnoses import write_diagnoses

            write = partial(write_diagnoses, layout=layout.value)

        typer.echo(str(write(folder, **sizes, seed=seed)))
    except (ValueError, FileExistsError) as error:
        _fail(error)


class FileFormat(StrEnum):
    """Annotation formats of `export` and `import`."""

    COCO = "coco"
    YOLO = "yolo"


Format = Annotated[FileFormat, typer.Option("--format", help="Format of the annotation files.")]


@app.command()
def export(
    run: Folder,
    file_format: Format,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    images: Annotated[
        bool, typer.Option("--images", help="Also write every image to OUT/images as PNG, at its original size.")
    ] = False,
) -> None:
    """Write the boxes of RUN, a run of notebook 10, as OUT/annotations.json (coco) or OUT/labels (yolo), and print OUT.

    With --images, images that cannot be decoded are left out and listed on standard error.
    """
    from kitlib.runs.export import export_run

    try:
        for line in export_run(run, out, file_format, images):
            typer.echo(line, err=True)
    except (ValueError, FileExistsError) as error:
        _fail(error)
    typer.echo(str(out))


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Option(exists=True, help="coco: the JSON file. yolo: the folder that contains `labels`.")],
    file_format: Format,
    out: Annotated[Path, typer.Option(help="The folder to write the tables to.")],
    run: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="The run that was exported; required for yolo.")
    ] = None,
) -> None:
    """Write the boxes of SOURCE as OUT/boxes.parquet and print the number of rows.

    Without RUN, the images and any folds in a coco file are also written, as OUT/images.parquet and OUT/folds.parquet.
    """
    from kitlib.runs.export import import_tables

    try:
        for name, rows in import_tables(source, out, file_format, run).items():
            typer.echo(f"{out / name}.parquet: {rows} rows")
    except ValueError as error:
        _fail(error)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The plan's YAML file, such as submissions/plans/demo.yaml.")],
    engine: Annotated[list[str] | None, typer.Argument(help="Arguments for Snakemake, after --.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE sets a variable of the plan to a YAML value, NAME= to empty text; repeatable."
        ),
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Parent folder of the run folders (default: the plan's).")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Do only this step and the steps that it needs; repeatable.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Number of CPU cores to use (default: all).")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Number of GPUs to use (default: all visible ones); 0: all runs use the CPU.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Number of times that a failed run is repeated.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be done.")] = False,
    graph: Annotated[Path | None, typer.Option(help="Only draw the plan to this .png or .svg file.")] = None,
) -> None:
    """Execute the notebooks and commands of PLAN whose runs are not finished, on this machine or a cluster."""
    from rich.console import Console

    from kitlib.atomic import replacing
    from kitlib.plans.engine import describe_plan, run_plan
    from kitlib.plans.graph import draw_plan
    from kitlib.plans.inputs import check_inputs
    from kitlib.plans.plan import read_plan
    from kitlib.plans.scores import describe_scores
    from kitlib.plans.trainings import describe_trainings
    from kitlib.yaml_reader import parse_yaml

    logging.getLogger("papermill").setLevel(logging.WARNING)
    pairs = [change.partition("=") for change in changes or []]
    if not all(separator for _, separator, _ in pairs):
        raise typer.BadParameter("--set requires NAME=VALUE")
    try:
        variables = {name: parse_yaml(value, f"--set {name}") if value else "" for name, _, value in pairs}
        parsed_plan = read_plan(plan, runs, variables)
        if graph:
            with replacing(graph) as temporary_path:
                draw_plan(parsed_plan).savefig(temporary_path, dpi=110)
        if dry_run:
            Console().print(describe_plan(parsed_plan))
            names = parsed_plan.with_needs(only or ())
            Console().print(describe_trainings(parsed_plan, names), highlight=False)
            check_inputs(parsed_plan, names)
        if not (graph or dry_run):
            run_plan(parsed_plan, Console(), only or (), cores, gpus, retries, engine or ())
            if (scores := describe_scores(parsed_plan)).row_count:
                Console().print(scores)
    except (PlanError, SettingsError) as error:
        _fail(error)


@app.command(hidden=True)
def run_planned(runs_file: Annotated[Path, typer.Argument(exists=True)], name: str) -> None:
    """Execute the run NAME of a plan; Snakemake calls this command. RUNS_FILE is the `runs.json` that `run` writes."""
    from kitlib.plans.one_run import run_planned as work

    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        work(runs_file, name)
    except PlanError as error:
        _fail(error)


@app.command()
def convert_weights(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A pickled model, such as yolov5lu.pt.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Convert SOURCE, a pickled PyTorch model such as an ultralytics .pt file, to the .safetensors file TARGET.

    No code from SOURCE is run: a dummy replaces each Python class to which SOURCE refers. The names of the replaced classes
    are printed. A file that contains only a state dictionary needs no conversion.
    """
    from kitlib.errors import BundleError
    from kitlib.models.convert_weights import convert_weights as convert

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"{target} must end in .safetensors")
    try:
        names = convert(source, target)
    except BundleError as error:
        _fail(error)
    typer.echo(f"{target} has the tensors of {source}, which names {len(names)} classes: {', '.join(names)}")


@app.command()
def publish(
    runs: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="New folder for the bundles, the card and the metadata.")],
    title: Annotated[str, typer.Option(help="Title of the dataset, 6 to 50 characters; Kaggle derives the slug from it.")],
    owner: Annotated[str, typer.Option(envvar="KAGGLE_USERNAME", help="Kaggle user name.")],
    licence: Annotated[str, typer.Option(help="Kaggle's name of a licence, such as CC-BY-NC-SA-4.0.")] = "other",
    description: Annotated[str, typer.Option(help="The first paragraph of the card.")] = "",
    should_push: Annotated[
        bool, typer.Option("--push", help="Upload the dataset as private; requires an API token.")
    ] = False,
) -> None:
    """Write the models of RUNS and a data set card (README.md) as a Kaggle dataset; with --push, also upload the dataset.

    The card states the training data and the out-of-fold metrics of each model. Read the card before you make the dataset
    public: weights inherit the terms of the training data and of the starting weights.
    """
    from kitlib.errors import KitError
    from kitlib.kernels.publish import publish as upload
    from kitlib.kernels.publish import write_publication

    try:
        folder = write_publication(runs, out, title, owner, licence, description)
        typer.echo(f"{folder} has {len(runs)} runs; read {folder / 'README.md'}")
        if should_push:
            typer.echo(f"https://www.kaggle.com/datasets/{upload(folder)}")
    except KitError as error:
        _fail(error)


@app.command()
def kaggle_image(
    frozen: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="List that pip printed in a Kaggle session.")],
) -> None:
    """Rewrite kitlib/kernels/kaggle_image.txt, which lists the packages in Kaggle's Docker image, from FROZEN.

    Prints the differences from the old list, and the changes that requirements.txt needs. To make FROZEN, run
    `!pip list --format=freeze > /kaggle/working/freeze.txt` in a notebook on Kaggle and download freeze.txt.
    """
    from kitlib.errors import KernelError
    from kitlib.kernels.kaggle_image import IMAGE_LIST, list_changes, refresh_image

    try:
        differences, changes = refresh_image(frozen), list_changes()
    except KernelError as error:
        _fail(error)
    for difference in differences:
        typer.echo(str(difference))
    typer.echo(f"{IMAGE_LIST} is written: {len(differences)} differences")
    if changes:
        typer.echo("Change requirements.txt, and make .venv again:")
    for change in changes:
        typer.echo(f"  {change}")


@app.command()
def demo(
    whole: Annotated[
        bool, typer.Option("--whole", help="Also segment lungs, pre-train on phantoms of NIH and RSNA, and pseudo-label.")
    ] = False,
) -> None:
    """Run the demo, from the DICOM files of a phantom competition to a scored submission.csv.

    The demo runs the notebooks 10, 30, 40, 60 and 80, and rehearses notebook 70 as a Kaggle kernel without internet.
    """
    from rich.console import Console

    from kitlib.errors import PlanError
    from kitlib.plans.demo import demo_plan, run_demo

    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        run_demo(demo_plan(whole), Console())
    except PlanError as error:
        _fail(error)


@app.command()
def predict(
    files: Annotated[
        list[str], typer.Argument(help="Image files (DICOM, PNG, JPEG), folders of them, and tables (CSV) that list them.")
    ],
    runs: Annotated[
        str, typer.Option(help="The run whose models predict, such as runs/demo/fuse, or a folder with only one fusion.")
    ],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("predictions.csv"),
    pictures: Annotated[
        Path | None, typer.Option(file_okay=False, help="Also write each image with its boxes to this folder, as PNG.")
    ] = None,
    file_column: Annotated[str, typer.Option(help="The column with the file paths, if FILES includes tables.")] = "file",
    study_column: Annotated[str, typer.Option(help="The column with the study ids, in tables that have one.")] = "study_id",
    workers: Annotated[int, typer.Option(min=0, help="Number of decoding processes; 0: one per core.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict FILES with the trained models of a run; write one row per image to a CSV file. Not for diagnosis.

    A file that cannot be read also gets a row; its column `error` says why. Exits with 0 only if at least one file was
    predicted. With --json, prints an object: `rows` has the rows, `system` is the name of the run. See docs/predict.md.
    """
    from kitlib.atomic import replacing
    from kitlib.inference.listed_files import list_files
    from kitlib.inference.predict_files import predict_parts
    from kitlib.inference.systems import find_system

    answered, total, first_error = 0, 0, ""
    rows: list[dict[str, Any]] = []
    try:
        system, listed = find_system(runs), list_files(files, file_column, study_column, progress=not as_json)
        with replacing(out) as temporary_path:
            for table in predict_parts(listed, system, pictures, workers, progress=not as_json):
                table.to_csv(temporary_path, mode="a", header=not total, index=False)
                failed = table[table["error"] != ""]
                first_error = first_error or next((f"{row.file}: {row.error}" for row in failed.itertuples()), "")
                answered, total = answered + len(table) - len(failed), total + len(table)
                rows += json.loads(table.to_json(orient="records", double_precision=15)) if as_json else []
    except (KitError, OSError) as error:
        _fail(error)
    if as_json:
        rows = [{**row, **({"boxes": json.loads(row["boxes"] or "null")} if "boxes" in row else {})} for row in rows]
        typer.echo(json.dumps({"system": system.name, "predicted": answered, "files": total, "rows": rows}))
    else:
        more = f"; {total - answered} failed, the first: {first_error}" if answered < total else ""
        typer.echo(f"{out}: {answered} of {total} files predicted by {system.name}{more}")
    if not answered:
        raise typer.Exit(1)


@app.command()
def page(
    runs: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of trained runs (default: runs/demo, from `make demo`)."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any free port.")] = 7860,
    host: Annotated[
        str,
        typer.Option(
            help="Address to serve on. Change it only in a container: 0.0.0.0, with the port published on 127.0.0.1."
        ),
    ] = "127.0.0.1",
) -> None:
    """Serve a web page on this computer that shows the predictions of the models in RUNS for a chest X-ray.

    Not for diagnosis.
    """
    from kitlib.page.server import quiet_gradio

    try:
        typer.echo("Starting, which takes about ten seconds ...")
        with quiet_gradio() as folder:
            from kitlib.page.blocks import open_page

            open_page(runs, folder, port, host, lambda address: typer.echo(f"{address}  (press Ctrl-C to stop)"))
        code = 0
    except (ImportError, OSError, ValueError) as error:
        _fail(error)
    except SystemExit as stop:  # raised on SIGTERM
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    # Python's normal shutdown is skipped, because it would wait for or fail in a thread that is still predicting.
    sys.stdout.flush()
    os._exit(code)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m kitlib")
