import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kitlib.errors import NotebookError
from kitlib.notebook import first_problem, run_notebook


def write_notebook(path, *cells, result="''"):
    parameters = new_code_cell(f"result = {result}", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(new_notebook(cells=[parameters, *map(new_code_cell, cells)], metadata={"kernelspec": kernel}), path)


EPOCHS = "print('no epoch'); print('study fold 0: epoch 1 of 2, loss 0.500')"
WRITE = "import pathlib; pathlib.Path(result).write_text('done')"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "cell 3 raised ZeroDivisionError"),
        ("import sys; sys.exit(0)", "cell 3 raised SystemExit: 0"),
        ("import os; os.kill(os.getpid(), 9)", "papermill's exit code is 138|cell 3"),
        ("result = '/dev/null'", "it ended without writing"),
    ],
)
def test_a_run_that_only_looks_finished_is_an_error(tmp_path, cell, message):
    write_notebook(tmp_path / "n.ipynb", cell, WRITE)
    with pytest.raises(NotebookError, match=message):
        run_notebook(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {"result": str(tmp_path / "r")}, tmp_path / "r")


def test_a_run_reports_its_cells_and_keeps_the_types_of_its_parameters(tmp_path):
    sources = "assert result['fold'] == '007'", "result = result['path']", EPOCHS, WRITE
    write_notebook(tmp_path / "n.ipynb", *sources, result={})
    cells, epochs = [], []
    parameters = {"result": {"fold": "007", "path": str(tmp_path / "r")}}
    callbacks = {"on_cell": lambda *cell: cells.append(cell), "on_epoch": epochs.append}
    run_notebook(tmp_path / "n.ipynb", tmp_path / "out.ipynb", parameters, tmp_path / "r", **callbacks)
    assert (tmp_path / "r").read_text() == "done"
    assert cells == [(number, 6) for number in range(1, 7)]
    assert epochs == ["study fold 0: epoch 1 of 2, loss 0.500"]


def test_a_run_ends_with_any_output_and_if_its_callback_fails(tmp_path):
    # More output than a pipe can buffer, not from Python, and not valid UTF-8.
    output = "import os, pathlib\nerr = os.open(f'/proc/{os.getppid()}/fd/2', os.O_WRONLY)\n"
    output += "os.write(err, b'\\xff\\n')\nos.write(err, b'y\\n' * 150_000)"
    write_notebook(tmp_path / "n.ipynb", output, WRITE)

    def fail(*_):
        raise OSError("no space left")

    run_notebook(
        tmp_path / "n.ipynb", tmp_path / "out.ipynb", {"result": str(tmp_path / "r")}, tmp_path / "r", fail, time_limit_s=60
    )
    assert (tmp_path / "r").read_text() == "done"
    log = (tmp_path / "out.log").read_text()
    assert "\ufffd\n" in log and "Executing Cell 3" in log


@pytest.mark.parametrize(
    ("statuses", "problem"),
    [
        (["completed", "completed"], ""),
        (["completed", "pending"], "cell 3 did not complete (status: pending)"),
        (["running", "pending"], "cell 2 did not complete (status: running)"),
        ([None, None], "cell 2 did not complete (status: None)"),
    ],
)
def test_every_code_cell_must_have_completed(tmp_path, statuses, problem):
    """Papermill executes no text, and it inserts a cell of its own above one that failed."""
    inserted = new_markdown_cell("An error is below.", metadata={"tags": ["papermill-error-cell-tag"]})
    cells = [new_markdown_cell("# Title", metadata={"papermill": {"status": "pending"}}), inserted]
    cells += [new_code_cell("1", metadata={"papermill": {"status": status}} if status else {}) for status in statuses]
    nbformat.write(new_notebook(cells=cells), tmp_path / "out.ipynb")
    assert first_problem(tmp_path / "out.ipynb") == problem


def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path):
    write_notebook(tmp_path / "n.ipynb", WRITE)
    with pytest.raises(ValueError, match=r"n\.ipynb has no parameter 'epoch'; it has: result"):
        run_notebook(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {"epoch": 1}, tmp_path / "r")
    assert not (tmp_path / "out.ipynb").exists()


def test_a_kernel_that_dies_at_its_start_is_started_once_more(tmp_path):
    """A papermill of the test's: its first `deaths` calls end as if two kernels had chosen one port."""
    program = """
import pathlib, sys
calls = pathlib.Path(__file__).with_name("calls")
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
if len(calls.read_text()) <= DEATHS:
    sys.exit("RuntimeError: Kernel died before replying to kernel_info")
pathlib.Path(sys.argv[2]).write_text('{"cells": []}')
pathlib.Path(RESULT).write_text("done")
"""
    for deaths in (1, 2):
        folder, result = tmp_path / str(deaths), tmp_path / f"result{deaths}"
        (folder / "papermill").mkdir(parents=True)
        (folder / "papermill" / "__init__.py").touch()
        script = program.replace("DEATHS", str(deaths)).replace("RESULT", repr(str(result)))
        (folder / "papermill" / "__main__.py").write_text(script)
        write_notebook(folder / "n.ipynb", WRITE)
        arguments = folder / "n.ipynb", folder / "out.ipynb", {"result": str(result)}, result
        if deaths == 1:
            run_notebook(*arguments, variables={"PYTHONPATH": str(folder)})
            assert result.read_text() == "done"
        else:
            with pytest.raises(NotebookError, match="papermill wrote no notebook"):
                run_notebook(*arguments, variables={"PYTHONPATH": str(folder)})
        assert len((folder / "papermill" / "calls").read_text()) == 2
