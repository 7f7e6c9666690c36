"""Decisions of the planner, pinned, each with its arithmetic by hand; and every sentence of a rejection."""

import dataclasses
import math

import pytest
from hydra import compose, initialize_config_dir

from wanexp.config import MODES, ParallelismConfig, RunConfig, conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.hardware.profiles import profile_for
from wanexp.parallel.layout import Layout
from wanexp.plan_task import devices_to_plan
from wanexp.planning.advice import nearest_that_fits
from wanexp.planning.candidates import Planned
from wanexp.planning.memory import GIB, predict_memory
from wanexp.planning.plan import make_plan
from wanexp.planning.planner import judge, plan_layouts, with_asked
from wanexp.planning.preflight import Preflight, preflight
from wanexp.planning.sizes import sizes_of
from wanexp.planning.time import block_seconds, rates_of

register()


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(compose("config", overrides=list(overrides)))


def planned(*overrides: str, devices: tuple[Device, ...] | None = None) -> Planned:
    """By the kernels of plain torch, which the numbers below are of."""
    config = composed("kernels=torch", *overrides)
    devices = devices or devices_to_plan(config)
    return plan_layouts(config, devices, [profile_for(config.hardware, d, conf_dir()) for d in devices])


def rejections(result: Planned) -> dict[str, str]:
    return {candidate.name: candidate.rejection for candidate in result.candidates}


def needs(result: Planned, name: str) -> float:
    """GiB on the fullest device."""
    candidate = next(candidate for candidate in result.candidates if candidate.name == name)
    return max(entry.needed for entry in candidate.memory) / GIB


def gpu(index: int, free_gib: float, name: str = "NVIDIA H200", peers: tuple[int, ...] = ()) -> Device:
    return Device("cuda", index, name, round(free_gib * GIB), round(free_gib * GIB), peers=peers)


