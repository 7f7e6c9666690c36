"""Sweeps: composed by Hydra, run by the launcher, their folders and sweep.json. The runner is replaced."""

import errno
import json
import re
import shutil
import sys
from types import ModuleType

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from tests.hardware.fake_nvml import gpu_device
from wanexp import __main__ as program
from wanexp.config import MODES, conf_dir, to_dict
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.telemetry import ForeignProcess
from wanexp.record import Record, read_record
from wanexp.sweep import sweep_name_of
from wanexp.sweep.files import FolderLock
from wanexp.sweep.forecast import Forecast
from wanexp.sweep.launcher import sweep_exit_code
from wanexp.sweep.plugin import gpu_counts
from wanexp.tracking.mlflow_store import Tracked


class Fakes:
    """In the place of wanexp.runner and wanexp.terminal.console. endings: by cell number, default finished."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.tables: list[list[Record]] = []
        self.endings: dict[int, str | BaseException] = {}
        self.at_call: list[dict] = []
        self.writes = False
        self.cut_off: set[int] = set()  # cells that Ctrl-C ends when their record is written

    def run(self, config, *, folder, overrides, sweep=None):
        self.calls.append({"config": config, "folder": folder, "overrides": overrides, "sweep": sweep})
        self.at_call.append(json.loads((folder.parent / "sweep.json").read_text()))
        ending = self.endings.get(sweep.index, "finished")
        if isinstance(ending, BaseException):
            raise ending
        record = Record("id", f"{config.model.name} {config.parallelism.mode}", "now", to_dict(config))
        record.run_id = f"id {len(self.calls)}" if self.writes else "id"
        record.outcome = ending
        record.metrics = {"latency/step_ms": 2.0, "other": 1.0}
        if self.writes:
            record.write(folder)
        if sweep.index in self.cut_off:
            raise KeyboardInterrupt
        return record


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    fakes = Fakes()
    runner, console = ModuleType("wanexp.runner"), ModuleType("wanexp.terminal.console")
    vars(runner)["run"] = fakes.run

    class Console:
        def sweep_table(self, records):
            fakes.tables.append(list(records))

    vars(console)["Console"] = Console
    monkeypatch.setattr("wanexp.report.compose.draw", lambda *_: [])  # figures take seconds
    no_summary = Tracked(None, [])  # a database takes seconds too
    monkeypatch.setattr("wanexp.report.summary.track_summary", lambda *_: no_summary)
    monkeypatch.setitem(sys.modules, "wanexp.runner", runner)
    monkeypatch.setitem(sys.modules, "wanexp.terminal.console", console)
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
    """Of the runs; the report's figures lie beside them."""
    return sorted(item.name for item in path.iterdir() if item.is_dir() and item.name != "figures")


def sweep_file(path):
    return json.loads((path / "sweep.json").read_text())


GRID = ["-m", "parallelism=data_parallel,distributed", "gpus=[0],[0,1]", "sweep_order=given", "hardware=cpu"]


