"""GPU memory that the training of each published recipe needs, computed without a GPU; fails if a T4 has too little.

python benchmarks/memory.py             all published recipes, for the table in docs/training.md
python benchmarks/memory.py --only vgg  those whose name contains "vgg"
"""

import sys

import typer

from kitlib.recipes.named import RECIPES
from kitlib.training.gpu_memory import T4_GIB, training_memory_gib

# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"only": "ensemble_vgg19"}


def row(name: str, gib: float) -> str:
    """Return the Markdown table row of the recipe `name`, whose training needs `gib` GiB."""
    recipe = RECIPES[name]
    return (
        f"| `{name}` | {recipe.image_size} | {recipe.batch_size} | {recipe.nominal_batch or recipe.batch_size} | {gib:.1f} |"
    )


def main(only: str = "") -> None:
    """Print the rows of the table."""
    too_large = []
    for name, recipe in RECIPES.items():
        if name.startswith("small_") or only not in name:
            continue
        needed = training_memory_gib(recipe)
        too_large += [name] * (needed > T4_GIB)
        print(row(name, needed), flush=True)
    if too_large:
        sys.exit(f"more than the {T4_GIB} GiB of a T4: {', '.join(too_large)}")


if __name__ == "__main__":
    typer.run(main)
