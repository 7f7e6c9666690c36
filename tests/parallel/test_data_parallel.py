"""Scatter and gather between real processes: each rank gets its own samples only, and the order is kept."""

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import on_ranks
from wanexp.parallel import data_parallel
from wanexp.parallel.data_parallel import gather_batch, scatter_batch

SAMPLE = (3, 5)


def batch_of(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sample i is full of i."""
    return torch.arange(number, dtype=dtype).reshape(-1, 1, 1).expand(-1, *SAMPLE).contiguous()


def there_and_back(rank: int, cases: list[list[int]]) -> list[dict]:
    sent = []
    original = data_parallel._wait

    def count(operations: list[dist.P2POp]) -> None:
        sent.extend((op.op.__name__, op.peer, op.tensor.nbytes) for op in operations)
        original(operations)

    data_parallel._wait = count
    results = []
    for shares in cases:
        sent.clear()
        whole = batch_of(sum(shares)) if rank == 0 else None
        part = scatter_batch(whole, shares, rank=rank, like=torch.empty(SAMPLE))
        scattered = list(sent)
        gathered = gather_batch(part * 10, shares, rank=rank)
        results.append({"part": part.clone(), "gathered": gathered, "sent": scattered})
    return results


CASES = {2: [[1, 1], [2, 1], [3, 3]], 4: [[1, 1, 1, 1], [2, 2, 1, 1], [3, 2, 2, 2]]}


@pytest.mark.parametrize("world_size", [2, 4])
def test_samples_go_out_and_come_back_in_order(world_size):
    by_rank = on_ranks(world_size, there_and_back, CASES[world_size])
    sample_bytes = 4 * 15
    for case, shares in enumerate(CASES[world_size]):
        begin = 0
        for rank, share in enumerate(shares):
            result = by_rank[rank][case]
            assert torch.equal(result["part"], batch_of(sum(shares))[begin : begin + share])
            assert (result["gathered"] is None) == (rank != 0)
            if rank:  # one receipt, of its own samples and nothing else
                assert result["sent"] == [("irecv", 0, share * sample_bytes)]
            begin += share
        root = by_rank[0][case]
        assert torch.equal(root["gathered"], batch_of(sum(shares)) * 10)
        assert root["sent"] == [
            ("isend", rank, share * sample_bytes) for rank, share in enumerate(shares) if rank
        ]


def test_one_replica_needs_no_process_group():
    batch = batch_of(3)
    assert scatter_batch(batch, [3], rank=0, like=batch[0]) is batch
    assert gather_batch(batch, [3], rank=0) is batch
