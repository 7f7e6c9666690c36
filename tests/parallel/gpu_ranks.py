"""Two ranks on two GPUs with NCCL, for what gloo cannot show."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from wanexp.parallel.peer_memory import open_peer_memory
from wanexp.parallel.traffic import Traffic
from wanexp.parallel.ulysses import Exchange


def exchange_on_gpus(world_size: int) -> list[list[float]]:
    """Largest difference between what copies and collectives carry, for each of many attentions, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_exchange, (world_size, folder), nprocs=world_size, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def _exchange(rank: int, world_size: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        device_id=device,
    )
    group = dist.group.WORLD
    assert group is not None
    memories = open_peer_memory([group], device)
    assert memories is not None
    differences = []
    torch.manual_seed(rank)
    for tokens, heads, batch in ((37, 5, 1), (1000, 12, 2), (999, 3, 1), (5000, 40, 1), (37, 5, 1)) * 4:
        shares = [tokens - tokens // 3, tokens // 3]
        shapes = (batch, shares[rank], heads, 64)
        q, k, v = (torch.randn(shapes, device=device).bfloat16() for _ in range(3))
        results = []
        for memory in (None, memories[0]):
            exchange = Exchange(group, lambda shares=shares: shares, Traffic(), memory)
            for _ in range(3):  # one after the other, so that places are written to again
                sent = exchange.send(v), exchange.send(k)
                out = exchange.attend(
                    lambda q, k, v: q.float().mul(2).add(k).sub(v).bfloat16(), q, sent[1], sent[0]
                )
            results.append(out)
        differences.append((results[0].float() - results[1].float()).abs().max().item())
    torch.save(differences, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
