"""What all figures share: sheet, heads, rows, marks of cells that did not run, and the files they become.

Figures are made without pyplot, which keeps state and would want a screen.
"""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wanexp.report.cells import Cell
from wanexp.report.modes import style_of
from wanexp.tracking import describe
from wanexp.tracking.describe import plural

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "text.parse_math": False,  # a label is text, whatever is in it
    "svg.hashsalt": "wanexp",  # the same figure is the same file
}
WIDTH = 8.4  # inches
ROW_HEIGHT = 0.34
HEAD_INCHES, FOOT_INCHES = 0.85, 0.65
DPI = 110
MAX_ROWS = 40
MAX_COLUMNS = 5  # of a legend
MAX_EMPTY = 8.0  # a capacity so many times what is in use is not drawn: it would leave nothing to see
MAX_LABEL = 66  # characters
GREY = "#666666"
NOT_RUN = {"oom": "out of memory", "infeasible": "cannot fit (planned)"}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """A figure as files. name: of the files, without suffix. alt: what it shows, in words."""

    name: str
    title: str
    alt: str
    svg: bytes
    png: bytes


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws in our style, whatever that of the process is."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def sheet(
    title: str, subtitle: str, *, height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with its title and subtitle, and its panels row by row. height: of all panels, inches."""
    total = height + HEAD_INCHES + FOOT_INCHES
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    figure.text(0.012, 1 - 0.14 / total, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.40 / total, subtitle, fontsize=8.5, color=GREY, va="top")
    return figure, list(axes)


def finish(figure: Figure, name: str, alt: str) -> Drawn:
    """Lay the figure out and render both formats."""
    title, total = figure.texts[0].get_text(), figure.get_figheight()
    legends = [legend.get_window_extent().height / figure.dpi for legend in figure.legends]
    foot = max(legends, default=0.0) + 0.05  # inches
    figure.tight_layout(rect=(0, foot / total, 1, 1 - (HEAD_INCHES - 0.2) / total))
    files = []
    for form, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):  # nothing that changes
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
        files.append(buffer.getvalue())
    return Drawn(name, title, alt, *files)


def subtitle_of(cells: Sequence[Cell]) -> str:
    """`wan2.1_t2v_14b 480p, bf16 | NVIDIA H200 | n = 3 runs of 5 steps`."""
    ran = [cell for cell in cells if cell.runs]
    precisions = {str(p) for cell in ran if (p := describe.tags_of(cell.record).get("precision"))}
    parts = [", ".join([ran[0].setting, *sorted(precisions)])]
    hardware = sorted({hardware_of(cell) for cell in ran} - {""})
    parts += [" / ".join(hardware[:3])] if hardware else []
    runs = [len(cell.steps_ms) for cell in ran if cell.steps_ms]
    steps = [len(run) for cell in ran for run in cell.steps_ms]
    if steps:
        parts.append(
            f"n = {_range(runs)} {'run' if max(runs) == 1 else 'runs'} x "
            f"{_range(steps)} {'step' if max(steps) == 1 else 'steps'} a cell"
        )
    return "  |  ".join(parts)


def hardware_of(cell: Cell) -> str:
    """Names of the devices that a cell ran on."""
    names = sorted({name for _, name in describe.devices_of(cell.record) if name})
    return " + ".join(names)


def row_axes(axes: Axes, labels: Sequence[str], unit: str) -> None:
    """A row a cell, the first on top."""
    axes.set_yticks(range(len(labels)), [describe.cut(label, MAX_LABEL) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)


def row_note(axes: Axes, row: float, text: str) -> None:
    """Words at the left edge of a row which has no mark."""
    axes.text(
        0.008, row, text, transform=axes.get_yaxis_transform(), va="center", color="#B00020", style="italic"
    )


def legend_of_modes(place: Axes | Figure, modes: Sequence[str], *extra: Line2D, **options: Any) -> None:
    """Colour and marker of each mode, then `extra`; that of a figure in as many columns as fit."""
    handles = [
        Line2D([], [], color=style_of(m).colour, marker=style_of(m).marker, linestyle="", label=m)
        for m in dict.fromkeys(modes)
    ]
    for columns in (*range(MAX_COLUMNS, 1, -1), 1) if isinstance(place, Figure) else (1,):
        legend = place.legend(handles=[*handles, *extra], fontsize=8, ncols=columns, **options)
        if columns == 1 or legend.get_window_extent().width < place.bbox.width:
            break
        legend.remove()


def shown(cells: Sequence[Cell]) -> tuple[list[Cell], str]:
    """At most MAX_ROWS of `cells` that were not skipped, and a remark for the subtitle where some are left out."""
    kept = [cell for cell in cells if cell.outcome != "skipped"]
    if len(kept) <= MAX_ROWS:
        return kept, ""
    return kept[:MAX_ROWS], f"  |  first {MAX_ROWS} of {plural(len(kept), 'cell')}; the table has all"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
