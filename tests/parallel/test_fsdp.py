"""FSDP is the unsharded model to the last digit, in inference and through steps of training."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from tests.parallel.ranks import on_ranks
from tests.parallel.shared_memory import SharedMemory
from wanexp.parallel.fsdp import full_gradient, shard_with_fsdp
from wanexp.parallel.loading import Loader
from wanexp.parallel.peer_shards import shard_over_peers
from wanexp.parallel.shares import shard_part
from wanexp.parallel.traffic import fsdp_bytes
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer, first_blocks
from wanexp.wan.weights import RandomWeights, load_weights, local_tensor

# 16 rows of the head, 104 of the attention, 202 of the FFN do not divide by 3, the one of modulation by nothing.
T2V = WanArchitecture(
    dim=104,
    ffn_dim=202,
    num_heads=4,
    num_layers=3,
    text_dim=32,
    text_len=12,
    freq_dim=16,
    in_channels=4,
    out_channels=4,
)
I2V = dataclasses.replace(T2V, clip_tokens=5, clip_dim=24, in_channels=12)


def samples(architecture: WanArchitecture, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = {
        "latent": normal(batch, 4, 3, 6, 10),
        "timestep": torch.linspace(100, 900, batch),
        "text": normal(batch, 10, architecture.text_dim),
    }
    if architecture.clip_tokens:
        given["image_latent"] = normal(batch, 8, 3, 6, 10)
        given["clip_features"] = normal(batch, architecture.clip_tokens, architecture.clip_dim)
    return given


def share(given: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {name: tensor[rank : rank + 1].clone() for name, tensor in given.items()}


def build(architecture: WanArchitecture, dtype: torch.dtype = torch.float32) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=dtype)


def plain(architecture: WanArchitecture, *, training: bool = False, dtype: torch.dtype = torch.float32):
    model = build(architecture, dtype)
    load_weights(model, RandomWeights(architecture), device_of=lambda name: "cpu", requires_grad=training)
    return model


def make_mesh(replicas: int):
    world = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def sharded(
    architecture: WanArchitecture, replicas: int, *, training: bool, dtype=torch.float32, folder=None
):
    """folder: of memory that all ranks of a group read shards from; None: FSDP2."""
    model = build(architecture, dtype)
    mesh = make_mesh(replicas)
    peers = None
    if folder:
        peers = shard_over_peers(model, SharedMemory(mesh.get_group(mesh.ndim - 1), folder))
        traffic, into = peers.traffic, peers.into
    else:
        traffic, into = shard_with_fsdp(model, mesh, training=training), None
    world = dist.get_world_size()
    shards = world // replicas
    loader = Loader(
        architecture,
        part_of=lambda rank, name, shape: shard_part(shape, degree=shards, index=rank % shards),
        nodes=[range(world)],
        rank=dist.get_rank(),
        home=torch.device("cpu"),
        known_groups=[mesh.get_group("replicate")] if replicas > 1 else [],
    )
    loader.load(
        model, RandomWeights(architecture), device_of=lambda name: "cpu", requires_grad=training, into=into
    )
    if peers:
        peers.complete()
    return model, traffic


def inference(rank: int, folder: str | None = None) -> dict:
    """Largest difference to the plain model of every way in which a run calls it."""
    results = {}
    for label, arch, dtype in (
        ("t2v", T2V, torch.float32),
        ("i2v", I2V, torch.float32),
        ("t2v bf16", T2V, torch.bfloat16),
    ):
        given = share(samples(arch, dist.get_world_size()), rank)
        whole = plain(arch, dtype=dtype)
        own_folder = None if folder is None else f"{folder}/{label}"
        if own_folder is not None:
            Path(own_folder).mkdir(exist_ok=True)
        model, traffic = sharded(arch, 1, training=False, dtype=dtype, folder=own_folder)
        held = sum(local_tensor(parameter).numel() for parameter in model.parameters())
        with torch.inference_mode():
            context = model.embed_text(given["text"], given.get("clip_features"))  # before any forward
            expected_context = whole.embed_text(given["text"], given.get("clip_features"))
            results[label, "embed_text"] = (context - expected_context).abs().max().item()
            expected = whole(**given)
            results[label, "forward"] = (model(**given) - expected).abs().max().item()
            results[label, "bytes"] = traffic.num_bytes
            without = {k: v for k, v in given.items() if k not in ("text", "clip_features")}
            results[label, "with context"] = (model(**without, context=context) - expected).abs().max().item()
            with first_blocks(model, 2), first_blocks(whole, 2):
                results[label, "first blocks"] = (model(**given) - whole(**given)).abs().max().item()
            results[label, "again"] = (model(**given) - expected).abs().max().item()
        assert held == sum(
            local_tensor(parameter).numel() for parameter in model.parameters()
        )  # let go again
        results[label, "held"] = held
    return results


def train(model: torch.nn.Module, given: dict, target: torch.Tensor, name: str) -> tuple[list, torch.Tensor]:
    """Losses of 3 steps and the first gradient of parameter `name`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses, first = [], None
    for _ in range(3):
        loss = F.mse_loss(model(**given), target)
        loss.backward()
        if first is None:
            gradient = full_gradient(model.get_parameter(name))
            assert gradient is not None
            first = gradient.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, first


