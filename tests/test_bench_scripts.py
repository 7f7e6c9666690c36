"""scripts/bench_floor.py, bench_peers.py and bench_layouts.py, as far as they go without a GPU and without xDiT."""
# ruff: noqa: E402

import argparse
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from wanexp.config import MODES, HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware.devices import find_devices
from wanexp.planning.planner import profile_devices
from wanexp.record import Record
from wanexp.report.collect import read_sweep
from wanexp.wan.architecture import WanArchitecture

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # they are no package

import bench_floor
import bench_peers
import layouts_study
import layouts_table
import peer_models
import peer_run
import peer_table
from bench_case import Case, parse_case
from peer_budget import expected_seconds, num_rounds
from peer_models import CONTENDERS, Inputs
from peer_table import GOALS, Goal, Result, find, goal_cells, paired_ratio, result_of

WAN_14B = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
SMALL = WanArchitecture(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=64, freq_dim=64)


# --- cases and what they may cost ---


def test_a_case_is_read_from_its_text():
    assert parse_case("wan2.1_t2v_14b:480p:2") == Case("wan2.1_t2v_14b", "480p", 2)
    assert parse_case("tiny:tiny") == Case("tiny", "tiny", 1)
    case = parse_case("wan2.1_t2v_14b:480p")
    assert case.num_tokens == 32_760
    assert case.latent_shape == (16, 21, 60, 104)
    assert case.flops == pytest.approx(1.678e15, rel=2e-3)


@pytest.mark.parametrize("text", ["tiny", "tiny:", ":tiny", "tiny:tiny:two", "tiny:tiny:0"])
def test_a_text_that_is_no_case_is_refused(text):
    with pytest.raises(UserError, match="model:video:gpus"):
        parse_case(text)


def test_long_forwards_get_fewer_turns_but_never_fewer_than_an_interval_needs():
    assert num_rounds(flops=1.7e15, samples_per_round=1) == 4
    assert num_rounds(flops=6.5e15, samples_per_round=1) == 3
    assert num_rounds(flops=6.5e15, samples_per_round=2) * 2 >= 3


def test_the_expected_cost_counts_turns_gpus_and_compilation():
    ours, guided, peer = (CONTENDERS[name] for name in ("ours", "ours_cfg", "xdit"))

    def cost(contender, num_gpus, rounds=3):
        return expected_seconds(flops=6e14, num_gpus=num_gpus, contenders=[contender], rounds=rounds)

    assert cost(ours, 1, rounds=4) - cost(ours, 1) == pytest.approx(1.0)
    assert cost(ours, 1) - cost(ours, 2) == pytest.approx(2.0)  # half of four forwards of a second
    assert cost(guided, 2) == cost(ours, 1)
    assert cost(peer, 1) - cost(ours, 1) == pytest.approx(15.0)


def test_a_case_beyond_the_budget_or_the_gpus_is_not_begun(monkeypatch):
    devices = find_devices(HardwareConfig(name="cpu", device_type="cpu", num_devices=1))
    options = argparse.Namespace(devices=devices, contender=["ours"], rounds=None, budget_s=100.0)
    monkeypatch.setattr(peer_run, "elapsed", lambda _: 90.0)
    case = Case("wan2.1_t2v_14b", "480p", 1)
    assert "10 s of the budget were left" in peer_run.refusal(case, options)
    monkeypatch.setattr(peer_run, "elapsed", lambda _: 10.0)
    assert peer_run.refusal(case, options) is None
    assert "needs 2 GPUs, found 1" in peer_run.refusal(Case("tiny", "tiny", 2), options)


def test_sizes_between_one_gpu_and_all_are_refused():
    bench_peers.check_sizes([Case("tiny", "tiny", 1), Case("tiny", "tiny", 4)], 4)
    with pytest.raises(UserError, match="by itself"):
        bench_peers.check_sizes([Case("tiny", "tiny", 2), Case("tiny", "tiny", 4)], 4)