def test_a_grid_runs_in_order_in_named_folders(sweep, fakes, tmp_path):
    assert sweep(*GRID, "sweep_name=grid") == 0
    folder = tmp_path / "multirun" / "grid"
    assert folders(folder) == [
        "000_data_parallel_1gpu",
        "001_data_parallel_2gpus",
        "002_distributed_1gpu",
        "003_distributed_2gpus",
    ]
    cells = [call["sweep"] for call in fakes.calls]
    assert [(cell.index, cell.count) for cell in cells] == [(i, 4) for i in range(4)]
    assert {cell.sweep_id for cell in cells} == {sweep_file(folder)["sweep_id"]}
    assert [call["folder"] for call in fakes.calls] == [folder / name for name in folders(folder)]
    assert [call["config"].gpus for call in fakes.calls] == [[0], [0, 1], [0], [0, 1]]
    assert fakes.calls[1]["overrides"] == [
        "parallelism=data_parallel",
        "gpus=[0,1]",
        "sweep_order=given",
        "hardware=cpu",
        "sweep_name=grid",
    ]
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
    assert re.fullmatch(r"grid-[0-9a-f]{6}", document["sweep_id"])
    assert (document["name"], document["state"]) == ("grid", "finished")
    assert document["started"] <= document["ended"]
    entry = document["cells"][3]
    assert len(entry.pop("cell")) == 16 and entry.pop("predicted_s") > 0 and entry.pop("seconds") >= 0
    assert entry == {
        "index": 3,
        "repeat": 1,
        "overrides": [
            "parallelism=distributed", "gpus=[0,1]", "sweep_order=given", "hardware=cpu", "sweep_name=grid"
        ],
        "folder": "003_distributed_2gpus",
        "outcome": "finished",
        "reason": "",
        "name": "tiny distributed",
        "run_id": "id",
        "kept": False,
        "warnings": [],
        "metrics": {"latency/step_ms": 2.0},
    }  # fmt: skip
    own = json.loads((tmp_path / "multirun" / "grid" / "003_distributed_2gpus" / "cell.json").read_text())
    assert own.pop("cell") and own == {key: entry[key] for key in ("index", "repeat", "overrides")}
    progress = json.loads((tmp_path / "multirun" / "grid" / "progress.json").read_text())
    assert (progress["state"], progress["counts"]["finished"], progress["current"]) == ("finished", 4, None)
    assert progress["sweep_id"] == document["sweep_id"]


def test_without_a_name_a_sweep_is_called_by_its_time(sweep, fakes, tmp_path):
    assert sweep("-m", "seed=1,2") == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    assert folder.name[:2] == "20" and not set("[], :") & set(folder.name)
    assert folders(folder) == ["000_none_1gpu", "001_none_1gpu"]
    (sweep_id,) = {call["sweep"].sweep_id for call in fakes.calls}
    assert sweep_name_of(sweep_id) == folder.name


def test_the_named_sweeps(sweep, fakes, tmp_path):
    assert sweep("+sweep=modes", "sweep_order=given", "hardware=cpu", "gpus=[0,1,2,3]") == 0
    asked = [call["config"].parallelism for call in fakes.calls]
    assert asked[0].mode == "none" and {parallelism.mode for parallelism in asked} == set(MODES)
    assert all(asked.count(parallelism) == 1 for parallelism in asked)
    (folder,) = (tmp_path / "multirun").iterdir()
    assert folder.name == "modes_tiny", "the same command finds it again"
    assert folders(folder)[3:5] == [
        "003_block_distribution_4gpus",
        "004_block_distribution_interleaved_4gpus",
    ]
    assert {call["config"].sweep_name for call in fakes.calls} == {folder.name}


def test_mode_none_is_the_baseline_whatever_gpus_are_named(sweep, fakes, tmp_path):
    words = [
        "-m",
        "parallelism=none,data_parallel",
        "gpus=[1,0]",
        "hardware=cpu",
        "tracking=none",
        "sweep_name=s",
    ]
    fakes.writes = True
    assert sweep(*words) == 0
    folder = tmp_path / "multirun" / "s"
    assert folders(folder)[:2] == ["000_none_1gpu", "001_data_parallel_2gpus"]
    assert read_record(folder / "000_none_1gpu").requested["gpus"] == [1, 0]
    assert [entry["outcome"] for entry in sweep_file(folder)["cells"]] == ["finished"] * 2
    fakes.calls.clear()
    assert sweep(*words, "resume=true") == 0
    assert not fakes.calls and all(entry["cell"] for entry in sweep_file(folder)["cells"])


