"""What bench_peers.py does in each process: the cases in turn, all contenders of a case in turns.

`run_rank` is the entry; rank 0 watches the GPUs and writes the results. Everything that a rank decides it decides as
all others do, for its forwards wait for theirs.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from bench_case import Case
from peer_budget import expected_seconds, num_rounds
from peer_models import (
    CONTENDERS,
    Contender,
    Forward,
    Inputs,
    Weights,
    build,
    missing,
    random_weights,
    stop_xdit,
)
from peer_table import SCHEMA, add_ratios, markdown
from torch import Tensor

from wanexp.hardware.telemetry import TelemetrySampler
from wanexp.measure.environment import host_environment, torch_environment
from wanexp.measure.parity import compare_answers
from wanexp.measure.timing import Stopwatch
from wanexp.parallel.peer_memory import bytes_in_use, release_all
from wanexp.wan.attention_choice import attention_shapes, steady
from wanexp.wan.attention_probe import probe

Row = dict[str, Any]  # what stands in the file of a contender in a case
GIB = 2**30


def run_rank(options: argparse.Namespace) -> None:
    """All cases, one after the other; rank 0 writes what is known after each."""
    rank, on_gpu = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    # A block that hits the limit would go on in eager mode without a word: let it be far, and an error.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Without device_id: with it xDiT's own groups are made another way, of which its authors warn.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
    # The parent of all ranks is the root: no rank is foreign to another.
    sampler = TelemetrySampler(options.devices, 0.1, root_pid=os.getppid()) if rank == 0 else nullcontext()
    with sampler, torch.no_grad():
        run_cases(options, device, sampler if isinstance(sampler, TelemetrySampler) else None)
    stop_xdit()
    dist.destroy_process_group()


def run_cases(options: argparse.Namespace, device: torch.device, sampler: TelemetrySampler | None) -> None:
    rows: list[Row] = []
    weights: Weights = {}
    model = None
    for case in options.cases:
        if problem := refusal(case, options):
            rows += [row_of(case, one, "not run", problem) for one in contenders_of(case, options)]
        else:
            if case.model != model:
                weights = {}  # the old ones go before the new ones come
                weights, model = random_weights(case.architecture, device), case.model
            rows += run_case(case, options, weights, device, sampler)
        gc.collect()
        release_all()
        torch.compiler.reset()  # the next size is compiled for itself, not as a dynamic shape of this one
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if sampler is not None:
            write(options, rows, sampler.summarise(options.start, time.time())[1])
            print(f"{case}: {time.time() - options.start:.0f} s since the start", flush=True)
        dist.barrier()


def refusal(case: Case, options: argparse.Namespace) -> str | None:
    """Why this case is not begun, the same on all ranks; None if it is."""
    if case.num_gpus > len(options.devices):
        return f"needs {case.num_gpus} GPUs, found {len(options.devices)}"
    needed = expected_seconds(
        flops=case.flops,
        num_gpus=case.num_gpus,
        contenders=contenders_of(case, options),
        rounds=rounds_of(case, options),
    )
    left = options.budget_s - elapsed(options)
    return f"{left:.0f} s of the budget were left, {needed:.0f} s might be needed" if needed > left else None


def contenders_of(case: Case, options: argparse.Namespace) -> list[Contender]:
    """Those asked for; a guided step is spread over two GPUs only."""
    asked = [CONTENDERS[name] for name in options.contender]
    return [contender for contender in asked if case.num_gpus == 2 or not contender.is_guided]


def rounds_of(case: Case, options: argparse.Namespace) -> int:
    alone = len(options.devices) // case.num_gpus
    return options.rounds or num_rounds(flops=case.flops, samples_per_round=alone)


def elapsed(options: argparse.Namespace) -> float:
    """Seconds since the start, of rank 0 on all ranks."""
    seconds = [time.time() - options.start]
    dist.broadcast_object_list(seconds, src=0)
    return seconds[0]


def run_case(
    case: Case,
    options: argparse.Namespace,
    weights: Weights,
    device: torch.device,
    sampler: TelemetrySampler | None,
) -> list[Row]:
    """One row for each contender."""
    kernels = our_attention(case, options.attention, device)
    inputs = random_inputs(case, device)
    rows: dict[str, Row] = {}
    ready: dict[str, tuple[Forward, Stopwatch]] = {}
    outputs: dict[str, Tensor] = {}
    for contender in contenders_of(case, options):
        row = rows[contender.name] = row_of(case, contender, "missing", missing(contender))
        if row["reason"]:
            continue
        begin, problem = time.perf_counter(), None
        try:
            forward = build(contender, case.architecture, weights, degree=case.num_gpus, attention=kernels)
            outputs[contender.name] = forward(inputs).float().cpu()
        except Exception as error:  # whatever a library may raise is its result, not the end of the others
            lines = str(error).strip().splitlines() or [""]
            problem = f"{type(error).__name__}: {lines[0]}"
        row["first_call_s"] = time.perf_counter() - begin
        if problems := list(filter(None, gather(problem))):
            row |= {"outcome": "failed", "reason": problems[0]}
            continue
        row |= {"outcome": "measured", "windows": [], "peak_gib": 0.0}
        row["attention"] = kernels if contender.library == "wanexp" else contender.attention
        ready[contender.name] = forward, Stopwatch([device])

    rounds = rounds_of(case, options)
    for index in range(rounds):
        begun = elapsed(options)
        for name, (forward, stopwatch) in ready.items():
            take_turn(forward, inputs, stopwatch, rows[name], device)
        now = elapsed(options)
        if index + 1 < rounds and now + (now - begun) > options.budget_s:
            break
    for name, (_, stopwatch) in ready.items():
        finish_row(rows[name], case, gather(stopwatch.step_s), options.floors, sampler)
        if "ours" in outputs:
            parity = compare_answers({"flow": outputs[name]}, {"flow": outputs["ours"]})
            rows[name]["rel_l2_to_ours"] = parity.rel_l2
    return list(rows.values())


def take_turn(forward: Forward, inputs: Inputs, stopwatch: Stopwatch, row: Row, device: torch.device) -> None:
    """One timed call; adds its window to `row`, and the peak of what it took above what was there."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begin = time.time()
    with stopwatch.step():
        forward(inputs)
    row["windows"].append((begin, time.time()))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
        # Ours on several GPUs is the only one that has memory beside torch's allocator.
        peak += bytes_in_use() if row["contender"] == "ours" else 0
        row["peak_gib"] = max(row["peak_gib"], peak / GIB)


