"""Swapped blocks give the same bits, come in time, and are never written back."""

import dataclasses
import gc
import weakref

import pytest
import torch

from tests.offload.models import SMALL, inputs, load, meta_model
from tests.parallel.ranks import on_ranks
from wanexp.errors import UserError
from wanexp.offload.block_buffers import ALIGNMENT, pieces_of
from wanexp.offload.block_swap import BlockSwap, swap_blocks
from wanexp.offload.host_memory import host_buffer
from wanexp.offload.load_device import loading_device, move_to_owners
from wanexp.offload.swap_plan import swapped_blocks
from wanexp.parallel.block_distribution import ForwardArguments, Pipeline, distribute_blocks, position_of
from wanexp.parallel.context_parallel import context_parallel
from wanexp.parallel.tensor_parallel import tensor_parallel, tensor_part
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import open_checkpoint
from wanexp.wan.transformer import WanTransformer, first_blocks
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
I2V = dataclasses.replace(SMALL, clip_tokens=257, clip_dim=20, in_channels=24)
NUM_BLOCKS = SMALL.num_layers


def plain(architecture: WanArchitecture = SMALL) -> WanTransformer:
    return load(meta_model(architecture), RandomWeights(architecture))


def swapped(
    blocks: tuple[int, ...], buffers: int = 2, architecture: WanArchitecture = SMALL
) -> tuple[WanTransformer, BlockSwap]:
    model = meta_model(architecture)
    swap = swap_blocks(model, blocks, device_of_block=lambda _: CPU, buffers=buffers)
    return load(model, RandomWeights(architecture), into=swap.into), swap


# --- the same bits ---