# GiB by hand: weights (parameters of wan-facts x bytes) + the worst moment of the activations + the rest. With T tokens
# U = T dim bytes, F = T ffn bytes, W = 4 T dim; for 14B at 480p U = 32,760 x 5120 x 2 = 0.312 and F = 0.844, so while q
# is turned 5.5 U + 1.5 W = 2.66, and at the GELU 3 U + 2 F = 2.62. The rest: context 0.82, cuBLAS 0.06, pages 0.06,
# inputs, contexts and RoPE tables 0.06 to 0.17. Over N GPUs the weights are divided by N, there is one U more for the
# second forward in the pipeline, and the rest contains the first GPU's embeddings and what does not divide.
# Guidance is split before anything else, over NVLink then heads (ulysses), over PCIe then rings; weights are sharded
# where they do not fit.
# (model, hardware, precision, video, best layout for latency, needs of mode none, least needs of block distribution)
CASES = [
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.96 = 30.2; over 4 6.65 + 2.66 + U 0.31 + 1.28 = 10.9; 10.0 free
    ("wan2.1_t2v_14b", "4x_rtx3080", "bf16", "480p", None, 30.2, 10.9),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 1.01 = 33.8; over 4 6.65 + 6.13 + U 0.72 + 1.32 = 14.8; 10.0 free
    ("wan2.1_t2v_14b", "4x_rtx3080", "bf16", "720p", None, 33.8, 14.8),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.96 = 30.2; over 2 13.31 + 2.66 + U 0.31 + 1.17 = 17.4; 24.0 free
    ("wan2.1_t2v_14b", "2x_rtx4090", "bf16", "480p", "hybrid x 2, cfg=2 x shard=2", 30.2, 17.4),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 1.01 = 33.8; over 2 13.31 + 6.13 + U 0.72 + 1.21 = 21.4; 24.0 free
    ("wan2.1_t2v_14b", "2x_rtx4090", "bf16", "720p", "hybrid x 2, cfg=2 x shard=2", 33.8, 21.4),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.96 = 30.2; 24.0 free
    ("wan2.1_t2v_14b", "1x_rtx4090", "bf16", "480p", None, 30.2, None),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 1.01 = 33.8; 24.0 free
    ("wan2.1_t2v_14b", "1x_rtx4090", "bf16", "720p", None, 33.8, None),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.96 = 30.2; over 4 6.65 + 2.66 + U 0.31 + 1.28 = 10.9; 40.0 free
    ("wan2.1_t2v_14b", "4x_a100_40gb", "bf16", "480p", "hybrid x 4, cfg=2 x ulysses=2", 30.2, 10.9),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 1.01 = 33.8; over 4 6.65 + 6.13 + U 0.72 + 1.32 = 14.8; 40.0 free
    ("wan2.1_t2v_14b", "4x_a100_40gb", "bf16", "720p", "hybrid x 4, cfg=2 x ulysses=2", 33.8, 14.8),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.87 = 30.1; over 2 13.31 + 2.66 + U 0.31 + 1.08 = 17.4; 139.8 free
    ("wan2.1_t2v_14b", "2x_h200", "bf16", "480p", "cfg_parallel x 2", 30.1, 17.4),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 0.92 = 33.7; over 2 13.31 + 6.13 + U 0.72 + 1.12 = 21.3; 139.8 free
    ("wan2.1_t2v_14b", "2x_h200", "bf16", "720p", "cfg_parallel x 2", 33.7, 21.3),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 0.87 = 30.1; 139.8 free
    ("wan2.1_t2v_14b", "1x_h200", "bf16", "480p", "none", 30.1, None),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 0.92 = 33.7; 139.8 free
    ("wan2.1_t2v_14b", "1x_h200", "bf16", "720p", "none", 33.7, None),
    # 26.61 + 5.5 U + 1.5 W 2.66 + the rest 1.01 = 30.3; 79.6 free
    ("wan2.1_t2v_14b", "1x_h100", "bf16", "480p", "none", 30.3, None),
    # 26.61 + 5.5 U + 1.5 W 6.13 + the rest 1.06 = 33.8; 79.6 free
    ("wan2.1_t2v_14b", "1x_h100", "bf16", "720p", "none", 33.8, None),
    # 53.23 + 3 U + 2 F 5.25 + the rest 1.02 = 59.5; over 2 26.61 + 5.25 + U 0.62 + 1.44 = 33.9; 79.6 free
    ("wan2.1_t2v_14b", "2x_h100", "fp32", "480p", "cfg_parallel x 2", 59.5, 33.9),
    # 53.23 + 3 U + 2 F 5.25 + the rest 0.88 = 59.4; 139.8 free
    ("wan2.1_t2v_14b", "1x_h200", "fp32", "480p", "none", 59.4, None),
    # 2.64 + 3 U + 2 F 1.37 + the rest 0.95 = 5.0; 24.0 free
    ("wan2.1_t2v_1.3b", "1x_rtx4090", "bf16", "480p", "none", 5.0, None),
    # 2.64 + 3 U + 2 F 3.17 + the rest 1.00 = 6.8; 24.0 free
    ("wan2.1_t2v_1.3b", "1x_rtx4090", "bf16", "720p", "none", 6.8, None),
    # 5.29 + 3 U + 2 F 2.75 + the rest 0.96 = 9.0; 24.0 free
    ("wan2.1_t2v_1.3b", "1x_rtx4090", "fp32", "480p", "none", 9.0, None),
    # 5.29 + 3 U + 2 F 6.34 + the rest 1.01 = 12.6; 24.0 free
    ("wan2.1_t2v_1.3b", "1x_rtx4090", "fp32", "720p", "none", 12.6, None),
    # 2.64 + 3 U + 2 F 1.37 + the rest 0.95 = 5.0; over 2 1.32 + 1.37 + U 0.09 + 0.97 = 3.8; 10.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx3080", "bf16", "480p", "cfg_parallel x 2", 5.0, 3.8),
    # 2.64 + 3 U + 2 F 3.17 + the rest 1.00 = 6.8; over 2 1.32 + 3.17 + U 0.22 + 1.01 = 5.7; 10.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx3080", "bf16", "720p", "cfg_parallel x 2", 6.8, 5.7),
    # 5.29 + 3 U + 2 F 2.75 + the rest 0.96 = 9.0; over 2 2.64 + 2.75 + U 0.19 + 1.00 = 6.6; 10.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx3080", "fp32", "480p", "cfg_parallel x 2", 9.0, 6.6),
    # 5.29 + 3 U + 2 F 6.34 + the rest 1.01 = 12.6; over 2 2.64 + 6.34 + U 0.43 + 1.04 = 10.4; 10.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx3080", "fp32", "720p", "context_parallel x 2, ring=2", 12.6, 10.4),
    # 2.64 + 3 U + 2 F 1.37 + the rest 0.95 = 5.0; over 4 0.66 + 1.37 + U 0.09 + 1.02 = 3.1; 10.0 free
    ("wan2.1_t2v_1.3b", "4x_rtx3080", "bf16", "480p", "hybrid x 4, cfg=2 x ring=2", 5.0, 3.1),
    # 2.64 + 3 U + 2 F 3.17 + the rest 1.00 = 6.8; over 4 0.66 + 3.17 + U 0.22 + 1.06 = 5.1; 10.0 free
    ("wan2.1_t2v_1.3b", "4x_rtx3080", "bf16", "720p", "hybrid x 4, cfg=2 x ring=2", 6.8, 5.1),
    # 5.29 + 3 U + 2 F 2.75 + the rest 0.96 = 9.0; over 4 1.32 + 2.75 + U 0.19 + 1.11 = 5.4; 10.0 free
    ("wan2.1_t2v_1.3b", "4x_rtx3080", "fp32", "480p", "hybrid x 4, cfg=2 x ring=2", 9.0, 5.4),
    # 5.29 + 3 U + 2 F 6.34 + the rest 1.01 = 12.6; over 4 1.32 + 6.34 + U 0.43 + 1.15 = 9.2; 10.0 free
    ("wan2.1_t2v_1.3b", "4x_rtx3080", "fp32", "720p", "hybrid x 4, cfg=2 x ring=2", 12.6, 9.2),
    # 2.64 + 3 U + 2 F 1.37 + the rest 0.95 = 5.0; over 2 1.32 + 1.37 + U 0.09 + 0.97 = 3.8; 16.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx4080", "bf16", "480p", "cfg_parallel x 2", 5.0, 3.8),
    # 2.64 + 3 U + 2 F 3.17 + the rest 1.00 = 6.8; over 2 1.32 + 3.17 + U 0.22 + 1.01 = 5.7; 16.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx4080", "bf16", "720p", "cfg_parallel x 2", 6.8, 5.7),
    # 5.29 + 3 U + 2 F 2.75 + the rest 0.96 = 9.0; over 2 2.64 + 2.75 + U 0.19 + 1.00 = 6.6; 16.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx4080", "fp32", "480p", "cfg_parallel x 2", 9.0, 6.6),
    # 5.29 + 3 U + 2 F 6.34 + the rest 1.01 = 12.6; over 2 2.64 + 6.34 + U 0.43 + 1.04 = 10.4; 16.0 free
    ("wan2.1_t2v_1.3b", "2x_rtx4080", "fp32", "720p", "cfg_parallel x 2", 12.6, 10.4),
    # 9.31 + 3 U + 2 F 1.93 + the rest 0.99 = 12.2; over 2 4.66 + 1.93 + U 0.16 + 1.05 = 7.8; 10.0 free
    ("wan2.2_ti2v_5b", "2x_rtx3080", "bf16", "704p", "hybrid x 2, cfg=2 x shard=2", 12.2, 7.8),
    # 9.31 + 3 U + 2 F 1.93 + the rest 0.99 = 12.2; over 2 4.66 + 1.93 + U 0.16 + 1.05 = 7.8; 16.0 free
    ("wan2.2_ti2v_5b", "2x_rtx4080", "bf16", "704p", "cfg_parallel x 2", 12.2, 7.8),
    # 9.31 + 3 U + 2 F 1.93 + the rest 0.99 = 12.2; 24.0 free
    ("wan2.2_ti2v_5b", "1x_rtx4090", "bf16", "704p", "none", 12.2, None),
    # 30.54 + 5.5 U + 1.5 W 2.66 + the rest 1.03 = 34.2; 79.6 free
    ("wan2.1_i2v_14b_480p", "1x_h100", "bf16", "480p", "none", 34.2, None),
    # 30.54 + 5.5 U + 1.5 W 2.66 + the rest 0.98 = 34.2; over 4 7.63 + 2.66 + U 0.31 + 1.30 = 11.9; 40.0 free
    ("wan2.1_i2v_14b_480p", "4x_a100_40gb", "bf16", "480p", "hybrid x 4, cfg=2 x ulysses=2", 34.2, 11.9),
    # 30.54 + 5.5 U + 1.5 W 2.66 + the rest 0.98 = 34.2; over 2 15.27 + 2.66 + U 0.31 + 1.19 = 19.4; 24.0 free
    ("wan2.1_i2v_14b_480p", "2x_rtx4090", "bf16", "480p", "hybrid x 2, cfg=2 x shard=2", 34.2, 19.4),
    # 30.54 + 5.5 U + 1.5 W 6.13 + the rest 1.05 = 37.7; over 4 7.63 + 6.13 + U 0.72 + 1.37 = 15.8; 40.0 free
    ("wan2.1_flf2v_14b", "4x_a100_40gb", "bf16", "720p", "hybrid x 4, cfg=2 x ulysses=2", 37.7, 15.8),
    # 53.23 + 5.5 U + 1.5 W 2.66 + the rest 1.04 = 56.9; 79.6 free
    ("wan2.2_t2v_a14b", "1x_h100", "bf16", "480p", "none", 56.9, None),
    # 53.23 + 5.5 U + 1.5 W 6.13 + the rest 1.11 = 60.5; 79.6 free
    ("wan2.2_t2v_a14b", "1x_h100", "bf16", "720p", "none", 60.5, None),
    # 53.23 + 5.5 U + 1.5 W 2.66 + the rest 0.99 = 56.9; over 4 13.31 + 2.66 + U 0.31 + 1.63 = 17.9; 40.0 free
    (
        "wan2.2_t2v_a14b",
        "4x_a100_40gb",
        "bf16",
        "480p",
        "hybrid x 4, cfg=2 x ulysses=2 x shard=4",
        56.9,
        17.9,
    ),
    # 53.23 + 5.5 U + 1.5 W 6.13 + the rest 1.06 = 60.4; over 4 13.31 + 6.13 + U 0.72 + 1.69 = 21.8; 40.0 free
    (
        "wan2.2_t2v_a14b",
        "4x_a100_40gb",
        "bf16",
        "720p",
        "hybrid x 4, cfg=2 x ulysses=2 x shard=4",
        60.4,
        21.8,
    ),
    # 53.23 + 5.5 U + 1.5 W 2.66 + the rest 1.04 = 56.9; over 2 26.61 + 2.66 + U 0.31 + 1.46 = 31.0; 79.6 free
    ("wan2.2_t2v_a14b", "2x_h100", "bf16", "480p", "cfg_parallel x 2", 56.9, 31.0),
    # 53.23 + 5.5 U + 1.5 W 6.13 + the rest 1.11 = 60.5; over 2 26.61 + 6.13 + U 0.72 + 1.52 = 35.0; 79.6 free
    ("wan2.2_t2v_a14b", "2x_h100", "bf16", "720p", "cfg_parallel x 2", 60.5, 35.0),
    # 53.23 + 5.5 U + 1.5 W 2.66 + the rest 0.90 = 56.8; 139.8 free
    ("wan2.2_t2v_a14b", "1x_h200", "bf16", "480p", "none", 56.8, None),
    # 53.23 + 5.5 U + 1.5 W 6.13 + the rest 0.97 = 60.3; 139.8 free
    ("wan2.2_t2v_a14b", "1x_h200", "bf16", "720p", "none", 60.3, None),
]


