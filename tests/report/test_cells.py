"""Cells from records: repeats grouped, names that tell them apart, what is absent, light memory."""

import json
from pathlib import Path

import pytest

from tests.report.made_up import record_of, scaling_sweep, write_sweep
from wanexp.config import MODES
from wanexp.errors import UserError
from wanexp.record import Record
from wanexp.report.cells import Run
from wanexp.report.collect import MAX_POINTS, lighten, make_cells, read_sweep
from wanexp.report.compose import compose
from wanexp.report.modes import STYLES
from wanexp.report.page import to_markdown


def cells_of(*records: Record):
    return make_cells([Run(record) for record in records])


def test_every_mode_has_a_style_of_its_own() -> None:
    assert set(STYLES) == set(MODES)
    for field in ("colour", "marker"):
        values = [getattr(style, field) for style in STYLES.values()]
        assert len(set(values)) == len(values)


def test_a_sweep_from_its_folder(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "s", scaling_sweep(2)))
    assert sweep.sweep_id == "s"
    by_label = {cell.label: cell for cell in sweep.cells}
    assert len(by_label) == len(sweep.cells) == 22
    assert len(by_label["context_parallel, 4 GPUs"].runs) == 2
    assert by_label["distributed, 8 GPUs"].outcome == "oom"
    skipped, waiting = by_label["cfg_parallel, 4 GPUs"], by_label["cfg_parallel, 8 GPUs"]
    assert (skipped.outcome, skipped.runs) == ("skipped", []) and "two devices" in skipped.reason
    assert waiting.outcome == "waiting"
    assert {cell.setting for cell in sweep.cells} == {"wan2.1_t2v_14b 480p"}
    assert by_label["fsdp, 4 GPUs"].kind == "throughput"
    assert by_label["fsdp, 4 GPUs"].videos_per_hour == pytest.approx(44.3, rel=0.02)
    assert by_label["none, 1 GPU"].capacity_gib("gpu0") == 139.8


def test_the_newer_sweep_json_is_read_too(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [record_of("none", 1)])
    document = json.loads((folder / "sweep.json").read_text())
    document["runs"] = document.pop("cells")
    document["runs"][1]["reason"] = document["runs"][1].pop("message")
    (folder / "sweep.json").write_text(json.dumps(document))
    assert [cell.outcome for cell in read_sweep(folder).cells] == ["finished", "skipped", "waiting"]
    assert "two devices" in read_sweep(folder).cells[1].reason


def test_a_record_that_is_gone_is_no_result(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [record_of("none", 1), record_of("fsdp", 2)], absent=False)
    next(folder.glob("0001_*/record.json")).unlink()
    sweep = read_sweep(folder)
    assert [(cell.mode, cell.outcome) for cell in sweep.cells] == [
        ("none", "finished"),
        ("fsdp", "no record"),
    ]
    assert "| no record |" in to_markdown(compose(sweep).blocks)


def test_a_repeat_that_is_missing_is_no_cell(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [record_of("none", 1), record_of("fsdp", 2)], absent=False)
    document = json.loads((folder / "sweep.json").read_text())
    first, second = document["cells"]
    missing = {"outcome": None, "repeat": 2}
    third = {"index": 2, "cell": "c", "overrides": ["parallelism=hybrid"], "folder": "2"}
    document["cells"] = [
        second | {"cell": "b"},  # cheap cells ran first
        first | {"cell": "a"},
        first | missing | {"cell": "a", "folder": "000_repeat2"},
        third | {"outcome": None},
        third | missing | {"folder": "2_repeat2"},
    ]
    (folder / "sweep.json").write_text(json.dumps(document | {"state": "interrupted"}))
    sweep = read_sweep(folder)
    assert [(cell.mode, cell.outcome) for cell in sweep.cells] == [
        ("none", "finished"),
        ("fsdp", "finished"),
        ("hybrid", "waiting"),
    ]