def test_what_comes_to_the_layout_of_an_earlier_cell_is_skipped(sweep, fakes, tmp_path):
    words = [
        "-m",
        "parallelism=none,cfg_parallel,hybrid,data_parallel,distributed",
        "gpus=[0,1]",
        "hardware=cpu",
    ]
    assert sweep(*words, "tracking=none", "sweep_name=s", "sweep_order=given", "repeats=2") == 0
    reasons = {entry["folder"]: entry["reason"] for entry in sweep_file(tmp_path / "multirun" / "s")["cells"]}
    assert reasons.pop("002_hybrid_2gpus") == "same layout as 001_cfg_parallel_2gpus"
    assert set(reasons.values()) == {""} and len(reasons) == 8, "replicas are not all alike"
    assert (
        sweep(
            *words[:1], "parallelism=cfg_parallel,hybrid", "gpus=[0,1],[1,0]", "hardware=cpu", "tracking=none"
        )
        == 0
    )
    assert len(fakes.calls) == 8 + 2, "other devices are another layout"


def test_scaling_takes_as_many_devices_as_there_are(sweep, fakes, tmp_path):
    assert sweep("+sweep=scaling", "hardware=cpu", "hardware.num_devices=3", "parallelism=data_parallel") == 0
    assert [call["config"].gpus for call in fakes.calls] == [[0], [0, 1], [0, 1, 2]]
    fakes.calls.clear()
    assert sweep("+sweep=scaling", "hardware=cpu", "gpus=[1],[2]", "parallelism=none", "sweep_name=s") == 0
    assert [call["config"].gpus for call in fakes.calls] == [[1], [2]]
    assert [gpu_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "sweep").glob("*.yaml")))
def test_every_sweep_file_gives_valid_cells_in_a_folder_named_after_it(sweep, fakes, tmp_path, name):
    fakes.endings = dict.fromkeys(range(99), KeyboardInterrupt())  # all are composed before the first is run
    assert sweep(f"+sweep={name}", "hardware=cpu", "hardware.num_devices=2") == 130
    (folder,) = (tmp_path / "multirun").iterdir()
    cells = sweep_file(folder)["cells"]
    assert folder.name.startswith(name) and len(cells) >= 4
    assert all(entry["cell"] for entry in cells)


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
    assert sweep("-m", "seed=-1,2", "sweep_name=s", "tracking=none") == 1
    assert [call["config"].seed for call in fakes.calls] == [2]
    record = read_record(tmp_path / "multirun" / "s" / "000_none_1gpu")
    assert (record.outcome, record.message) == ("failed", "seed is -1; write 0 or more")
    assert record.sweep_id == sweep_file(tmp_path / "multirun" / "s")["sweep_id"]
    assert record.requested["seed"] == -1 and record.overrides == ["seed=-1", "sweep_name=s", "tracking=none"]
    assert (tmp_path / "multirun" / "s" / "000_none_1gpu" / ".hydra" / "config.yaml").exists()
    cells = sweep_file(tmp_path / "multirun" / "s")["cells"]
    assert [cell["outcome"] for cell in cells] == ["failed", "finished"]
    assert [record.outcome for record in fakes.tables[0]] == ["failed", "finished"]
    assert capsys.readouterr().err == ""


def test_a_mistake_that_leaves_nothing_to_run_is_one_line_and_no_sweep(sweep, fakes, tmp_path, capsys):
    words = ["-m", "parallelism=none,cfg_parallel", "gpus=[0]", "hardware=cpu", "sweep_name=s"]
    assert sweep(*words, "checkpoint=/nope") == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint at /nope")
    assert not fakes.calls and not (tmp_path / "multirun" / "s").exists()
    assert sweep(*words) == 0, "the command put right is not refused"


