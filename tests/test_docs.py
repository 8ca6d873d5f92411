"""The commands, links and tables in the README and in docs/ fit the project."""

import re
import shlex
from pathlib import Path

import papermill
import pytest
import typer
import yaml

from kitlib.__main__ import app
from kitlib.fusion.flannel import ENSEMBLES
from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.recipes.fields import TrainingRecipe
from kitlib.recipes.named import RECIPES, recipe
from kitlib.reports.published_tables import TABLES

ROOT = project_root()
OWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*OWN, ROOT / "inputs/README.md", ROOT / "benchmarks/README.md"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def split_page(page: Path) -> tuple[list[str], list[str]]:
    """Return the lines of `page` outside of code blocks, and its commands: lines of code, joined where one continues."""
    prose, code, inside = [], [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        else:
            (code if inside else prose).append(line)
    return prose, "\n".join(code).replace("\\\n", " ").splitlines()


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of `page`."""
    headings = [line.lstrip("# ") for line in split_page(page)[0] if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(split_page(page)[0]))
    for link in links:
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@by_page
def test_papermill_commands_name_notebooks_parameters_and_recipes(page):
    commands = [line.partition("papermill ")[2] for line in split_page(page)[1] if "papermill notebooks/" in line]
    for command in commands:
        notebook, _, *options = shlex.split(command, comments=True)
        known = papermill.inspect_notebook(str(ROOT / notebook))
        values = {}
        for option, *arguments in zip(options, options[1:], [*options[2:], ""], strict=False):
            if option == "-p":
                values[arguments[0]] = arguments[1]
            elif option == "-y":
                values |= yaml.safe_load(arguments[0])
        assert set(values) <= set(known), command
        if "recipe" in known:
            overrides = {name: value for name, value in values.get("overrides", {}).items() if name != "backbone"}
            recipe(values.get("recipe", known["recipe"]["default"].strip('"')), TrainingRecipe, **overrides)


@by_page
def test_commands_of_the_kit_exist_and_have_these_options(page):
    commands = typer.main.get_command(app).commands
    for line in split_page(page)[1]:
        if "python -m kitlib" in line:
            name, *arguments = shlex.split(line.partition("python -m kitlib")[2], comments=True)
            options = {option for parameter in commands[name].params for option in parameter.opts}
            ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
            assert {argument for argument in ours if argument.startswith("--")} <= options, line
            for argument in ours:
                assert not argument.startswith("submissions/") or (ROOT / argument).is_file(), line
        if "build_kernel.py" in line:
            assert (ROOT / shlex.split(line.partition("build_kernel.py")[2], comments=True)[0]).is_file(), line


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "documents").glob("*.md")), ids=lambda page: page.stem)
def test_the_documents_pages_name_existing_tests_steps_recipes_and_tables(page):
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), name
    (plan,) = set(re.findall(r"Plan `(\w+)`", text))
    steps = {run.step for run in read_plan(ROOT / "submissions" / "plans" / f"{plan}.yaml").planned.values()}
    named = re.findall(r"steps? ((?:`\w+`(?: \([^)]*\))?(?:, | and )?)+)", text)
    assert named and set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", " ".join(named)))) <= steps
    recipes = set(re.findall(r"`((?:heidelberg|flannel|patched|hrnet|ensemble)_\w+|\w+_lungs)`", text))
    known = {*RECIPES, *ENSEMBLES, *TABLES, *steps}
    assert {name for name in recipes if "NETWORK" not in name} <= known


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {line.split()[1] for page in PAGES for line in split_page(page)[1] if line.startswith("make ")}
    assert {"demo", "test", "page"} <= used <= targets


def test_every_recipe_is_in_the_table():
    """A pattern such as `flannel_NETWORK` or `small_*` stands for several recipes."""
    table = "\n".join(line for line in split_page(ROOT / "docs/training.md")[0] if line.startswith("|"))
    patterns = [re.sub("NETWORK|[*]", ".+", name) for name in re.findall(r"`([^`]+)`", table)]
    assert [name for name in RECIPES if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_prose_is_not_wider_than_a_terminal():
    wide = [
        f"{page.name}: {line}"
        for page in OWN
        for line in split_page(page)[0]
        if len(line) > 110 and not line.startswith(("|", "!["))
    ]
    assert wide == []
