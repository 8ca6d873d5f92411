"""Runs of a plan carried out without Snakemake: the code of its notebooks in quick kernels, the kit's commands in place."""

import json
from typing import Any

from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.parameters import check_parameters
from kitlib.plans.plan import PlannedRun
from tests.warm_processes import run_script


def carry_out(run: PlannedRun, **changes: Any) -> None:
    """Carry out one run, which must write its result; requires the fixture `quick_processes`.

    `changes` replaces parameters of its notebook, or leaves them at their default if the value is None. Papermill and
    Jupyter, which other tests use, would take as long as the smallest notebooks.
    """
    if run.notebook is None:
        finished = CliRunner().invoke(app, list(run.command[run.command.index("kitlib") + 1 :]))
        assert finished.exit_code == 0, finished.output
    else:
        parameters = {name: value for name, value in (run.parameters | changes).items() if value is not None}
        check_parameters(run.notebook, parameters)
        lines = ["from IPython.display import display"]
        for cell in json.loads(run.notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines.append("".join(cell["source"]))
                if "parameters" in cell["metadata"].get("tags", []):
                    lines += [f"{name} = {value!r}" for name, value in parameters.items()]
        script = run.folder.with_name(f"{run.name}.py")
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join(lines), encoding="utf-8")
        run_script(script)
    assert run.result.is_file(), run.name