def test_a_mistake_in_some_cells_fails_those_alone(sweep, fakes, tmp_path):
    words = [
        "-m",
        "gpus=[0],[0,9]",
        "parallelism=data_parallel",
        "hardware=cpu",
        "tracking=none",
        "sweep_name=s",
    ]
    assert sweep(*words) == 1
    entries = {entry["folder"]: entry for entry in sweep_file(tmp_path / "multirun" / "s")["cells"]}
    failed = entries["001_data_parallel_2gpus"]
    assert failed["outcome"] == "failed" and "there is no device 9" in failed["reason"]
    assert read_record(tmp_path / "multirun" / "s" / failed["folder"]).requested["gpus"] == [0, 9]
    assert len(fakes.calls) == 1


def test_an_invalid_number_does_not_break_the_record(sweep, tmp_path):
    assert sweep("-m", "limits.run_s=inf,10", "sweep_name=s", "tracking=none") == 1
    assert (
        read_record(tmp_path / "multirun" / "s" / "000_none_1gpu").requested["limits"]["run_s"] == "Infinity"
    )


@pytest.mark.parametrize(
    "error", [UserError("no such device"), LayoutError("too many"), RuntimeError("ours")]
)
def test_an_error_in_a_cell_does_not_end_the_sweep(sweep, fakes, tmp_path, error):
    fakes.endings = {0: error}
    assert sweep("-m", "seed=1,2", "sweep_name=s") == int(not isinstance(error, LayoutError))
    record = read_record(tmp_path / "multirun" / "s" / "000_none_1gpu")
    assert record.outcome == ("skipped" if isinstance(error, LayoutError) else "failed")
    assert str(error) in record.message
    assert (record.error is not None) == isinstance(error, RuntimeError)
    assert len(fakes.calls) == 2


@pytest.mark.parametrize("ending", ["interrupted", KeyboardInterrupt()])
def test_ctrl_c_stops_the_rest_and_keeps_what_there_is(sweep, fakes, tmp_path, ending):
    fakes.endings = {1: ending}
    assert sweep("-m", "seed=1,2,3", "sweep_name=s", "hydra.sweeper.max_batch_size=2") == 130
    assert len(fakes.calls) == 2
    document = sweep_file(tmp_path / "multirun" / "s")
    assert [cell["outcome"] for cell in document["cells"]] == ["finished", "interrupted"]
    assert document["ended"] and document["state"] == "interrupted"
    assert [len(table) for table in fakes.tables] == [2]


def test_ctrl_c_while_mlflow_is_written_leaves_the_record_as_it_is(sweep, fakes, tmp_path):
    fakes.writes, fakes.cut_off = True, {1}
    assert sweep("-m", "seed=1,2,3", "sweep_name=s", "tracking=none") == 130
    document = sweep_file(tmp_path / "multirun" / "s")
    assert [cell["outcome"] for cell in document["cells"]] == ["finished", "finished", None]
    assert document["state"] == "interrupted"
    record = read_record(tmp_path / "multirun" / "s" / "001_none_1gpu")
    assert (record.run_id, record.metrics["latency/step_ms"]) == ("id 2", 2.0)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOLCK, "No locks available"), 1, "error: the sweep stopped: No locks available\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_sweep_that_ends_before_its_first_run_says_so(sweep, fakes, monkeypatch, capsys, error, code, said):
    def lock(folder):
        raise error

    monkeypatch.setattr("wanexp.sweep.files.FolderLock", lock)
    assert sweep("-m", "seed=1,2", "sweep_name=s") == code
    assert capsys.readouterr().err == said
    assert fakes.calls == []


def test_of_two_sweeps_that_begin_at_once_the_second_leaves_the_folder(sweep, fakes, monkeypatch, tmp_path):
    def lock(folder):
        (folder / "000_none_1gpu").mkdir()  # the other has begun
        raise UserError("a sweep is running in it")

    monkeypatch.setattr("wanexp.sweep.files.FolderLock", lock)
    assert sweep("-m", "seed=1,2", "sweep_name=s") == 2
    assert (tmp_path / "multirun" / "s" / "000_none_1gpu").exists()


