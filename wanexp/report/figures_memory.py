"""Figures of memory: peak of each GPU, time against memory, memory over the phases of a run."""

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wanexp.report import answers
from wanexp.report.cells import Cell
from wanexp.report.drawing import (
    GREY,
    MAX_EMPTY,
    MAX_LABEL,
    NOT_RUN,
    ROW_HEIGHT,
    Drawn,
    finish,
    legend_of_modes,
    row_axes,
    row_note,
    sheet,
    shown,
    styled,
    subtitle_of,
)
from wanexp.report.modes import KIND_IN_WORDS, LATENCY, THROUGHPUT, style_of
from wanexp.tracking.describe import cut, mapping, number

CAPACITY_COLOUR = "#B00020"
MAX_PANELS, PANELS_A_ROW = 9, 3  # a panel for every mode
MAX_LABELS = 12  # of points; with more of them those on the front alone are named
SAME_SPOT = 0.025  # of the longest axis: points so near share a label
LETTER, LINE, AXES_POINTS = (
    0.014,
    0.045,
    240.0,
)  # size of a label as parts of the largest values; points a part
DEVICE_HEIGHT, GAP = 0.11, 0.12  # inches a bar, and between cells
PHASE_COLOURS = ("#F2F2F2", "#FFFFFF")


@styled
def peaks(cells: Sequence[Cell]) -> Drawn | None:
    """A row a cell with a bar for each device: weights dark, activations light, what NVML saw as a tick."""
    own, remark = shown([cell for cell in cells if cell.runs])
    measured = [cell for cell in own if cell.peak_gib is not None]
    if not measured:
        return None
    heights = [max(ROW_HEIGHT, DEVICE_HEIGHT * len(c.devices) * (c.peak_gib is not None) + GAP) for c in own]
    middles = [sum(heights[:row]) + height / 2 for row, height in enumerate(heights)]
    figure, (axes,) = sheet(
        "Peak memory of each " + ("logical CPU device" if measured[0].on_cpu else "GPU"),
        f"{subtitle_of(measured)}{remark}\none bar a device, in order; peaks over the timed steps",
        height=max(1.0, sum(heights)),
    )
    row_axes(axes, [cell.label for cell in own], "GiB")
    axes.set_yticks(middles, [cut(cell.label, MAX_LABEL) for cell in own])
    axes.set_ylim(sum(heights), 0)
    capacities = {cap for cell in own for device in cell.devices if (cap := cell.capacity_gib(device))}
    largest = 0.0
    for middle, height, cell in zip(middles, heights, own, strict=True):
        colour = style_of(cell.mode).colour
        if cell.peak_gib is None:
            _not_measured(axes, middle, cell)
            continue
        bar = (height - GAP) / len(cell.devices)
        for place, device in enumerate(cell.devices):
            y = middle + (place - (len(cell.devices) - 1) / 2) * bar
            peak = cell.metric(f"memory/{device}/peak_allocated_gib") or 0.0
            weights = cell.metric(f"memory/{device}/weights_gib") or 0.0
            used = cell.metric(f"memory/{device}/nvml_used_gib")
            axes.barh(y, peak, height=bar * 0.86, color=colour, alpha=0.45, linewidth=0)
            axes.barh(y, min(weights, peak), height=bar * 0.86, color=colour, linewidth=0)
            if used:
                axes.plot([used, used], [y - bar * 0.4, y + bar * 0.4], color="black", linewidth=1.1)
            largest = max(largest, peak, used or 0.0)
    drawn = {capacity for capacity in capacities if capacity <= MAX_EMPTY * largest}
    handles: list[Patch | Line2D] = [
        Patch(color=GREY, label="weights"),
        Patch(color=GREY, alpha=0.45, label="the rest of the peak (torch allocated)"),
    ]
    if any(cell.metric(f"memory/{d}/nvml_used_gib") for cell in measured for d in cell.devices):
        handles.append(Line2D([], [], color="black", label="in use, NVML"))
    for capacity in sorted(drawn):
        axes.axvline(capacity, color=CAPACITY_COLOUR, linewidth=1.4)
        largest = max(largest, capacity)
    if drawn:
        handles.append(Line2D([], [], color=CAPACITY_COLOUR, label="capacity"))
    for capacity in sorted(capacities - drawn):
        handles.append(Line2D([], [], linestyle="", label=f"capacity: {capacity:.0f} GiB, off the scale"))
    axes.set_xlim(0, 1.06 * largest)
    figure.legend(handles=handles, loc="lower left", ncols=4, fontsize=8)
    leanest = min(measured, key=lambda cell: cell.peak_gib or 0.0)
    least = f"{leanest.label} at {number(leanest.peak_gib or 0.0)} GiB"
    alt = f"Peak memory of each device; the least is {least} on the fullest"
    return finish(figure, "peaks", alt)


