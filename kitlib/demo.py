"""The whole kit on a phantom competition: from DICOM files to a scored submission.csv, in minutes, on two CPU cores."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kitlib.atomic import replacing
from kitlib.classes import SCORED_CLASSES
from kitlib.paths import inputs_root, project_root, runs_root
from kitlib.phantom_competition import COMPETITION, write_competition
from kitlib.phantom_nih import NAME as NIH
from kitlib.phantom_nih import write_nih
from kitlib.phantom_rsna import SLUG as RSNA
from kitlib.phantom_rsna import write_rsna
from kitlib.run_notebook import run_notebook
from kitlib.scoring import score_files


class DemoFailed(RuntimeError):
    """The demo ended without a valid submission that clearly beats the all-negative floor."""


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does. The defaults are what two cores finish in four minutes."""

    train_studies: int = 180
    test_studies: int = 80
    side: int = 320  # of the phantoms, pixels
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the recipe small_<model>, by model
    whole: bool = False  # with the stages around them: NIH's and RSNA's phantoms, pre-training on them, pseudo-labels
    pretraining_images: int = 160  # of NIH's phantoms, and of RSNA's
    times_the_floor: float = 3.0  # a model that ignores its images stays near the floor; less than this is a failure


DETECTORS = ("yolo", "faster_rcnn")


@dataclass(frozen=True)
class Demo:
    """Where one demo lives: phantoms in `inputs`, their truth apart, stages below `runs`, the kernel by `submission`."""

    runs: Path
    inputs: Path
    truth: Path
    submission: Path  # a YAML file that names the runs below
    size: DemoSize = DemoSize()

    def stages(self) -> list[list[tuple[str, str, dict[str, Any]]]]:
        """(notebook, run, parameters) in their order; those of one inner list run side by side."""
        runs = [str(self.runs / name) for name in ("study", *DETECTORS)]
        prepare = [self._prepare("siim", "prepare", COMPETITION)]
        training = [
            self._training("30_train_study", "study", self._start("backbone")),
            self._training("40_train_detector", "yolo", self._start("rsna_yolo")),
            self._training("40_train_detector", "faster_rcnn"),
        ]
        fuse = {"prepare_run": str(self.runs / "prepare"), "runs": runs, "cross_fitted": False}
        if not self.size.whole:
            return [prepare, training, [("60_fuse", "fuse", fuse)]]
        prepare += [self._prepare("nih", "nih", NIH), self._prepare("rsna", "rsna", RSNA)]
        pretraining = [
            self._training("20_pretrain_backbone", "backbone", run="backbone", prepared="nih", folds=[0]),
            self._training("40_train_detector", "yolo", run="rsna_yolo", prepared="rsna", folds=[0]),
        ]
        # The student's fold is 0, which the models of fold 0 have not met either.
        pseudo = {"prepare_run": str(self.runs / "prepare"), "runs": runs, "folds": [0]}
        pseudo |= {"competition": str(self.inputs / COMPETITION)}
        pseudo |= {"extra_runs": [str(self.runs / "nih"), str(self.runs / "rsna")]}
        student = self._training("30_train_study", "study", run="student", folds=[0])
        student[2]["extra_run"] = str(self.runs / "pseudo")
        stages = [prepare, pretraining, training, [("50_pseudo_label", "pseudo", pseudo)], [student]]
        return [*stages, [("60_fuse", "fuse", fuse)]]

    def _prepare(self, dataset: str, run: str, folder: str) -> tuple[str, str, dict[str, Any]]:
        parameters = {"dataset": dataset, "competition": str(self.inputs / folder), "longest_side": self.size.side}
        return "10_prepare", run, {**parameters, "n_folds": 2}

    def _training(
        self,
        notebook: str,
        model: str,
        start: dict[str, Any] | None = None,
        run: str = "",
        prepared: str = "prepare",
        folds: Sequence[int] = (0, 1),
    ) -> tuple[str, str, dict[str, Any]]:
        parameters = {"prepare_run": str(self.runs / prepared), "folds": list(folds), "model_name": run or model}
        overrides = {**self.size.overrides.get(model, {}), **(start or {})}
        return notebook, run or model, {**parameters, "recipe": f"small_{model}", "overrides": overrides}

    def _start(self, run: str) -> dict[str, Any]:
        return {"starting_weights": str(self.runs / run / "fold0")} if self.size.whole else {}

    def report(self) -> list[tuple[str, str, dict[str, Any]]]:
        parameters = {"prepare_run": str(self.runs / "prepare"), "fuse_run": str(self.runs / "fuse")}
        parameters |= {"runs": [str(self.runs / name) for name in ("study", *DETECTORS)]}
        parameters |= {"submission": str(self.runs / "submission.csv"), "truth": str(self.truth)}
        return [("80_report", "report", {**parameters, "competition": str(self.inputs / COMPETITION)})]