@pytest.mark.parametrize(
    ("model", "hardware", "precision", "video", "best", "one_gpu", "spread"),
    CASES,
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_decisions(model, hardware, precision, video, best, one_gpu, spread):
    result = planned(f"model={model}", f"hardware={hardware}", f"precision={precision}", f"video={video}")
    assert (result.winner.name if result.winner else None) == best
    assert needs(result, "none") == pytest.approx(one_gpu, abs=0.06)
    blocks = [c for c in result.candidates if c.parallelism.mode == "block_distribution"]
    least = min((max(entry.needed for entry in c.memory) / GIB for c in blocks), default=None)
    assert least == (None if spread is None else pytest.approx(spread, abs=0.06))


# --- the guide's three examples


def test_guide_1_two_rtx4090_with_14b_is_not_data_parallel():
    """26.6 GiB of weights on each replica do not fit 24 GB. 13.3 of shards or of blocks do: 13.3 + 2.4 of gathered
    blocks + 2.7 + 0.4 + 0.9 = 19.7, or with two forwards in the pipeline 13.3 + 2.7 + 0.3 + 0.4 + 0.8 = 17.5.
    """
    result = planned("model=wan2.1_t2v_14b", "hardware=2x_rtx4090")
    assert result.winner and result.winner.name == "hybrid x 2, cfg=2 x shard=2"
    assert needs(result, "hybrid x 2, cfg=2 x shard=2") == pytest.approx(19.7, abs=0.06)
    assert needs(result, "block_distribution x 2") == pytest.approx(17.5, abs=0.06)
    assert rejections(result)["data_parallel x 2"] == "needs 30.6 GiB on each GPU, 24.0 free"


def test_guide_2_four_rtx3080_with_14b_fits_a_shorter_video():
    """26.6 / 4 = 6.65, + 0.4 of embeddings on gpu0 + 3.0 + 0.9 = 10.9 of 10; 53 frames take 14 / 21 of the 3.0."""
    result = planned("model=wan2.1_t2v_14b", "hardware=4x_rtx3080")
    assert result.winner is None
    assert rejections(result)["block_distribution x 4"] == (
        "needs 10.9 GiB on gpu0, 10.0 free (and too much on 3 more)"
    )
    shorter = planned("model=wan2.1_t2v_14b", "hardware=4x_rtx3080", "video.num_frames=53")
    assert shorter.winner and shorter.winner.parallelism.mode == "block_distribution"


def test_guide_3_one_rtx4090_with_1_3b_needs_nothing_else():
    """2.64 + 1.37 + 0.8 + 0.2 = 5.0 of 24."""
    result = planned("model=wan2.1_t2v_1.3b", "hardware=1x_rtx4090")
    assert result.winner and result.winner.name == "none"


# --- objectives


def test_latency_splits_the_guidance_first():
    """One latent a step is all that crosses: twice as fast, as heads or rings would be but for their exchanges."""
    result = planned("model=wan2.1_t2v_14b", "hardware=2x_h200")
    assert result.winner and result.winner.name == "cfg_parallel x 2"
    assert result.speedup(result.winner) == pytest.approx(2, rel=0.01)


def test_latency_without_guidance_splits_the_tokens():
    result = planned("model=wan2.1_t2v_14b", "hardware=2x_h200", "workload.guidance_scale=[1]")
    assert result.winner and result.winner.parallelism.mode == "context_parallel"
    assert "guidance above 1, found 1" in rejections(result)["cfg_parallel x 2"]
    assert "block_distribution x 2, interleaved" not in rejections(result), "nothing follows in a pipeline"


def test_latency_takes_one_gpu_where_more_are_no_faster():
    """The tiny model is all launches, on whatever GPUs."""
    result = planned("model=tiny", "video=tiny", "hardware=2x_h200", "workload.guidance_scale=[1]")
    assert result.winner and result.winner.name == "none"


def test_throughput_takes_all_replicas():
    """Four samples in the time of one."""
    result = planned("model=wan2.1_t2v_1.3b", "hardware=4x_rtx3080", "objective=throughput")
    assert result.winner and result.winner.name == "data_parallel x 4"
    assert result.speedup(result.winner) == pytest.approx(4)


def test_memory_takes_the_thinnest_spread():
    """A quarter of the weights a GPU, and of the activations too."""
    result = planned("model=wan2.1_t2v_1.3b", "hardware=4x_rtx3080", "objective=memory")
    assert result.winner and result.winner.name == "hybrid x 4, ring=4 x shard=4"
    assert needs(result, result.winner.name) < needs(result, "fsdp x 4") < needs(result, "data_parallel x 4")


def test_latency_of_a_batch_takes_replicas():
    """A batch of 4 on 4 GPUs: one sample each, a quarter of the time."""
    result = planned("model=wan2.1_t2v_14b", "hardware=4x_a100_40gb", "workload.batch_size=4")
    assert result.winner and result.winner.name == "data_parallel x 4"
    assert result.speedup(result.winner) == pytest.approx(4, rel=0.02)


def test_training_takes_distributed():
    """1.42 G weights x 16 bytes = 21.1 GiB of masters, gradients and moments, + 5.3 of sqrt(v) at the step: 27.7."""
    result = planned("model=wan2.1_t2v_1.3b", "hardware=8x_h100", "workload=train", "objective=throughput")
    assert result.winner and result.winner.name == "distributed x 8"
    none = next(c for c in result.candidates if c.name == "none")
    weights = 1.419e9
    assert none.memory[0].weights == pytest.approx(4 * weights, rel=0.001)
    assert none.memory[0].allocated >= 20 * weights


def test_training_is_ranked_by_throughput_as_nobody_waits_for_one_sample():
    """14B on four H200: fsdp x 4 trains on four samples in 14.0 s, block_distribution x 2 on one in 13.9 s."""
    words = ("model=wan2.1_t2v_14b", "hardware=4x_h200", "workload=train", "video=480p")
    result = planned(*words)
    assert result.objective == "throughput" and result.winner and result.winner.name == "fsdp x 4"
    assert result.speedup(result.winner) == pytest.approx(4, rel=0.02)
    assert planned(*words, "objective=memory").objective == "memory"
    config = composed(*words, "parallelism=auto")
    devices = devices_to_plan(config)
    assert preflight(config, devices, devices, lambda device: None).config.parallelism.mode == "fsdp"


def test_training_gathers_what_is_stored_fp32_masters():
    """Two RTX 4090, PCIe: half of 14B's block, 2 bytes a weight more, at 32 GB/s through the host."""
    config = composed("model=wan2.1_t2v_14b", "hardware=2x_rtx4090", "video.num_frames=1")
    rates = rates_of(config.hardware.device, "bfloat16", has_p2p=False)
    sizes, layout = sizes_of(config, 1), Layout(dp=2, shard=2)
    more_s = block_seconds(sizes, rates, layout, stored=4) - block_seconds(sizes, rates, layout)
    num_weights = config.model.architecture.num_block_parameters()
    copied_s = 4 * 2 * num_weights / rates.memory  # FSDP2 copies what it gathers, beside which it gathers
    assert more_s == pytest.approx(num_weights / rates.collective, abs=copied_s)


@pytest.mark.parametrize(
    ("hardware", "num_gpus", "milliseconds"), [("2x_h200", 2, 39 * 0.897), ("4x_rtx3080", 4, 39 * 26.2)]
)
def test_seams_cost_more_without_p2p(hardware, num_gpus, milliseconds):
    """Single blocks in turn: seams of 335 MB, 0.9 ms each at 383 GB/s, 26 ms at 12.8 GB/s through the host."""
    config = composed("model=wan2.1_t2v_14b", f"hardware={hardware}")
    devices = devices_to_plan(config)
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    parallelism = ParallelismConfig("block_distribution", blocks=num_gpus, block_placement="interleaved")
    time = judge(config, parallelism, devices, profiles).time
    assert time and time.seam_s * 1000 == pytest.approx(milliseconds, rel=0.02)


def test_slow_links_get_fewer_chunks():
    """NVLink pays for a seam a block; through the host 20 runs of two blocks are faster, as docs/modes has it."""
    fast = rejections(planned("model=wan2.1_t2v_14b", "hardware=2x_h200"))
    slow = rejections(planned("model=wan2.1_t2v_14b", "hardware=2x_rtx4090"))
    assert "block_distribution x 2, interleaved" in fast
    assert (
        "block_distribution x 2, interleaved 20" in slow and "block_distribution x 2, interleaved" not in slow
    )


def test_of_equals_the_one_with_less_to_exchange():
    """cfg=2 x ulysses=2 and ulysses=4 are a percent apart on NVLink: half of the heads' exchange stays at home."""
    result = planned("model=wan2.1_t2v_14b", "hardware=4x_a100_40gb")
    first, second = (
        next(c.time.step_s for c in result.candidates if c.name == name and c.time)
        for name in ("hybrid x 4, cfg=2 x ulysses=2", "context_parallel x 4, ulysses=4")
    )
    assert first == pytest.approx(second, rel=0.01) and result.winner.name == "hybrid x 4, cfg=2 x ulysses=2"


def test_the_digest_has_each_mode_once_and_the_best_hybrids():
    result = planned("model=wan2.1_t2v_14b", "hardware=8x_h100")
    shown = result.digest()
    by_name = [c.parallelism.mode for c in shown if not c.is_hybrid]
    assert sorted(by_name) == sorted(mode for mode in MODES if mode != "hybrid")
    hybrids = [c for c in result.candidates if c.is_hybrid]
    assert [c for c in shown if c.is_hybrid] == hybrids[:4] and len(hybrids) > 20
    assert shown[0] is result.winner


def test_a_mode_that_never_fits_is_in_the_digest_once():
    shown = planned("model=wan2.1_t2v_14b", "hardware=4x_rtx3080").digest()
    assert all(c.rejection and not c.is_hybrid for c in shown)
    assert len({c.parallelism.mode for c in shown}) == len(shown) == 8


# --- rejections


def test_too_large_for_the_one_gpu():
    result = planned("model=wan2.1_t2v_14b", "hardware=1x_rtx4090")
    assert rejections(result) == {"none": "needs 30.2 GiB on gpu0, 24.0 free"}


def test_more_gpus_than_blocks():
    result = planned("model=tiny", "video=tiny", "hardware.num_devices=16", "hardware=4x_rtx3080")
    assert rejections(result)["block_distribution x 16"] == (
        "16 GPUs for 8 transformer blocks; write at most 8 GPUs"
    )


def test_fewer_samples_than_replicas():
    result = planned("model=tiny", "hardware=4x_rtx3080", "workload.batch_size=2")
    assert rejections(result)["data_parallel x 4"] == (
        "workload.batch_size 2 is smaller than the 4 replicas; write workload.batch_size=4 or more, or fewer GPUs"
    )


def test_training_without_synchronised_gradients():
    result = planned("model=tiny", "hardware=2x_h100", "workload=train")
    assert rejections(result)["data_parallel x 2"].startswith("workload=train needs synchronised gradients")


def test_training_batch_that_does_not_divide():
    result = planned("model=tiny", "hardware=2x_h100", "workload=train", "workload.batch_size=3")
    assert "is not a multiple of the 2 training replicas" in rejections(result)["distributed x 2"]


def test_too_large_for_the_host():
    config = composed("model=wan2.1_t2v_14b", "hardware=cpu")
    host = Device("cpu", 0, "cpu", 16 * GIB, 8 * GIB)
    result = plan_layouts(config, [host], [None])
    assert rejections(result)["none"] == "needs 29.3 GiB of host memory, 8.0 free"


# --- free memory as it is now, mixed GPUs


def test_free_memory_decides_and_not_the_size_of_the_card():
    devices = (gpu(0, 5), gpu(1, 140))
    result = planned("model=wan2.1_t2v_14b", devices=devices)
    assert result.winner and result.winner.settings == "parallelism=none 'gpus=[1]'"


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["tensor_parallel", "context_parallel"])
def test_scores_that_are_kept_are_of_the_heads_that_a_rank_attends_with(mode, kernels):
    def scores(*overrides: str) -> int:
        def peak(attention: str) -> int:
            config = composed(
                "model=wan2.1_t2v_1.3b", f"kernels={kernels}", f"attention={attention}", *overrides
            )
            plan = make_plan(config, [gpu(index, 139.0) for index in config.gpus or []])
            return predict_memory(config, plan)[0].activations

        return peak("sdpa_math") - peak("sdpa_flash")

    whole = scores("parallelism=none", "gpus=[0]")
    assert whole == pytest.approx(2 * 4 * 12 * 32760**2, rel=0.02)  # and their softmax; 12 heads
    assert scores(f"parallelism={mode}", "gpus=[0,1]") == pytest.approx(whole / 2, rel=0.02)


