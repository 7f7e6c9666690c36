"""Work of one block by hand, and what other kernels change about it."""

from dataclasses import replace

import pytest

from tests.planning.test_measured import judged
from tests.planning.test_planner import composed, gpu
from wanexp.planning.activations import Sizes
from wanexp.planning.block_work import (
    Kernels,
    block_elementwise_bytes,
    block_flops,
    fused_elementwise_bytes,
    kernels_of,
    quantized_bytes,
    quantized_heads_bytes,
)
from wanexp.wan.architecture import WanArchitecture

S = Sizes(WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), 1, (21, 30, 52))


def step_s(*overrides: str) -> float:
    time = judged("14b", "parallelism=none", *overrides).time
    assert time
    return time.step_s


def test_flops_of_a_block():
    """2 T (6 d^2 + 2 d f), the context's k and v on 512 tokens; 4 T (T + 512) d."""
    gemm, attention = block_flops(S)
    assert gemm == 2 * 32760 * (6 * 5120**2 + 2 * 5120 * 13824) + 4 * 512 * 5120**2
    assert attention == 4 * 32760 * (32760 + 512) * 5120


def test_fused_kernels_move_each_tensor_once():
    """19 x [tokens, dim] in 16 bits, against 118 of eager PyTorch, of which the GELU has 5.4."""
    hidden = 32760 * 5120 * 2
    assert fused_elementwise_bytes(S) == 19 * hidden
    assert block_elementwise_bytes(S) / hidden == pytest.approx(118.4, rel=0.001)


def test_tensor_parallel_divides_what_is_of_heads_and_columns():
    hidden = S.hidden
    assert fused_elementwise_bytes(S, tp=2) == (13 + (6 + 3) / 2) * hidden
    assert block_elementwise_bytes(S, tp=4) < block_elementwise_bytes(S, tp=2) < block_elementwise_bytes(S)


def test_8_bit_layers_read_their_inputs_or_weights_once_more():
    """fp8: 5 inputs of dim and one of ffn_dim, 2 bytes read and 1 written. Else 7 bytes a weight."""
    assert quantized_bytes(S, Kernels()) == 0
    assert quantized_bytes(S, Kernels(linear="fp8")) == 3 * 32760 * (5 * 5120 + 13824)
    assert quantized_bytes(S, Kernels(linear="int8_weight")) == 7 * S.arch.num_block_parameters()


def test_what_kernels_write_in_8_bits_is_not_read_again():
    """Inputs of o twice and of the GELU: 2 bytes read, 1 written; three norms write 1 byte less."""
    written = Kernels(is_fused=True, linear="fp8", writes_float8=True)
    assert quantized_bytes(S, written) == 32760 * (3 * (2 * 5120 + 13824) - 3 * 5120)
    assert quantized_heads_bytes(S) == 32760 * 5120 * 3 * 5
    hopper = replace(gpu(0, 140), compute_capability=(9, 0))
    fp8 = kernels_of(composed("precision=fp8"), hopper)
    assert fp8.writes_float8 and not fp8.has_float8_attention
    assert not kernels_of(composed("precision=fp8", "kernels=torch"), hopper).writes_float8
    assert kernels_of(composed("attention=fa3_fp8"), hopper).has_float8_attention


@pytest.mark.parametrize(
    ("overrides", "is_fused"),
    [((), True), (("kernels=triton",), True), (("kernels=torch",), False), (("workload=train",), False)],
)
def test_auto_fuses_for_inference_on_gpus(overrides, is_fused):
    assert kernels_of(composed(*overrides), gpu(0, 24)).is_fused is is_fused


def test_named_kernels_of_attention_count_with_their_speed():
    """14B at 480p: 1.786 PFLOP a step in attention, 2.51 s by fa3 at 711 TFLOP/s, 3.08 s by cuDNN at 580."""
    fa3 = step_s("attention=fa3")
    assert step_s("attention=auto") == fa3, "which the profile of an H200 is of"
    assert step_s("attention=sdpa_cudnn") - fa3 == pytest.approx(3.08 - 2.51, rel=0.01)
    assert step_s("attention=sdpa_flash") > 1.2 * step_s("attention=sdpa_cudnn")
    assert step_s("attention=sdpa_efficient") - fa3 == pytest.approx(10.27 - 2.51, rel=0.01), "at 174 TFLOP/s"


@pytest.mark.parametrize(
    ("kernel", "hardware", "is_known"),
    [
        ("auto", "2x_h200", True),
        ("sdpa_efficient", "2x_h200", True),
        ("sdpa_math", "2x_h200", False),
        ("auto", "2x_rtx4090", True),
        ("sdpa_flash", "2x_rtx4090", True),
        ("sdpa_efficient", "2x_rtx4090", False),
        ("sdpa_math", "2x_rtx4090", False),
    ],
)
def test_no_time_is_predicted_by_a_kernel_that_nobody_has_measured(kernel, hardware, is_known):
    candidate = judged("1.3b", "parallelism=cfg_parallel", f"attention={kernel}", hardware=hardware)
    assert candidate.time and candidate.time.is_known is is_known
    assert (candidate.summary()["step_ms"] is not None) is is_known


def test_fp32_is_timed_by_the_kernel_that_auto_takes():
    for kernel, is_known in (("auto", True), ("sdpa_efficient", True), ("sdpa_math", False)):
        found = kernels_of(composed("precision=fp32", f"attention={kernel}"), gpu(0, 140), "fa3")
        assert (found.attention_speed, found.is_known) == (1, is_known)


@pytest.mark.parametrize(
    ("overrides", "profiled", "speed"),
    [
        ((), "fa3", 1),
        (("workload=train",), "fa3", 580 / 711),  # no backward pass
        (("precision=fp16",), "fa3", 580 / 711),  # bf16 only
        (("precision=fp32",), "fa3", 1),  # a rate of its own
        (("attention=fa3",), "sdpa_cudnn", 711 / 580),
        (("attention=sdpa_cudnn",), "fa3", 580 / 711),
        (("workload=train",), "sdpa_cudnn", 1),
    ],
)
def test_auto_stands_for_the_kernel_of_the_profile_where_that_can_run(overrides, profiled, speed):
    found = kernels_of(composed(*overrides), gpu(0, 140), profiled).attention_speed
    assert found == pytest.approx(speed)


def test_fused_kernels_save_nearly_all_between_the_products():
    """40 blocks x 2 x (39.7 GB / 2538 GB/s - 6.4 GB / 4080 GB/s) = 1.13 s."""
    assert step_s() - step_s("kernels=triton") == pytest.approx(1.13, rel=0.03)


def test_8_bit_weights_cost_time_where_there_are_no_units_for_them():
    assert step_s("precision=int8_weight") > step_s()
