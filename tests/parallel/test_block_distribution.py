"""Block distribution in this process, on logical devices: the same bits as one device, and what crosses, by hand."""

import pytest
import torch

from tests.conftest import CLIP, PER_TOKEN, Composer, cpu_devices
from wanexp.parallel.block_distribution import Seams, position_of
from wanexp.parallel.parallelize import ParallelModel, parallelize_wan
from wanexp.planning.plan import make_plan
from wanexp.wan.transformer import WanTransformer, first_blocks
from wanexp.wan.weights import RandomWeights, load_weights
from wanexp.workloads.samples import draw_samples, timesteps_of

VARIANTS = {"t2v": (), "i2v_clip": CLIP, "ti2v": PER_TOKEN}
DIM, TOKENS, CONTEXT = 128, 32, 512
CPU = torch.device("cpu")


def load(config, *, requires_grad: bool = False) -> WanTransformer:
    architecture = config.model.architecture
    with torch.device("meta"):
        model = WanTransformer(architecture, dtype=getattr(torch, config.precision.dtype))
    load_weights(
        model, RandomWeights(architecture), device_of=lambda _name: "cpu", requires_grad=requires_grad
    )
    return model


def distribute(config, num_devices: int, *, requires_grad: bool = False) -> ParallelModel:
    plan = make_plan(config, cpu_devices(num_devices))
    return parallelize_wan(
        load(config, requires_grad=requires_grad), plan, devices=[CPU] * num_devices, training=False
    )


def inputs(config, batch: int = 1, timestep: float = 700.0) -> tuple:
    samples = draw_samples(config.model, config.video, seed=0, indices=range(batch))
    timesteps = timesteps_of(config.model, samples.noise, timestep)
    return samples.noise, timesteps, samples.text, samples.image_latent, samples.clip_features


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_placement_gives_the_bits_of_one_device(run_config: Composer, variant, precision):
    base = ("parallelism=block_distribution", f"precision={precision}", *VARIANTS[variant])
    config = run_config(*base)
    batch = inputs(config, batch=3)
    with torch.inference_mode():
        expected = load(config)(*batch)
        assert expected.std() > 0.1
        for num_devices, overrides in [
            (2, ()),
            (3, ()),
            (4, ()),
            (2, ("parallelism.block_placement=interleaved",)),
            (3, ("parallelism.block_placement=interleaved",)),
            (2, ("parallelism.block_split=[1,3]",)),
            (3, ("parallelism.block_split=[2,1,1]",)),
        ]:
            model = distribute(run_config(*base, *overrides), num_devices)
            assert torch.equal(model.module(*batch), expected), (num_devices, overrides)
            assert model.traffic["blocks"].num_bytes > 0


def test_one_device_needs_no_hooks(run_config: Composer):
    model = distribute(run_config("parallelism=block_distribution"), 1)
    assert not model.traffic and model.module is model.bare
    assert not any(block._forward_pre_hooks for block in model.bare.blocks)


def test_a_device_left_out_of_the_hooks_would_be_seen(run_config: Composer):
    """The comparison can fail: one block with other weights gives other bits."""
    config = run_config("parallelism=block_distribution")
    model = distribute(config, 2)
    with torch.inference_mode():
        model.bare.blocks[2].ffn[2].bias.add_(1e-3)
        assert not torch.equal(model.module(*inputs(config)), load(config)(*inputs(config)))


# fp32 bytes of what may cross, one sample of 32 tokens
HIDDEN = TOKENS * DIM * 4
MODULATION, TIME_VECTOR = 6 * DIM * 4, DIM * 4
CONTEXT_BYTES = CONTEXT * DIM * 4
ROPE = 2 * TOKENS * 32 * 4  # cos and sin of 32 pairs of a head of 64
PATCHES = TOKENS * 64 * 4  # 16 channels x 4 places, back from the head


@pytest.mark.parametrize(
    ("num_devices", "placement", "seams"),
    [(2, "contiguous", 1), (4, "contiguous", 3), (2, "interleaved", 3), (4, "interleaved", 3)],
)
def test_bytes_that_cross(run_config: Composer, num_devices, placement, seams):
    config = run_config("parallelism=block_distribution", f"parallelism.block_placement={placement}")
    model = distribute(config, num_devices)
    latent, timestep, text, *_ = inputs(config)
    others = num_devices - 1  # devices but the first
    each_forward = seams * HIDDEN + others * MODULATION + TIME_VECTOR + PATCHES
    once = others * (CONTEXT_BYTES + ROPE)
    counted = model.traffic["blocks"]
    assert isinstance(counted, Seams)
    with torch.inference_mode():
        context = model.bare.embed_text(text)
        model.module(latent, timestep, context=context)
        assert counted.num_bytes == each_forward + once
        assert counted.num_copies == seams + others + 2 + others * 3, "cos, sin and context are three"
        for _ in range(2):
            counted.reset()
            model.module(latent, timestep, context=context)
            assert counted.num_bytes == each_forward, "no constant crosses twice"


def test_copies_of_constants_die_with_them(run_config: Composer):
    seams = Seams()
    constant = torch.ones(4)
    copy = seams.move_constant(constant, 1, CPU)
    assert copy.data_ptr() != constant.data_ptr() and torch.equal(copy, constant)
    assert seams.move_constant(constant, 1, CPU) is copy
    assert seams.move_constant(constant, 2, CPU) is not copy, "a copy for each device"
    assert (seams.num_bytes, seams.num_copies) == (32, 2)
    del constant
    assert not any(len(copies) for copies in seams._constants.values())


@pytest.mark.parametrize("placement", ["contiguous", "interleaved"])
def test_the_first_blocks_alone(run_config: Composer, placement):
    config = run_config("parallelism=block_distribution", f"parallelism.block_placement={placement}")
    model, plain = distribute(config, 4), load(config)
    for number in (1, 2, 3, 4):
        with torch.inference_mode(), first_blocks(model.bare, number), first_blocks(plain, number):
            assert torch.equal(model.module(*inputs(config)), plain(*inputs(config)))


def test_weights_lie_with_their_blocks():
    owner = (1, 1, 0, 2)
    for name, position in {
        "patch_embedding.weight": 1,
        "time_projection.1.bias": 1,
        "img_emb.proj.0.weight": 1,
        "blocks.0.modulation": 1,
        "blocks.2.ffn.0.weight": 0,
        "blocks.3.self_attn.q.weight": 2,
        "head.modulation": 2,
    }.items():
        assert position_of(name, owner) == position


@pytest.mark.parametrize("placement", ["contiguous", "interleaved"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_seams(run_config: Composer, checkpointing, placement):
    config = run_config("parallelism=block_distribution", f"parallelism.block_placement={placement}")
    batch = inputs(config, batch=2)
    gradients = []
    for model in (distribute(config, 3, requires_grad=True).bare, load(config, requires_grad=True)):
        model.gradient_checkpointing = checkpointing
        model(*batch).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    distributed, plain = gradients
    for name, expected in plain.items():
        assert expected is not None and expected.abs().max() > 0, name
        torch.testing.assert_close(distributed[name], expected, rtol=1e-5, atol=1e-8, msg=name)