def test_mixed_gpus_share_the_blocks_by_memory():
    """24 + 12.5 GiB: half of the weights, 13.1 + 3.6, does not fit 12.5; 27 blocks, 17.7 + 4, and 13, 8.5 + 3.6, do."""
    devices = (gpu(0, 24, "NVIDIA GeForce RTX 4090"), gpu(1, 12.5, "NVIDIA GeForce RTX 3080"))
    result = planned("model=wan2.1_t2v_14b", devices=devices)
    assert result.winner and result.winner.name == "block_distribution x 2, 27+13"
    assert rejections(result)["block_distribution x 2"].startswith("needs 16.7 GiB on gpu1, 12.5 free")


def test_unknown_devices_are_ranked_but_get_no_times():
    result = planned("model=tiny", devices=(gpu(0, 8, "Some GPU"), gpu(1, 8, "Some GPU")))
    assert result.winner and result.winner.summary()["step_ms"] is None
    assert result.speedup(result.winner) is None


def test_without_rates_the_order_says_so_and_a_ranking_by_memory_needs_none():
    devices = (gpu(0, 8, "Some GPU"), gpu(1, 8, "Some GPU"))
    assert "no rates are known" in planned("model=tiny", devices=devices).note
    assert planned("model=tiny", "objective=memory", devices=devices).note == ""
    assert planned("model=tiny", "hardware=2x_h200").note == ""
    assert "with this attention" in planned("model=tiny", "hardware=2x_h200", "attention=sdpa_math").note
    assert "no rates are known" in checked("model=tiny", "parallelism=auto", devices=devices).note
    assert checked("model=tiny", devices=devices[:1]).note == ""


