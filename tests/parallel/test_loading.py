"""Under every layout a node reads each byte of a checkpoint once, and each rank ends with what a plain load gives."""

import dataclasses
from functools import partial
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import wanexp.wan.checkpoint as checkpoint_module
from tests.parallel.ranks import on_ranks
from wanexp.errors import CheckpointError
from wanexp.measure.memory import anonymous_rss_bytes
from wanexp.parallel.fsdp import shard_with_fsdp
from wanexp.parallel.loading import Loader, plan_loading, sharing_groups
from wanexp.parallel.shares import shard_part, tensor_part
from wanexp.parallel.tensor_parallel import tensor_parallel
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, load_weights, local_tensor, open_weights
from wanexp.wan.write_checkpoint import write_checkpoint

SMALL = WanArchitecture(
    dim=96, ffn_dim=202, num_heads=6, num_layers=2, text_dim=32, freq_dim=16, in_channels=4, out_channels=4
)
I2V = dataclasses.replace(SMALL, clip_tokens=257, clip_dim=24, in_channels=36)
LARGE = WanArchitecture(dim=768, ffn_dim=2048, num_heads=6, num_layers=3, text_dim=512)
WORLD = 4
ONE_NODE, TWO_NODES = [[0, 1, 2, 3]], [[0, 1], [2, 3]]
STORAGES = {"native": 3, "diffusers": 2, "fp8_scaled": 1, "fp8": 1}  # layout of the file: number of shards


def whole_part(_rank, _name, shape):
    return Part.whole(shape)


def tp2_part(rank, name, shape):
    return tensor_part(name, shape, I2V, degree=2, rank=rank % 2)


def tp4_part(rank, name, shape):
    return tensor_part(name, shape, I2V, degree=4, rank=rank)


def fsdp_part(rank, _name, shape):
    return shard_part(shape, degree=4, index=rank)


def hsdp_part(rank, _name, shape):
    return shard_part(shape, degree=2, index=rank % 2)


LAYOUTS = {"copies": whole_part, "tp2 x dp2": tp2_part, "tp4": tp4_part, "fsdp": fsdp_part, "hsdp": hsdp_part}


# Deciding