@pytest.mark.parametrize("name", ["sweep.json", ".lock"])
def test_a_mistake_removes_no_folder_that_another_sweep_uses_by_then(
    sweep, fakes, monkeypatch, tmp_path, name
):
    def schedule(*_, **__):
        (tmp_path / "multirun" / "s" / name).write_text("{}")  # of a sweep that began since `setup`
        raise UserError("a mistake")

    monkeypatch.setattr("wanexp.sweep.launcher.schedule", schedule)
    assert sweep("-m", "seed=1,2", "sweep_name=s") == 2
    assert (tmp_path / "multirun" / "s" / name).exists()
    assert (tmp_path / "multirun" / "s" / "multirun.yaml").exists()


def test_a_fault_of_our_own_between_two_runs_is_no_finished_sweep(sweep, fakes, monkeypatch, tmp_path):
    def foreign_processes(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("wanexp.sweep.launcher.SweepLauncher._foreign_processes", foreign_processes)
    with pytest.raises(RuntimeError, match="a bug"):
        sweep("-m", "seed=1,2", "sweep_name=s", "hardware=cpu")
    kept = sweep_file(tmp_path / "multirun" / "s")
    assert (kept["state"], kept["reason"]) == ("stopped", "RuntimeError: a bug")


def test_a_sweep_without_a_name_says_how_to_go_on_with_it(sweep, fakes, tmp_path, capsys):
    fakes.endings, fakes.writes = {1: "interrupted"}, True
    words = ["-m", "seed=1,2,3", "hardware=cpu", "tracking=none"]
    assert sweep(*words) == 130
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "runs are missing" in line]
    fakes.endings = {}
    assert sweep(*words, *line.partition("repeat the command with ")[2].split()) == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    assert [cell["outcome"] for cell in sweep_file(folder)["cells"]] == ["finished"] * 3


def test_batches_of_cells_make_one_sweep(sweep, fakes, tmp_path):
    assert sweep("-m", "seed=1,2,3", "sweep_name=s", "hydra.sweeper.max_batch_size=2") == 0
    assert [cell["index"] for cell in sweep_file(tmp_path / "multirun" / "s")["cells"]] == [0, 1, 2]
    assert [len(table) for table in fakes.tables] == [3]


def test_a_sweep_does_not_write_over_another(sweep, fakes, tmp_path, capsys):
    assert sweep("-m", "seed=1,2", "sweep_name=s") == 0
    before = sweep_file(tmp_path / "multirun" / "s")
    assert sweep("-m", "seed=3,4", "sweep_name=s") == 2
    assert "already holds a sweep; add resume=true" in capsys.readouterr().err
    assert sweep_file(tmp_path / "multirun" / "s") == before
    assert len(fakes.calls) == 2


def test_two_sweeps_of_a_name_have_two_ids_and_a_resumed_one_keeps_its_own(sweep, fakes, tmp_path):
    words = ["-m", "seed=1,2", "sweep_name=s", "hardware=cpu", "tracking=none"]
    folder = tmp_path / "multirun" / "s"
    assert sweep(*words) == 0
    first = sweep_file(folder)["sweep_id"]
    shutil.rmtree(folder)
    fakes.endings, fakes.writes = {0: UserError("no")}, True
    assert sweep(*words) == 1
    second = sweep_file(folder)["sweep_id"]
    assert first != second and sweep_name_of(first) == sweep_name_of(second) == "s"
    assert sweep(*words, "resume=true") == 1
    (folder / "sweep.json").unlink()  # the record of the cell that failed has it too
    assert sweep(*words, "resume=true") == 1
    assert sweep_file(folder)["sweep_id"] == second
    older = sweep_file(folder) | {"sweep_id": "s"}
    (folder / "sweep.json").write_text(json.dumps(older))
    assert sweep(*words, "resume=true") == 1
    assert sweep_file(folder)["sweep_id"] == "s"


