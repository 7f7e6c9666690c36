"""What bench_peers.py found, as ratios, against the goals, and as Markdown. Pure: rows in, rows and text out."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanexp.measure.comparison import Interval, compare, median_interval

SCHEMA = "wanexp.peers/1"
MAX_REL_L2 = 0.05  # of two bf16 forwards of one model; beyond it they do not compute the same

Row = Mapping[str, Any]
SMALL, LARGE = "wan2.1_t2v_1.3b", "wan2.1_t2v_14b"


@dataclass(frozen=True)
class Goal:
    """A ratio to reach. kind: see `result_of`."""

    kind: str
    model: str
    video: str
    num_gpus: int
    against: str  # contender
    at_least: float


GOALS = (
    Goal("forward", LARGE, "480p", 1, "xdit", 1.04),
    Goal("forward", LARGE, "480p", 1, "diffusers", 1.14),
    Goal("forward", LARGE, "720p", 1, "xdit", 1.03),
    Goal("forward", LARGE, "720p", 1, "diffusers", 1.16),
    Goal("forward", SMALL, "480p", 1, "xdit", 1.05),
    Goal("forward", SMALL, "480p", 1, "diffusers", 1.16),
    Goal("floor", LARGE, "480p", 1, "", 0.95),
    Goal("floor", LARGE, "720p", 1, "", 0.95),
    Goal("floor", SMALL, "480p", 1, "", 0.95),
    Goal("forward", LARGE, "480p", 2, "xdit", 1.13),
    Goal("forward", LARGE, "480p", 2, "diffusers", 1.24),
    Goal("forward", LARGE, "720p", 2, "xdit", 1.05),
    Goal("forward", LARGE, "720p", 2, "diffusers", 1.16),
    Goal("step", LARGE, "480p", 2, "xdit", 1.17),
    Goal("step", LARGE, "720p", 2, "xdit", 1.06),
    Goal("scaling", LARGE, "480p", 2, "ours", 1.90),
    Goal("scaling", LARGE, "720p", 2, "ours", 1.95),
    Goal("scaling", LARGE, "480p", 2, "ours_cfg", 1.97),
    Goal("scaling", LARGE, "720p", 2, "ours_cfg", 1.97),
)


@dataclass(frozen=True)
class Result:
    """A ratio with its interval, None where there are too few samples for one."""

    ratio: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f} (n = {self.n})"
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired_ratio(
    slower: Sequence[Sequence[float]], faster: Sequence[Sequence[float]], *, factor: float = 1.0
) -> Result:
    """factor * slower / faster turn by turn: the median of the ratios and the bootstrap interval of it.

    Both are [run][turn], of the same runs; a turn that only one of them took is left out.
    """
    ratios = [
        [factor * one / other for one, other in zip(run, base, strict=False)]
        for run, base in zip(slower, faster, strict=True)
    ]
    return as_result(median_interval(ratios))


def as_result(interval: Interval) -> Result:
    if interval.low == interval.high:
        return Result(interval.median, None, None, interval.n)
    return Result(interval.median, interval.low, interval.high, interval.n)


def add_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, each measured forward of a peer with `ours_is_faster`: its time by ours."""
    result = []
    for row in rows:
        row = dict(row)
        ours = find(rows, row["model"], row["video"], row["num_gpus"], "ours")
        if ours and row["outcome"] == "measured" and row["contender"] != "ours" and row["forwards"] == 1:
            row["ours_is_faster"] = vars(paired_ratio(row["samples_s"], ours["samples_s"]))
        result.append(row)
    return result


def find(rows: Sequence[Row], model: str, video: str, num_gpus: int, contender: str) -> Row | None:
    """The measured row of a contender, None if there is none."""
    wanted = (model, video, num_gpus, contender)
    for row in rows:
        if (row["model"], row["video"], row["num_gpus"], row["contender"]) == wanted:
            return row if row["outcome"] == "measured" else None
    return None


def result_of(goal: Goal, rows: Sequence[Row]) -> Result | None:
    """What was measured for `goal`, None if not.

    forward: the peer's time of a forward by ours, on the same GPUs. step: the same of a guided step of two forwards,
    ours by its best mode (by cfg_parallel, or two forwards by Ulysses), the peer's twice its forward. scaling: our time
    on one GPU by that on several, not in turns. floor: the floor by our time.
    """
    ours = find(rows, goal.model, goal.video, goal.num_gpus, "ours")
    if goal.kind == "floor":
        share = ours.get("share_of_floor") if ours else None
        return Result(share, None, None, len(ours["samples_s"][0])) if ours and share else None
    peer = find(rows, goal.model, goal.video, goal.num_gpus, goal.against)
    if peer is None:
        return None
    if goal.kind == "forward":
        return paired_ratio(peer["samples_s"], ours["samples_s"]) if ours else None
    if goal.kind == "scaling":
        alone = find(rows, goal.model, goal.video, 1, "ours")
        return scaling(alone, peer) if alone else None
    assert goal.kind == "step", goal.kind
    guided = find(rows, goal.model, goal.video, goal.num_gpus, "ours_cfg")
    ways = [(way["seconds"] * 2 / way["forwards"], way) for way in (ours, guided) if way]
    if not ways:
        return None
    best = min(ways, key=lambda way: way[0])[1]
    return paired_ratio(peer["samples_s"], best["samples_s"], factor=best["forwards"])