def test_a_tree_without_sweep_json(tmp_path: Path) -> None:
    for index, mode in enumerate(("none", "data_parallel")):
        (tmp_path / "runs" / str(index)).mkdir(parents=True)
        record_of(mode, 1).write(tmp_path / "runs" / str(index))
    assert [cell.mode for cell in read_sweep(tmp_path / "runs").cells] == ["none", "data_parallel"]


def test_unreadable_sweeps_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        read_sweep(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no record\.json"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        read_sweep(tmp_path)


def test_labels_name_what_varies() -> None:
    records = [record_of("none", 1, attention=kernel) for kernel in ("sdpa_math", "sdpa_flash")]
    assert [c.label for c in cells_of(*records)] == [
        "none, 1 GPU, attention=sdpa_math",
        "none, 1 GPU, attention=sdpa_flash",
    ]


def test_every_option_of_a_label_stands_by_itself() -> None:
    blocks = {"mode": "block_distribution", "block_placement": "contiguous"}
    spread = blocks | {"block_placement": "interleaved"}
    records = [
        record_of("block_distribution", 2, attention="sdpa_math", parallelism=blocks),
        record_of("block_distribution", 2, attention="sdpa_flash", parallelism=spread),
    ]
    assert [c.label for c in cells_of(*records)] == [
        "block_distribution, 2 GPUs, contiguous, attention=sdpa_math",
        "block_distribution, 2 GPUs, interleaved, attention=sdpa_flash",
    ]


def test_a_label_is_silent_on_what_is_not_set() -> None:
    records = [record_of("none", 1, workload={"name": "denoise", "batch_size": size}) for size in (None, 2)]
    records[1].effective["batch_size"] = 2
    cells = cells_of(*records)
    assert [c.label for c in cells] == ["none, 1 GPU", "none, 1 GPU, batch_size=2"]
    assert [c.kind for c in cells] == ["latency", "throughput"], "its steps are of two samples"


def test_the_objective_makes_another_cell_only_where_the_planner_chose() -> None:
    named = [record_of("fsdp", 2, objective=name) for name in ("latency", "throughput")]
    assert [c.label for c in cells_of(*named)] == ["fsdp, 2 GPUs"]
    planned = [
        record_of("fsdp", 2, objective=name, parallelism={"mode": "auto"})
        for name in ("memory", "throughput")
    ]
    for record in planned:
        record.effective["mode"] = "fsdp"
    found = cells_of(*named, *planned)
    assert [c.label for c in found] == [
        "fsdp, 2 GPUs",
        "fsdp, 2 GPUs, objective=memory",
        "fsdp, 2 GPUs, objective=throughput",
    ]
    assert {c.options for c in found} == {""}  # so that all are compared with the same mode none


def test_layouts_are_named_by_the_degrees_that_ran() -> None:
    def cell(mode: str, **degrees: int) -> Record:
        record = record_of("context_parallel", 4, parallelism={"mode": mode, **degrees, "ulysses": -1})
        record.effective |= {"mode": mode, "layout": {"dp": 1, "cfg": 1, **degrees}}
        return record

    plain, tp = cell("context_parallel", ulysses=4), cell("tensor_parallel", tp=4)
    both, replicas = cell("context_parallel", ring=2, ulysses=2), cell("hybrid", dp=2, ulysses=2)
    found = cells_of(record_of("none", 1), plain, tp, both, replicas)
    assert [c.label for c in found] == [
        "none, 1 GPU",
        "context_parallel, 4 GPUs, ulysses=4",
        "tensor_parallel, 4 GPUs",
        "context_parallel, 4 GPUs, ring=2 x ulysses=2",
        "hybrid, 4 GPUs, dp=2 x ulysses=2",
    ]
    assert [c.kind for c in found] == ["latency"] * 4 + ["throughput"]


def test_what_varies_between_settings_alone_is_not_named() -> None:
    records = [record_of("none", 1), record_of("none", 1, num_steps=9, video={"name": "720p"})]
    assert [c.label for c in cells_of(*records)] == ["none, 1 GPU"] * 2


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        (
            {"video": {"name": "480p", "width": 832, "height": 480, "num_frames": 33}},
            ["832x480x81", "832x480x33"],
        ),
        ({"workload": {"name": "denoise", "guidance_scale": [1.0]}}, ["guided", "not guided"]),
        (
            {"model": {"name": "wan2.1_t2v_14b", "guidance_scale": [5.0], "architecture": {"num_layers": 4}}},
            ["num_layers=40", "num_layers=4"],
        ),
    ],
)
def test_other_work_under_the_same_names_is_another_setting(changed, settings) -> None:
    whole = {"model": {"name": "wan2.1_t2v_14b", "guidance_scale": [5.0], "architecture": {"num_layers": 40}}}
    records = [
        record_of(mode, n, **what)
        for what in (whole, whole | changed)
        for mode, n in (("none", 1), ("fsdp", 2))
    ]
    cells = cells_of(*records)
    assert [cell.setting for cell in cells] == [
        f"wan2.1_t2v_14b 480p {text}" for text in settings for _ in range(2)
    ]
    assert [cell.label for cell in cells] == ["none, 1 GPU", "fsdp, 2 GPUs"] * 2
    assert {cell.setting for cell in cells_of(*records[:2])} == {"wan2.1_t2v_14b 480p"}, (
        "of one work nothing is said"
    )


