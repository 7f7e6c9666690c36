"""The summary run of a sweep, and the sweep back out of MLflow."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import record_of, write_sweep
from tests.tracking.test_mlflow_store import artifacts_of, client_of, runs_in
from wanexp import import_records
from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.record import Record
from wanexp.report import command, compose, summary
from wanexp.report.cells import Run, Sweep
from wanexp.report.collect import make_cells, read_sweep
from wanexp.report.drawing import Drawn
from wanexp.report.fetch import SUMMARY_TAG, fetch_sweep
from wanexp.report.finish import finish_sweep
from wanexp.tracking import describe
from wanexp.tracking.view import sweep_view, sweep_view_key


@pytest.fixture(autouse=True)
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones take seconds."""
    drawn = Drawn("peaks", "Peaks", "Peaks of memory.", b"<svg/>", b"PNG")
    monkeypatch.setattr("wanexp.report.compose.draw", lambda *_: [drawn])


def records(sweep_id: str = "s", **changes: Any) -> list[Record]:
    modes = (("none", 1), ("context_parallel", 2), ("data_parallel", 2))
    found = [record_of(m, n, repeat=r, sweep_id=sweep_id, **changes) for r in range(2) for m, n in modes]
    return [*found, record_of("fsdp", 2, outcome="oom", sweep_id=sweep_id)]


def summaries(uri: str) -> list[Any]:
    return [run for run in runs_in(uri) if SUMMARY_TAG in run.data.tags]