def scaling(alone: Row, together: Row) -> Result:
    """The time of the same forwards on one GPU (the mean of the GPUs that measured it) by that on several."""
    ratio = together["forwards"] * alone["seconds"] / together["seconds"]
    times = [[together["forwards"] * value for value in run] for run in alone["samples_s"]]
    found = compare(together["samples_s"], times)
    pooled = found.ratio  # of all samples of all GPUs; the interval is moved to the ratio of the means
    low, high = (bound and bound * ratio / pooled for bound in (found.low, found.high))
    return Result(ratio, low, high, min(sum(map(len, times)), sum(map(len, together["samples_s"]))))


def describe(goal: Goal) -> str:
    gpus = "1 GPU" if goal.num_gpus == 1 else f"{goal.num_gpus} GPUs"
    ways = {
        "forward": f"a forward, against {goal.against}" + (" by Ulysses" if goal.num_gpus > 1 else ""),
        "step": f"a guided step, our best mode against two forwards of {goal.against} by Ulysses",
        "scaling": ("cfg_parallel" if goal.against == "ours_cfg" else "Ulysses") + " against ours on one GPU",
        "floor": "share of the floor",
    }
    return f"{goal.model} {goal.video}, {gpus}: {ways[goal.kind]}"


def markdown(result: Mapping[str, Any]) -> str:
    """The whole page."""
    rows, environment = result["rows"], result["environment"]
    torch = environment["torch"]
    peers = ", ".join(f"{name} {version}" for name, version in environment["peers"].items() if version)
    lines = [
        "# Against diffusers and xDiT",
        "",
        f"Measured {result['measured'][:10]} on {len(result['devices'])} x {result['devices'][0]}; torch "
        f"{torch['version']}, cuDNN {torch['cudnn']}, driver {environment.get('driver')}; {peers or 'no peers'}. bf16, "
        f"exact attention, random weights and inputs of unit variance; the contenders of a case in turns. Made by "
        f"`{result['command']}`; what the columns mean is in docs/peers.md.",
        "",
        "## Goals",
        "",
        *table(
            ("goal", "at least", "result (95 % interval)", ""),
            [goal_cells(goal, result_of(goal, rows)) for goal in GOALS],
        ),
    ]
    for case in dict.fromkeys((row["model"], row["video"], row["num_gpus"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["video"], row["num_gpus"]) == case]
        gpus = "one GPU" if case[2] == 1 else f"{case[2]} GPUs"
        lines += ["", f"## {case[0]}, {case[1]}, {gpus}", "", *table(HEADERS, [cells(row) for row in mine])]
    if result["warnings"]:
        lines += ["", "Warnings:", "", *(f"* {warning}" for warning in dict.fromkeys(result["warnings"]))]
    return "\n".join(lines) + "\n"


def goal_cells(goal: Goal, found: Result | None) -> list[str]:
    asked = f"{goal.at_least:.2f}" + ("" if goal.kind == "floor" else "x")
    if found is None:
        return [describe(goal), asked, "not measured", ""]
    if found.low is not None and found.high is not None and found.low <= goal.at_least <= found.high:
        return [describe(goal), asked, str(found), "within the interval"]
    if found.ratio >= goal.at_least:
        return [describe(goal), asked, str(found), "reached"]
    return [describe(goal), asked, str(found), f"short by {100 * (1 - found.ratio / goal.at_least):.1f} %"]


HEADERS = (
    "contender",
    "ms",
    "ours is faster by",
    "of the floor",
    "rel. L2 to ours",
    "peak above weights",
    "first call",
    "clock, power, heat",
)


def cells(row: Row) -> list[str]:
    title = row["title"]
    if row["outcome"] != "measured":
        return [title, f"{row['outcome']}: {row['reason']}", *[""] * (len(HEADERS) - 2)]
    if isinstance(row.get("attention"), (tuple, list)):
        title += f" ({', '.join(row['attention'])})"
    samples = [value for run in row["samples_s"] for value in run]
    spread = 1000 * (max(samples) - min(samples)) / 2
    faster, distance, share = row.get("ours_is_faster"), row.get("rel_l2_to_ours"), row.get("share_of_floor")
    return [
        title,
        f"{1000 * row['seconds']:.1f} +- {spread:.1f}",
        str(Result(**faster)) if faster else "",
        f"{share:.3f}" if share else "",
        distance_words(row["contender"], distance),
        f"{row['peak_gib']:.2f} GiB" if row["peak_gib"] else "",
        f"{row['first_call_s']:.1f} s",
        telemetry_words(row.get("telemetry", {})),
    ]


def distance_words(contender: str, distance: float | None) -> str:
    if contender == "ours" or distance is None:
        return ""
    words = "equal" if distance == 0 else f"{distance:.1e}"
    return words if distance <= MAX_REL_L2 else f"**{words}: not the same answer**"


def telemetry_words(series: Mapping[str, float]) -> str:
    """`1650 MHz, 690 W, 61 C`: clock and power as means over the GPUs, of the temperatures the highest."""
    words = []
    for name, unit, combine in (
        ("sm_clock_mhz", "MHz", statistics.fmean),
        ("power_w", "W", statistics.fmean),
        ("temperature_c", "C", max),
    ):
        values = [value for key, value in series.items() if key.endswith(f"/{name}")]
        if values:
            words.append(f"{combine(values):.0f} {unit}")
    return ", ".join(words)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(headers) + " |",
        "|" + " --- |" * len(headers),
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
    ]
