"""Sweeps: composed by Hydra, run by the launcher, their folders and sweep.json. The runner is replaced."""

import json
import sys
from types import ModuleType

import pytest

from wanexp import __main__ as program
from wanexp.config import to_dict
from wanexp.errors import LayoutError, UserError
from wanexp.record import Record, read_record
from wanexp.sweep import sweep_exit_code


class Fakes:
    """In the place of wanexp.runner and wanexp.console. endings: by cell number, default finished."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.tables: list[list[Record]] = []
        self.endings: dict[int, str | BaseException] = {}
        self.at_call: list[dict] = []

    def run(self, config, *, folder, overrides, sweep=None):
        self.calls.append({"config": config, "folder": folder, "overrides": overrides, "sweep": sweep})
        self.at_call.append(json.loads((folder.parent / "sweep.json").read_text()))
        ending = self.endings.get(sweep.index, "finished")
        if isinstance(ending, BaseException):
            raise ending
        record = Record("id", f"{config.model.name} {config.parallelism.mode}", "now", to_dict(config))
        record.outcome = ending
        record.metrics = {"latency/step_ms": 2.0, "other": 1.0}
        return record


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    fakes = Fakes()
    runner, console = ModuleType("wanexp.runner"), ModuleType("wanexp.console")
    vars(runner)["run"] = fakes.run

    class Console:
        def sweep_table(self, records):
            fakes.tables.append(list(records))

    vars(console)["Console"] = Console
    monkeypatch.setitem(sys.modules, "wanexp.runner", runner)
    monkeypatch.setitem(sys.modules, "wanexp.console", console)
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return fakes


@pytest.fixture
def sweep(fakes, monkeypatch):
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["wanexp", *arguments])
        return program.main()

    return call


def folders(path):
    return sorted(item.name for item in path.iterdir() if item.is_dir())


def sweep_file(path):
    return json.loads((path / "sweep.json").read_text())


GRID = ["-m", "parallelism=none,data_parallel", "gpus=[0],[0,1]"]


def test_a_grid_runs_in_order_in_named_folders(sweep, fakes, tmp_path):
    assert sweep(*GRID, "sweep_name=grid") == 0
    folder = tmp_path / "multirun" / "grid"
    assert folders(folder) == [
        "000_none_1gpu",
        "001_none_2gpus",
        "002_data_parallel_1gpu",
        "003_data_parallel_2gpus",
    ]
    cells = [call["sweep"] for call in fakes.calls]
    assert [(cell.sweep_id, cell.index, cell.count) for cell in cells] == [("grid", i, 4) for i in range(4)]
    assert [call["folder"] for call in fakes.calls] == [folder / name for name in folders(folder)]
    assert [call["config"].gpus for call in fakes.calls] == [[0], [0, 1], [0], [0, 1]]
    assert fakes.calls[1]["overrides"] == ["parallelism=none", "gpus=[0,1]", "sweep_name=grid"]
    for name in folders(folder):
        assert {path.name for path in (folder / name / ".hydra").iterdir()} == {
            "config.yaml",
            "hydra.yaml",
            "overrides.yaml",
        }
    assert [len(table) for table in fakes.tables] == [4]


def test_sweep_json_is_kept_up_to_date(sweep, fakes, tmp_path):
    sweep(*GRID, "sweep_name=grid")
    assert [cell["outcome"] for cell in fakes.at_call[0]["cells"]] == [None] * 4
    assert [cell["outcome"] for cell in fakes.at_call[2]["cells"]] == ["finished", "finished", None, None]
    assert fakes.at_call[2]["ended"] is None
    document = sweep_file(tmp_path / "multirun" / "grid")
    assert (document["sweep_id"], document["name"]) == ("grid", "grid")
    assert document["started"] <= document["ended"]
    assert document["cells"][3] == {
        "index": 3,
        "overrides": ["parallelism=data_parallel", "gpus=[0,1]", "sweep_name=grid"],
        "folder": "003_data_parallel_2gpus",
        "outcome": "finished",
        "name": "tiny data_parallel",
        "message": "",
        "metrics": {"latency/step_ms": 2.0},
    }


def test_without_a_name_a_sweep_is_called_by_its_time(sweep, fakes, tmp_path):
    assert sweep("-m", "seed=1,2") == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    assert folder.name[:2] == "20" and not set("[], :") & set(folder.name)
    assert folders(folder) == ["000_none_1gpu", "001_none_1gpu"]
    assert {call["sweep"].sweep_id for call in fakes.calls} == {folder.name}


def test_the_named_sweeps(sweep, fakes, tmp_path):
    assert sweep("+sweep=modes") == 0
    modes = [call["config"].parallelism.mode for call in fakes.calls]
    assert modes == ["none", "data_parallel", "distributed", "block_distribution"]
    (folder,) = (tmp_path / "multirun").iterdir()
    assert folder.name.startswith("modes_20")
    assert folders(folder)[3] == "003_block_distribution_all_gpus"
    assert {call["config"].sweep_name for call in fakes.calls} == {folder.name}
    fakes.calls.clear()
    assert sweep("+sweep=gpu_count") == 0
    assert [(call["config"].parallelism.mode, call["config"].gpus) for call in fakes.calls] == [
        ("data_parallel", [0]),
        ("data_parallel", [0, 1]),
    ]


def test_a_named_sweep_can_be_changed_on_the_command_line(sweep, fakes):
    assert sweep("+sweep=gpu_count", "gpus=[0],[0,1],[0,1,2,3]", "parallelism=block_distribution") == 0
    assert [len(call["config"].gpus) for call in fakes.calls] == [1, 2, 4]
    assert {call["config"].parallelism.mode for call in fakes.calls} == {"block_distribution"}


def test_a_sweep_over_models_brings_each_its_video(sweep, fakes):
    assert sweep("-m", "model=tiny,wan2.1_t2v_1.3b") == 0
    assert [call["config"].video.name for call in fakes.calls] == ["tiny", "480p"]


def test_experiments_can_be_swept(sweep, fakes):
    assert sweep("-m", "+experiment=quick_blocks,train_tiny", "seed=1,2") == 0
    assert [call["config"].workload.name for call in fakes.calls] == ["denoise", "denoise", "train", "train"]


@pytest.mark.parametrize(
    ("endings", "code"),
    [({0: "skipped"}, 0), ({1: "oom"}, 1), ({0: "failed", 1: "inexact"}, 1), ({1: "infeasible"}, 1)],
)
def test_a_sweep_goes_on_and_its_exit_code_tells(sweep, fakes, endings, code):
    fakes.endings = endings
    assert sweep("-m", "seed=1,2,3") == code
    assert len(fakes.calls) == 3


def test_a_cell_with_an_invalid_config_fails_alone(sweep, fakes, tmp_path, capsys):
    assert sweep("-m", "seed=-1,2", "sweep_name=s") == 1
    assert [call["config"].seed for call in fakes.calls] == [2]
    record = read_record(tmp_path / "multirun" / "s" / "000_none_1gpu")
    assert (record.outcome, record.message, record.sweep_id) == ("failed", "seed is -1; write 0 or more", "s")
    assert record.requested["seed"] == -1 and record.overrides == ["seed=-1", "sweep_name=s"]
    assert (tmp_path / "multirun" / "s" / "000_none_1gpu" / ".hydra" / "config.yaml").exists()
    cells = sweep_file(tmp_path / "multirun" / "s")["cells"]
    assert [cell["outcome"] for cell in cells] == ["failed", "finished"]
    assert [record.outcome for record in fakes.tables[0]] == ["failed", "finished"]
    assert capsys.readouterr().err == ""


def test_an_invalid_number_does_not_break_the_record(sweep, tmp_path):
    assert sweep("-m", "limits.run_s=inf,10", "sweep_name=s") == 1
    assert (
        read_record(tmp_path / "multirun" / "s" / "000_none_1gpu").requested["limits"]["run_s"] == "Infinity"
    )


@pytest.mark.parametrize(
    "error", [UserError("no such device"), LayoutError("too many"), RuntimeError("ours")]
)
def test_an_error_in_a_cell_does_not_end_the_sweep(sweep, fakes, tmp_path, error):
    fakes.endings = {0: error}
    assert sweep("-m", "seed=1,2", "sweep_name=s") == 1
    record = read_record(tmp_path / "multirun" / "s" / "000_none_1gpu")
    assert record.outcome == "failed" and str(error) in record.message
    assert (record.error is not None) == isinstance(error, RuntimeError)
    assert len(fakes.calls) == 2


@pytest.mark.parametrize("ending", ["interrupted", KeyboardInterrupt()])
def test_ctrl_c_stops_the_rest_and_keeps_what_there_is(sweep, fakes, tmp_path, ending):
    fakes.endings = {1: ending}
    assert sweep("-m", "seed=1,2,3", "sweep_name=s", "hydra.sweeper.max_batch_size=2") == 130
    assert len(fakes.calls) == 2
    document = sweep_file(tmp_path / "multirun" / "s")
    assert [cell["outcome"] for cell in document["cells"]] == ["finished", "interrupted"]
    assert document["ended"]
    assert [len(table) for table in fakes.tables] == [2]


def test_batches_of_cells_make_one_sweep(sweep, fakes, tmp_path):
    assert sweep("-m", "seed=1,2,3", "sweep_name=s", "hydra.sweeper.max_batch_size=2") == 0
    assert [cell["index"] for cell in sweep_file(tmp_path / "multirun" / "s")["cells"]] == [0, 1, 2]
    assert [len(table) for table in fakes.tables] == [3]


def test_a_sweep_does_not_write_over_another(sweep, fakes, tmp_path, capsys):
    assert sweep("-m", "seed=1,2", "sweep_name=s") == 0
    before = sweep_file(tmp_path / "multirun" / "s")
    assert sweep("-m", "seed=3,4", "sweep_name=s") == 2
    assert "already holds a sweep; write another sweep_name" in capsys.readouterr().err
    assert sweep_file(tmp_path / "multirun" / "s") == before
    assert len(fakes.calls) == 2


def test_exit_codes():
    assert sweep_exit_code([]) == 0
    assert sweep_exit_code(["finished", "skipped"]) == 0
    assert sweep_exit_code(["finished", "timeout"]) == 1
    assert sweep_exit_code(["failed", "interrupted"]) == 130