def training(rank: int) -> dict:
    world = dist.get_world_size()
    given = samples(T2V, world)
    target = torch.randn(given["latent"].shape, generator=torch.Generator().manual_seed(3))
    name = "blocks.1.ffn.0.weight"
    whole = plain(T2V, training=True)
    losses, gradient = train(whole, given, target, name)
    expected = torch.cat([parameter.detach().flatten() for parameter in whole.parameters()])
    results = {}
    for replicas, checkpointing in ((1, False), (1, True), (2, False), (2, True)):
        if world // replicas < 2:
            continue
        model, traffic = sharded(T2V, replicas, training=True)
        model.gradient_checkpointing = checkpointing
        own_losses, own_gradient = train(model, share(given, rank), target[rank : rank + 1], name)
        mean = torch.tensor(own_losses)
        dist.all_reduce(mean)
        # Of all weights together: AdamW blows rounding up where a gradient is next to nothing.
        found = torch.cat(
            [parameter.full_tensor().detach().flatten() for _, parameter in model.named_parameters()]
        )
        results[replicas, checkpointing] = {
            "loss": (mean / world - torch.tensor(losses)).abs().max().item(),
            "gradient": ((own_gradient - gradient).norm() / gradient.norm()).item(),
            "weights": ((found - expected).norm() / expected.norm()).item(),
            "bytes": traffic.num_bytes,
            "change": losses[0] - losses[-1],
        }
    return results