def test_logical_devices_share_the_cores_and_the_memory_of_the_host():
    """So no layout is faster than mode none, and each device more only adds its activations."""
    devices = tuple(Device("cpu", index, "cpu", 16 * GIB, 12 * GIB) for index in range(2))
    result = planned("model=wan2.1_t2v_1.3b", "precision=fp32", devices=devices)
    by_name = {candidate.name: candidate for candidate in result.candidates}
    none, blocks = by_name["none"], by_name["block_distribution x 2"]
    assert result.winner is none and planned("objective=memory", devices=devices).winner.name == "none"
    assert blocks.time.step_s >= none.time.step_s
    assert blocks.needed_bytes == sum(entry.needed for entry in blocks.memory) > none.needed_bytes
    assert by_name["data_parallel x 2"].rejection == "needs 16.2 GiB of host memory, 12.0 free"
    assert by_name["data_parallel x 2"].excess_bytes == pytest.approx(4.2 * GIB, rel=0.02)


# --- the layout that was asked for


def asked(*overrides: str) -> Planned:
    config = composed(*overrides)
    devices = devices_to_plan(config)
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    return with_asked(plan_layouts(config, devices, profiles), config, devices, profiles)


def test_the_layout_asked_for_is_marked_among_the_others():
    result = asked("+experiment=two_rtx4090_14b")
    assert result.asked in result.digest() and result.asked.name == "block_distribution x 2"
    assert [row["layout"] for row in result.summary()["layouts"] if row["is_asked_for"]] == [
        "block_distribution x 2"
    ]
    assert len(result.candidates) == len(asked("+experiment=two_rtx4090_14b", "parallelism=none").candidates)


