#!/usr/bin/env python
"""Where a forward spread over GPUs spends its time: its kernels, by stream, beside those of one GPU.

Context parallelism (Ulysses): the same model whole on each GPU, split with the exchanges carried by copy engines and by
the process group, and split with nothing exchanged at all (a wrong answer: what is left is the computing); with copy
engines also with all rows attended at once. What is lost between half the time of one GPU and the time of two shows in
which kernels take longer, in waits (`wait_signal`), and in times when nothing computes. FSDP: the model whole, and in
shards that copy engines or the process group bring together; and whole while small copies keep the links awake, which
tells what these draw.

First all take turns and are timed, then each is profiled.

    python -m torch.distributed.run --nproc-per-node 2 scripts/profile_exchanges.py --out docs/results/exchanges.md
    python -m torch.distributed.run --nproc-per-node 2 scripts/profile_exchanges.py --mode fsdp --out /tmp/fsdp.md
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from bench_case import parse_case
from peer_models import random_weights

from wanexp.parallel import shares, ulysses
from wanexp.parallel.context_parallel import context_parallel
from wanexp.parallel.fsdp import shard_with_fsdp
from wanexp.parallel.peer_memory import PeerMemory, open_peer_memory
from wanexp.parallel.peer_shards import shard_over_peers
from wanexp.parallel.shares import shard_part
from wanexp.parallel.ulysses import Parcel, Sent, Sizes
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, load_weights

ROUNDS, PROFILED = 5, 2
SHOWN = 16  # kernels of a table
SMALL_COPY = 64 * 1024  # bytes
Forward = Callable[[], Tensor]


class Nothing:
    """In place of an exchange: what a rank packs is what it receives."""

    def __init__(self, _group: dist.ProcessGroup) -> None: ...

    def parcel(self, like: Tensor, sizes: Sizes, _place: int) -> Parcel:
        flat = like.new_empty(max(sum(sizes.packed), sum(sizes.received)))
        return Parcel(list(flat[: sum(sizes.packed)].split(sizes.packed)), flat)

    def start(self, parcel: Parcel, sizes: Sizes, _place: int) -> Sent:
        assert parcel.flat is not None
        received, size = parcel.flat, sum(sizes.received)
        if len(received) < size:  # o of a rank with few heads, which is not packed here
            received = received.new_empty(size)
        return Sent(received[:size], sizes, parcel, lambda: None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="wan2.1_t2v_14b:480p", help="model:video")
    parser.add_argument("--mode", choices=("ulysses", "fsdp"), default="ulysses")
    parser.add_argument("--layers", type=int, default=10, help="blocks of the model (default 10)")
    parser.add_argument("--attention", default="fa3,sdpa_cudnn", help="kernels, to itself and to the text")
    parser.add_argument("--out", type=Path, help="Markdown")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        print(
            "error: it runs as one process a GPU; write python -m torch.distributed.run --nproc-per-node 2 "
            "scripts/profile_exchanges.py",
            file=sys.stderr,
        )
        return 2
    rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    case = parse_case(options.case)
    architecture = dataclasses.replace(case.architecture, num_layers=options.layers)
    attention = tuple(options.attention.split(","))
    models = {"ulysses": split_models, "fsdp": sharded_models}[options.mode](architecture, device, attention)
    forwards = forwards_of(models, architecture, case.latent_shape, device)
    assert dist.group.WORLD is not None
    if options.mode == "fsdp" and on_gpu and (memories := open_peer_memory([dist.group.WORLD], device)):
        forwards["whole, links awake"] = partial(with_links_awake, forwards["whole"], memories[0])
    lines = [
        f"# {options.mode}: {case.model}, {case.video}, {options.layers} blocks, {dist.get_world_size()} ranks"
    ]
    lines += ["", *(f"* {name}: {words} ms a forward" for name, words in in_turns(forwards, device).items())]
    for name, forward in forwards.items():
        lines += ["", f"## {name}, rank 0", "", *kernel_table(forward, device)]
        dist.barrier()
    if rank == 0:
        print("\n".join(lines))
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def empty_model(architecture: WanArchitecture) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=torch.bfloat16).eval().requires_grad_(False)


def use_kernels(model: WanTransformer, device: torch.device, attention: tuple[str, ...]) -> WanTransformer:
    if device.type == "cuda":
        model.set_attention(*attention)
        model.set_kernels("triton")
    return model


def split_models(
    architecture: WanArchitecture, device: torch.device, attention: tuple[str, ...]
) -> dict[str, WanTransformer]:
    """Whole, and split by Ulysses, on one set of weights."""
    weights = random_weights(architecture, device)

    def whole() -> WanTransformer:
        model = empty_model(architecture)
        model.load_state_dict(weights, assign=True)
        return use_kernels(model.requires_grad_(False), device, attention)

    def split(memory: Any = None, **settings: Any) -> WanTransformer:
        model = whole()
        context_parallel(model, ulysses=dist.group.WORLD, ring=None, memory=memory, **settings)
        return model

    assert dist.group.WORLD is not None
    found = {"whole": whole(), "collectives": split()}
    if device.type == "cuda" and (memories := open_peer_memory([dist.group.WORLD], device)):
        shares.MIN_HEADS_SENT = 0  # whether it pays or not
        found["copies, rows apart"] = split(memories[0])
        found["copies, all rows at once"] = split(memories[0], apart=False)
    carrier, ulysses.Collectives = ulysses.Collectives, Nothing  # type: ignore[assignment,misc]
    found["nothing exchanged"] = split()
    ulysses.Collectives = carrier  # type: ignore[misc]
    return found


def sharded_models(
    architecture: WanArchitecture, device: torch.device, attention: tuple[str, ...]
) -> dict[str, WanTransformer]:
    """Whole, and in shards over all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def filled(model: WanTransformer, **settings: Any) -> WanTransformer:
        load_weights(model, RandomWeights(architecture), device_of=lambda _: device, **settings)
        return use_kernels(model, device, attention)

    def own_part(_name: str, shape: tuple[int, ...]) -> Part:
        return shard_part(shape, degree=size, index=rank)

    assert dist.group.WORLD is not None
    found = {"whole": filled(empty_model(architecture))}
    model = empty_model(architecture)
    shard_with_fsdp(model, init_device_mesh(device.type, (size,)), training=False)
    found["collectives"] = filled(model, part_of=own_part)
    if device.type == "cuda" and (memories := open_peer_memory([dist.group.WORLD], device)):
        model = empty_model(architecture)
        shards = shard_over_peers(model, memories[0])
        found["copies"] = filled(model, part_of=own_part, into=shards.into)
        shards.complete()
    return found