@pytest.mark.parametrize(
    ("subdir", "words"),
    [
        ("${parallelism.mode}", "error: cells 0 seed=0 and 1 seed=1 share the folder {sweep}/none; leave"),
        ("x/../${model.name}", "error: cells 0 seed=0 and 1 seed=1 share the folder {sweep}/tiny; leave"),
        (
            ".",
            "error: the folder of cell 0, {sweep}, is not right below {sweep}; leave hydra.sweep.subdir out",
        ),
        ("..", "error: the folder of cell 0, {sweep}/.., is not right below {sweep}; leave"),
        ("../x${seed}", "error: the folder of cell 0, {sweep}/../x0, is not right below"),
        ("/tmp/x${seed}", "error: the folder of cell 0, /tmp/x0, is not right below"),
        ("${parallelism.mode}/${seed}", "error: the folder of cell 0, {sweep}/none/0, is not right below"),
    ],
)
def test_each_cell_has_a_folder_of_its_own_in_the_sweeps(sweep, fakes, tmp_path, capsys, subdir, words):
    folder = tmp_path / "multirun" / "s"
    asked = ["-m", "seed=0,1", "sweep_name=s", "hardware=cpu", "tracking=none", "repeats=2"]
    assert sweep(*asked, f"hydra.sweep.subdir='{subdir}'") == 2
    err = capsys.readouterr().err
    assert err.startswith(words.format(sweep=folder)) and err.count("\n") == 1
    assert not fakes.calls and not folder.exists()


def test_cells_may_have_other_folders_than_ours(sweep, fakes, tmp_path):
    folder = tmp_path / "multirun" / "s"
    asked = ["-m", "seed=0,1", "sweep_name=s", "hardware=cpu", "tracking=none", "repeats=2"]
    assert sweep(*asked, "hydra.sweep.subdir='${hydra.job.num}_${parallelism.mode}'") == 0
    assert folders(folder) == ["0_none", "0_none_repeat2", "1_none", "1_none_repeat2"]


def test_a_batch_does_not_write_over_an_earlier_one(sweep, fakes, tmp_path, capsys):
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s", "hydra.sweeper.max_batch_size=1"]
    assert sweep(*words, "seed=0,1", "hydra.sweep.subdir='${parallelism.mode}'") == 1
    assert "the sweep stopped: cells 0 seed=0 and 1 seed=1 share the folder" in capsys.readouterr().err
    document = sweep_file(tmp_path / "multirun" / "s")
    assert (document["state"], len(document["cells"]), len(fakes.calls)) == ("stopped", 1, 1)


def test_a_later_batch_leaves_what_an_earlier_one_took_over(sweep, fakes, tmp_path):
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s", "hydra.sweeper.max_batch_size=1"]
    fakes.writes = True
    assert sweep(*words, "seed=1,2") == 0
    fakes.calls.clear()
    assert sweep(*words, "seed=2,1,3", "resume=true") == 0
    assert sweep(*words, "seed=2,3", "resume=true") == 0, "whose cell 1 has the number of one that is kept"
    assert sweep(*words, "seed=2,4", "resume=true") == 0
    records = {
        path.parent.name: read_record(path) for path in (tmp_path / "multirun" / "s").glob("*/record.json")
    }
    assert sorted(record.requested["seed"] for record in records.values()) == [1, 2, 3, 4]


def test_no_file_of_a_sweep_of_ours_has_the_password_of_the_store(sweep, fakes, tmp_path):
    fakes.writes, fakes.endings = True, {1: RuntimeError("ours")}
    words = ["-m", "seed=1,2", "sweep_name=s", "hardware=cpu", "tracking.enabled=false", "limits.run_s=1"]
    assert sweep(*words, "tracking.uri=http://bob:s3cret@host") == 1
    assert fakes.calls[0]["config"].tracking.uri == "http://bob:s3cret@host"
    assert sweep(*words, "tracking.uri=http://bob:other@host", "resume=true") == 1
    assert [call["config"].seed for call in fakes.calls] == [1, 2, 2], "a password makes no other cell"
    folder = tmp_path / "multirun" / "s"
    of_hydra = {".hydra", "multirun.yaml"}
    files = [path for path in folder.rglob("*") if path.is_file() and not of_hydra & set(path.parts)]
    assert {"sweep.json", "cell.json", "record.json", "runs.json"} <= {path.name for path in files}
    for path in files:
        text = path.read_text(errors="replace")
        assert "s3cret" not in text and "other@" not in text, path
    assert "tracking.uri=http://host" in sweep_file(folder)["command"]


