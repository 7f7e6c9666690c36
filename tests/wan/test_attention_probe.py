import json
import logging
import math
from dataclasses import asdict

import pytest
import torch

from wanexp.errors import UserError
from wanexp.wan import attention_probe, flash_attention
from wanexp.wan.attention import KERNELS, is_lossy
from wanexp.wan.attention_cache import add_choice, cache_key, default_cache_file, read_choices
from wanexp.wan.attention_choice import (
    CANDIDATES,
    LAST_RESORT,
    AttentionShape,
    Choice,
    KernelResult,
    attention_shapes,
    candidates,
    choice_from_dict,
    decide,
    steady,
)
from wanexp.wan.attention_probe import attention_ceilings, measure_kernels, probe, time_in_turns

SMALL = AttentionShape(batch=2, queries=130, keys=70, heads=3, head_dim=16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- deciding ---


def test_flops_of_14b_at_480p():
    shape = AttentionShape(1, 32760, 32760, 40, 128)
    assert shape.flops == pytest.approx(21.98e12, rel=1e-3)  # 31.9 ms are 689 TFLOP/s
    assert shape.flops / 31.9e-3 / 1e12 == pytest.approx(689, abs=1)


@pytest.mark.parametrize(
    ("degrees", "own", "cross"),
    [
        ({}, (32760, 32760, 40), (32760, 512, 40)),
        ({"ulysses": 2}, (32760, 32760, 20), (16380, 512, 40)),
        ({"ring": 2}, (16380, 16380, 40), (16380, 512, 40)),
        ({"tp": 2}, (32760, 32760, 20), (32760, 512, 20)),
        ({"ulysses": 3, "ring": 7, "tp": 2}, (4680, 4680, 7), (1560, 512, 20)),
        ({"ulysses": 16}, (32760, 32760, 3), (2048, 512, 40)),
    ],
)
def test_shapes_of_one_rank(degrees, own, cross):
    found = attention_shapes(batch=1, tokens=32760, text_tokens=512, heads=40, head_dim=128, **degrees)
    assert [(s.queries, s.keys, s.heads) for s in found] == [own, cross]


def test_the_fastest_that_runs_is_taken_and_the_losers_are_kept():
    results = [
        KernelResult("sdpa_flash", seconds=0.0607, tflops=362.0, rel_l2=0.003),
        KernelResult("fa4", seconds=0.0319, tflops=689.0, rel_l2=0.003),
        KernelResult("fa3", refusal="here: it is not installed"),
        KernelResult("sdpa_cudnn", failure="right: relative L2 0.5, more than 0.01", rel_l2=0.5),
    ]
    choice = decide("auto", results, SMALL)
    assert (choice.kernel, choice.tflops) == ("fa4", 689.0)
    assert choice.results == tuple(results) and not choice.from_cache


@pytest.mark.parametrize(
    ("milliseconds", "taken"),
    [  # sdpa_flash, sdpa_cudnn, fa3 on 512 keys, as probed on H200
        ((1.027, 0.623, 0.647), "sdpa_cudnn"),  # 14B at 480p
        ((0.532, 0.323, 0.312), "sdpa_cudnn"),  # half of its tokens, under Ulysses
        ((2.4, 1.586, 1.476), "sdpa_cudnn"),  # at 720p
        ((0.3, 0.096, 0.277), "sdpa_cudnn"),  # half of 1.3B's, where a call of fa3 takes the host longer
        ((1.0, 0.8, 0.6), "fa3"),  # a clear gain
        ((0.6, 0.8, 0.6), "sdpa_flash"),
    ],
)
def test_cross_attention_gets_the_same_kernel_in_every_layout(milliseconds, taken):
    kernels = ("sdpa_flash", "sdpa_cudnn", "fa3")
    results = [
        KernelResult(k, seconds=ms / 1e3, tflops=1 / ms) for k, ms in zip(kernels, milliseconds, strict=True)
    ]
    results.append(KernelResult("fa4", refusal="here: it is not installed"))
    found = steady(decide("auto", results, SMALL))
    assert found.kernel == taken
    assert found.tflops == next(result.tflops for result in results if result.kernel == taken)
    assert found.results == tuple(results)  # what was measured stays


def test_a_choice_without_a_probe_or_by_name_is_steady_already():
    named = decide("fa3", [KernelResult("fa3", seconds=0.1, tflops=1.0)], SMALL)
    for choice in (Choice("sdpa_flash"), named):
        assert steady(choice) == choice


def test_no_kernel_at_all_names_every_reason():
    results = [KernelResult("fa3", refusal="on sm_80: no"), KernelResult("fa4", failure="here: OSError: x")]
    with pytest.raises(UserError, match=r"no attention kernel runs on .*: fa3 on sm_80: no, fa4 here: OSErr"):
        decide("auto", results, SMALL)
    with pytest.raises(UserError, match="attention=fa4 cannot run here: OSError: x; write attention=auto"):
        decide("fa4", results[1:], SMALL)


def test_what_auto_tries():
    assert set(candidates("auto", training=False)) == set(KERNELS) - {"fa3_fp8", LAST_RESORT}
    assert all(kernel.startswith("sdpa_") for kernel in candidates("auto", training=True))
    assert candidates("fa3_fp8", training=False) == ["fa3_fp8"]
    assert [kernel for kernel in KERNELS if is_lossy(kernel)] == ["fa3_fp8"]


def test_a_choice_survives_json():
    choice = Choice("fa4", 689.0, (KernelResult("fa4", 0.03, 689.0, 0.003), KernelResult("fa3", refusal="x")))
    assert choice_from_dict(json.loads(json.dumps(asdict(choice)))) == choice


# --- measuring, on the CPU ---


def by_kernel(kernels=CANDIDATES, **options):
    options = {"shape": SMALL, "device": CPU, "dtype": torch.bfloat16} | options
    return {result.kernel: result for result in measure_kernels(kernels, **options)}


@pytest.fixture
def fa4(monkeypatch):
    """Sets what the package of fa4 does; it then runs on the CPU too."""
    monkeypatch.setattr(flash_attention, "refusal", lambda *_args, **_facts: None)

    def set_function(function):
        monkeypatch.setattr(flash_attention, "package_function", lambda _package: function)

    return set_function


def softmax_attention(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
    return out.to(q.dtype), scores.logsumexp(-1)


def broken(q, k, v):
    raise AssertionError("no such tile\nsecond line")


@pytest.mark.parametrize("with_lse", [False, True])
def test_kernels_are_checked_and_timed(fa4, with_lse):
    fa4(softmax_attention)
    found = by_kernel(("sdpa_flash", "sdpa_cudnn", "fa4"), with_lse=with_lse)
    for kernel in ("sdpa_flash", "fa4"):
        result = found[kernel]
        assert result.refusal is None and result.failure is None
        assert 0 < result.rel_l2 < 0.006
        assert result.tflops == pytest.approx(SMALL.flops / result.seconds / 1e12)
    assert found["sdpa_cudnn"] == KernelResult("sdpa_cudnn", refusal="on cpu with bfloat16 and head_dim 16")


@pytest.mark.parametrize("factor", [1.05, math.nan])
def test_a_kernel_that_is_wrong_is_out(fa4, factor):
    def wrong(q, k, v):
        out, lse = softmax_attention(q, k, v)
        return out * factor, lse

    fa4(wrong)
    result = by_kernel(("fa4",))["fa4"]
    assert result.seconds is None and result.failure.startswith("right: relative L2 ")
    json.dumps(asdict(result), allow_nan=False)


def test_a_few_wrong_rows_are_seen_at_the_end_too(fa4):
    def wrong(q, k, v):
        out, lse = softmax_attention(q, k, v)
        out[:, -1] = 0  # what a kernel that forgets the last odd row leaves
        return out, lse

    fa4(wrong)
    assert by_kernel(("fa4",))["fa4"].failure is not None


def test_a_kernel_that_breaks_is_a_failure_and_not_the_end(fa4):
    fa4(broken)
    found = by_kernel(("fa4", "sdpa_flash"))
    assert found["fa4"] == KernelResult("fa4", failure="here: AssertionError: no such tile")
    assert found["sdpa_flash"].seconds


def test_training_times_the_backward_pass_too():
    found = by_kernel(("sdpa_flash", "fa4"), training=True, dtype=torch.float32)
    assert found["fa4"].refusal == "in training: it has no backward pass"
    result = found["sdpa_flash"]
    assert result.tflops == pytest.approx(3.5 * SMALL.flops / result.seconds / 1e12)


def test_inside_inference_mode_training_is_measured_all_the_same():
    with torch.inference_mode():
        assert by_kernel(("sdpa_flash",), training=True, dtype=torch.float32)["sdpa_flash"].seconds


def test_a_slow_kernel_keeps_its_first_time_and_the_others_take_turns(monkeypatch):
    clock, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(attention_probe.time, "perf_counter", lambda: clock[0])
    calls = {"slow": call("slow", 0.08), "fast": call("fast", 0.03), "near": call("near", 0.035)}
    found = time_in_turns(calls, CPU)
    assert found == pytest.approx({"slow": 0.08, "fast": 0.03, "near": 0.035})
    assert order == ["slow", "fast", "near"] * 2 + ["fast", "near"] * 4
    assert time_in_turns({}, CPU) == {}


def test_ceilings():
    rows = attention_ceilings([SMALL], ("sdpa_flash", "fa3"), device=CPU)
    assert [row["kernel"] for row in rows] == ["sdpa_flash", "fa3"]
    assert rows[0]["shape"] == "[2, 130, 3, 16] x 70 keys" and rows[0]["tflops"] > 0
    assert rows[1]["refusal"] == "on cpu: it needs a CUDA device"


# --- the probe ---


def test_on_the_cpu_nothing_is_probed(monkeypatch):
    monkeypatch.setattr(attention_probe, "measure_kernels", None)
    assert probe("auto", SMALL, device=CPU, dtype=torch.float32) == Choice("sdpa_flash")
    assert probe("sdpa_math", SMALL, device=CPU, dtype=torch.float32) == Choice("sdpa_math")


@pytest.mark.parametrize(
    ("kernel", "training", "reason"),
    [
        ("fa3", False, "attention=fa3 cannot run on cpu: it needs a CUDA device; write attention=auto"),
        ("fa3_fp8", True, "attention=fa3_fp8 cannot run in training: it has no backward pass"),
        ("fa5", False, "unknown attention kernel 'fa5'"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(kernel, training, reason):
    with pytest.raises(UserError, match=reason):
        probe(kernel, SMALL, device=CPU, dtype=torch.bfloat16, training=training)


class Gpu:
    """A pretended GPU: what its kernels are found to be, and how often they were measured."""

    def __init__(self, monkeypatch, path):
        self.path, self.measured = path, []
        self.results = {kernel: KernelResult(kernel, 0.04, 500.0, 0.003) for kernel in CANDIDATES}
        self.results["fa4"] = KernelResult("fa4", 0.03, 700.0, 0.003)
        monkeypatch.setattr(attention_probe, "measure_kernels", self.measure)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")

    def measure(self, kernels, **_options):
        self.measured.append(list(kernels))
        return [self.results[kernel] for kernel in kernels]

    def probe(self, requested="auto", shape=SMALL, dtype=torch.bfloat16, **options):
        return probe(requested, shape, device=CUDA, dtype=dtype, cache_file=self.path, **options)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return Gpu(monkeypatch, tmp_path / "deep" / "attention.json")


def test_a_choice_is_measured_once(gpu):
    first, second = gpu.probe(), gpu.probe()
    assert first.kernel == second.kernel == "fa4" and gpu.measured == [list(CANDIDATES)]
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.results == first.results and second.tflops == 700.0
    assert [path.name for path in gpu.path.parent.iterdir()] == ["attention.json"]


def test_whatever_else_differs_is_measured_anew(gpu, monkeypatch):
    gpu.probe()
    gpu.probe("fa3")
    gpu.probe(shape=AttentionShape(2, 130, 71, 3, 16))
    gpu.probe(dtype=torch.float16)
    gpu.probe(with_lse=True)
    gpu.probe(training=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100")
    gpu.probe()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    gpu.probe()
    assert len(gpu.measured) == 8 and len(read_choices(gpu.path)) == 8
    assert gpu.probe().from_cache


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 3}', '{"x": {"kernel": "fa4"}}', "\xff\xfe"])
def test_a_cache_that_cannot_be_read_costs_a_probe(gpu, content, caplog):
    gpu.path.parent.mkdir()
    gpu.path.write_bytes(content.encode("latin-1"))
    assert not gpu.probe().from_cache and gpu.probe().from_cache
    assert "cannot be read" in caplog.text


def test_a_cache_that_cannot_be_written_costs_the_next_run_a_probe(gpu, caplog):
    gpu.path.parent.write_text("a file where the folder should be")
    assert gpu.probe().kernel == "fa4" and not gpu.probe().from_cache
    assert "cannot be written" in caplog.text


def test_after_a_failure_the_next_run_tries_again(gpu, caplog):
    gpu.results["fa4"] = KernelResult("fa4", failure="here: ImportError: libcudart.so.12")
    with caplog.at_level(logging.WARNING):
        assert gpu.probe().kernel != "fa4"
    assert "attention=fa4 cannot run here: ImportError" in caplog.text
    gpu.results["fa4"] = KernelResult("fa4", 0.03, 700.0, 0.003)
    assert gpu.probe().kernel == "fa4" and len(gpu.measured) == 2


def test_math_is_the_last_resort(gpu):
    gpu.results = {kernel: KernelResult(kernel, refusal="in float64") for kernel in CANDIDATES}
    gpu.results[LAST_RESORT] = KernelResult(LAST_RESORT, 0.5, 1.0, 0.0)
    assert gpu.probe(dtype=torch.float64).kernel == LAST_RESORT
    assert gpu.measured == [list(CANDIDATES), [LAST_RESORT]]


def test_a_named_kernel_is_measured_alone_or_is_an_error(gpu):
    assert gpu.probe("sdpa_cudnn").kernel == "sdpa_cudnn" and gpu.measured == [["sdpa_cudnn"]]
    gpu.results["fa3"] = KernelResult("fa3", refusal="here: fa3-fwd or flash-attn-3 is not installed")
    with pytest.raises(UserError, match=r"attention=fa3 cannot run here: fa3-fwd .* is not installed; write"):
        gpu.probe("fa3")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / "wanexp" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / ".cache" / "wanexp" / "attention.json"


def test_the_key_says_all_that_a_choice_depends_on(gpu):
    facts = {"device": CUDA, "dtype": torch.bfloat16, "training": False, "with_lse": False}
    key = cache_key("auto", SMALL, **facts)
    for part in ("NVIDIA H200", f"torch {torch.__version__}", "cudnn", "fa3-fwd", "flash-attn-4", "bfloat16"):
        assert part in key
    add_choice(gpu.path, key, Choice("fa4"))
    assert gpu.probe() == Choice("fa4", from_cache=True)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keys", [1000, 512])
def test_probe_on_a_gpu(tmp_path, keys, training):
    shape, file = AttentionShape(1, 1000, keys, 12, 128), tmp_path / "attention.json"
    options = {"dtype": torch.bfloat16, "training": training, "cache_file": file}
    choice = probe("auto", shape, device=CUDA, **options)
    results = {result.kernel: result for result in choice.results}
    assert choice.kernel in CANDIDATES and choice.tflops > 0.1
    assert results[choice.kernel].seconds == min(r.seconds for r in choice.results if r.seconds)
    assert [result.failure for result in choice.results if result.failure] == []
    assert results["sdpa_flash"].rel_l2 < 0.01
    assert probe("auto", shape, device=CUDA, **options).from_cache
    held = torch.cuda.memory_allocated()  # cuBLAS keeps a workspace from the first product on
    named = probe("sdpa_flash", shape, device=CUDA, with_lse=not training, **options)
    assert named.kernel == "sdpa_flash" and named.tflops
    assert torch.cuda.memory_allocated() == held