def test_a_layout_of_ones_own_is_one_more():
    """docs/choosing.md: 0.94x unpipelined, where contiguous blocks are 1.00x."""
    plain = asked("+experiment=two_rtx4090_14b", "parallelism=none")
    assert plain.asked is None
    for name, placement, speedup in (
        ("block_distribution x 2, interleaved, not pipelined", "interleaved", 0.94),
        ("block_distribution x 2, not pipelined", "contiguous", 1.00),
    ):
        result = asked(
            "+experiment=two_rtx4090_14b",
            f"parallelism.block_placement={placement}",
            "parallelism.pipeline=false",
        )
        assert result.asked and result.asked.name == name and not result.asked.rejection
        assert result.speedup(result.asked) == pytest.approx(speedup, abs=0.005)
        assert len(result.candidates) == len(plain.candidates) + 1
        assert result.winner is not result.asked and result.candidates.index(result.asked) < 10


def test_a_layout_asked_for_that_makes_no_sense_says_why():
    result = asked("model=tiny", "hardware=2x_rtx4090", "parallelism=tensor_parallel", "gpus=[0]")
    assert result.asked in result.digest()
    assert "tensor_parallel on one GPU splits nothing" in result.asked.rejection


def test_a_machine_without_a_memory_size_cannot_be_planned():
    with pytest.raises(UserError, match="does not say how many GPUs there are"):
        planned("hardware=4x_rtx3080", "hardware.device.memory_gib=null")