def test_exit_codes():
    assert sweep_exit_code([]) == 0
    assert sweep_exit_code(["finished", "skipped"]) == 0
    assert sweep_exit_code(["finished", "timeout"]) == 1
    assert sweep_exit_code(["failed", "interrupted"]) == 130


def test_cheap_cells_run_first_and_repeats_are_interleaved(sweep, fakes, tmp_path):
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s", "video.num_frames=9,5", "repeats=2"]
    assert sweep(*words) == 0
    seen = [(call["config"].video.num_frames, call["sweep"].repeat) for call in fakes.calls]
    assert seen == [(5, 1), (9, 1), (5, 2), (9, 2)]
    cells = sweep_file(tmp_path / "multirun" / "s")["cells"]
    assert [cell["folder"] for cell in cells] == [
        "001_none_1gpu",
        "000_none_1gpu",
        "001_none_1gpu_repeat2",
        "000_none_1gpu_repeat2",
    ]
    assert cells[0]["cell"] == cells[2]["cell"] != cells[1]["cell"]
    assert [call["sweep"].cell for call in fakes.calls] == [cell["cell"] for cell in cells]
    assert [call["folder"].name for call in fakes.calls] == [cell["folder"] for cell in cells]


def test_what_is_bigger_than_a_cell_that_ran_out_of_memory_is_skipped(sweep, fakes, tmp_path):
    fakes.endings = {1: "oom"}
    words = ["-m", "hardware=cpu", "tracking=none", "video.num_frames=5,9,81", "repeats=2", "sweep_name=s"]
    assert sweep(*words) == 1
    cells = sweep_file(tmp_path / "multirun" / "s")["cells"]
    assert [cell["outcome"] for cell in cells] == [
        "finished",
        "oom",
        "skipped",
        "finished",
        "skipped",
        "skipped",
    ]
    assert "001_none_1gpu ran out of memory" in cells[2]["reason"] and "by the plan" in cells[2]["reason"]
    assert "the same cell, ran out" in cells[4]["reason"]
    record = read_record(tmp_path / "multirun" / "s" / "002_none_1gpu")
    assert record.outcome == "skipped" and record.requested["video"]["num_frames"] == 81
    assert sweep(*words, "force=true", "sweep_name=forced") == 1
    assert "skipped" not in {
        cell["outcome"] for cell in sweep_file(tmp_path / "multirun" / "forced")["cells"]
    }


def test_resume_runs_what_is_missing_or_not_finished(sweep, fakes, tmp_path):
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s"]
    fakes.endings = {1: "failed"}
    fakes.writes = True
    assert sweep(*words, "seed=1,2") == 1
    fakes.endings = {}
    fakes.calls.clear()
    assert sweep(*words, "seed=1,2,3", "resume=true") == 0
    assert [call["config"].seed for call in fakes.calls] == [2, 3]
    folder = tmp_path / "multirun" / "s"
    cells = sweep_file(folder)["cells"]
    assert [cell["kept"] for cell in cells] == [True, False, False]
    assert sorted(item.name for item in (folder / "replaced").iterdir()) == ["001_none_1gpu"]
    assert sweep(*words, "seed=1,2,3", "resume=true", "force=true") == 0
    assert len(fakes.calls) == 2, "a finished cell needs no force"
    assert [item.name for item in folder.glob("replaced/*/record.json")] == []
    fakes.calls.clear()
    assert sweep(*words, "seed=0,3", "resume=true") == 0
    assert [(call["config"].seed, call["folder"].name) for call in fakes.calls] == [
        (0, "000_none_1gpu_again")
    ]
    cells = {cell["folder"]: cell for cell in sweep_file(folder)["cells"]}
    assert len(cells) == 4 and all(cell["outcome"] == "finished" for cell in cells.values())
    assert cells["000_none_1gpu"]["index"] is None, "not asked for, and not lost"