def project_demo(whole: bool = False) -> Demo:
    """The demo of `make demo`; `whole` as in DemoSize."""
    inputs = inputs_root()
    submission = project_root() / "submissions" / "demo.yaml"
    return Demo(runs_root() / "demo", inputs / "demo", inputs / "demo-truth", submission, DemoSize(whole=whole))


def run_demo(demo: Demo, console: Console) -> dict[str, float]:
    """Make the phantom competition, train, fuse, build the kernel, rehearse it offline, score its submission, report.

    Leaves `submission.csv` in the demo's runs; returns its score and the parts. Raises DemoFailed, or whatever stopped a
    stage.
    """
    began = time.monotonic()
    # Runs of an earlier demo would be taken for this one's, finished or to be resumed.
    shutil.rmtree(demo.runs, ignore_errors=True)
    with _progress(console) as progress:
        bar = progress.add_task("phantom competition", total=1, cell="")
        sizes = {"train_studies": demo.size.train_studies, "test_studies": demo.size.test_studies, "side": demo.size.side}
        write_competition(demo.inputs, demo.truth, seed=2021, progress=False, **sizes)
        if demo.size.whole:
            for write in (write_nih, write_rsna):
                write(demo.inputs, images=demo.size.pretraining_images, side=demo.size.side, seed=2021, progress=False)
        progress.update(bar, completed=1)
        for stage in demo.stages():
            _run_side_by_side(demo.runs, stage, progress)
    console.rule("the kernel, built and rehearsed offline")
    _build_and_rehearse(demo)
    with _progress(console) as progress:
        _run_side_by_side(demo.runs, demo.report(), progress)
    return _judge(demo, console, time.monotonic() - began)


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.fields[cell]:>12}"), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _run_side_by_side(runs: Path, stage: list[tuple[str, str, dict[str, Any]]], progress: Progress) -> None:
    # All at once, with a thread each: small models gain little from a second thread, and the system shares the cores evenly.
    threads = 1 if len(stage) > 1 else None
    with ThreadPoolExecutor(len(stage)) as pool:
        waiting = [
            pool.submit(_run_stage, runs / run, progress, threads, notebook, parameters)
            for notebook, run, parameters in stage
        ]
        for done in waiting:
            done.result()


def _run_stage(run: Path, progress: Progress, threads: int | None, notebook: str, parameters: dict[str, Any]) -> None:
    bar = progress.add_task(f"{notebook} ({run.name})", total=None, cell="starts")

    def on_cell(started: int, total: int) -> None:
        progress.update(bar, total=total, completed=started - 1, cell=f"cell {started}/{total}")

    parameters = {"run_folder": str(run), **parameters}
    source = project_root() / "notebooks" / f"{notebook}.ipynb"
    run_notebook(source, run / "notebook.ipynb", parameters, run / "metrics.json", on_cell, threads)
    progress.update(bar, completed=progress.tasks[bar].total, cell="done")


def _build_and_rehearse(demo: Demo) -> None:
    out = demo.runs / "kernel"
    command = [sys.executable, str(project_root() / "build_kernel.py"), str(demo.submission), "--out", str(out)]
    command += ["--rehearse", "--inputs", str(demo.inputs), "--time-limit", "300"]
    if subprocess.run(command, cwd=project_root(), check=False).returncode:
        raise DemoFailed(f"the rehearsal failed; its log is {out / 'rehearsal.log'}")
    with replacing(demo.runs / "submission.csv") as beside:
        shutil.copyfile(out / "working" / "submission.csv", beside)


def _judge(demo: Demo, console: Console, seconds: float) -> dict[str, float]:
    submission, sample = demo.runs / "submission.csv", demo.inputs / COMPETITION / "sample_submission.csv"
    scores, floor = score_files(demo.truth, submission), score_files(demo.truth, sample)
    table = Table("", "submission", "all-negative floor", title=f"{submission}, after {seconds:.0f} s")
    for name in (*SCORED_CLASSES, "opacity_boxed", "score"):
        table.add_row(name, f"{scores[name]:.4f}", f"{floor[name]:.4f}")
    console.print(table)
    if not scores["score"] > demo.size.times_the_floor * floor["score"]:
        raise DemoFailed(f"score {scores['score']:.4f} does not clearly beat the floor {floor['score']:.4f}")
    return scores
