"""The summary run of a sweep in MLflow: the answer as its description, the comparison as a table, the figures.

There is one a sweep. It is made anew whenever the sweep is, and only then is the old one deleted.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.report import answers
from wanexp.report.cells import Cell, Sweep
from wanexp.report.collect import SWEEP_FILE
from wanexp.report.compose import Report
from wanexp.report.fetch import SUMMARY_TAG, runs_of
from wanexp.report.modes import KIND_IN_WORDS, LATENCY, THROUGHPUT
from wanexp.report.page import Picture, escape_markdown, to_markdown
from wanexp.tracking import describe
from wanexp.tracking.client import import_client, locked, one_line, open_experiment, page_lines
from wanexp.tracking.location import (
    charts_link,
    compare_link,
    is_http,
    resolve_uri,
    run_link,
    server_answers,
    sqlite_path,
    sweep_link,
    without_password,
)
from wanexp.tracking.mlflow_store import COMPLETE_TAG, PARAMS_PER_CALL, Tracked
from wanexp.tracking.view import quoted, sweep_view, sweep_view_key

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_COMPARED = 6  # runs side by side
TABLE_FILE = "comparison.json"  # MLflow shows it as a table


def track_summary(sweep: Sweep, report: Report, folder: Path, tracking: TrackingConfig) -> Tracked:
    """Make the summary run from the report whose pages lie in `folder`. Raises nothing: see mlflow_store.track."""
    try:
        return _track_summary(sweep, report, folder, tracking, resolve_uri(tracking.uri))
    except ImportError as error:
        problem = f"{(error.name or 'mlflow').partition('.')[0]} is not installed; pip install mlflow"
    except UserError as error:
        problem = str(error)
    except Exception as error:  # of mlflow, its database, the network: the report is on disk
        problem = one_line(error)
    return Tracked(None, [f"MLflow has no summary of this sweep: {problem}"])


def _track_summary(sweep: Sweep, report: Report, folder: Path, tracking: TrackingConfig, uri: str) -> Tracked:
    if is_http(uri) and (problem := server_answers(uri, tracking.timeout_s)):
        raise UserError(f"the server {without_password(uri)} does not answer ({problem})")
    client_class = import_client()
    database = sqlite_path(uri)
    with locked(database) if database else nullcontext():
        client = client_class(tracking_uri=uri)
        experiment_id = open_experiment(client, tracking.experiment, database)
        query = f"tags.`{SUMMARY_TAG}` = {quoted(sweep.sweep_id)}"
        old = [run.info.run_id for run in runs_of(client, experiment_id, query)]
        starts = [describe.start_ms(record) for record in sweep.records]
        run = client.create_run(
            experiment_id,
            start_time=max(starts, default=0) or round(time.time() * 1000),
            tags=summary_tags(sweep, report),
            run_name=summary_name(sweep, report),
        )
        try:
            _fill(client, run.info.run_id, sweep, report, folder)
        except BaseException:
            client.delete_run(run.info.run_id)
            raise
        for run_id in old:
            client.delete_run(run_id)
        is_training = {describe.group_name(record, "workload") for record in sweep.records} == {"train"}
        client.set_experiment_tag(experiment_id, *sweep_view(sweep.sweep_id, is_training=is_training))
        kind, cells = fastest_cells(sweep)
        best = _runs_of(client, experiment_id, cells)
    url = run_link(uri, experiment_id, run.info.run_id)
    lines = [f"MLflow: summary of sweep {sweep.sweep_id}", *page_lines(uri, url, tracking)]
    for what, link in (("its runs", sweep_link), ("its charts", charts_link)):
        if address := link(uri, experiment_id, sweep_view_key(sweep.sweep_id)):
            lines.append(f"  {what}: {address}")
    if len(best) > 1 and (address := compare_link(uri, experiment_id, best)):
        lines.append(f"  its {len(best)} fastest cells ({KIND_IN_WORDS[kind]}), compared: {address}")
    return Tracked(url, lines, "logged")


def _fill(client: "MlflowClient", run_id: str, sweep: Sweep, report: Report, folder: Path) -> None:
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in islice(cell_params(sweep).items(), PARAMS_PER_CALL)]
    client.log_batch(run_id, params=params)
    table = comparison_table(sweep)
    if table["cell"]:
        client.log_table(run_id, table, TABLE_FILE)
    for drawn in report.figures:
        client.log_artifact(run_id, str(folder / "figures" / f"{drawn.name}.png"), "figures")
        client.log_artifact(run_id, str(folder / "figures" / f"{drawn.name}.svg"), "figures")
    for name in ("report.html", "report.md"):
        client.log_artifact(run_id, str(folder / name))
    if sweep.document:
        with tempfile.TemporaryDirectory(prefix="wanexp-") as temporary:
            path = Path(temporary) / SWEEP_FILE
            path.write_text(json.dumps(sweep.document, indent=1))
            client.log_artifact(run_id, str(path))
    client.set_tag(run_id, COMPLETE_TAG, "complete")
    ends = [describe.end_ms(record) for record in sweep.records]
    client.set_terminated(run_id, "FINISHED", max(ends, default=0) or None)


def fastest_cells(sweep: Sweep) -> tuple[str, list[Cell]]:
    """Cells of one kind, which is said first: of one sample a step if there are two to compare, by their step; else of
    samples side by side, by the time of a sample."""
    timed = [cell for cell in sweep.cells if cell.is_finished and cell.steps_ms]
    kind = LATENCY if sum(cell.kind == LATENCY for cell in timed) > 1 else THROUGHPUT
    own = [cell for cell in timed if cell.kind == kind]
    return kind, sorted(own, key=lambda cell: cell.time_ms(kind))[:MAX_COMPARED]


def _runs_of(client: "MlflowClient", experiment_id: str, cells: Sequence[Cell]) -> list[str]:
    """MLflow's ids of their runs, one a cell."""
    found = []
    for cell in cells:
        query = f"tags.`wanexp.run_id` = {quoted(cell.record.run_id)}"
        found += [run.info.run_id for run in client.search_runs([experiment_id], query, max_results=1)]
    return found