def test_import_makes_one_summary_a_sweep(
    sqlite_uri: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(working_folder / "multirun" / "s", records())
    write_sweep(working_folder / "multirun" / "t", records("t"))
    assert import_records.main(["multirun"]) == 0
    said = capsys.readouterr().out
    assert said.count("MLflow: summary of sweep") == 2
    first = {run.data.tags[SUMMARY_TAG]: run for run in summaries(sqlite_uri)}
    assert set(first) == {"s", "t"} and len(runs_in(sqlite_uri)) == 16
    run, client = first["s"], client_of(sqlite_uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("SUMMARY s - fastest: context_parallel, 2 GPUs")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**Fastest**: context_parallel, 2 GPUs") and "out of memory" in note
    assert len(note) <= describe.MAX_TAG
    assert run.data.tags["outcome"] == "3 of 6 cells finished, 1 oom, 1 skipped, 1 waiting"
    assert run.data.params["context_parallel 2 GPUs"].endswith("x none, 1 GPU - 29.3 GiB")
    assert run.data.params["fsdp 2 GPUs"] == "oom"
    assert run.data.metrics == {}  # they would be charts beside those of the runs
    files = artifacts_of(client, run.info.run_id)
    assert {"comparison.json", "report.html", "report.md", "sweep.json", "figures/peaks.png"} <= files
    table = json.loads(
        Path(client.download_artifacts(run.info.run_id, "comparison.json", str(working_folder))).read_text()
    )
    column = table["columns"].index("cell")
    assert [row[column] for row in table["data"]][:2] == ["none, 1 GPU", "context_parallel, 2 GPUs"]
    experiment = client.get_experiment(run.info.experiment_id)
    assert f"viewStateShareKey={sweep_view_key('s')}" in said
    tag, state = sweep_view("s")
    assert experiment.tags[tag] == state and 'sweep_id = \\"s\\"' in state
    order = json.loads(state)
    assert (order["orderByKey"], order["orderByAsc"]) == ("metrics.`throughput/videos_per_hour`", False)
    assert "its 2 fastest cells (one sample a step), compared: http" in said

    assert import_records.main(["multirun"]) == 0  # again: the summaries are replaced
    second = {run.data.tags[SUMMARY_TAG]: run for run in summaries(sqlite_uri)}
    assert set(second) == {"s", "t"} and len(runs_in(sqlite_uri)) == 16
    assert second["s"].info.run_id != run.info.run_id


@pytest.mark.parametrize("is_training", [False, True])
def test_runs_are_sorted_by_a_column_that_is_shown(is_training: bool) -> None:
    state = json.loads(sweep_view("s", is_training=is_training)[1])
    metric = state["orderByKey"].removeprefix("metrics.").strip("`")
    assert metric.startswith("throughput/") and ("videos" in metric) is not is_training
    assert state["orderByKey"] in state["selectedColumns"]
    assert metric in [chart["metricKey"] for chart in state["compareRunCharts"]]


def test_the_fastest_cells_are_of_one_kind() -> None:
    def fastest(*modes: tuple[str, int]) -> tuple[str, list[str]]:
        cells = make_cells([Run(record_of(mode, num_gpus)) for mode, num_gpus in modes])
        kind, found = summary.fastest_cells(Sweep("s", cells))
        return kind, [cell.label for cell in found]

    throughput = [("none", 1), ("data_parallel", 2), ("data_parallel", 4)]
    assert fastest(*throughput) == ("throughput", ["data_parallel, 4 GPUs", "data_parallel, 2 GPUs"])
    assert fastest(*throughput, ("cfg_parallel", 2)) == ("latency", ["cfg_parallel, 2 GPUs", "none, 1 GPU"])


def test_a_summary_that_cannot_be_made_leaves_the_old_one(
    sqlite_uri: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(working_folder / "s", records())
    assert any("summary of sweep s" in line for line in finish_sweep(folder, TrackingConfig()))
    (old,) = summaries(sqlite_uri)

    def fail(*_: Any) -> dict[str, Any]:
        raise ConnectionError("gone")

    monkeypatch.setattr(summary, "comparison_table", fail)
    lines = finish_sweep(folder, TrackingConfig())
    assert lines[-1] == "MLflow has no summary of this sweep: ConnectionError: gone"
    assert [run.info.run_id for run in summaries(sqlite_uri)] == [old.info.run_id]


def test_without_tracking_there_is_a_report(working_folder: Path) -> None:
    folder = write_sweep(working_folder / "s", records())
    lines = finish_sweep(folder, TrackingConfig(enabled=False))
    assert lines[0].startswith("Fastest: ") and lines[-1].endswith("report.html")
    assert (folder / "report.html").is_file() and not (working_folder / "mlflow.db").exists()


def test_a_report_that_cannot_be_written_is_a_line(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(working_folder / "s", records())

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_report", fail)
    lines = finish_sweep(folder, TrackingConfig(enabled=False))
    assert "No space left on device" in lines[0] and "report.py s" in lines[1]
    monkeypatch.setitem(sys.modules, "wanexp.report.compose", None)  # as without matplotlib
    assert "is not installed" in finish_sweep(folder, TrackingConfig(enabled=False))[0]


def test_a_sweep_comes_back_whole(
    server: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over HTTP, from the artifacts alone; cells without a record from the summary run's sweep.json."""
    write_sweep(working_folder / "multirun" / "back", records("back"))
    options = ["--uri", server, "--experiment", "fetch"]
    assert import_records.main(["multirun", *options]) == 0
    sweep = fetch_sweep("back", TrackingConfig(uri=server, experiment="fetch"))
    assert [(cell.label, cell.outcome, len(cell.runs)) for cell in sweep.cells] == [
        ("none, 1 GPU", "finished", 2),
        ("context_parallel, 2 GPUs", "finished", 2),
        ("data_parallel, 2 GPUs", "finished", 2),
        ("fsdp, 2 GPUs", "oom", 1),
        ("cfg_parallel, 4 GPUs", "skipped", 0),
        ("cfg_parallel, 8 GPUs", "waiting", 0),
    ]
    capsys.readouterr()
    assert command.main(["--mlflow", "back", "--against", "multirun/back", *options]) == 0
    assert "Against back: no regression" in capsys.readouterr().out
    text = (working_folder / "report_back" / "report.md").read_text()
    assert "python -m wanexp parallelism=none 'gpus=[0]' model=wan2.1_t2v_14b" in text
    with pytest.raises(UserError, match="no run of experiment fetch has the tag sweep_id=nothing"):
        fetch_sweep("nothing", TrackingConfig(uri=server, experiment="fetch"))
    with pytest.raises(UserError, match="there is no experiment other"):
        fetch_sweep("back", TrackingConfig(uri=server, experiment="other"))


def test_sweeps_of_one_name_stay_apart(
    sqlite_uri: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["s-111111", "s-222222", "s_2-333333", "old"]
    for place, sweep_id in enumerate(ids):
        folder = write_sweep(working_folder / str(place) / "s", records(sweep_id))
        document = json.loads((folder / "sweep.json").read_text())
        (folder / "sweep.json").write_text(json.dumps(document | {"sweep_id": sweep_id}))
    assert import_records.main(["0", "1", "2", "3"]) == 0
    assert sorted(run.data.tags[SUMMARY_TAG] for run in summaries(sqlite_uri)) == sorted(ids)
    capsys.readouterr()
    assert command.main(["--mlflow", "s"]) == 2
    assert (
        capsys.readouterr().err == "error: 2 sweeps are called s; write the id of one: s-111111, s-222222\n"
    )
    for asked, sweep_id in (("s-222222", "s-222222"), ("s_2", "s_2-333333"), ("old", "old")):
        sweep = fetch_sweep(asked, TrackingConfig())
        assert sweep.sweep_id == sweep_id and {record.sweep_id for record in sweep.records} == {sweep_id}
        assert len(sweep.records) == 7


def test_a_description_fits_whatever_the_sweep(working_folder: Path) -> None:
    many = [record_of("none", 1, seed=i, attention=f"kernel{i}" * 20) for i in range(150)]
    folder = write_sweep(working_folder / "s", many)
    sweep = read_sweep(folder)
    note = summary.summary_note(compose.compose(sweep))
    assert note.startswith("**Fastest**") and len(note) <= describe.MAX_TAG
    assert all(len(key) <= describe.MAX_KEY for key in summary.cell_params(sweep))