def forwards_of(
    models: Mapping[str, WanTransformer],
    architecture: WanArchitecture,
    latent_shape: tuple[int, ...],
    device: torch.device,
) -> dict[str, Forward]:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, *latent_shape, generator=generator).to(device, torch.bfloat16)
    text = torch.randn(1, architecture.text_len, architecture.text_dim, generator=generator)
    inputs = (latent, torch.tensor([500.0], device=device), text.to(device, torch.bfloat16))

    def forward(model: WanTransformer) -> Tensor:
        with torch.inference_mode():
            return model(*inputs)

    return {name: partial(forward, model) for name, model in models.items()}


def with_links_awake(forward: Forward, memory: PeerMemory) -> Tensor:
    """`forward` while a small copy a millisecond goes to the next rank."""
    memory.reserve(SMALL_COPY)
    part = torch.zeros(SMALL_COPY, dtype=torch.uint8, device=memory.device)
    place = memory.place(memory.others[0], 0, SMALL_COPY, torch.uint8)
    stream, done = torch.cuda.Stream(memory.device), threading.Event()

    def copy() -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            while not done.wait(0.001):
                place.copy_(part, non_blocking=True)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        found = forward()
        torch.cuda.synchronize(memory.device)
    finally:
        done.set()
        thread.join()
    return found


def in_turns(forwards: Mapping[str, Forward], device: torch.device) -> dict[str, str]:
    """Median milliseconds of each, on every rank."""
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for forward in forwards.values():
        forward()
    for _ in range(ROUNDS):
        for name, forward in forwards.items():
            wait(device)
            begin = time.perf_counter()
            forward()
            wait(device)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: 1000 * statistics.median(samples) for name, samples in seconds.items()}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, medians)
    return {name: " / ".join(f"{times[name]:.1f}" for times in of_ranks) for name in forwards}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def kernel_table(forward: Forward, device: torch.device) -> list[str]:
    """The kernels and copies of a forward by their time, as Markdown; and how long nothing computes."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    forward()
    wait(device)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = [
        (event.time_range.start, event.time_range.end, event.device_resource_id, event.name)
        for event in profiler.events()
        if not event.is_user_annotation
        and (event.device_type == torch.autograd.DeviceType.CUDA or device.type != "cuda")
    ]
    totals: dict[tuple[int, str], list[float]] = {}
    for start, end, stream, name in events:
        totals.setdefault((stream, name), []).append(end - start)
    rows = sorted(totals.items(), key=lambda item: -sum(item[1]))
    lines = ["| ms a forward | calls | us each | stream | kernel |", "|---:|---:|---:|---:|---|"]
    for (stream, name), times in rows[:SHOWN]:
        calls = len(times) / PROFILED
        total = sum(times) / PROFILED / 1000
        lines.append(
            f"| {total:.2f} | {calls:.0f} | {sum(times) / len(times):.1f} | {stream} | `{name[:70]}` |"
        )
    if rows:
        idle, busy_until = 0.0, math.inf
        for start, end, _, name in sorted(events):
            if not name.startswith(("Memcpy PtoP", "Memset")) and "wait_signal" not in name:
                idle += max(0.0, start - busy_until)
                busy_until = end if busy_until == math.inf else max(busy_until, end)
        lines += ["", f"No stream computes for {idle / PROFILED / 1000:.2f} ms a forward."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
