"""Build a Kaggle kernel from a YAML file, rehearse it as Kaggle would run it, push it, and submit its result."""

import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from kitlib.errors import KernelError, KitError
from kitlib.kernels.push import push
from kitlib.kernels.pushed import Pushed, is_pushed, read_pushed
from kitlib.kernels.rehearse import Rehearsal, rehearse
from kitlib.kernels.spec import KernelSpec, read_spec
from kitlib.kernels.submit import check_output, fetch_output, submit_version, wait_for_run, wait_for_score
from kitlib.kernels.wheels import inference_pins, kaggle_wheels

console = Console()


def main(
    kernel: Annotated[
        Path, typer.Argument(help="the kernel's YAML file, submissions/NAME.yaml or submissions/kernels/NAME.yaml")
    ],
    out: Annotated[Path, typer.Option(help="folder to write: kernel/, wheels/ and, for a submission, weights/")],
    should_rehearse: Annotated[
        bool, typer.Option("--rehearse", help="run the built kernel offline, as Kaggle would")
    ] = False,
    docker: Annotated[
        bool, typer.Option("--docker", help="rehearse with Docker in Kaggle's public image, not in a sandbox")
    ] = False,
    inputs: Annotated[Path | None, typer.Option(help="folder with one subfolder per input, named by its slug")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="ground truth of the test images (see docs/competitions.md), to score the rehearsal")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=1, help="seconds for the rehearsal; default: the kernel's limit")
    ] = None,
    allow_placeholders: Annotated[
        bool, typer.Option("--allow-placeholders", help="accept a result although models were dropped or failed")
    ] = False,
    owner: Annotated[
        str | None, typer.Option(help="Kaggle user name; default: $KAGGLE_USERNAME, else the owner in the YAML file")
    ] = None,
    should_push: Annotated[
        bool, typer.Option("--push", help="push the kernel and its datasets; needs an API token")
    ] = False,
    should_wait: Annotated[
        bool, typer.Option("--wait", help="wait for the pushed run; download and check a submission's file")
    ] = False,
    should_submit: Annotated[
        bool, typer.Option("--submit", help="wait for the pushed run, submit it, and wait for the score")
    ] = False,
    message: Annotated[str, typer.Option(help="description of the submission; the kernel's version is added")] = "",
    quick_save: Annotated[
        int,
        typer.Option(min=0, help="the saved version predicts only this many files, the scored rerun all files; 0: no limit"),
    ] = 0,
) -> None:
    """Build OUT/kernel, OUT/wheels and OUT/weights, then rehearse, push and submit them if requested.

    Without --push, the options --wait and --submit build nothing and use the version that was last pushed from OUT. If they
    are given with --push, an unchanged build is not pushed again, unless its run has failed. After an interruption, repeat
    the command: OUT/pushed.json records the steps that are done.

    Exit codes: 0 everything succeeded; 1 the rehearsal failed; 2 an error, which is printed; 3 the rehearsal's session ended
    before the training was finished. A kernel that does not pass its rehearsal is not pushed.
    """
    # A console without `file` would log into the redirected stdout, whose lines KaggleClient takes for Kaggle's complaints.
    handler = RichHandler(console=Console(file=sys.stdout), show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("papermill").setLevel(logging.WARNING)
    if should_rehearse and inputs is None:
        raise typer.BadParameter("--rehearse needs --inputs DIR, a folder with a subfolder for each of the kernel's inputs")
    follows = should_wait or should_submit
    builds = should_push or not follows
    if not builds and (should_rehearse or quick_save):
        raise typer.BadParameter("--rehearse and --quick-save need a build; add --push, or leave --wait and --submit out")
    if (message and not should_submit) or (docker and not should_rehearse):
        raise typer.BadParameter("--message needs --submit, and --docker needs --rehearse")
    try:
        spec = read_spec(kernel, owner)
        if should_submit and not spec.is_submission:
            raise KernelError(f"{spec.slug} makes no submission; leave --submit out")
        if quick_save and not spec.rules.is_notebook:
            raise KernelError(f"{spec.rules.name} takes a file with all predictions, not a notebook; leave --quick-save out")
        if quick_save:
            logging.warning(
                "quick save: the saved version predicts only %d files; the scored rerun predicts all", quick_save
            )
            spec = dataclasses.replace(spec, parameters=spec.parameters | {"quick_save": quick_save})
        parts: dict[str, Path] = {}
        if builds:
            from kitlib.kernels.build import build_kernel  # loads torch, which takes seconds

            parts = build_kernel(spec, out, kaggle_wheels(inference_pins()))
            console.print(_size_table(parts))
        was_pushed = should_push and follows and is_pushed(out)
        if should_rehearse and inputs and not was_pushed:
            _run_rehearsal(spec, out, inputs, truth, time_limit, allow_placeholders, docker)
        if should_push:
            console.rule("push")
            rules = spec.rules.name if spec.is_submission else ""
            pushed = read_pushed(out) if was_pushed else push(out, spec.fused_run(), rules=rules)
            _print_pushed(pushed, "pushed before" if was_pushed else "pushed")
        if follows:
            _follow(spec, out, should_submit, message, allow_placeholders)
        elif not should_push:
            console.print(_push_instructions(spec, parts), highlight=False, soft_wrap=True)
    except KitError as error:
        console.print(f"[red]{type(error).__name__}[/red]", end=": ")
        console.out(str(error), highlight=False)
        raise typer.Exit(2) from error


def _run_rehearsal(
    spec: KernelSpec,
    out: Path,
    inputs: Path,
    truth: Path | None,
    time_limit: float | None,
    allow_placeholders: bool,
    docker: bool,
) -> None:
    console.rule("rehearsal")
    limit = spec.time_limit_s if time_limit is None else time_limit
    result = rehearse(
        spec,
        out,
        inputs,
        limit,
        truth,
        on_line=lambda line: console.out(line, highlight=False),
        allow_placeholders=allow_placeholders,
        docker=docker,
    )
    _print_rehearsal(result)
    if not result.passed:
        raise typer.Exit(3 if result.unfinished else 1)


def _follow(spec: KernelSpec, out: Path, should_submit: bool, message: str, allow_placeholders: bool) -> None:
    """Wait for the run that was pushed from `out` and check a submission's file; then submit it, if requested."""
    console.rule("wait")
    if (pushed := read_pushed(out)).kernel != f"{spec.owner}/{spec.slug}":
        name = f"{spec.owner}/{spec.slug}"
        raise KernelError(f"{pushed.kernel} was pushed from {out}, not {name}; set --out to the folder of {name}")
    wait_for_run(out)
    if not spec.is_submission:
        return
    fetch_output(out)
    check_output(out, allow_placeholders)
    if should_submit:
        console.rule("submit")
        submit_version(out, message)
        pushed = wait_for_score(out)
        for name, score in (("public", pushed.public_score), ("private", pushed.private_score)):
            console.print(f"{name} score: {'not published' if score is None else f'{score:g}'}")


def _size_table(parts: dict[str, Path]) -> Table:
    table = Table("file", "bytes", title=f"built in {parts['kernel'].parent}")
    table.columns[0].overflow, table.columns[1].justify = "fold", "right"
    for part, folder in parts.items():
        sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        for path, size in sizes.items():
            table.add_row(f"{part}/{path.relative_to(folder)}", f"{size:,}")
        table.add_row(f"[bold]{part}[/bold]", f"[bold]{sum(sizes.values()):,}[/bold]", end_section=True)
    return table


def _push_instructions(spec: KernelSpec, parts: dict[str, Path]) -> str:
    submit = "; to submit its result too, --push --submit" if spec.is_submission else ""
    lines = [f"To push the kernel with its datasets, add --push{submit}."]
    if spec.owner == "your-kaggle-name":
        lines.insert(0, "Build it again with --owner and your Kaggle user name first; the YAML file has a placeholder.")
    if spec.kernel_sources:
        lines.append("These kernels must have run on Kaggle before: " + ", ".join(spec.sources(spec.kernel_sources)))
    lines.append("To push by hand (datasets first; `version -m NOTE` instead of `create` for an existing dataset):")
    quoted = {part: shlex.quote(str(folder)) for part, folder in parts.items()}
    # Without -r the client skips the bundles' folders.
    lines += [f"  kaggle datasets create -p {folder} -r zip" for part, folder in quoted.items() if part != "kernel"]
    return "\n".join([*lines, f"  kaggle kernels push -p {quoted['kernel']}"])


def _print_pushed(result: Pushed, title: str) -> None:
    table = Table(title, "", title="")
    for name, outcome in result.datasets.items():
        table.add_row(name, outcome)
    table.add_row(f"version {result.version}", result.url)
    console.print(table)


def _print_rehearsal(result: Rehearsal) -> None:
    table = Table("rehearsal", "", title="")
    table.add_row("notebook", result.problem or "ran to its end")
    table.add_row("time", f"{result.seconds:.1f} s of {result.limit_s:g} s" + ("" if result.in_time else ", stopped"))
    if result.unfinished:
        table.add_row(result.result, "unfinished: the session ended before the training; its checkpoint is kept")
    elif result.result:
        count = "1 fault" if len(result.faults) == 1 else f"{len(result.faults)} faults"
        table.add_row(result.result, f"{count}: {result.faults[0]}" if result.faults else "valid")
    table.add_row("isolation", result.not_isolated or "private mounts, processes and network")
    for name, value in (result.scores or {}).items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("output", str(result.working))
    table.add_row("log", str(result.log))
    console.print(table)
    for fault in result.faults[1:20]:
        console.out(f"  {fault}", highlight=False)
    verdict = "[yellow]unfinished[/yellow]" if result.unfinished else "[red]not passed[/red]"
    console.print("[green]passed[/green]" if result.passed else verdict)


if __name__ == "__main__":
    typer.run(main)