def test_cells_of_one_name_are_told_apart_by_their_gpus() -> None:
    first, second = record_of("none", 1), record_of("none", 1, gpus=[1])
    second.effective["devices"][0]["label"] = "gpu1"
    assert [c.label for c in cells_of(first, second)] == ["none, 1 GPU, gpu0", "none, 1 GPU, gpu1"]
    assert [c.options for c in cells_of(first, second)] == ["", ""]  # so that one is compared with the other


def test_skipped_cells_of_one_mode_are_told_apart_by_what_was_asked() -> None:
    records = [record_of("context_parallel", 1, outcome="skipped") for _ in range(2)]
    for record, name in zip(records, ("ulysses", "ring"), strict=True):
        record.effective.pop("layout", None)
        asked = {"dp": 1, "ring": 1, "ulysses": 1} | {name: -1}
        record.requested["parallelism"] = dict(record.requested["parallelism"]) | asked
    assert [c.label.rpartition(", ")[2] for c in cells_of(*records)] == ["ulysses", "ring"]


def test_a_cell_that_did_not_run_is_not_named_by_what_all_cells_share() -> None:
    run, entry = record_of("none", 1), {"overrides": ["parallelism=fsdp", "gpus=[0,1]", "tracking=none"]}
    run.overrides[:] = ["parallelism=none", "tracking=none"]
    assert make_cells([Run(run)], [entry])[1].label == "fsdp, 2 GPUs"


def test_where_results_go_makes_no_other_cell() -> None:
    records = [record_of("none", 1, sweep_name=name, tracking={"uri": name}) for name in ("a", "b")]
    (cell,) = cells_of(*records)
    assert len(cell.runs) == 2


def test_one_finished_run_is_enough() -> None:
    (cell,) = cells_of(record_of("none", 1, outcome="timeout"), record_of("none", 1, repeat=1))
    assert (cell.outcome, len(cell.steps_ms), cell.reason) == ("finished", 1, "")


def test_telemetry_that_nobody_draws_is_dropped() -> None:
    record = record_of("none", 1)
    record.telemetry = {
        "gpu0/power_w": [[0.0, 1.0]] * 9,
        "gpu0/memory_used_gib": [[float(i), 1.0] for i in range(99_999)],
    }
    light = lighten(record)
    assert list(light.telemetry) == ["gpu0/memory_used_gib"]
    assert len(light.telemetry["gpu0/memory_used_gib"]) == MAX_POINTS


def test_a_record_with_nothing_in_it() -> None:
    (cell,) = cells_of(Record(run_id="r", name="n", started="", requested={}))
    assert (cell.label, cell.outcome, cell.interval, cell.peak_gib) == ("n", "failed", None, None)
    assert cell.videos_per_hour is None
