"""What a sweep says: baseline, verdicts, the best cells, energy and cost, what changed since an older sweep. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from wanexp.errors import UserError
from wanexp.measure.comparison import MIN_SAMPLES, SAME_MARGIN, Comparison, compare, compare_all
from wanexp.report.cells import Cell, Sweep
from wanexp.report.collect import settings_of
from wanexp.report.modes import LATENCY, THROUGHPUT
from wanexp.tracking import describe
from wanexp.tracking.describe import gibibytes, milliseconds, number

CREDIBLE_EFFICIENCY = 1.10  # above it there is noise, or a base that did other work
MAX_NEAREST = 50  # cells of a sweep, of which each is held against each of another


@dataclass(frozen=True)
class Change:
    """A cell of the new sweep beside the same of the old one. comparison: None where one of them has no times."""

    cell: Cell
    before: Cell
    comparison: Comparison | None

    @property
    def is_regression(self) -> bool:
        """Slower, or no longer finished."""
        lost = self.before.is_finished and self.cell.outcome not in ("finished", "waiting", "skipped")
        return lost or (self.comparison is not None and self.comparison.verdict == "slower")


def check_baseline(cells: Sequence[Cell], wanted: str) -> None:
    """Raise UserError where no cell is called so."""
    labels = sorted({cell.label for cell in cells} | {cell.mode for cell in cells})
    if wanted not in labels:
        raise UserError(f"no cell is called '{wanted}'; write --baseline with one of: {'; '.join(labels)}")


def baseline_of(cell: Cell, cells: Sequence[Cell], wanted: str | None = None) -> Cell | None:
    """What `cell` is compared with, among `cells` of its setting that finished; None where nothing will do.

    Mode none with the same options, else mode none, else the cell with the fewest devices, and fewer than its own
    (where one device is too small for the model). wanted: a label or mode instead of these. No step of one
    sample is compared with a step of several.
    """
    finished = [other for other in cells if other.is_finished and other.steps_ms]
    if cell.kind == LATENCY:
        finished = [other for other in finished if other.kind == LATENCY]
    if wanted is not None:
        return next((other for other in finished if wanted in (other.label, other.mode)), None)
    alone = [other for other in finished if other.mode == "none"]
    alike = [other for other in alone if other.options == cell.options]
    if alike or alone:
        return (alike or alone)[0]
    smaller = [other for other in finished if other.num_devices < cell.num_devices]
    return min(smaller, key=lambda o: (o.options != cell.options, o.num_devices), default=None)


@dataclass(frozen=True)
class Against:
    """A cell's verdict against its baseline."""

    base: Cell
    cell: Cell
    comparison: Comparison

    @property
    def efficiency(self) -> float:
        """The gain over the ratio of devices: 1 is ideal."""
        return gain(self.base, self.cell) * max(1, self.base.num_devices) / max(1, self.cell.num_devices)

    @property
    def is_credible(self) -> bool:
        return self.efficiency <= CREDIBLE_EFFICIENCY

    def __str__(self) -> str:
        """`1.88x none, 1 GPU (2 steps each)`, or that there is too much noise for a ratio."""
        if self.comparison.says_nothing:
            return f"no ratio to {self.base.label}: noise allows anything"
        text = f"{gain(self.base, self.cell):.2f}x {self.base.label}"
        if self.comparison.low is None:
            counts = [sum(map(len, side.steps_ms)) for side in (self.cell, self.base)]
            each = f"{describe.plural(counts[0], 'step')} each"
            text += f" ({each if counts[0] == counts[1] else '{} and {} steps'.format(*counts)})"
        return text if self.is_credible else f"{text} (not credible: efficiency {self.efficiency:.0%})"


def verdicts(cells: Sequence[Cell], wanted: str | None = None) -> dict[int, Against]:
    """By id of each finished cell the verdict against its baseline; none for a baseline itself."""
    pairs = [
        (base, cell)
        for cell in cells
        if cell.is_finished and cell.steps_ms and (base := baseline_of(cell, cells, wanted))
    ]
    pairs = [(base, cell) for base, cell in pairs if base is not cell]
    return {
        id(cell): Against(
            base, cell, compare(base.times_ms(cell.kind), cell.times_ms(cell.kind), comparisons=len(pairs))
        )
        for base, cell in pairs
    }