# --- times


@pytest.mark.parametrize(
    ("model", "video", "milliseconds"),
    [
        # 0.785 PFLOP / 692 T + 0.893 / 580 T + 40 x 39.7 GB / 2538 GB/s = 1134 + 1540 + 626; measured 3241
        ("wan2.1_t2v_14b", "480p", 3241),
        # 2.617 s + 8.16 s + 1.4 s; measured 12,373 (24,746 a step of two)
        ("wan2.1_t2v_14b", "720p", 12373),
        # 0.082 PFLOP / 692 T + 0.2 / 580 T + 30 x 12.5 GB / 2538 GB/s = 118 + 347 + 148; measured 621
        ("wan2.1_t2v_1.3b", "480p", 621),
    ],
)
def test_forward_times_on_h200(model, video, milliseconds):
    """By cuDNN: the profile's 711 TFLOP/s are of fa3, which is 711 / 580 as fast."""
    result = planned(f"model={model}", f"video={video}", "hardware=1x_h200", "attention=sdpa_cudnn")
    assert result.winner.time.forward_s * 1000 == pytest.approx(milliseconds, rel=0.03)


# --- before a run


def checked(*overrides: str, devices: tuple[Device, ...], found: tuple[Device, ...] = ()) -> Preflight:
    return preflight(composed(*overrides), devices, found or devices, lambda device: None)


def test_auto_is_replaced_by_the_choice():
    devices = (gpu(0, 24), gpu(1, 24))
    result = checked("model=wan2.1_t2v_14b", "parallelism=auto", devices=devices)
    assert (result.config.parallelism.cfg, result.config.parallelism.shard) == (2, 2)
    assert result.config.gpus == [0, 1] and not result.message


def test_auto_takes_no_degrees():
    said = "parallelism.tp=2, parallelism.pipeline=false would be lost; leave that out"
    with pytest.raises(UserError, match=said):
        checked(
            "parallelism=auto",
            "parallelism.tp=2",
            "parallelism.pipeline=false",
            devices=(gpu(0, 24), gpu(1, 24)),
        )


def test_auto_where_nothing_fits_says_what_is_missing():
    devices = (gpu(0, 8), gpu(1, 8))
    result = checked("model=wan2.1_t2v_14b", "parallelism=auto", devices=devices)
    assert result.config.parallelism.mode == "tensor_parallel"
    assert result.message.startswith("needs 16.0 GiB on gpu0, 8.0 free")


def test_advice_is_another_layout_on_the_devices_found():
    devices = (gpu(0, 24), gpu(1, 24))
    result = checked("model=wan2.1_t2v_14b", devices=devices[:1], found=devices)
    assert result.message == (
        "needs 29.2 GiB on gpu0, 24.0 free; write parallelism=hybrid parallelism.ulysses=1 parallelism.shard=2 "
        "'gpus=[0,1]'; "
        "force=true runs it all the same"
    )


def test_advice_is_fewer_samples_where_that_is_enough():
    config = composed("model=wan2.1_t2v_14b", "workload.batch_size=64")
    advice = nearest_that_fits(config, [gpu(0, 40)], [None])
    assert advice == "write workload.batch_size=null parallelism=none 'gpus=[0]'"


def test_advice_is_block_swap_and_how_many_gpus_hold_all_of_it():
    """29.1 GiB of 24.0: 10 of 40 blocks, 6.5 GiB, on the host are enough."""
    config = composed("model=wan2.1_t2v_14b", "hardware=1x_rtx4090")
    more = "block_distribution over 2 such GPUs would hold all of it"
    devices = devices_to_plan(config)
    advice = nearest_that_fits(config, devices, [None])
    assert advice == f"write offload=block_swap parallelism=none 'gpus=[0]'; {more}"
    assert planned("model=wan2.1_t2v_14b", "hardware=1x_rtx4090", "offload=block_swap").winner, "as advised"
    few = composed("model=wan2.1_t2v_14b", "hardware=1x_rtx4090", "offload=block_swap", "offload.blocks=3")
    advice = nearest_that_fits(few, devices, [None])
    assert advice == f"write offload=block_swap offload.blocks=auto parallelism=none 'gpus=[0]'; {more}"


