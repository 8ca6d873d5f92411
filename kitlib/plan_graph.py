"""A picture of a plan: its runs in columns by what they wait for, coloured by their state."""

from matplotlib.figure import Figure

from kitlib.plan import Plan

COLOURS = {"done": "#9fd8a0", "goes on": "#ffe08a", "changed": "#ffb38a", "new": "#e6e6e6"}


def plan_graph(plan: Plan) -> Figure:
    """Each run stands in the column after the last one that it needs."""
    column: dict[str, int] = {}
    for name, run in plan.planned.items():
        column[name] = 1 + max((column[need] for need in run.needs), default=-1)
    columns = [[name for name in plan.planned if column[name] == at] for at in range(max(column.values()) + 1)]
    tallest = max(map(len, columns))
    figure = Figure(figsize=(2.6 * len(columns) + 1, 0.55 * tallest + 1.2), layout="constrained")
    axes = figure.subplots()
    place = {
        name: (at, (tallest - len(names)) / 2 + row) for at, names in enumerate(columns) for row, name in enumerate(names)
    }
    states = plan.states()
    for name, run in plan.planned.items():
        for need in run.needs:
            axes.annotate(
                "", place[name], place[need], arrowprops={"arrowstyle": "->", "color": "grey", "shrinkA": 22, "shrinkB": 22}
            )
        axes.text(
            *place[name],
            name,
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round", "facecolor": COLOURS[states[name]]},
        )
    for state, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=state, marker="s", s=80)
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(tallest - 0.4, -0.6), title=plan.path.stem)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    axes.axis("off")
    return figure