def no_base(wanted: str | None = None) -> str:
    """Why a cell of one sample a step is compared with nothing."""
    if wanted is None:
        return "no run of mode none finished"
    return f"no run of {wanted} finished, or it makes several samples a step"


def gain(base: Cell, cell: Cell) -> float:
    """Speed-up of one sample a step, throughput ratio of samples side by side."""
    return base.time_ms(cell.kind) / cell.time_ms(cell.kind)


def energy_wh(cell: Cell) -> float | None:
    """Of one video, all GPUs together; None without telemetry, and for training."""
    return describe.wh_per_video(cell.record, cell.metric("energy/joules_per_step"))


def cost_usd(cell: Cell) -> float | None:
    """Of one video: GPU hours times `hardware.usd_per_gpu_hour`; None where there is no price."""
    price = describe.mapping(cell.record.requested.get("hardware")).get("usd_per_gpu_hour")
    if not price or cell.on_cpu or not cell.videos_per_hour:
        return None
    return float(price) * cell.num_devices / cell.videos_per_hour


def pareto(cells: Sequence[Cell], kind: str) -> list[Cell]:
    """Cells that no other beats in both time and peak memory, least memory first. All must have both."""
    front: list[Cell] = []
    for cell in sorted(cells, key=lambda c: (c.peak_gib or 0.0, c.time_ms(kind))):
        if not front or cell.time_ms(kind) < front[-1].time_ms(kind):
            front.append(cell)
    return front


def answers(cells: Sequence[Cell], wanted: str | None = None) -> list[tuple[str, str]]:
    """The sweep in a few lines, for the cells of one setting: what is fastest, leanest, and of most throughput."""
    judged = verdicts(cells, wanted)
    finished = [cell for cell in cells if cell.is_finished and cell.steps_ms]
    if not finished:
        count = describe.plural(len(cells), "cell")
        return [("No answer", f"none of {count} finished; see what became of them below")]
    latency = [cell for cell in finished if cell.kind == LATENCY]
    found = [("Fastest", _fastest(latency or finished, cells, wanted, judged))]
    measured = [cell for cell in finished if cell.peak_gib is not None]
    if measured:
        leanest = min(measured, key=lambda c: c.peak_gib or 0.0)
        base = baseline_of(leanest, cells, wanted)
        text = f"{leanest.label}: {gibibytes(leanest.peak_gib or 0.0)} on the fullest device"
        if base not in (None, leanest) and base and base.peak_gib:
            text += f", {(leanest.peak_gib or 0.0) / base.peak_gib:.0%} of {base.label}"
        found.append(("Least memory", text))
    found.append(("Best throughput", _best_throughput(finished, judged)))
    costs = [(cost, cell) for cell in finished if (cost := cost_usd(cell)) is not None]
    if costs:
        cost, cell = min(costs, key=lambda pair: pair[0])
        found.append(("Cheapest", f"{cell.label}: {number(cost)} USD a video"))
    return found


def _fastest(
    candidates: Sequence[Cell], cells: Sequence[Cell], wanted: str | None, judged: Mapping[int, Against]
) -> str:
    best, near = _best(candidates, LATENCY)
    text = f"{best.label}: {milliseconds(best.time_ms(LATENCY))} a step"
    if id(best) in judged:
        text += f", {judged[id(best)]}"
    elif baseline_of(best, cells, wanted) is None:
        text += f" (no speed-up: {no_base(wanted)})"
    return text + near


def _best_throughput(candidates: Sequence[Cell], judged: Mapping[int, Against]) -> str:
    best, near = _best(candidates, THROUGHPUT)
    hourly = best.videos_per_hour
    a_second = 1000 / best.time_ms(THROUGHPUT)
    amount = f"{number(hourly)} videos/hour" if hourly else f"{number(a_second)} samples/s"
    return f"{best.label}: {amount}" + (f", {judged[id(best)]}" if id(best) in judged else "") + near