@pytest.mark.parametrize("architecture", [SMALL, I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("blocks", [(0,), (5,), (1, 3, 5), tuple(range(6))], ids=str)
@torch.inference_mode()
def test_same_bits_as_resident(architecture, buffers, blocks):
    reference = plain(architecture)
    model, swap = swapped(blocks, buffers, architecture)
    for seed in range(3):
        given = inputs(architecture, seed)
        assert torch.equal(model(**given), reference(**given))
    assert swap.blocks == blocks


def test_model_that_has_its_weights_is_swapped_too():
    reference, model = plain(), plain()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    swap_blocks(model, (1, 2, 4), device_of_block=lambda _: CPU)
    with torch.inference_mode():
        assert torch.equal(model(**inputs()), reference(**inputs()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@torch.inference_mode()
def test_first_blocks_only():
    reference, (model, swap) = plain(), swapped(tuple(range(6)))
    for k in (2, 6, 3, 1, 6):
        with first_blocks(model, k), first_blocks(reference, k):
            assert torch.equal(model(**inputs()), reference(**inputs()))
    swap.reset()
    with first_blocks(model, 3):
        for _ in range(3):
            model(**inputs())
        swap.reset()
        model(**inputs())
    assert swap.num_late == 0 and swap.num_copies == 3  # the shorter order has been learned


@torch.inference_mode()
def test_checkpoint_goes_straight_home(tmp_path):
    file = write_checkpoint(RandomWeights(SMALL, 5), tmp_path / "model.safetensors")[0]
    model = meta_model()
    swap = swap_blocks(model, (0, 2, 4), device_of_block=lambda _: CPU)
    load(model, open_checkpoint(file), into=swap.into)
    home = swap.into("blocks.2.ffn.0.weight")
    assert model.blocks[2].ffn[0].weight.data_ptr() == home.data_ptr()
    assert torch.equal(
        home, RandomWeights(SMALL, 5).read("blocks.2.ffn.0.weight", device="cpu", dtype=torch.float32)
    )
    reference = load(meta_model(), open_checkpoint(file))
    assert torch.equal(model(**inputs()), reference(**inputs()))


# --- what moves when ---


@torch.inference_mode()
def test_counts_bytes_and_copies():
    model, swap = swapped((1, 3, 5))
    _, num_bytes = pieces_of(model.blocks[0])
    model(**inputs())
    assert swap.num_late == 1  # the very first: nothing ran before it
    swap.reset()
    for _ in range(4):
        model(**inputs())
    assert swap.num_late == 0
    assert swap.num_copies == 12 and swap.num_bytes == 12 * num_bytes
    assert swap.host_bytes == 3 * num_bytes and swap.buffer_bytes(CPU) == 2 * num_bytes
    assert swap.stall_s() == 0


@torch.inference_mode()
def test_as_many_buffers_as_blocks_copy_once():
    model, swap = swapped((1, 4), buffers=4)
    for _ in range(3):
        model(**inputs())
    assert swap.num_copies == 2 and len(swap.rings[CPU].slots) == 2


@torch.inference_mode()
def test_block_computes_from_a_buffer_and_lives_on_the_host():
    model, swap = swapped((2, 3, 4))
    seen = {}

    def look(index):
        def hook(block, *_):
            seen[index] = block.ffn[0].weight.data_ptr()

        return hook

    for index in (0, 2, 3, 4):
        model.blocks[index].register_forward_pre_hook(look(index))
    model(**inputs())
    slots = swap.rings[CPU].slots
    buffers = [(slot.flat.data_ptr(), slot.flat.data_ptr() + slot.flat.numel()) for slot in slots]
    for index in (2, 3, 4):
        assert any(start <= seen[index] < end for start, end in buffers)
        home = swap.into(f"blocks.{index}.ffn.0.weight").data_ptr()
        assert model.blocks[index].ffn[0].weight.data_ptr() == home != seen[index]
    assert seen[0] == model.blocks[0].ffn[0].weight.data_ptr()


@torch.inference_mode()
def test_homes_are_only_read():
    model, swap = swapped(tuple(range(6)))
    before = [home.clone() for home in swap._homes.values()]
    for seed in range(3):
        model(**inputs(seed=seed))
    for slot in swap.rings[CPU].slots:
        slot.flat.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, swap._homes.values(), strict=True))


@torch.inference_mode()
def test_forward_that_fails_leaves_nothing_behind():
    reference, (model, _) = plain(), swapped(tuple(range(6)))
    expected = reference(**inputs())

    def fail(*_):
        raise RuntimeError("boom")

    for index in (0, 3):
        broken = model.blocks[index].cross_attn.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            model(**inputs())
        broken.remove()
        assert torch.equal(model(**inputs()), expected)


@torch.inference_mode()
def test_closed_swap_lets_go():
    model, swap = swapped((0, 1, 2, 3))
    model(**inputs())
    home = weakref.ref(swap.rings[CPU].slots[0].flat)
    swap.close()
    gc.collect()
    assert home() is None and not model.blocks[0]._forward_pre_hooks
    assert torch.equal(model(**inputs()), plain()(**inputs()))  # on a CPU the host's weights can compute


def test_swapped_blocks_are_for_inference():
    with pytest.raises(AssertionError):
        swap_blocks(plain().requires_grad_(True), (0,), device_of_block=lambda _: CPU)


def test_one_compiled_block_serves_every_buffer():
    """Compiled code is guarded on dtype, shape and device of the weights, not on where they lie."""
    reference, (model, _) = plain(), swapped(tuple(range(6)))
    torch.compiler.reset()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            assert torch.equal(model(**inputs(seed=seed)), reference(**inputs(seed=seed)))
    torch.compiler.reset()


# --- with the layouts ---


@torch.inference_mode()
@pytest.mark.parametrize("owner", [(0, 0, 0, 1, 1, 1), (0, 1) * 3, (0, 0, 1, 1, 0, 1)], ids=str)
def test_block_distribution_and_its_pipeline(owner):
    reference = plain()
    devices = [CPU, CPU]
    model = meta_model()
    chosen = swapped_blocks(owner, [2, 3])
    swap = swap_blocks(model, chosen, device_of_block=lambda index: devices[owner[index]])
    load(model, RandomWeights(SMALL), into=swap.into)
    seams = distribute_blocks(model, block_owner=owner, devices=devices)
    requests = [ForwardArguments(**inputs(seed=seed)) for seed in range(2)]
    expected = [reference(**vars(request)) for request in requests]
    assert torch.equal(model(**vars(requests[0])), expected[0])
    pipeline = Pipeline(model, block_owner=owner, devices=devices, seams=seams)
    for _ in range(3):
        assert all(map(torch.equal, pipeline.run(requests), expected))
    swap.reset()
    pipeline.run(requests)
    assert swap.num_late == 0


def tensor_parallel_rank(rank: int, degree: int) -> torch.Tensor:
    group = torch.distributed.group.WORLD
    flows = []
    for swaps in (False, True):
        model = meta_model()
        tensor_parallel(model, group)
        into = swap_blocks(model, (1, 2, 4), device_of_block=lambda _: CPU).into if swaps else lambda _: None
        load(
            model,
            RandomWeights(SMALL),
            into=into,
            part_of=lambda name, shape: tensor_part(name, shape, SMALL, degree=degree, rank=rank),
        )
        with torch.inference_mode():
            flows += [model(**inputs()), model(**inputs(seed=1))]
    return torch.stack(flows)


def test_tensor_parallel():
    for flows in on_ranks(2, tensor_parallel_rank, 2):
        assert torch.equal(flows[:2], flows[2:])
        assert (flows[0] - plain()(**inputs())).norm() < 1e-5 * flows[0].norm()


def context_parallel_rank(rank: int) -> torch.Tensor:
    flows = []
    for swaps in (False, True):
        model = meta_model()
        swap = swap_blocks(model, (0, 3, 5) if swaps else (), device_of_block=lambda _: CPU)
        load(model, RandomWeights(SMALL), into=swap.into)
        context_parallel(model, ulysses=torch.distributed.group.WORLD, ring=None)
        with torch.inference_mode():
            flows.append(model(**inputs()))
    return torch.stack(flows)


def test_context_parallel():
    for flows in on_ranks(2, context_parallel_rank):
        assert torch.equal(flows[0], flows[1])


# --- host memory and loading ---


def test_pieces_are_aligned_and_hold_everything():
    block = meta_model(I2V).blocks[0]
    block.register_buffer("extra", torch.empty(3, dtype=torch.int8, device="meta"))
    pieces, num_bytes = pieces_of(block)
    assert {piece.name for piece in pieces} == {*dict(block.named_parameters()), "extra"}
    assert all(piece.offset % ALIGNMENT == 0 for piece in pieces)
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    for piece in pieces:
        view = piece.view(flat)
        assert view.shape == piece.shape and view.dtype == piece.dtype
        assert not view.any()  # nobody wrote here: pieces do not overlap
        view.fill_(1)


def test_host_buffer_is_whole_pages_and_outlives_its_maker():
    buffer = host_buffer(10_000, pin_for=None)
    assert buffer.numel() == 10_000 and buffer.data_ptr() % 4096 == 0 and not buffer.any()
    view = buffer[4096:8192].view(torch.float32)
    del buffer
    gc.collect()
    view.fill_(1.0)
    assert view.sum() == 1024


def test_more_host_memory_than_there_can_be():
    with pytest.raises(
        UserError, match=r"GiB of host memory cannot be allocated .*; write a smaller offload\.blocks"
    ):
        host_buffer(2**60, pin_for=None)


@torch.inference_mode()
def test_load_device():
    main = torch.device("cuda", 1)
    assert loading_device("main_device", main) == main and loading_device("offload_device", main) == CPU
    # `meta` stands for the other device: whatever has moved there has no values any more.
    model = meta_model()
    swap = swap_blocks(model, (1,), device_of_block=lambda _: CPU)
    load(model, RandomWeights(SMALL), into=swap.into)
    total = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks.1."))
    moved = move_to_owners(
        model, lambda _: torch.device("meta"), stays=lambda name: swap.into(name) is not None
    )
    assert moved == total
    for name, parameter in model.named_parameters():
        assert parameter.is_meta != name.startswith("blocks.1.")
    assert (
        move_to_owners(model, lambda _: torch.device("meta"), stays=lambda name: swap.into(name) is not None)
        == 0
    )


# --- on GPUs ---

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDE = dataclasses.replace(SMALL, dim=1024, ffn_dim=4096, num_heads=8, num_layers=8)


def on_gpu(blocks: tuple[int, ...] | None, buffers: int = 2, device: str = "cuda:0"):
    model = meta_model(WIDE, torch.bfloat16)
    swap = None
    if blocks is not None:
        swap = swap_blocks(model, blocks, device_of_block=lambda _: torch.device(device), buffers=buffers)
    into = swap.into if swap else lambda _: None
    return load(model, RandomWeights(WIDE), device=device, into=into), swap


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("buffers", [1, 2, 3])
@torch.inference_mode()
def test_gpu_same_bits_while_streams_race(buffers):
    """A slow copy stream, then a slow computing stream: neither may overtake the other."""
    given = inputs(WIDE, device="cuda:0")
    reference, _ = on_gpu(None)
    expected = reference(**given)
    model, swap = on_gpu((0, 1, 2, 4, 5, 7), buffers)
    ring = swap.rings[torch.device("cuda:0")]
    for delayed in (None, ring.stream, torch.cuda.current_stream()):
        for _ in range(3):
            if delayed is not None:
                with torch.cuda.stream(delayed):
                    torch.cuda._sleep(20_000_000)
            assert torch.equal(model(**given), expected)
    assert swap.num_late <= 1
    ring.reset()
    with torch.cuda.stream(ring.stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s
    model(**given)
    assert swap.stall_s() > 0.05


@pytest.mark.gpu
@gpu
@torch.inference_mode()
def test_gpu_homes_are_pinned_and_memory_is_what_was_promised():
    gc.collect()  # what is freed while this runs would be taken off what has grown
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, swap = on_gpu((1, 2, 3, 5, 6, 7))
    home = swap.into("blocks.2.ffn.0.weight")
    assert home.is_pinned() and model.blocks[2].ffn[0].weight.is_cpu
    _, block_bytes = pieces_of(model.blocks[0])
    outer = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks."))
    grown = torch.cuda.memory_allocated() - before
    assert 4 * block_bytes < grown < 1.05 * (4 * block_bytes + outer)
    del model
    swap.close()
    del swap
    address = home.data_ptr()
    del home
    gc.collect()
    assert host_buffer(2**22, pin_for=torch.device("cuda:0")).is_pinned(), (
        address
    )  # the host's pins still work


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.inference_mode()
def test_gpu_pipeline_over_two_devices():
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    reference, _ = on_gpu(None)
    for owner in ((0,) * 4 + (1,) * 4, (0, 1) * 4):
        model = meta_model(WIDE, torch.bfloat16)
        chosen = swapped_blocks(owner, [3, 4])
        swap = swap_blocks(model, chosen, device_of_block=lambda index, owner=owner: devices[owner[index]])
        load(model, RandomWeights(WIDE), device=devices[0], into=swap.into)
        move_to_owners(
            model,
            lambda name, owner=owner: devices[position_of(name, owner)],
            stays=lambda name, swap=swap: swap.into(name) is not None,
        )
        seams = distribute_blocks(model, block_owner=owner, devices=devices)
        pipeline = Pipeline(model, block_owner=owner, devices=devices, seams=seams)
        requests = [ForwardArguments(**inputs(WIDE, seed, "cuda:0")) for seed in range(2)]
        expected = [reference(**vars(request)) for request in requests]
        for _ in range(4):
            assert all(map(torch.equal, pipeline.run(requests), expected))
        swap.reset()
        pipeline.run(requests)
        assert swap.num_late == 0