def test_an_unknown_contender_is_one_line(monkeypatch, capsys, tmp_path):
    arguments = ["bench_peers.py", "--contender", "nobody", "--out", str(tmp_path / "x.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench_peers.main() == 2
    assert "unknown contender 'nobody'; write one of: ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "advice"),
    [
        ("bench_floor.py", "write --device cpu --case tiny:tiny"),
        ("bench_kernels.py", "write TRITON_INTERPRET=1 before"),
        ("bench_loading.py", "write --device cpu"),
        ("bench_offload.py", "write --device cpu --tiny"),
        ("bench_rows.py", "write --device cpu --case tiny:tiny"),
        ("profile_exchanges.py", "write python -m torch.distributed.run"),
    ],
)
def test_a_script_that_lacks_its_gpus_is_one_line(script, advice, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("LOCAL_RANK", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    assert importlib.import_module(script.removesuffix(".py")).main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert advice in said
    assert said.count("\n") == 1


# --- the floor ---


def test_the_products_are_those_of_a_forward():
    tokens = 32_760
    for degree in (1, 2):
        total = sum(gemm.flops * gemm.times for gemm in bench_floor.gemms(WAN_14B, tokens, degree))
        linear = 2 * (tokens // degree) * (6 * 5120**2 + 2 * 5120 * 13824) * 40
        assert total == linear + 2 * 512 * 5120**2 * 2 * 40  # and k and v of the text


def test_the_floor_takes_the_fastest_exact_kernel():
    products = [
        {"dtype": "bf16", "seconds": 0.1, "times": 3},
        {"dtype": "bf16", "seconds": 0.2, "times": 1},
        {"dtype": "fp8", "seconds": 0.05, "times": 4},
    ]
    attention = {
        "self": [
            {"kernel": "sdpa_flash", "seconds": 0.3},
            {"kernel": "fa3", "seconds": 0.2},
            {"kernel": "fa3_fp8", "seconds": 0.1},
            {"kernel": "fa4", "seconds": None},
        ],
        "cross": [{"kernel": "sdpa_cudnn", "seconds": 0.01}],
    }
    floor = bench_floor.floor_of(products, attention, num_layers=2)
    assert floor["self_kernel"] == "fa3"
    assert floor["floor_s"] == pytest.approx(0.1 * 3 + 0.2 + 2 * (0.2 + 0.01))
    assert floor["fp8_self_kernel"] == "fa3_fp8"
    assert floor["fp8_floor_s"] == pytest.approx(0.05 * 4 + 2 * (0.1 + 0.01))


def test_a_floor_that_was_not_measured_is_none():
    attention = {"self": [{"kernel": "fa3", "seconds": None}], "cross": []}
    floor = bench_floor.floor_of([{"dtype": "bf16", "seconds": 0.1, "times": 1}], attention, 2)
    assert floor["gemm_s"] == pytest.approx(0.1)
    assert floor["floor_s"] is floor["attention_s"] is floor["self_kernel"] is floor["fp8_floor_s"] is None


def test_rows_are_rounded_to_float8_by_their_own_scale():
    x = torch.randn(8, 64) * torch.logspace(-3, 3, 8).unsqueeze(1)
    rounded, scale = bench_floor.to_fp8(x)
    back = rounded.float() * scale
    assert ((back - x).norm(dim=1) / x.norm(dim=1)).max() < 0.05


def test_the_floor_file_is_read_by_the_other_script(tmp_path):
    result = bench_floor.measure(
        [Case("tiny", "tiny")], [1, 2, 3], ["sdpa_flash"], device=torch.device("cpu"), warm_up_s=0.0
    )
    assert [floor["num_gpus"] for floor in result["floors"]] == [1, 2]  # 3 does not divide 4 heads
    assert "| tiny | tiny | 2 |" in bench_floor.table(result["floors"])
    (tmp_path / "floor.json").write_text(json.dumps(result))
    (device,) = find_devices(HardwareConfig(name="cpu", device_type="cpu", num_devices=1))
    floors = bench_peers.read_floors(tmp_path / "floor.json", device)
    assert floors["tiny", "tiny", 1] == pytest.approx(result["floors"][0]["floor_s"])
    (tmp_path / "floor.json").write_text(json.dumps(result | {"device": "NVIDIA H200"}))
    with pytest.raises(UserError, match="floor of NVIDIA H200, this is cpu"):
        bench_peers.read_floors(tmp_path / "floor.json", device)


# --- the models ---


@pytest.fixture(scope="module")
def weights():
    return peer_models.random_weights(SMALL, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 3, 8, 8, generator=generator).bfloat16()
    text = torch.randn(1, 512, 64, generator=generator).bfloat16()
    return Inputs(latent, torch.tensor([500.0]), text)


@torch.no_grad()
def test_ours_and_diffusers_give_the_same_flow(weights, inputs):
    flows = [
        peer_models.build(CONTENDERS[name], SMALL, weights, degree=1)(inputs).float()
        for name in ("ours", "diffusers_native")
    ]
    assert flows[0].shape == inputs.latent.shape
    assert (flows[0] - flows[1]).norm() / flows[0].norm() < 0.02  # both round to bf16, in other places


@torch.no_grad()
def test_other_weights_would_be_noticed(weights, inputs):
    ours = peer_models.build(CONTENDERS["ours"], SMALL, weights, degree=1)(inputs).float()
    other = dict(weights) | {"blocks.1.ffn.2.weight": -weights["blocks.1.ffn.2.weight"]}
    theirs = peer_models.build(CONTENDERS["diffusers_native"], SMALL, other, degree=1)(inputs).float()
    assert (ours - theirs).norm() / ours.norm() > peer_table.MAX_REL_L2


def test_the_models_share_the_weights_but_what_diffusers_keeps_in_fp32(weights):
    from diffusers import WanTransformer3DModel

    model = peer_models._diffusers_model(WanTransformer3DModel, SMALL, weights)
    state = model.state_dict()
    assert state["blocks.0.ffn.net.2.weight"].data_ptr() == weights["blocks.0.ffn.2.weight"].data_ptr()
    assert state["blocks.0.norm2.weight"].dtype == torch.float32
    assert state["condition_embedder.time_embedder.linear_1.weight"].dtype == torch.float32
    assert state["condition_embedder.time_proj.weight"].dtype == torch.bfloat16
    assert model.rope.freqs_cos.device.type == "cpu"  # a table, and not on meta
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not torch.nn.Linear(2, 2).weight.is_meta  # what is built afterwards is real again


def test_what_is_not_installed_is_said(monkeypatch):
    installed = {"diffusers", "wanexp"}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name in installed else None)
    assert peer_models.missing(CONTENDERS["ours"]) is None
    assert peer_models.missing(CONTENDERS["diffusers"]) is None
    assert "xfuser is not installed" in peer_models.missing(CONTENDERS["xdit"])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.endswith("interface") else real("torch")
    )
    assert "FlashAttention-3 is not installed" in peer_models.missing(CONTENDERS["xdit"])
    assert peer_models.missing(CONTENDERS["xdit_cudnn"]) is None


def test_fa3_fwd_is_offered_by_the_name_that_xdit_knows(monkeypatch, tmp_path):
    (tmp_path / "fa3_fwd_interface.py").write_text("flash_attn_func = flash_attn_varlen_func = len\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    if importlib.util.find_spec("flash_attn_interface") is not None:
        pytest.skip("FlashAttention-3's own package is installed")
    folder = peer_models.offer_flash_attention_3.__wrapped__()
    try:
        module = importlib.import_module("flash_attn_interface")
        assert isinstance(module, types.ModuleType)
        assert module.flash_attn_func is module.flash_attn_varlen_func is len
    finally:
        folder.cleanup()
        for name in ("flash_attn_interface", "fa3_fwd_interface"):
            sys.modules.pop(name, None)


# --- samples, ratios, goals ---


def test_gpus_that_measure_alone_keep_their_samples_and_those_together_the_slowest():
    ranks = [[1.0, 2.0], [1.5, 1.0]]
    assert peer_run.samples_of_runs(ranks, 1) == ranks
    assert peer_run.samples_of_runs(ranks, 2) == [[1.5, 2.0]]


def test_telemetry_is_taken_inside_the_windows():
    series = {
        "gpu0/power_w": [[0.0, 100.0], [1.0, 600.0], [2.0, 700.0], [3.0, 100.0]],
        "gpu0/temperature_c": [[1.0, 50.0], [2.0, 60.0]],
        "gpu0/energy_j": [[1.0, 5.0]],
        "gpu1/power_w": [[9.0, 1.0]],
    }
    found = peer_run.means_in(series, [(0.5, 1.5), (1.9, 2.5)])
    assert found == {"gpu0/power_w": 650.0, "gpu0/temperature_c": 60.0}


def test_a_drift_that_both_share_does_not_widen_the_ratio():
    ours = [1.0, 1.1, 1.2, 1.3]
    result = paired_ratio([[1.1 * value for value in ours]], [ours])
    assert result.ratio == pytest.approx(1.1)
    assert result.low is None or result.high - result.low < 1e-9
    noisy = paired_ratio([[1.1, 1.19, 1.35, 1.43]], [ours])
    assert noisy.low < 1.1 < noisy.high


def row(contender, samples, *, num_gpus=1, forwards=1, **more):
    seconds = sum(sorted(run)[len(run) // 2] for run in samples) / len(samples)
    return {
        "model": "wan2.1_t2v_14b",
        "video": "480p",
        "num_gpus": num_gpus,
        "contender": contender,
        "title": contender,
        "forwards": forwards,
        "outcome": "measured",
        "reason": None,
        "samples_s": samples,
        "seconds": seconds,
        "peak_gib": 1.5,
        "first_call_s": 3.0,
        **more,
    }


ROWS = [
    row("ours", [[2.0, 2.0, 2.0], [2.2, 2.2, 2.2]], share_of_floor=0.96),
    row("xdit", [[2.1, 2.1, 2.1], [2.31, 2.31, 2.31]], rel_l2_to_ours=0.01),
    row("ours", [[1.1, 1.1, 1.1]], num_gpus=2),
    row("xdit", [[1.2, 1.2, 1.2]], num_gpus=2, rel_l2_to_ours=0.3),
    row("ours_cfg", [[2.15, 2.15, 2.15]], num_gpus=2, forwards=2),
]


def result(kind, num_gpus, against):
    return result_of(Goal(kind, "wan2.1_t2v_14b", "480p", num_gpus, against, 1.0), ROWS)


def test_the_goals_are_computed_from_the_rows():
    assert result("forward", 1, "xdit").ratio == pytest.approx(1.05)
    assert result("forward", 2, "xdit").ratio == pytest.approx(1.2 / 1.1)
    assert result("floor", 1, "").ratio == 0.96
    assert result("scaling", 2, "ours").ratio == pytest.approx(2.1 / 1.1)  # the mean of the two GPUs
    assert result("scaling", 2, "ours_cfg").ratio == pytest.approx(2 * 2.1 / 2.15)
    assert result("step", 2, "xdit").ratio == pytest.approx(2 * 1.2 / 2.15)  # 2.15 is less than 2 x 1.1
    assert result("forward", 1, "diffusers") is None


def test_a_step_by_two_forwards_of_ulysses_counts_where_it_is_the_faster_way():
    rows = [one if one["contender"] != "ours_cfg" else {**one, "seconds": 2.5} for one in ROWS]
    goal = Goal("step", "wan2.1_t2v_14b", "480p", 2, "xdit", 1.0)
    assert result_of(goal, rows).ratio == pytest.approx(1.2 / 1.1)


def test_a_goal_within_the_interval_is_neither_reached_nor_missed():
    goal = Goal("forward", "wan2.1_t2v_14b", "480p", 1, "xdit", 1.04)
    for low, high, words in (
        (1.030, 1.045, "within the interval"),
        (1.041, 1.045, "reached"),
        (1.020, 1.030, "short by 1.4 %"),
    ):
        assert goal_cells(goal, Result((low + high) / 2, low, high, 9))[-1] == words, (low, high)


def test_the_page_holds_goal_and_result_side_by_side():
    missing = row("diffusers", [[1.0]]) | {"outcome": "missing", "reason": "diffusers is not installed"}
    page = peer_table.markdown(
        {
            "measured": "2026-11-22T00:00:00",
            "command": "python scripts/bench_peers.py",
            "environment": {"torch": {"version": "2.11", "cudnn": 91900}, "peers": {"xfuser": "0.7.0"}},
            "devices": ["NVIDIA H200"] * 2,
            "rows": peer_table.add_ratios([*ROWS, missing]),
            "warnings": ["hot"],
        }
    )
    lines = page.splitlines()
    assert (
        "| wan2.1_t2v_14b 480p, 1 GPU: a forward, against xdit | 1.04x | 1.050 (n = 6) | reached |" in lines
    )
    short = [line for line in lines if "a guided step" in line and "480p" in line]
    assert short[0].endswith("| short by 4.6 % |")
    assert sum("not measured" in line for line in lines) == sum(
        result_of(goal, [*ROWS, missing]) is None for goal in GOALS
    )
    assert any("missing: diffusers is not installed" in line for line in lines)
    assert any("**3.0e-01: not the same answer**" in line for line in lines)
    assert "* hot" in lines


def test_only_measured_rows_are_found():
    failed = row("xdit", [[1.0]]) | {"outcome": "failed"}
    assert find([failed], "wan2.1_t2v_14b", "480p", 1, "xdit") is None
    assert find(ROWS, "wan2.1_t2v_14b", "480p", 2, "ours")["samples_s"] == [[1.1, 1.1, 1.1]]


# --- the whole script, on two logical CPU devices ---


@pytest.mark.slow
def test_the_script_measures_what_it_can_and_says_what_it_cannot(tmp_path):
    out = tmp_path / "peers.md"
    names = ("ours", "ours_cfg", "diffusers_native", "diffusers_eager")
    command = [sys.executable, "scripts/bench_peers.py", "--rounds", "3", "--out", str(out)]
    command += [word for case in ("tiny:tiny:1", "tiny:tiny:2") for word in ("--case", case)]
    command += [word for name in names for word in ("--contender", name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["schema"] == peer_table.SCHEMA
    rows = {(row["num_gpus"], row["contender"]): row for row in result["rows"]}
    assert set(rows) == {
        (gpus, name) for gpus in (1, 2) for name in names if not (gpus == 1 and name == "ours_cfg")
    }
    alone, peer, together, guided = (
        rows[key] for key in ((1, "ours"), (1, "diffusers_native"), (2, "ours"), (2, "ours_cfg"))
    )
    assert [len(run) for run in alone["samples_s"]] == [3, 3]  # each of two devices by itself
    assert [len(run) for run in together["samples_s"]] == [3]
    assert peer["rel_l2_to_ours"] < 0.02
    assert peer["ours_is_faster"]["ratio"] > 0
    assert guided["rel_l2_to_ours"] < 0.02
    assert guided["forwards"] == 2
    assert rows[1, "diffusers_eager"]["outcome"] == "failed"  # there is no cuDNN on a CPU
    assert rows[1, "diffusers_eager"]["reason"]
    assert "## tiny, tiny, 2 GPUs" in out.read_text()


# --- every layout ---


def test_a_study_of_all_layouts_lists_each(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "")  # which the script adds to
    words = ["--dry-run", "--gpus=0,1", "--layout=all", "--case=tiny:tiny:1", "--override=hardware=cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_layouts.py", "--out", str(tmp_path / "x.md"), *words])
    assert importlib.import_module("bench_layouts").main() == 0
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert len(lines) == len(set(lines)) == 12
    assert {line.split(" ")[0] for line in lines} == set(MODES) - {"none"}
    assert {
        "block_distribution block_placement=interleaved on 2",
        "hybrid ulysses=1 shard=2 on 2",
        "hybrid cfg=1 ring=2 ulysses=1 shard=2 on 2",
    } < set(lines)


def test_a_study_runs_its_layouts_and_compares_their_answers(tmp_path):
    """scripts/bench_layouts.py: predictions first, then each layout, all cases in its processes."""
    arguments = [
        "--gpus=0,1",
        "--layout=cfg_parallel",
        "--layout=cfg_parallel attention=sdpa_math",
        "--layout=hybrid parallelism.ulysses=1 parallelism.shard=2",
        "--layout=block_distribution_interleaved workload.batch_size=3",
        "--case=tiny:tiny:1",
        *(f"--override={word}" for word in TINY if word.startswith(("precision", "model", "video"))),
        "--fp32-blocks=1",
    ]
    arguments += [f"--folder={tmp_path / 'records'}", f"--out={tmp_path / 'table.md'}"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_layouts.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"finished"}
    parity = {row["layout"]: row["parity"] for row in rows}
    assert set(parity) == {
        "one GPU",
        "cfg=2",
        "cfg=2, attention=sdpa_math",
        "cfg=2 x shard=2, collectives",
        "blocks=2",
    }
    assert parity["cfg=2"] == parity["cfg=2 x shard=2, collectives"] == "bit-equal"
    distance, _, said = parity["cfg=2, attention=sdpa_math"].partition(", ")
    assert float(distance) < 1e-5
    assert said == "other kernels"
    assert not parity["blocks=2"], "two devices computed the answers of two samples"
    predicted = json.loads((tmp_path / "records" / "predictions.json").read_text())
    assert len(predicted) == len(rows) - 2
    assert sum(1 for _ in (tmp_path / "records").glob("*/record.json")) == len(rows)
    sweep = read_sweep(tmp_path / "records")
    labels = [cell.label for cell in sweep.cells]
    assert len(labels) == len(rows) - 1  # none on each device is a repeat
    assert {"none, 1 CPU device, attention=auto", "cfg_parallel, 2 CPU devices, attention=sdpa_math"} < set(
        labels
    )
    assert "hybrid, 2 CPU devices, cfg=2 x shard=2, attention=auto" in labels


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "tiny"], "--case tiny is no case; write model:video:steps"),
        (["--case", "tiny:tiny:x"], "--case tiny:tiny:x is no case"),
        (["--case", "tiny:tiny:1:y"], "--case tiny:tiny:1:y is no case"),
        (["--case", "nomodel:tiny:1"], "nomodel"),
        (["--gpus", "x"], "--gpus x is no list of whole numbers; write it such as 0,1"),
        (["--counts", "2,x"], "--counts 2,x is no list of whole numbers"),
        (["--layout", "nolayout"], "nolayout"),
    ],
)
def test_a_study_that_cannot_be_is_one_line(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "")  # which the script adds to
    monkeypatch.setattr(sys, "argv", ["bench_layouts.py", "--out", str(tmp_path / "x.md"), *arguments])
    assert importlib.import_module("bench_layouts").main() == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


def layout_run(mode, batch, step_ms, *overrides, **metrics):
    """As the table takes it: case, folder, record."""
    device = {"label": "gpu0"}
    record = Record(
        "1", mode, "2026-01-01", {"parallelism": {"block_placement": "contiguous"}}, outcome="failed"
    )
    record.overrides = ["model=tiny", "attention=sdpa_flash", f"parallelism={mode}", *overrides]
    record.effective, record.plan = {"mode": mode, "devices": [device]}, {"layout": {"dp": 1}}
    record.metrics = {"latency/step_ms": step_ms, "setup/batch_size": batch, **metrics}
    return "tiny", Path(), record


def test_a_row_counts_samples_and_says_what_is_missing():
    none, other = layouts_table.table_rows(
        [
            layout_run("none", 2, 100.0, **{"memory/gpu0/weights_gib": 1.5}),
            layout_run("cfg_parallel", 1, 25.0),
        ]
    )
    assert (none["speed-up"], none["weights GiB"]) == (1.0, "1.50")
    assert (other["speed-up"], other["weights GiB"], other["busy %"]) == (2.0, "-", "-")


def test_a_layout_with_settings_of_its_own_says_so_and_is_no_base():
    runs = [layout_run("none", 1, 100.0), layout_run("none", 1, 80.0, "gpus=[0]", "precision=fp8")]
    none, lossy = layouts_table.table_rows(runs)
    assert (none["layout"], none["speed-up"]) == ("one GPU", 1.0)
    assert (lossy["layout"], lossy["speed-up"]) == ("one GPU, precision=fp8", 1.25)


def test_goals_of_layouts_stand_beside_the_best_of_them():
    def one(mode, layout, gpus, speedup, samples=1, outcome="finished"):
        row = {
            "case": "wan2.1_t2v_14b 720p",
            "mode": mode,
            "layout": layout,
            "GPUs": gpus,
            "outcome": outcome,
        }
        return row | {"speed-up": speedup, "samples": samples}

    rows = [
        one("none", "one GPU", 1, 1.0),
        one("hybrid", "cfg=2 x ulysses=2", 4, 3.8),
        one("data_parallel", "dp=4", 4, 4.0, samples=4),
        one("tensor_parallel", "tp=4", 4, 5.0, outcome="inexact"),
        one("block_distribution, interleaved", "blocks=4", 4, 1.9),
        one("block_distribution, interleaved", "blocks=4", 4, 2.4, samples=2),
        one("block_distribution, interleaved", "dp=2 x blocks=2", 4, 3.9, samples=4),
    ]
    assert layouts_table.best_rows(rows) == [
        ["wan2.1_t2v_14b 720p", "4", "hybrid, cfg=2 x ulysses=2", "3.80x", "3.75x", "reached"],
        [
            "wan2.1_t2v_14b 720p",
            "4",
            "block_distribution, interleaved, blocks=4, 2 samples",
            "2.40x",
            "3x",
            "short by 20.0%",
        ],
    ]


def test_layouts_of_few_gpus_run_side_by_side():
    devices = find_devices(HardwareConfig(name="cpu", device_type="cpu", num_devices=5))
    cells = [
        layouts_study.Cell(name, devices[:count]) for name, count in (("a", 2), ("b", 5), ("c", 2), ("d", 2))
    ]
    found = layouts_study.batches(cells, devices)
    assert [[(cell.asked, [d.index for d in cell.devices]) for cell in batch] for batch in found] == [
        [("a", [0, 1]), ("c", [2, 3])],
        [("b", [0, 1, 2, 3, 4])],
        [("d", [0, 1])],
    ]


def test_long_steps_are_left_out_and_modes_by_name_come_first():
    case = layouts_study.parse_case("wan2.1_t2v_14b:480p:2", ["hardware=8x_h100"])
    devices = profile_devices(case.config().hardware)[:4]
    cells, left = layouts_study.choose_cells([case], ["all"], devices, [4, 2], max_step_s=4.5)
    asked = [cell.asked for cell in cells]
    assert asked.index("parallelism=tensor_parallel") < asked.index(
        "parallelism=hybrid parallelism.ulysses=1 parallelism.tp=2"
    )
    assert {cell.asked for cell, _ in left} >= {"parallelism=data_parallel", "parallelism=fsdp"}
    assert all(cell.seconds > layouts_study.START_S for cell in cells)
