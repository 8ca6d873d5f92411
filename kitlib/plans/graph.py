"""Draw a plan as a graph: its steps in columns by dependency, coloured by the state of their runs."""

from matplotlib.figure import Figure

from kitlib.plans.plan import Plan

# A step takes the first of these states that any of its runs has.
COLOURS = {"changed": "#ffb38a", "resumes": "#ffe08a", "new": "#e6e6e6", "done": "#9fd8a0"}


def draw_plan(plan: Plan) -> Figure:
    """Return a figure of the plan's steps, with an arrow from each step to the steps that need it.

    If C needs B and B needs A, no arrow is drawn from A to C, even if C also reads results of A. A step is drawn one column
    to the right of the rightmost step that it needs.
    """
    states, runs = (
        plan.states(),
        {step: plan.runs_of_steps([step]) for step in {run.step: None for run in plan.planned.values()}},
    )
    needs = {
        step: {plan.planned[need].step for name in names for need in plan.planned[name].needs}
        for step, names in runs.items()
    }
    column_of: dict[str, int] = {}
    ancestors: dict[str, set[str]] = {}
    for step in runs:
        column_of[step] = 1 + max((column_of[need] for need in needs[step]), default=-1)
        ancestors[step] = needs[step].union(*(ancestors[need] for need in needs[step]))
    columns = [[step for step in runs if column_of[step] == column] for column in range(max(column_of.values()) + 1)]
    tallest = max(map(len, columns))
    figure = Figure(figsize=(2.1 * len(columns) + 1, 0.8 * tallest + 1), layout="constrained")
    axes = figure.subplots()
    # Every second column is shifted, so that long arrows do not cross the steps between their ends.
    position = {
        step: (column, (tallest - len(steps)) / 2 + row + column % 2 / 3)
        for column, steps in enumerate(columns)
        for row, step in enumerate(steps)
    }
    for step, names in runs.items():
        for need in needs[step] - set().union(*(ancestors[other] for other in needs[step])):
            arrow = {"arrowstyle": "->", "color": "grey", "shrinkA": 34, "shrinkB": 34}
            axes.annotate("", position[step], position[need], arrowprops=arrow, zorder=1)
        done = sum(states[name] == "done" for name in names)
        text = step if len(names) == 1 else f"{step}\n{done} of {len(names)} runs"
        state = min((states[name] for name in names), key=list(COLOURS).index)
        box = {"boxstyle": "round", "facecolor": COLOURS[state]}
        axes.text(*position[step], text, ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    for state, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=state, marker="s", s=80)
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(tallest - 0.2, -0.6), title=plan.path.stem)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    axes.axis("off")
    return figure
