"""Ranks on GPUs of their own with NCCL, for what gloo cannot show."""

import dataclasses
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.offload.models import SMALL, inputs, load, meta_model
from wanexp.parallel import shares
from wanexp.parallel.layout import split_evenly
from wanexp.parallel.loading import Loader
from wanexp.parallel.peer_memory import PeerMemory, bytes_in_use, open_peer_memory
from wanexp.parallel.peer_shards import shard_over_peers
from wanexp.parallel.shares import shard_part
from wanexp.parallel.traffic import Traffic
from wanexp.parallel.ulysses import Exchange
from wanexp.wan.transformer import first_blocks
from wanexp.wan.weights import RandomWeights

# 8 blocks of 32 MiB
WIDE = dataclasses.replace(SMALL, dim=1024, ffn_dim=4096, num_heads=8, num_layers=8)


def exchange_on_gpus(world_size: int) -> list[list[float]]:
    """Largest difference between what copies and collectives carry, for each of many attentions, by rank."""
    return on_gpus(world_size, _exchange)


def shards_on_gpus(world_size: int) -> list[dict[str, Any]]:
    """By rank, what became of forwards with shards in peer memory: see `_shards`."""
    return on_gpus(world_size, _shards)


def on_gpus(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(device, rank, *arguments)` on GPUs of one process group; results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _enter, (world_size, folder, function, arguments), nprocs=world_size, start_method="spawn"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _enter(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
        device_id=device,
    )
    shares.MIN_HEADS_SENT = 0  # so that rows are attended apart
    torch.save(function(device, rank, *arguments), Path(folder) / f"{rank}.pt")
    torch.cuda.synchronize(device)
    dist.barrier()
    dist.destroy_process_group()


def _memory_of_all(device: torch.device) -> PeerMemory:
    group = dist.group.WORLD
    assert group is not None
    memories = open_peer_memory([group], device)
    assert memories is not None
    return memories[0]


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of an attention: to the bit the same for a row of q, whichever rows are beside it."""
    return (
        q.float().mul(2).add(k.float().mean(1, keepdim=True)).sub(v.float().amax(1, keepdim=True)).bfloat16()
    )


def _exchange(device: torch.device, rank: int) -> list[float]:
    """Attentions by copies less those by collectives: rows apart and not, with new tensors each, and slow streams."""
    memory, differences = _memory_of_all(device), []
    torch.manual_seed(rank)
    slow = (torch.cuda.current_stream(device), memory._beside, memory._copying, None)
    for tokens, heads, batch in ((37, 5, 1), (1000, 12, 2), (999, 9, 1), (5000, 40, 1), (37, 5, 1)) * 4:
        first = tokens - tokens // 3
        tokens_of = [first, *split_evenly(tokens - first, memory.size - 1)]
        exchanges = [
            Exchange(memory.group, lambda tokens_of=tokens_of: tokens_of, Traffic(), carrier)
            for carrier in (None, memory)
        ]
        for number in range(6):  # one after the other, so that places are written to again
            stream = slow[number % 4]
            if stream is not None and (len(differences) + number) % memory.size == rank:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(5_000_000)
            q, k, v = (
                torch.randn(batch, tokens_of[rank], heads, 64, device=device).bfloat16() for _ in range(3)
            )
            results = []
            for exchange, apart in zip(exchanges, (False, number % 3 > 0), strict=True):
                sent = exchange.send(v), exchange.send(k)
                results.append(exchange.attend(_mixed, q, sent[1], sent[0], apart=apart).float())
            differences.append((results[0] - results[1]).abs().max().item())
    return differences


def _shards(device: torch.device, rank: int) -> dict[str, Any]:
    """Forwards that differ from those of the whole model, memory and counters.

    Ranks run as they like: each a different number of first blocks, and a slow stream on one rank at a time.
    """
    memory = _memory_of_all(device)
    plain, model = meta_model(WIDE, torch.bfloat16), meta_model(WIDE, torch.bfloat16)
    load(plain, RandomWeights(WIDE), device=device)
    given = inputs(WIDE, device=str(device))
    with torch.inference_mode():
        plain(**given)  # what kernels keep for themselves is there from now on
    torch.cuda.synchronize(device)
    before, peer_bytes = torch.cuda.memory_allocated(device), bytes_in_use()
    shards = shard_over_peers(model, PeerMemory(memory.group, device))
    loader = Loader(
        WIDE,
        part_of=lambda rank, name, shape: shard_part(shape, degree=memory.size, index=rank),
        nodes=[range(memory.size)],
        rank=rank,
        home=device,
    )
    loader.load(model, RandomWeights(WIDE), device_of=lambda _: device, into=shards.into)
    shards.complete()
    different, ring = [], shards.ring
    with torch.inference_mode():
        if not torch.equal(model.embed_text(given["text"]), plain.embed_text(given["text"])):
            different.append("embed_text")
        for number in range(24):
            slow = (ring.stream, torch.cuda.current_stream(device), None)[number % 3]
            if slow is not None and number % memory.size == rank:
                with torch.cuda.stream(slow):
                    torch.cuda._sleep(20_000_000)
            k = (8, 8, 2, 5, 1, 8, 3)[(number + rank) % 7]
            with first_blocks(model, k), first_blocks(plain, k):
                found = model(**given)
                if not torch.equal(found, plain(**given)):
                    different.append(f"forward {number}, {k} blocks")
        for _ in range(3):
            model(**given)
        ring.reset()
        shards.traffic.reset()
        model(**given)
    return {
        "different": different,
        "num_late": ring.num_late,
        "num_copies": ring.num_copies,
        "sent": shards.traffic.num_bytes,
        "peer_bytes": bytes_in_use() - peer_bytes,
        "torch_bytes": torch.cuda.memory_allocated(device) - before,
    }
