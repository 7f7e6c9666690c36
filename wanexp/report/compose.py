"""From a sweep to the blocks of its page: the answer, tables, figures, what was skipped, commands, machine. Pure."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wanexp.report import answers, figures_memory, figures_speed
from wanexp.report.cells import Cell, Sweep
from wanexp.report.drawing import NOT_RUN, Drawn
from wanexp.report.machine import environment_facts, machine
from wanexp.report.modes import LATENCY, THROUGHPUT
from wanexp.report.page import Block, Code, Heading, Picture, Table, Terms, Text
from wanexp.report.runs import runs_document
from wanexp.report.tables import cell_tables
from wanexp.sweep import sweep_name_of
from wanexp.tracking.describe import plural
from wanexp.tracking.location import tool_command

MAX_DRAWN_SETTINGS = 4  # models, videos and workloads whose figures are drawn
MAX_WARNINGS = 40
MAX_DIFFERING = 3  # settings, where no cell of an older sweep is the same
OF_A_SWEEP = (
    "sweep_name",
    "sweep_order",
    "sweep_report",
    "repeats",
    "resume",
)  # settings that no single run has


@dataclass(frozen=True)
class Report:
    """A sweep's page. headline: the answers, of several settings the first of each. regressions: cells that got worse,
    in words. against: what else the comparison with an older sweep came to; empty without one. runs: the data,
    `runs_document`.
    """

    title: str
    blocks: list[Block]
    headline: list[tuple[str, str]]
    figures: list[Drawn]
    regressions: list[str]
    against: str = ""
    runs: dict[str, Any] = field(default_factory=dict)


def compose(sweep: Sweep, *, before: Sweep | None = None, baseline: str | None = None) -> Report:
    """The report on `sweep`; before: an older sweep to compare it with. Raises UserError for an unknown baseline."""
    if baseline is not None:
        answers.check_baseline(sweep.cells, baseline)
    title = f"Sweep {sweep.sweep_id}"
    top: list[Block] = [Heading(title, 1), Text(_state(sweep))]
    if not _is_whole(sweep):
        top.append(Code(resume_command(sweep.document)))
    blocks: list[Block] = []
    figures: list[Drawn] = []
    for place, setting in enumerate(sweep.settings):
        cells = sweep.of_setting(setting)
        drawn = draw(cells, baseline) if place < MAX_DRAWN_SETTINGS else []
        if place:
            drawn = [Drawn(f"{place + 1}_{d.name}", d.title, d.alt, d.svg, d.png) for d in drawn]
        figures += drawn
        blocks += [Heading(setting or "Cells"), Terms(answers.answers(cells, baseline))]
        blocks += cell_tables(cells, baseline)
        blocks += [Picture(figure) for figure in drawn]
    if len(sweep.settings) > MAX_DRAWN_SETTINGS:
        blocks.append(
            Text(f"Figures are drawn for the first {MAX_DRAWN_SETTINGS} settings; the tables have all.")
        )
    regressions: list[str] = []
    against = ""
    if before is not None:
        found = answers.changes(sweep, before)
        regressions = [
            f"{change.cell.label}: {_change_words(change)}" for change in found if change.is_regression
        ]
        top += change_blocks(sweep, before, found)
        against = change_sentence(sweep, before, found)
    blocks += not_finished(sweep) + commands(sweep) + machine(sweep) + warnings(sweep)
    return Report(
        title, top + blocks, headline_of(sweep, baseline), figures, regressions, against, runs_document(sweep)
    )


def headline_of(sweep: Sweep, baseline: str | None) -> list[tuple[str, str]]:
    """The answers to what a sweep was run for; of several settings the first of each, under its name."""
    found = {setting: answers.answers(sweep.of_setting(setting), baseline) for setting in sweep.settings}
    if len(found) == 1:
        return next(iter(found.values()))
    return [(f"{term}, {setting}", said) for setting, lines in found.items() for term, said in lines[:1]]


def draw(cells: Sequence[Cell], baseline: str | None) -> list[Drawn]:
    """All figures of one setting for which there are numbers."""
    ran = [cell for cell in cells if cell.runs]
    if not ran:
        return []
    found = [
        *(figures_speed.scaling(ran, kind, baseline) for kind in (LATENCY, THROUGHPUT)),
        *(figures_speed.times(ran, kind) for kind in (LATENCY, THROUGHPUT)),
        figures_memory.peaks(ran),
        *(figures_memory.tradeoff(ran, kind) for kind in (LATENCY, THROUGHPUT)),
        figures_memory.over_time(ran),
        figures_speed.prediction(ran),
        figures_speed.energy(ran),
    ]
    return [drawn for drawn in found if drawn is not None]


def change_sentence(sweep: Sweep, before: Sweep, found: Sequence[answers.Change]) -> str:
    """How many cells were compared, and with what result: no regression among none is no good news."""
    count = Counter(change.comparison.verdict for change in found if change.comparison)
    if not count:
        said = f"Against {before.sweep_id}: nothing to compare, no cell with times was run with the same settings"
        return said + ("" if found else _nearest(sweep, before))
    worse = sum(change.is_regression for change in found)
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in count.most_common())
    return (
        f"Against {before.sweep_id}: {plural(worse, 'regression') if worse else 'no regression'} ({verdicts})"
    )


def change_blocks(sweep: Sweep, before: Sweep, found: Sequence[answers.Change]) -> list[Block]:
    """The cells of both sweeps side by side, what got worse first."""
    if not found:
        said = (
            f"No cell of {before.sweep_id} was run with the same settings{_nearest(sweep, before)}, so nothing can "
            "be compared."
        )
        return [Heading(f"Against {before.sweep_id}"), Text(said)]
    worse = [change for change in found if change.is_regression]
    better = [c for c in found if c.comparison and c.comparison.verdict == "faster"]
    unclear = [c for c in found if c.comparison and c.comparison.verdict == "unclear"]
    same = len([c for c in found if c.comparison and c.comparison.verdict == "same"])
    terms = [("Regressions", "; ".join(c.cell.label for c in worse) or "none")]
    if better:
        terms.append(("Faster", "; ".join(c.cell.label for c in better)))
    terms.append(
        ("Of the others", f"{same} the same, {len(unclear)} unclear (noise hides a difference, if any)")
    )
    rows = [
        [c.cell.label, answers.amount(c.before), answers.amount(c.cell), _change_words(c)]
        for c in sorted(found, key=lambda change: not change.is_regression)
    ]
    blocks: list[Block] = [Heading(f"Against {before.sweep_id}"), Terms(terms)]
    differences = list(_differences(sweep, before))
    if differences:
        blocks.append(Text("Not only the code may differ. " + ". ".join(differences) + "."))
    return [*blocks, Table(["cell", "before", "now", "verdict on its time"], rows)]


def _nearest(sweep: Sweep, before: Sweep) -> str:
    """` (attention was sdpa_math, is sdpa_flash)`: what keeps two sweeps from being compared."""
    differing = answers.nearest_difference(sweep, before)
    named = "; ".join(f"{name} was {old}, is {new}" for name, old, new in differing[:MAX_DIFFERING])
    rest = len(differing) - MAX_DIFFERING
    return (f" ({named}" + (f"; and {rest} more" if rest > 0 else "") + ")") if named else ""


def _change_words(change: answers.Change) -> str:
    if change.comparison is not None:
        return str(change.comparison)
    return f"{change.before.outcome} before, {change.cell.outcome} now"


def _differences(sweep: Sweep, before: Sweep) -> Iterable[str]:
    """What of machine and versions is not the same in two sweeps."""
    now, then = (dict(environment_facts(s)) for s in (sweep, before))
    for key in dict.fromkeys([*now, *then]):
        if now.get(key) != then.get(key):
            yield f"{key}: {then.get(key, 'unknown')} before, {now.get(key, 'unknown')} now"


def not_finished(sweep: Sweep) -> list[Block]:
    """Every cell without numbers, with the reason that it gives."""
    rows = [
        [cell.label, NOT_RUN.get(cell.outcome, cell.outcome), cell.reason or "not run yet"]
        for cell in sweep.cells
        if not cell.is_finished
    ]
    return [Heading("Skipped, failed and waiting"), Table(["cell", "outcome", "why"], rows)] if rows else []


def commands(sweep: Sweep) -> list[Block]:
    """For each cell what repeats it: from its record where that lies here, else from its overrides."""
    lines = []
    for cell in sweep.cells:
        folder = next((run.folder for run in cell.runs if run.folder and run.record is cell.record), None)
        if folder is not None:
            command = tool_command("rerun.py", "wanexp.rerun", folder / "record.json")
        elif cell.runs or cell.overrides:
            own = single_run(cell.overrides)
            if cell.mode == "none":  # which runs on the first of several in a sweep only
                own = [re.sub(r"^gpus=\[(\d+),.*", r"gpus=[\1]", text) for text in own]
            command = shlex.join(["python", "-m", "wanexp", *own])
        else:
            continue
        lines.append(f"{command}  # {' '.join(cell.label.split())}")
    return [Heading("Run a cell again"), Code("\n".join(lines))] if lines else []


def single_run(overrides: Sequence[str]) -> list[str]:
    """Overrides that run one cell alone. A sweep file stays, since it may choose more than the grid (mlperf)."""
    keys = {text: text.lstrip("+").partition("=")[0] for text in overrides}
    own = [text for text in overrides if keys[text] not in OF_A_SWEEP and not keys[text].startswith("hydra.")]
    return own + ["hydra.mode=RUN"] if "sweep" in keys.values() else own


def warnings(sweep: Sweep) -> list[Block]:
    """What the runs warned of, each once, with the number of runs."""
    count = Counter(text for record in sweep.records for text in record.warnings)
    if not count:
        return []
    rows = [[text, str(number)] for text, number in count.most_common(MAX_WARNINGS)]
    rest = len(count) - len(rows)
    blocks: list[Block] = [Heading("Warnings"), Table(["warning", "runs"], rows, numeric=[1])]
    return blocks + ([Text(f"... and {rest} more in the records.")] if rest else [])


def _state(sweep: Sweep) -> str:
    """`19 of 22 cells finished, 1 oom, 1 skipped, 1 waiting; 60 runs from 2026-11-22 20:00 to 2026-11-22 21:10 UTC.`"""
    records = sweep.records
    started = sorted(record.started for record in records if record.started)
    ended = sorted(record.ended for record in records if record.ended)
    when = f" from {_moment(started[0])} to {_moment(ended[-1])} UTC" if started and ended else ""
    said = f"{sweep.outcomes}; {plural(len(records), 'run')}{when}."
    if _is_whole(sweep):
        return said
    return f"{said} The sweep is not whole ({sweep.document['state']}). This runs what is missing:"


def _is_whole(sweep: Sweep) -> bool:
    return sweep.document.get("state") in (None, "", "finished")


def resume_command(document: Mapping[str, Any]) -> str:
    """The command of a sweep.json, to go on with that sweep."""
    words = [str(word) for word in document.get("command") or ["python", "-m", "wanexp"]]
    words = [word for word in words if word.partition("=")[0] != "resume"]
    if document.get("name") is None:
        words.append(f"sweep_name={sweep_name_of(str(document.get('sweep_id')))}")
    return shlex.join([*words, "resume=true"])


def _moment(text: str) -> str:
    return text[:16].replace("T", " ")