def test_code_that_has_changed_is_measured_again(sweep, fakes, tmp_path, monkeypatch):
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s", "seed=1,2"]
    fakes.writes = True
    assert sweep(*words) == 0
    monkeypatch.setattr("wanexp.sweep.fingerprint.source_digest", lambda: "other")
    fakes.calls.clear()
    assert sweep(*words, "resume=true", "limits.run_s=9") == 0
    assert len(fakes.calls) == 2
    fakes.calls.clear()
    assert sweep(*words, "resume=true", "limits.run_s=10") == 0
    assert not fakes.calls, "a limit makes no other cell"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "seed=1,2", "resume=true"], "add sweep_name=NAME"),
        (["seed=1", "repeats=2"], "add -m"),
        (["seed=1", "resume=true", "sweep_name=s"], "add -m"),
        (["-m", "seed=1,2", "repeats=0"], "repeats is 0"),
        (["-m", "seed=1,2", "hydra.sweeper.max_batch_size=x"], "hydra.sweeper.max_batch_size=x"),
        (["-m", "seed=1,2", "sweep_order=fast"], "sweep_order 'fast' does not exist"),
    ],
)
def test_user_errors_are_one_line(sweep, fakes, capsys, arguments, words):
    assert sweep(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not fakes.calls


def test_two_sweeps_do_not_run_in_one_folder(sweep, fakes, tmp_path, capsys):
    folder = tmp_path / "multirun" / "s"
    folder.mkdir(parents=True)
    lock = FolderLock(folder)
    words = ["-m", "hardware=cpu", "tracking=none", "sweep_name=s", "seed=1,2"]
    assert sweep(*words, "resume=true") == 2
    assert "a sweep is running in" in capsys.readouterr().err and not fakes.calls
    lock.release()
    assert sweep(*words, "resume=true") == 0


def test_who_else_is_on_the_gpus_is_named_before_a_run(sweep, fakes, tmp_path, monkeypatch, capsys):
    somebody = ForeignProcess("gpu0", 7, "python", 3.0)
    monkeypatch.setattr("wanexp.hardware.telemetry.foreign_processes", lambda devices: [somebody])
    monkeypatch.setattr("wanexp.sweep.compose.Forecaster.__call__", lambda *_: Forecast((gpu_device(0),)))
    assert sweep("-m", "hardware=cpu", "tracking=none", "sweep_name=s", "seed=1,2") == 0
    assert capsys.readouterr().out.count("note: GPU 0 is also used by process 7 (python, 3.0 GiB)") == 2


def test_a_cell_is_composed_once(sweep, fakes, monkeypatch):
    composed = []
    compose = ConfigLoaderImpl.load_sweep_config

    def load_sweep_config(self, master_config, sweep_overrides):
        composed.append(sweep_overrides[-1])
        return compose(self, master_config, sweep_overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", load_sweep_config)
    assert sweep("-m", "hardware=cpu", "tracking=none", "sweep_name=s", "seed=1,2") == 0
    assert composed == ["seed=1", "seed=2"]


def test_another_launcher_is_not_handed_what_cannot_be_composed(sweep, fakes, capsys):
    assert sweep("-m", "hardware=cpu", "tracking=none", "hydra/launcher=basic", "seed=1,x") == 2
    assert "seed" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not fakes.calls