def _best(candidates: Sequence[Cell], kind: str) -> tuple[Cell, str]:
    """The cell of the shortest time, or of those that are the same within noise the one with the fewest devices; and
    in words which others come near it: within SAME_MARGIN, or their interval reaches so far. A cell may be named
    nowhere: where the noise floor leaves the verdict open, though its interval lies clearly above.
    """
    shortest, *others = sorted(candidates, key=lambda c: c.time_ms(kind))
    times = shortest.times_ms(kind)
    found = {id(cell): compare(times, cell.times_ms(kind), comparisons=len(others)) for cell in others}
    tied = [shortest, *(cell for cell in others if found[id(cell)].verdict == "same")]
    best = min(tied, key=lambda c: c.num_devices)
    text = ""
    if len(tied) > 1:
        text += f"; the same within noise: {_some([cell.label for cell in tied if cell is not best])}"
    lows = [(cell, found[id(cell)].low) for cell in others if found[id(cell)].verdict != "same"]
    unclear = [cell.label for cell, low in lows if low is not None and low <= 1 + SAME_MARGIN]
    worse = "slower" if kind == LATENCY else "lower"
    text += f"; not clearly {worse}: {_some(unclear)}" if unclear else ""
    if any(low is None for _, low in lows):
        close = [c.label for c, low in lows if low is None and found[id(c)].ratio <= 1 + SAME_MARGIN]
        text += f"; within {SAME_MARGIN:.0%}: {_some(close)}" if close else ""
        text += f" (too few samples to judge by: one cell or more has under {MIN_SAMPLES} steps)"
    return best, text


def _some(labels: Sequence[str], limit: int = 3) -> str:
    rest = len(labels) - limit
    return "; ".join(labels[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def changes(now: Sweep, before: Sweep) -> list[Change]:
    """Cells that both sweeps have: equal in every setting that both versions know."""
    flats = [{id(cell): settings_of(cell.record) for cell in s.cells if cell.runs} for s in (now, before)]
    known = _known_to_all([flat for side in flats for flat in side.values()]) if all(flats) else set()

    def key(cell: Cell, side: int) -> frozenset[tuple[str, str]]:
        return frozenset((name, flats[side][id(cell)][name]) for name in known)

    old = {key(cell, 1): cell for cell in reversed(before.cells) if cell.runs}
    matched = [(cell, old[k]) for cell in now.cells if cell.runs and (k := key(cell, 0)) in old]
    timed = [(cell, other) for cell, other in matched if cell.steps_ms and other.steps_ms]
    found = compare_all([(other.times_ms(cell.kind), cell.times_ms(cell.kind)) for cell, other in timed])
    comparisons = {id(cell): comparison for (cell, _), comparison in zip(timed, found, strict=True)}
    return [Change(cell, other, comparisons.get(id(cell))) for cell, other in matched]


def nearest_difference(now: Sweep, before: Sweep) -> list[tuple[str, str, str]]:
    """Where no cell of two sweeps is the same: (setting, value before, value now) of the two that differ least."""
    sides = [
        [settings_of(cell.record) for cell in sweep.cells if cell.runs and cell.steps_ms][:MAX_NEAREST]
        for sweep in (before, now)
    ]
    if not all(sides):
        return []
    known = _known_to_all([flat for side in sides for flat in side])
    found = [
        [(name, old[name], new[name]) for name in new if name in known and old[name] != new[name]]
        for old, new in product(*sides)
    ]
    nearest = min(found, key=len)
    return sorted(nearest, key=lambda one: not one[0].endswith(".name"))  # it brings others with it


def _known_to_all(flats: Sequence[Mapping[str, str]]) -> set[str]:
    """Settings that all have: an older version may lack some."""
    return set.intersection(*map(set, flats))


def amount(cell: Cell) -> str:
    """The number that a cell is compared by, `812 ms/step` or `22.1 videos/hour`."""
    if not cell.steps_ms:
        return cell.outcome
    if cell.kind == THROUGHPUT and cell.videos_per_hour:
        return f"{number(cell.videos_per_hour)} videos/hour"
    return f"{milliseconds(cell.time_ms(LATENCY))}/step"
