"""Picture of the comparison: holds a second, and the CPU time behind each, as bars in a PNG."""

from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from benchmarks.parts.compare import Row
from benchmarks.support.run import Section

__all__ = ["draw"]

_INCHES: Final = (11.0, 4.2)
_DOTS_PER_INCH: Final = 110
_OURS: Final = "#1f6f5c"
_OTHERS: Final = "#a9b4b1"
_REDIS: Final = "#c96a3f"


def draw(section: Section, path: Path) -> None:
    """The picture of one comparison."""
    rows = cast("list[Row]", section.data)[::-1]
    # By name: the checks run without this extra, and must not miss its types.
    figure: Any = import_module("matplotlib.figure").Figure(
        figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained"
    )
    rate, cost = figure.subplots(1, 2, sharey=True)
    labels = [row.label for row in rows]
    bars = rate.barh(
        labels,
        [row.per_second for row in rows],
        color=[_OURS if row.name == "ours" else _OTHERS for row in rows],
    )
    rate.bar_label(bars, [f"{row.per_second:,.0f}" for row in rows], padding=3)
    rate.set_title("holds a second, median of the rounds", loc="left", fontsize=10)
    server = [row.server_us for row in rows]
    cost.barh(labels, server, color=_OTHERS, label="server")
    cost.barh(labels, [row.redis_us for row in rows], left=server, color=_REDIS, label="Redis")
    cost.set_title("CPU time of one hold, microseconds", loc="left", fontsize=10)
    cost.legend(frameon=False)
    for each in (rate, cost):
        each.spines[["top", "right"]].set_visible(False)
    rate.margins(x=0.15)
    figure.savefig(path)
