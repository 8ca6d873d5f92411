"""Build a Kaggle kernel from submissions/NAME.yaml, and rehearse it as Kaggle would run it."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from kitlib.bundle import BundleError
from kitlib.kernel import KernelError, build_kernel, folder_bytes
from kitlib.kernel_spec import SpecError, read_spec
from kitlib.rehearse import Rehearsal, RehearsalError, rehearse
from kitlib.stand_in import StandInError
from kitlib.wheels import WheelError, inference_pins, kaggle_wheels

console = Console()
EXPECTED = (SpecError, KernelError, WheelError, BundleError, StandInError, RehearsalError)


def main(
    submission: Annotated[Path, typer.Argument(help="submissions/NAME.yaml")],
    out: Annotated[Path, typer.Option(help="folder for kernel/, wheels/ and weights/")],
    rehearsed: Annotated[bool, typer.Option("--rehearse", help="run the built kernel offline, as Kaggle would")] = False,
    inputs: Annotated[Path | None, typer.Option(help="folder whose folders appear below /kaggle/input")] = None,
    truth: Annotated[Path | None, typer.Option(help="folder with the truth's two CSV files, to score the rehearsal")] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=1, help="seconds the rehearsal may take; else the submission's")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Kaggle user name; else KAGGLE_USERNAME, else the submission's")] = None,
) -> None:
    """Build OUT/kernel, OUT/wheels and OUT/weights; exit code 0 only if that, and the rehearsal if asked for, went well."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("papermill").setLevel(logging.WARNING)
    if rehearsed and inputs is None:
        raise typer.BadParameter("--rehearse needs --inputs DIR, the folder that holds the competition's folder")
    try:
        spec = read_spec(submission, owner)
        parts = build_kernel(spec, out, kaggle_wheels(inference_pins()))
        console.print(_sizes(parts))
        console.print(_how_to_push(parts), highlight=False, soft_wrap=True)
        if not rehearsed:
            return
        console.rule("rehearsal")
        result = rehearse(
            out,
            inputs,
            spec.time_limit_s if time_limit is None else time_limit,
            truth,
            on_line=lambda line: console.out(line, highlight=False),
        )
    except EXPECTED as error:
        console.print(f"[red]{type(error).__name__}[/red]", end=": ")
        console.out(str(error), highlight=False)
        raise typer.Exit(2) from error
    _tell(result)
    raise typer.Exit(0 if result.passed else 1)


def _sizes(parts: dict[str, Path]) -> Table:
    table = Table("file", "bytes", title=f"built in {parts['kernel'].parent}")
    table.columns[0].overflow, table.columns[1].justify = "fold", "right"
    for part, folder in parts.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                table.add_row(f"{part}/{path.relative_to(folder)}", f"{path.stat().st_size:,}")
        table.add_row(f"[bold]{part}[/bold]", f"[bold]{folder_bytes(folder):,}[/bold]", end_section=True)
    return table


def _how_to_push(parts: dict[str, Path]) -> str:
    return "\n".join(
        [
            "To push (datasets first; `version -m NOTE` in place of `create` from the second time on):",
            f"  kaggle datasets create -p {parts['wheels']}",
            # without -r the client leaves the bundles' folders out
            f"  kaggle datasets create -p {parts['weights']} -r zip",
            f"  kaggle kernels push -p {parts['kernel']}",
        ]
    )


def _tell(result: Rehearsal) -> None:
    table = Table("rehearsal", "", title="")
    table.add_row("notebook", result.problem or "ran to its end")
    table.add_row("time", f"{result.seconds:.1f} s of {result.limit_s:g} s" + ("" if result.in_time else ", stopped"))
    table.add_row("submission.csv", "valid" if not result.faults else f"{len(result.faults)} faults: {result.faults[0]}")
    table.add_row("isolation", result.not_isolated or "private mounts, processes and network")
    for name, value in (result.scores or {}).items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("output", str(result.working))
    table.add_row("log", str(result.log))
    console.print(table)
    for fault in result.faults[1:20]:
        console.out(f"  {fault}", highlight=False)
    console.print("[green]passed[/green]" if result.passed else "[red]not passed[/red]")


if __name__ == "__main__":
    typer.run(main)