def _not_measured(axes: Axes, row: float, cell: Cell) -> None:
    """A hatched bar up to the capacity for a cell that did not fit; words for any other."""
    capacities = [cap for device in cell.devices if (cap := cell.capacity_gib(device))]
    if cell.outcome in NOT_RUN and capacities:
        axes.barh(
            row,
            min(capacities),
            height=ROW_HEIGHT - GAP,
            facecolor="none",
            edgecolor=style_of(cell.mode).colour,
            hatch="////",
        )
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(
            min(capacities) / 2, row, NOT_RUN[cell.outcome], ha="center", va="center", fontsize=8, bbox=box
        )
    else:
        row_note(axes, row, NOT_RUN.get(cell.outcome, cell.outcome))


@styled
def tradeoff(cells: Sequence[Cell], kind: str) -> Drawn | None:
    """Time against the peak of the fullest device, the Pareto front marked; what did not fit on the right edge."""
    own = [cell for cell in cells if cell.kind == kind and cell.runs]
    if kind == THROUGHPUT:
        own = [cell for cell in cells if cell.mode == "none" and cell.runs and cell not in own] + own
    placed = [cell for cell in own if cell.peak_gib is not None and cell.steps_ms]
    if len(placed) < 2:
        return None
    what = "step time" if kind == LATENCY else "time a sample"
    figure, (axes,) = sheet(
        f"{what.capitalize()} against memory, {KIND_IN_WORDS[kind]}",
        f"{subtitle_of(placed)}\nlower left is better; line: cells that no other beats in both",
        height=3.8,
    )
    front = answers.pareto(placed, kind)
    axes.step(
        [cell.peak_gib or 0.0 for cell in front],
        [cell.time_ms(kind) for cell in front],
        where="post",
        color=GREY,
        linewidth=1.2,
    )
    most = max(cell.time_ms(kind) for cell in placed)
    widest = max(cell.peak_gib or 0.0 for cell in placed)
    labelled = placed if len(placed) <= MAX_LABELS else front
    texts: dict[tuple[float, float], list[str]] = {}  # points on one spot have one label
    for cell in placed:
        style, on_front = style_of(cell.mode), cell in front
        axes.plot(
            cell.peak_gib or 0.0,
            cell.time_ms(kind),
            marker=style.marker,
            color=style.colour,
            markersize=9 if on_front else 6.5,
            markeredgecolor="black" if on_front else "none",
            alpha=1.0 if on_front else 0.7,
        )
        if cell in labelled:
            here = ((cell.peak_gib or 0.0) / widest, cell.time_ms(kind) / most)
            near = (s for s in texts if math.dist(s, here) < SAME_SPOT)
            spot = next(near, here)
            text = ", ".join(filter(None, (cell.devices_label, cell.layout or cell.mode, cell.options)))
            if text not in texts.setdefault(spot, []):
                texts[spot].append(text)
    taken: list[tuple[float, float, float]] = []  # left, right and middle of each label, as parts of the axes
    for (x_place, y_place), words in sorted(texts.items(), key=lambda item: item[0][1]):
        text = cut(words[0] + (f" and {len(words) - 1} more" if len(words) > 1 else ""), MAX_LABEL)
        left, right, height = x_place, x_place + LETTER * len(text), y_place
        while any(left < end and begin < right and abs(height - at) < LINE for begin, end, at in taken):
            height += LINE / 4
        taken.append((left, right, height))
        axes.annotate(
            text,
            (x_place * widest, y_place * most),
            xytext=(8, 3 + (height - y_place) * AXES_POINTS),
            textcoords="offset points",
            fontsize=7.5,
        )
    lost = [cell for cell in own if cell.outcome in NOT_RUN]
    for place, cell in enumerate(lost):
        axes.text(
            1.04,
            0.02 + 0.1 * place,
            f"x {cell.mode}, {cell.devices_label}:\n  {NOT_RUN[cell.outcome]}",
            transform=axes.transAxes,
            color=style_of(cell.mode).colour,
            fontsize=8,
        )
    axes.set_xlim(0, 1.35 * widest)
    axes.set_ylim(0, 1.12 * most)
    axes.set_xlabel("peak memory of the fullest device, GiB")
    axes.set_ylabel(f"{what}, ms")
    extra = Line2D(
        [], [], marker="o", linestyle="-", color=GREY, markeredgecolor="black", label="Pareto front"
    )
    modes = [cell.mode for cell in placed]
    legend_of_modes(axes, modes, extra, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    alt = f"{what} against memory; on the front: {', '.join(cell.label for cell in front)}"
    return finish(figure, f"tradeoff_{kind}", alt)


@styled
def over_time(cells: Sequence[Cell]) -> Drawn | None:
    """NVML's memory in use over a run, its phases shaded: one panel a mode, of its cell with the most devices."""
    chosen: dict[str, Cell] = {}
    for cell in cells:
        if cell.runs and any(cell.record.telemetry.values()):
            best = chosen.get(cell.mode)
            if best is None or (cell.is_finished, cell.num_devices) > (best.is_finished, best.num_devices):
                chosen[cell.mode] = cell
    own = list(chosen.values())[:MAX_PANELS]
    if not own:
        return None
    left_out = len(chosen) - len(own)
    remark = f"; {left_out} more modes are not shown" if left_out else ""
    rows = -(-len(own) // PANELS_A_ROW)
    used = max(
        (value for cell in own for series in cell.record.telemetry.values() for _, value in series), default=0
    )
    capacities = {cap for cell in own for device in cell.devices if (cap := cell.capacity_gib(device))}
    shows_capacity = bool(capacities) and max(capacities) <= MAX_EMPTY * used
    red = "red: capacity" if shows_capacity else "capacity off the scale" if capacities else ""
    shaded = "shaded: phases" if any(_phases(cell) for cell in own) else ""
    figure, grid = sheet(
        "Memory over time",
        f"{subtitle_of(own)}\n{'; '.join(filter(None, ('in use, NVML, one line a GPU', shaded, red)))}{remark}",
        height=2.0 * rows,
        rows=rows,
        columns=min(len(own), PANELS_A_ROW),
        sharey=True,
    )
    for axes, cell in zip(grid, own, strict=False):
        _memory_panel(axes, cell, shows_capacity=shows_capacity)
    for axes in grid[len(own) :]:
        axes.set_visible(False)
    for axes in grid[:: min(len(own), PANELS_A_ROW)]:
        axes.set_ylabel("GiB in use")
    grid[0].set_ylim(0, max(capacities) * 1.05 if shows_capacity else 2 * used or None)  # room for the phases
    alt = f"Memory in use over the run of {', '.join(cell.label for cell in own)}"
    return finish(figure, "memory_over_time", alt)


def _phases(cell: Cell) -> list[tuple[float, str]]:
    """When each phase of the run began, s since its start."""
    return sorted((float(s), str(p)) for p, s in mapping(cell.record.samples.get("phase_s")).items())


def _memory_panel(axes: Axes, cell: Cell, *, shows_capacity: bool) -> None:
    colour, end = style_of(cell.mode).colour, 0.0
    for name, series in sorted(cell.record.telemetry.items()):
        if series:
            seconds, values = zip(*series, strict=True)
            axes.plot(seconds, values, color=colour, linewidth=1.3, alpha=0.7, label=name.partition("/")[0])
            end = max(end, seconds[-1])
    for place, ((begin, phase), (until, _)) in enumerate(pairwise([*_phases(cell), (end, "")])):
        axes.axvspan(begin, until, color=PHASE_COLOURS[place % 2], zorder=0)
        if until - begin > 0.07 * end:
            middle, place_of = (begin + until) / 2, axes.get_xaxis_transform()
            axes.text(
                middle, 0.64, phase, transform=place_of, rotation=90, ha="center", va="center", fontsize=7
            )
    for capacity in {c for device in cell.devices if shows_capacity and (c := cell.capacity_gib(device))}:
        axes.axhline(capacity, color=CAPACITY_COLOUR, linewidth=1.2)
    axes.set_title(
        f"{cell.mode}, {cell.devices_label}" + ("" if cell.is_finished else f" ({cell.outcome})"), fontsize=8
    )
    axes.set_xlabel("s since the start", fontsize=8)