@pytest.mark.parametrize("nodes", [ONE_NODE, TWO_NODES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_reads_every_element_once_a_node(layout, nodes):
    shapes = dict(I2V.tensor_shapes())
    plan = plan_loading(shapes, LAYOUTS[layout], nodes)
    for node in nodes:
        to_read = dict.fromkeys(node, 0)
        for name, shape in shapes.items():
            for rank in node:
                part = LAYOUTS[layout](rank, name, shape)
                assert (name in plan[rank]) == (not part.is_empty)
                if holding := plan[rank].get(name):
                    assert holding.part == part
                    assert rank in holding.ranks and holding.reader in holding.ranks
                    assert set(holding.ranks) <= set(node)
                    assert all(plan[other][name] == holding for other in holding.ranks)
                    if holding.reader == rank:
                        to_read[rank] += prod(part.shape_in(shape))
        if layout == "copies" or nodes == ONE_NODE:
            assert sum(to_read.values()) == I2V.num_parameters()
        if layout != "fsdp":  # its last shard may be smaller
            assert max(to_read.values()) - min(to_read.values()) <= max(map(prod, shapes.values()))


def test_sharing_groups():
    shapes = dict(I2V.tensor_shapes())

    def groups(part_of, nodes):
        return sharing_groups(plan_loading(shapes, part_of, nodes))

    assert groups(whole_part, ONE_NODE) == [(0, 1, 2, 3)]
    assert groups(whole_part, TWO_NODES) == [(0, 1), (2, 3)]
    assert groups(whole_part, [[0]]) == []
    assert groups(fsdp_part, ONE_NODE) == []
    assert groups(hsdp_part, ONE_NODE) == [(0, 2), (1, 3)]
    assert groups(tp4_part, ONE_NODE) == [(0, 1, 2, 3)]
    assert groups(tp2_part, ONE_NODE) == [(0, 1, 2, 3), (0, 2), (1, 3)]


# Loading


def build(architecture: WanArchitecture, dtype: torch.dtype = torch.bfloat16) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=dtype)


def cut(model: WanTransformer, layout: str, groups: dict) -> None:
    if layout == "tp2 x dp2":
        tensor_parallel(model, groups["tp2"])
    elif layout == "tp4":
        tensor_parallel(model, dist.group.WORLD)
    elif layout == "fsdp":
        shard_with_fsdp(model, init_device_mesh("cpu", (WORLD,)), training=False)
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        shard_with_fsdp(model, mesh, training=False)


def count_reads(counter: list[int]) -> None:
    """Lets the checkpoints of this process add the bytes they read to `counter[0]`."""
    read_tensor = checkpoint_module.read_tensor

    def counted(*arguments):
        tensor = read_tensor(*arguments)
        counter[0] += tensor.nbytes
        return tensor

    checkpoint_module.read_tensor = counted


def load_all(rank: int, folders: dict) -> dict:
    counter = [0]
    count_reads(counter)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    groups = {"tp2": pairs[rank // 2]}
    results: dict = {}
    for layout, part_of in LAYOUTS.items():
        for storage, folder in folders.items():
            for nodes in (ONE_NODE, TWO_NODES) if storage == "native" else (ONE_NODE,):
                (source,) = open_weights(folder, I2V)
                reference = build(I2V)
                load_weights(reference, source, device_of=lambda name: "cpu")
                expected = dict(reference.named_parameters())
                model = build(I2V)
                cut(model, layout, groups)
                counter[0] = 0
                loader = Loader(
                    I2V,
                    part_of=part_of,
                    nodes=nodes,
                    rank=rank,
                    home=torch.device("cpu"),
                    known_groups=[groups["tp2"]],
                )
                report = loader.load(
                    model, source, device_of=lambda name: "cpu:0" if "blocks.1." in name else "cpu"
                )
                for name, parameter in model.named_parameters():
                    part = part_of(rank, name, tuple(expected[name].shape))
                    assert torch.equal(local_tensor(parameter), part.cut(expected[name])), (
                        layout,
                        storage,
                        name,
                    )
                    assert not parameter.is_meta
                assert report.bytes_read == counter[0]
                results[layout, storage, len(nodes)] = (
                    report.bytes_read,
                    report.bytes_received,
                    report.num_bytes,
                )
    return results


def memory_of_loading(rank: int, folder, is_split: bool) -> tuple[int, int]:
    """Bytes that anonymous memory grew by, at most, and bytes of the weights that are held at the end."""
    (source,) = open_weights(folder, LARGE)
    model = build(LARGE)
    part_of = whole_part
    if is_split:
        tensor_parallel(model, dist.group.WORLD)
        part_of = partial(large_tp_part, degree=2)
    loader = Loader(LARGE, part_of=part_of, nodes=[[0, 1]], rank=rank, home=torch.device("cpu"))
    before = anonymous_rss_bytes()
    growth = []
    report = loader.load(
        model,
        source,
        device_of=lambda name: "cpu",
        on_tensor=lambda name, num_bytes: growth.append(anonymous_rss_bytes() - before),
    )
    growth.append(anonymous_rss_bytes() - before)  # only now has all arrived that others sent
    return max(growth), report.num_bytes


def large_tp_part(rank, name, shape, *, degree):
    return tensor_part(name, shape, LARGE, degree=degree, rank=rank)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for storage, num_shards in STORAGES.items():
        found[storage] = tmp_path_factory.mktemp(storage)
        write_checkpoint(RandomWeights(I2V, 2), found[storage], layout=storage, num_shards=num_shards)
    return found


def test_every_layout_and_storage(folders):
    by_rank = on_ranks(WORLD, load_all, {**folders, "random": None})
    num_scales = len(open_weights(folders["fp8_scaled"], I2V)[0].scales)
    for layout, storage, num_nodes in by_rank[0]:
        read, received, held = zip(*[results[layout, storage, num_nodes] for results in by_rank], strict=True)
        case = (layout, storage, num_nodes, read)
        if storage == "random":
            assert sum(read) == 0
        elif num_nodes == 1:
            on_disk = open_weights(folders[storage], I2V)[0].num_bytes
            # The 4 bytes of a scale go with each part that is read of its tensor.
            extra = 4 * num_scales * (WORLD - 1) if storage == "fp8_scaled" else 0
            assert on_disk <= sum(read) <= on_disk + extra, case
            assert max(read) < 0.4 * on_disk, case
        elif layout == "copies":
            on_disk = open_weights(folders[storage], I2V)[0].num_bytes
            assert read[0] + read[1] == read[2] + read[3] == on_disk, case
        if storage == "native":
            assert all(r + g == h for r, g, h in zip(read, received, held, strict=True)), case
        if layout == "fsdp":
            assert sum(received) == 0


@pytest.mark.parametrize("is_split", [False, True])
def test_host_memory_grows_by_what_is_held(tmp_path, is_split):
    write_checkpoint(RandomWeights(LARGE), tmp_path)
    for growth, held in on_ranks(2, memory_of_loading, tmp_path, is_split):
        assert 0.5 * held < growth < held + 16 * 2**20, (growth, held)


def test_one_rank_without_a_process_group(folders):
    model = build(I2V)
    loader = Loader(I2V, part_of=whole_part, nodes=[[0]], rank=0, home=torch.device("cpu"))
    (source,) = open_weights(folders["native"], I2V)
    report = loader.load(model, source, device_of=lambda name: "cpu", requires_grad=True)
    assert report.bytes_read == source.num_bytes == report.num_bytes
    assert report.bytes_received == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_model_that_was_not_cut_is_refused():
    model = build(I2V)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.q\.weight is \[96, 96\]"):
        load_weights(
            model,
            RandomWeights(I2V),
            device_of=lambda name: "cpu",
            part_of=lambda name, shape: tensor_part(name, shape, I2V, degree=2, rank=0),
        )