def finish_row(
    row: Row,
    case: Case,
    samples_of_ranks: Sequence[Sequence[float]],
    floors: Mapping[tuple[str, str, int], float],
    sampler: TelemetrySampler | None,
) -> None:
    """What follows from the turns. Called by all ranks."""
    row["samples_s"] = samples_of_runs(samples_of_ranks, case.num_gpus)
    row["seconds"] = statistics.fmean(statistics.median(run) for run in row["samples_s"])
    row["peak_gib"] = max(gather(row["peak_gib"]))
    # Of a guided step each GPU has a forward of its own.
    floor = floors.get((case.model, case.video, case.num_gpus // row["forwards"]))
    if floor:
        row["share_of_floor"] = floor / row["seconds"]
    windows = row.pop("windows")
    if sampler is not None:
        row["telemetry"] = means_in(sampler.series(0.0), windows)


def row_of(case: Case, contender: Contender, outcome: str, reason: str | None) -> Row:
    return {
        "model": case.model,
        "video": case.video,
        "num_gpus": case.num_gpus,
        "contender": contender.name,
        "title": contender.title,
        "forwards": 2 if contender.is_guided else 1,
        "outcome": outcome,
        "reason": reason,
    }


def our_attention(case: Case, asked: str | None, device: torch.device) -> tuple[str, str]:
    """Our kernels for self- and cross-attention; without a wish those that a run chooses, by a probe of rank 0."""
    if asked:
        first, _, second = asked.partition(",")
        return first, second or first
    kernels = ["", ""]
    if dist.get_rank() == 0:
        shapes = attention_shapes(
            batch=1,
            tokens=case.num_tokens,
            text_tokens=case.architecture.text_len,
            heads=case.architecture.num_heads,
            head_dim=case.architecture.head_dim,
            ulysses=case.num_gpus,
        )
        own, cross = (probe("auto", shape, device=device, dtype=torch.bfloat16) for shape in shapes)
        kernels = [own.kernel, steady(cross).kernel]
    dist.broadcast_object_list(kernels, src=0)
    return kernels[0], kernels[1]


def random_inputs(case: Case, device: torch.device) -> Inputs:
    """Normal random values of unit variance, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, torch.bfloat16)

    text = draw(case.architecture.text_len, case.architecture.text_dim)
    return Inputs(draw(*case.latent_shape), torch.tensor([500.0], device=device), text)


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def samples_of_runs(samples_of_ranks: Sequence[Sequence[float]], num_gpus: int) -> list[list[float]]:
    """One run for each GPU that measured alone; of several GPUs together one, as long as their slowest rank."""
    if num_gpus == 1:
        return [list(samples) for samples in samples_of_ranks]
    return [[max(turn) for turn in zip(*samples_of_ranks, strict=True)]]


def means_in(
    series: Mapping[str, Sequence[Sequence[float]]], windows: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Means of what was sampled inside any of `windows`; of temperatures the largest."""
    found: dict[str, float] = {}
    for name, samples in series.items():
        inside = [v for t, v in samples if any(begin <= t <= end for begin, end in windows)]
        if inside and not name.endswith("/energy_j"):
            found[name] = max(inside) if name.endswith("/temperature_c") else statistics.fmean(inside)
    return found


def write(options: argparse.Namespace, rows: Sequence[Row], warnings: Sequence[str]) -> None:
    """What is known so far, in both forms."""
    result = {
        "schema": SCHEMA,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python scripts/bench_peers.py " + " ".join(sys.argv[1:]),
        "environment": host_environment(options.devices) | torch_environment() | {"peers": peer_versions()},
        "devices": [device.name for device in options.devices],
        "rows": add_ratios(rows),
        "warnings": list(warnings),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.write_text(markdown(result))


def peer_versions() -> dict[str, str | None]:

    versions: dict[str, str | None] = {}
    for package in ("diffusers", "xfuser", "fa3-fwd", "flash-attn-4"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions
