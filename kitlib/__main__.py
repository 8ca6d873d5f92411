"""The command line, `python -m kitlib COMMAND`: thin commands that import what they need, so that none waits for torch."""

import json
import logging
import math
from pathlib import Path
from typing import Annotated

import typer

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
    from kitlib.scoring import ScoringError, score_files
    from kitlib.submission import SubmissionError

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
    from kitlib import validate as validator
    from kitlib.submission import SubmissionError

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


@app.command()
def phantom(
    folder: Annotated[Path, typer.Option()],
    truth: Annotated[Path, typer.Option()],
    train_studies: int = 240,
    test_studies: int = 80,
    side: int = 320,
    seed: int = 0,
) -> None:
    """Write a phantom competition into FOLDER/siim-covid19-detection, its test set's truth into TRUTH. SIDE in pixels."""
    from kitlib.phantom_competition import write_competition

    sizes = {"train_studies": train_studies, "test_studies": test_studies, "side": side}
    try:
        typer.echo(str(write_competition(folder, truth, seed=seed, **sizes)))
    except (ValueError, FileExistsError) as error:
        _fail(error)


@app.command()
def demo() -> None:
    """From a phantom competition's DICOM files to a scored submission.csv, through every notebook and an offline kernel."""
    from rich.console import Console

    from kitlib.demo import DemoFailed, project_demo, run_demo
    from kitlib.run_notebook import NotebookFailed

    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        run_demo(project_demo(), Console())
    except (DemoFailed, NotebookFailed, FileExistsError) as error:
        _fail(error)


def _fail(error: Exception) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m kitlib")