def test_advice_keeps_the_layout_asked_for_where_block_swap_lets_it_fit():
    words = ("model=wan2.1_t2v_14b", "hardware=4x_rtx3080", "kernels=torch")
    for parallelism, settings in (
        ("auto", "parallelism=hybrid parallelism.ring=2 parallelism.ulysses=1"),
        ("block_distribution", "parallelism=block_distribution"),
        ("fsdp", "parallelism=hybrid parallelism.ring=2 parallelism.ulysses=1"),  # refuses to swap
    ):
        config = composed(*words, f"parallelism={parallelism}")
        advice = nearest_that_fits(config, devices_to_plan(config), [config.hardware.device] * 4)
        assert advice.startswith(f"write offload=block_swap {settings} 'gpus=[0,1,2,3]'; ")
    config = composed(*words, "parallelism=data_parallel", "gpus=[3,1]")
    advice = nearest_that_fits(config, [gpu(index, 10) for index in range(4)], [None] * 4)
    assert advice.startswith("write offload=block_swap parallelism=data_parallel 'gpus=[3,1]'; ")


def test_auto_where_nothing_fits_is_advised_the_best_layout_with_block_swap():
    """And not the nearest to fitting, tensor_parallel, which it would otherwise run."""
    result = checked(
        "model=wan2.1_t2v_14b", "parallelism=auto", "kernels=torch", devices=(gpu(0, 8), gpu(1, 8))
    )
    assert "; write offload=block_swap parallelism=cfg_parallel 'gpus=[0,1]'; block_dist" in result.message


def test_advice_swaps_no_more_than_the_host_holds():
    """Then come 8-bit weights, 13.5 GiB, which are lossy, beside what is exact."""
    config = composed("model=wan2.1_t2v_14b", "hardware=1x_rtx4090")
    devices = devices_to_plan(config)
    assert "block_swap" in nearest_that_fits(config, devices, [None], host_free_bytes=7 * GIB)
    advice = nearest_that_fits(config, devices, [None], host_free_bytes=6 * GIB)
    assert advice == (
        "write precision=fp8_weight parallelism=none 'gpus=[0]' (lossy: weights in 8 bits); "
        "block_distribution over 2 such GPUs would hold all of it"
    )
    result = preflight(config, devices, devices, lambda device: None, host_free_bytes=6 * GIB)
    assert result.advice == advice


def test_advice_for_training_neither_swaps_nor_quantizes():
    config = composed("model=wan2.1_t2v_1.3b", "hardware=4x_rtx3080", "workload=train")
    advice = nearest_that_fits(config, devices_to_plan(config), [None] * 4)
    assert advice.startswith("write video.num_frames=")


def test_advice_is_a_shorter_video_and_how_many_gpus_hold_all_of_it():
    """6.5 a GPU + 0.4 + 0.9 leave 2.1 for 3.0 x frames / 21; over 5 GPUs 5.3 a GPU leave enough."""
    config = composed("model=wan2.1_t2v_14b", "hardware=4x_rtx3080", "kernels=torch")
    devices = devices_to_plan(config)
    assert nearest_that_fits(config, devices, [None] * 4, host_free_bytes=0) == (
        "write precision=fp8_weight parallelism=hybrid parallelism.cfg=1 parallelism.ring=2 parallelism.ulysses=1 "
        "parallelism.tp=2 'gpus=[0,1,2,3]' (lossy: weights in 8 bits); "
        "write video.num_frames=53 parallelism=block_distribution parallelism.block_placement=interleaved "
        "'gpus=[0,1,2,3]'; "
        "block_distribution over 5 such GPUs would hold all of it"
    )


def test_fused_kernels_make_room_for_all_of_it():
    """The same: 6.98 a GPU + 0.96 of activations + 1.35 for CUDA and NCCL = 9.29 of 10."""
    config = composed("model=wan2.1_t2v_14b", "hardware=4x_rtx3080")
    advice = nearest_that_fits(config, devices_to_plan(config), [None] * 4)
    assert advice == "write parallelism=tensor_parallel 'gpus=[0,1,2,3]'"


def test_a_mode_that_does_not_suit_is_an_error_and_not_infeasible():
    with pytest.raises(LayoutError, match="mode none uses one device"):
        checked("model=tiny", devices=(gpu(0, 24), gpu(1, 24)))


def test_enforced_memory_needs_a_named_machine():
    with pytest.raises(
        UserError, match=r"hardware\.enforce_memory is true and hardware=auto has no memory_gib"
    ):
        composed("hardware.enforce_memory=true")


def test_errors_are_those_of_the_device_that_is_furthest_off():
    result = checked("model=wan2.1_t2v_14b", "parallelism=auto", devices=(gpu(0, 24), gpu(1, 24)))
    memory = result.candidate.memory
    exact = {
        "memory/gpu0/peak_allocated_gib": memory[0].allocated / GIB,
        "memory/gpu1/peak_allocated_gib": memory[1].allocated / GIB / 1.1,
    }
    assert result.error_metrics(exact)["plan/peak_error"] == pytest.approx(0.1)
    assert "plan/step_error" not in result.error_metrics(exact | {"latency/step_ms": 1.0})  # unknown rates


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        ("latency", "parallelism=hybrid parallelism.ulysses=1 parallelism.shard=2"),
        ("throughput", "parallelism=fsdp"),
        (
            "memory",
            "parallelism=block_distribution parallelism.block_placement=interleaved parallelism.block_chunks=20",
        ),
    ],
)
def test_a_summary_is_plain_and_finite(objective, best):
    summary = planned("model=wan2.1_t2v_14b", "hardware=2x_rtx4090", f"objective={objective}").summary()
    assert summary["winner"] == f"{best} 'gpus=[0,1]'"
    for row in summary["layouts"]:
        assert row["feasible"] == (row["rejection"] is None)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert dataclasses.is_dataclass(Planned)