def summary_name(sweep: Sweep, report: Report) -> str:
    """`SUMMARY modes_2gpus - fastest: context_parallel, 2 GPUs: 3296 ms a step, ...`."""
    first = ": ".join(report.headline[0]).partition(";")[0] if report.headline else "no cells"
    return f"SUMMARY {sweep.sweep_id} - {first[:1].lower()}{first[1:]}"[: describe.MAX_KEY]


def summary_tags(sweep: Sweep, report: Report) -> dict[str, str]:
    """What finds the summary, and its description."""
    return {
        "sweep_id": sweep.sweep_id,
        SUMMARY_TAG: sweep.sweep_id,
        "mode": "summary",
        "outcome": "finished" if all(cell.is_finished for cell in sweep.cells) else sweep.outcomes,
        "mlflow.source.name": "wanexp",
        "mlflow.note.content": summary_note(report),
    }


def summary_note(report: Report) -> str:
    """The answer in the three lines that MLflow shows at once, then the tables, cut to its limit between blocks."""
    first = [f"**{escape_markdown(term)}**: {escape_markdown(said)}" for term, said in report.headline[:3]]
    lines = "\n\n".join(first) + "\n\nThe figures and the whole report are under **Artifacts**.\n\n"
    blocks = [block for block in report.blocks if not isinstance(block, Picture)]
    while len(text := lines + to_markdown(blocks, figures=None)) > describe.MAX_TAG and blocks:
        blocks.pop()
    return text[: describe.MAX_TAG]


def cell_params(sweep: Sweep) -> dict[str, str]:
    """A line a cell: MLflow shows params on a run's first page, and no chart is made of them."""
    found: dict[str, str] = {}
    judged: dict[int, answers.Against] = {}
    for setting in sweep.settings:
        judged |= answers.verdicts(sweep.of_setting(setting))
    for cell in sweep.cells:
        parts = [answers.amount(cell)] if cell.runs else [cell.outcome]
        if id(cell) in judged:
            parts.append(str(judged[id(cell)]))
        if cell.peak_gib is not None:
            parts.append(describe.gibibytes(cell.peak_gib))
        name = " ".join([cell.setting, cell.label] if len(sweep.settings) > 1 else [cell.label])
        found.setdefault(describe.clean_key(name.replace(",", "")), " - ".join(parts))
    return found


def comparison_table(sweep: Sweep) -> dict[str, list[str | float | None]]:
    """A column each; a row a cell, those that did not finish too."""
    columns: dict[str, list[str | float | None]] = {}
    for setting in sweep.settings:
        cells = sweep.of_setting(setting)
        judged = answers.verdicts(cells)
        for cell in cells:
            for name, value in _row(cell, judged.get(id(cell))).items():
                columns.setdefault(name, []).append(value)
    return columns or {"cell": []}


def _row(cell: Cell, judged: answers.Against | None) -> dict[str, str | float | None]:
    timed = bool(cell.is_finished and cell.steps_ms)
    return {
        "setting": cell.setting,
        "cell": cell.label,
        "mode": cell.mode,
        "devices": float(cell.num_devices),
        "outcome": cell.outcome,
        "step ms": cell.time_ms(LATENCY) if timed else None,
        "ms a sample": cell.time_ms(THROUGHPUT) if timed else None,
        "gain over baseline": answers.gain(judged.base, cell)
        if judged and not judged.comparison.says_nothing
        else None,
        "videos/hour": cell.videos_per_hour,
        "peak GiB": cell.peak_gib,
        "runs": float(len(cell.steps_ms)),
        "why": cell.reason,
    }