def autocast_training(rank: int) -> dict:
    """fp32 master weights with the forward under autocast, as the train workload runs it."""
    given = samples(T2V, dist.get_world_size())
    target = torch.randn(given["latent"].shape, generator=torch.Generator().manual_seed(3))
    flows = []
    for model in (plain(T2V, training=True), sharded(T2V, 1, training=True)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            flow = model(**share(given, rank))
        F.mse_loss(flow, target[rank : rank + 1]).backward()
        flows.append(flow.detach())
    return {"difference": (flows[1] - flows[0]).abs().max().item()}


def held_of(arch: WanArchitecture, world: int, rank: int, shapes=None) -> int:
    """Elements of a rank's shards of the tensors with these shapes, by default of all."""
    return sum(
        torch.Size(shard_part(shape, degree=world, index=rank).shape_in(shape)).numel()
        for _, shape in shapes or arch.tensor_shapes()
    )


def both(rank: int) -> dict:
    return {"inference": inference(rank), "training": training(rank), "autocast": autocast_training(rank)}


@pytest.mark.parametrize("world", [2, 3])
def test_blocks_are_read_from_the_memory_of_other_ranks(world, tmp_path):
    for rank, results in enumerate(on_ranks(world, inference, str(tmp_path))):
        assert len(results) == 3 * 7
        for (label, case), value in results.items():
            arch, size = (I2V if label == "i2v" else T2V), (2 if "bf16" in label else 4)
            if case == "held":
                blocks = held_of(arch, world, rank) - held_of(arch, world, rank, arch.outer_shapes().items())
                assert value == blocks + arch.num_outer_parameters()
            elif case == "bytes":  # a first forward reads the first blocks again, for the next one
                one = fsdp_bytes(arch.num_block_parameters(), element_size=size, shards=world, training=False)
                assert value == (arch.num_layers + 2) * one
            else:
                assert value == 0, (label, case, value)


def uneven(rank: int, folder: str) -> dict:
    """What ranks can do that need not wait for each other, on two groups of two ranks."""
    model, traffic = sharded(T2V, dist.get_world_size() // 2, training=False, folder=folder)
    whole = plain(T2V)
    given = share(samples(T2V, dist.get_world_size()), rank)
    different = 0
    with torch.inference_mode():
        for number in range(1 + 2 * rank):  # not the same number of forwards, nor of blocks
            k = 1 + (number + rank) % T2V.num_layers
            with first_blocks(model, k), first_blocks(whole, k):
                different += not torch.equal(model(**given), whole(**given))
        for _ in range(2):
            model(**given)
        traffic.reset()
        model(**given)
    shards = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dist.barrier()  # as a run does before it ends
    return {"different": different, "bytes": traffic.num_bytes, "shapes": shards}


def test_ranks_need_not_keep_step(tmp_path):
    one = fsdp_bytes(T2V.num_block_parameters(), element_size=4, shards=2, training=False)
    for rank, results in enumerate(on_ranks(4, uneven, str(tmp_path))):
        assert results["different"] == 0
        assert results["bytes"] == T2V.num_layers * one
        for name, shape in T2V.tensor_shapes():
            part = shard_part(shape, degree=2, index=rank % 2)
            assert results["shapes"][name] == (part.shape_in(shape) if name.startswith("blocks.") else shape)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_same_as_unsharded(world):
    for rank, results in enumerate(on_ranks(world, both)):
        for (label, case), value in results["inference"].items():
            arch, size = (I2V if label == "i2v" else T2V), (2 if "bf16" in label else 4)
            if case == "held":
                assert value == held_of(arch, world, rank)
            elif case == "bytes":
                assert value == fsdp_bytes(
                    arch.num_parameters(), element_size=size, shards=world, training=False
                )
            else:
                assert value <= 1e-6, (label, case, value)
        assert len(results["training"]) == (4 if world == 4 else 2)
        for (replicas, checkpointing), result in results["training"].items():
            case = (world, replicas, checkpointing, result)
            assert result["loss"] <= 1e-6, case
            assert result["gradient"] <= 1e-5, case
            assert result["weights"] <= 1e-6, case
            assert result["change"] > 1e-3, case  # it learns something
            assert result["bytes"] == 3 * fsdp_bytes(
                T2V.num_parameters(),
                element_size=4,
                shards=world // replicas,
                replicas=replicas,
                training=True,
            )
        assert results["autocast"]["difference"] <= 1e-6


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_blocks_are_read_from_the_memory_of_other_gpus(world):
    from tests.parallel.gpu_ranks import WIDE, shards_on_gpus

    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    block, outer = 2 * WIDE.num_block_parameters(), 2 * WIDE.num_outer_parameters()
    for results in shards_on_gpus(world):
        assert results["different"] == []
        assert results["num_late"] == 0 and results["num_copies"] == WIDE.num_layers
        assert results["sent"] == WIDE.num_layers * block * (world - 1) // world
        assert results["peer_bytes"] == pytest.approx(WIDE.num_layers * block / world, rel=0.01)
        # Two blocks and what is outside of them; the inputs and results of the test are small beside it.
        assert results["torch_bytes"] == pytest.approx(2 * block + outer, rel=0.1)


def test_shards_are_those_of_chunk():
    for rows in (1, 2, 5, 6, 7, 64):
        for degree in (1, 2, 3, 4, 8):
            tensor = torch.arange(rows)
            parts = [shard_part((rows,), degree=degree, index=index) for index in range(degree)]
            expected = [chunk.tolist() for chunk in tensor.chunk(degree)]
            expected += [[]] * (degree - len(expected))
            assert [part.cut(tensor).tolist() for part in parts] == expected


def test_bytes_of_14b():
    """The numbers in docs/modes/fsdp.md."""
    num_parameters = 14_288_000_000
    assert 14.2e9 < fsdp_bytes(num_parameters, element_size=2, shards=2, training=False) < 14.4e9
    assert fsdp_bytes(1000, element_size=4, shards=4, training=True) == 9000
    assert fsdp_bytes(1000, element_size=4, shards=4, replicas=2, training=True) == 10000
