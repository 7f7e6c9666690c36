"""Figures of time: scaling over GPUs, times by mode, predicted against measured, energy and cost.

Each takes the cells of one setting and returns None where there is nothing to draw. Cells of one sample a step and
of samples side by side never share an axis of time.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from wanexp.measure.comparison import median_interval
from wanexp.report import answers
from wanexp.report.cells import Cell
from wanexp.report.drawing import (
    GREY,
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
from wanexp.tracking.describe import number, plural

WORDS = {  # kind -> title, y axis
    LATENCY: ("Speed-up over GPUs", "speed-up of a step"),
    THROUGHPUT: ("Throughput over GPUs", "throughput, times the baseline's"),
}
PREDICTION_BAND = 0.10
# Series of the scaling figure; with more the legend names modes alone, and the best of each has the line.
MAX_NAMED = 9
MAX_SPREAD = 0.14  # of the marks of one count, as part of the axis


@styled
def scaling(cells: Sequence[Cell], kind: str, wanted: str | None = None) -> Drawn | None:
    """Gain and efficiency against the number of devices, with the ideal line; cells out of memory at the bottom."""
    own = [cell for cell in cells if cell.kind == kind and cell.runs and cell.num_devices]
    verdicts = answers.verdicts(cells, wanted)
    judged = [verdicts[id(cell)] for cell in own if id(cell) in verdicts]
    beside = [found for found in judged if not found.comparison.says_nothing]
    if not beside:
        return None
    base = beside[0].base
    title, label = f"{WORDS[kind][0]}, {KIND_IN_WORDS[kind]}", WORDS[kind][1]
    noisy = len(judged) - len(beside)
    remark = f"; left out as too noisy: {plural(noisy, 'cell')}" if noisy else ""
    if not all(found.is_credible for found in beside):
        remark += f"; above {answers.CREDIBLE_EFFICIENCY:.0%} not credible"
    figure, (left, right) = sheet(
        title, f"{subtitle_of([*own, base])}\nbaseline: {base.label}{remark}", height=3.3, columns=2
    )
    counts = sorted({cell.num_devices for cell in own} | {base.num_devices})
    ideal = [count / base.num_devices for count in counts]
    left.plot(counts, ideal, "--", color=GREY, linewidth=1.2)
    right.axhline(100, linestyle="--", color=GREY, linewidth=1.2)
    series: dict[tuple[str, tuple[str, ...], str], list[tuple[int, float, float]]] = {}
    for found in sorted(beside, key=lambda found: not found.cell.degrees):  # those on one device have none
        cell = found.cell
        point = (cell.num_devices, answers.gain(found.base, cell), found.efficiency)
        own_key = (cell.mode, tuple(cell.degrees), cell.options)
        alike = [key for key in series if not cell.degrees and (key[0], key[2]) == (cell.mode, cell.options)]
        for key in alike or [own_key]:
            series.setdefault(key, []).append(point)
    handles = []
    is_crowded = len(series) > MAX_NAMED
    places = list(dict.fromkeys(key[0] if is_crowded else key for key in series))
    # So that no mark of one count hides another.
    dodge = min(0.022, MAX_SPREAD / len(places)) * (counts[-1] - counts[0])
    for (mode, degrees, options), points in series.items():
        style = style_of(mode)
        siblings = [key for key in series if key[0] == mode]
        if is_crowded:
            siblings.sort(key=lambda key: -max(gain for _, gain, _ in series[key]))
        is_first = siblings[0] == (mode, degrees, options)
        several = len({key[1] for key in siblings}) > 1
        look: dict[str, Any] = {
            "color": style.colour,
            "marker": style.marker,
            "markersize": 6,
            "alpha": 0.9,
            "markerfacecolor": style.colour if is_first else "white",
        }
        name = ", ".join(filter(None, (mode, " x ".join(degrees) if several else "", options)))
        handles.append(Line2D([], [], linestyle="", label=name, **look))
        place = places.index(mode if is_crowded else (mode, degrees, options))
        shift = dodge * (place - (len(places) - 1) / 2)
        fastest = {point[0]: point for point in sorted(points)}  # of several of one count
        line = sorted(({base.num_devices: (base.num_devices, 1.0, 1.0)} | fastest).values())
        for axes, field, scale in ((left, 1, 1), (right, 2, 100)):
            for shown_points, dash in ((points, ""), (line if is_first or not is_crowded else [], "-")):
                axes.plot(
                    [count + shift * (count != base.num_devices) for count, *_ in shown_points],
                    [scale * point[field] for point in shown_points],
                    **look | ({"marker": "", "linewidth": 1.0, "alpha": 0.5} if dash else {}),
                    linestyle=dash,
                )
    for axes, y_base in ((left, 1), (right, 100)):
        axes.plot(
            base.num_devices, y_base, marker=style_of(base.mode).marker, color=style_of(base.mode).colour
        )
    lost = [cell for cell in own if cell.outcome in NOT_RUN]
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xticks(counts)
        axes.set_xlabel("CPU devices" if base.on_cpu else "GPUs")
        for place, cell in enumerate(lost):
            x_place = cell.num_devices + 0.06 * (place - (len(lost) - 1) / 2)
            axes.plot(x_place, 0, marker="x", color=style_of(cell.mode).colour, markersize=9, clip_on=False)
    left.set_ylabel(label)
    right.set_ylabel("efficiency, % of ideal")
    extra = [Line2D([], [], linestyle="--", color=GREY, label="ideal")]
    if lost:
        extra.append(Line2D([], [], linestyle="", marker="x", color=GREY, label="out of memory"))
    modes = [base.mode, *(mode for mode, *_ in series), *(cell.mode for cell in lost)]
    if not is_crowded:
        named = {mode for mode, *_ in series}
        modes, extra = [mode for mode in modes if mode not in named], [*handles, *extra]
    legend_of_modes(figure, modes, *extra, loc="lower left")
    left.set_ylim(0, 1.03 * left.get_ylim()[1])
    right.set_ylim(0, max(108, right.get_ylim()[1]))
    best = max(beside, key=lambda found: answers.gain(found.base, found.cell))
    alt = f"{title}; the best is {best.cell.label} at {answers.gain(best.base, best.cell):.2f} times {best.base.label}"
    return finish(figure, f"scaling_{kind}", alt)


@styled
def times(cells: Sequence[Cell], kind: str) -> Drawn | None:
    """A row a cell: every step as a point, the median as a line, its interval as a bar."""
    if not any(cell.kind == kind and cell.interval for cell in cells):
        return None
    # Mode none is a base for throughput, too.
    chosen = [cell for cell in cells if cell.kind == kind or (kind == THROUGHPUT and cell.mode == "none")]
    intervals = {
        id(cell): median_interval(times)
        for cell in chosen
        if cell.is_finished and (times := cell.times_ms(kind))
    }
    chosen.sort(key=lambda c: intervals[id(c)].median if id(c) in intervals else float("inf"))
    own, remark = shown(chosen)
    timed = [cell for cell in own if id(cell) in intervals]
    bars = any(middle.low < middle.high for middle in intervals.values())
    title = f"{'Step time' if kind == LATENCY else 'Time a sample'}, {KIND_IN_WORDS[kind]}"
    figure, (axes,) = sheet(
        title,
        f"{subtitle_of(timed)}{remark}\npoints: steps; line and number: median"
        + ("; dark bar: its 95 % interval" if bars else "; too few steps for intervals"),
        height=max(1.2, ROW_HEIGHT * len(own)),
    )
    row_axes(
        axes, [cell.label for cell in own], "ms a step" if kind == LATENCY else "ms a sample (step / batch)"
    )
    longest = max(step for cell in timed for run in cell.times_ms(kind) for step in run)
    for row, cell in enumerate(own):
        if id(cell) not in intervals:
            row_note(axes, row, NOT_RUN.get(cell.outcome, cell.outcome))
            continue
        style, middle = style_of(cell.mode), intervals[id(cell)]
        axes.barh(row, middle.median, height=0.5, color=style.colour, alpha=0.15, linewidth=0)
        end = max(middle.high, *(step for run in cell.times_ms(kind) for step in run))
        axes.text(end + 0.015 * longest, row, number(middle.median, 4), va="center", fontsize=8)
        steps = [step for run in cell.times_ms(kind) for step in run]
        axes.barh(
            row,
            middle.high - middle.low,
            left=middle.low,
            height=0.5,
            color=style.colour,
            alpha=0.3,
            linewidth=0,
        )
        spread = [
            row + 0.32 * ((i * 0.618) % 1 - 0.5) for i in range(len(steps))
        ]  # so that none hides another
        axes.plot(
            steps, spread, linestyle="", marker=style.marker, markersize=3.6, color=style.colour, alpha=0.75
        )
        axes.plot([middle.median] * 2, [row - 0.34, row + 0.34], color=style.colour, linewidth=2.2)
    axes.set_xlim(0, 1.1 * max(longest, *(intervals[id(cell)].high for cell in timed)))
    alt = f"{title}: {', '.join(f'{c.label} {number(intervals[id(c)].median, 4)} ms' for c in timed[:5])}"
    return finish(figure, f"times_{kind}", alt)


@styled
def prediction(cells: Sequence[Cell]) -> Drawn | None:
    """The planner against the machine: peak memory, and step times of either kind of cell, each with +- 10 %."""
    panels: list[tuple[str, list[tuple[Cell, float, float]]]] = []
    finished = [cell for cell in cells if cell.is_finished]
    if peaks := _pairs(
        [cell for cell in finished if not cell.on_cpu],  # there the measured number is weights alone
        "plan/predicted_peak_gib",
        "memory/peak_allocated_gib",
    ):
        panels.append(("peak memory, GiB", peaks))
    for kind in (LATENCY, THROUGHPUT):
        own = [cell for cell in finished if cell.kind == kind]
        if pairs := _pairs(own, "plan/predicted_step_ms", "latency/step_ms"):
            panels.append((f"ms a step, {KIND_IN_WORDS[kind]}", pairs))
    if not panels:
        return None
    all_cells = [cell for _, pairs in panels for cell, _, _ in pairs]
    figure, grid = sheet(
        "Predicted against measured",
        f"{subtitle_of(all_cells)}\nline: as predicted; band: +- {PREDICTION_BAND:.0%}",
        height=3.0,
        columns=len(panels),
    )
    worst = 0.0
    for axes, (label, pairs) in zip(grid, panels, strict=True):
        top = 1.12 * max(max(predicted, measured) for _, predicted, measured in pairs)
        axes.plot([0, top], [0, top], color=GREY, linewidth=1)
        axes.fill_between(
            [0, top],
            [0, top * (1 - PREDICTION_BAND)],
            [0, top * (1 + PREDICTION_BAND)],
            color=GREY,
            alpha=0.13,
            linewidth=0,
        )
        for cell, predicted, measured in pairs:
            style = style_of(cell.mode)
            axes.plot(predicted, measured, marker=style.marker, color=style.colour, markersize=6, alpha=0.85)
            worst = max(worst, abs(predicted / measured - 1))
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted", ylabel="measured")
        axes.set_title(label, fontsize=8)
    legend_of_modes(figure, [cell.mode for cell in all_cells], loc="lower left")
    return finish(figure, "prediction", f"Predicted against measured; the largest error is {worst:.1%}")


@styled
def energy(cells: Sequence[Cell]) -> Drawn | None:
    """Energy of a video by cell, and its cost where the price of a GPU hour is known."""
    measured = [cell for cell in cells if cell.is_finished and answers.energy_wh(cell) is not None]
    own, remark = shown(sorted(measured, key=lambda cell: answers.energy_wh(cell) or 0.0))
    priced = [cell for cell in own if answers.cost_usd(cell) is not None]
    if not own:
        return None
    note = "GPUs alone; a video is all sampling steps, without text encoder and VAE"
    figure, grid = sheet(
        "Energy and cost of a video" if priced else "Energy of a video",
        f"{subtitle_of(own)}{remark}\n{note}",
        height=max(1.2, ROW_HEIGHT * len(own)),
        columns=2 if priced else 1,
        sharey=True,
    )
    row_axes(grid[0], [cell.label for cell in own], "Wh a video")
    _bars(grid[0], own, [answers.energy_wh(cell) for cell in own])
    if priced:
        prices = {float(cell.record.requested["hardware"]["usd_per_gpu_hour"]) for cell in priced}
        price = " / ".join(f"{value:g}" for value in sorted(prices))
        grid[1].set_xlabel(f"USD a video, at {price} USD a GPU hour")
        _bars(grid[1], own, [answers.cost_usd(cell) for cell in own])
    alt = f"Energy of a video; the least is {own[0].label} at {number(answers.energy_wh(own[0]) or 0.0)} Wh"
    return finish(figure, "energy", alt)


def _bars(axes: Axes, cells: Sequence[Cell], values: Sequence[float | None]) -> None:
    top = max(value for value in values if value is not None)
    for row, (cell, value) in enumerate(zip(cells, values, strict=True)):
        if value is not None:
            axes.barh(row, value, height=0.6, color=style_of(cell.mode).colour, alpha=0.85)
            axes.text(value + 0.01 * top, row, number(value), va="center", fontsize=8)
    axes.set_xlim(0, 1.14 * top)
    axes.grid(visible=False, axis="y")


def _pairs(cells: Sequence[Cell], predicted: str, measured: str) -> list[tuple[Cell, float, float]]:
    found = ((cell, cell.metric(predicted), cell.metric(measured)) for cell in cells)
    return [(cell, p, m) for cell, p, m in found if p and m]
