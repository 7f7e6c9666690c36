import copy
from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_map

from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.block import RMSNorm, gated_add
from wanexp.wan.transformer import WanTransformer, first_blocks, sinusoid

SIZES = {"ffn_dim": 96, "num_layers": 2, "text_dim": 24, "clip_dim": 20, "freq_dim": 32}
VARIANTS = {
    "t2v": WanArchitecture(dim=256, num_heads=2, **SIZES),
    "t2v_head_dim_24": WanArchitecture(dim=96, num_heads=4, **SIZES),
    "i2v_clip": WanArchitecture(dim=256, num_heads=2, in_channels=36, clip_tokens=257, **SIZES),
    "flf2v": WanArchitecture(dim=128, num_heads=2, in_channels=36, clip_tokens=514, **SIZES),
    "i2v_2.2": WanArchitecture(dim=128, num_heads=1, in_channels=36, **SIZES),
    "ti2v": WanArchitecture(dim=256, num_heads=2, in_channels=48, out_channels=48, **SIZES),
}
GRID = (3, 5, 3)  # odd numbers of tokens along every axis
NUM_TOKENS = 45
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def random_model(variant: str) -> WanTransformer:
    """A model whose every tensor matters: no weight is 0 or 1, as norms and positions are by default."""
    generator = torch.Generator().manual_seed(1)
    model = WanTransformer(VARIANTS[variant])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif "modulation" in name or "emb_pos" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


@cache
def reference(variant: str):
    pytest.importorskip("diffusers")  # a GPU node without it still runs the other tests
    from tests.wan.diffusers_reference import Reference

    return Reference(VARIANTS[variant], random_model(variant).state_dict())


def inputs(variant: str, batch: int = 1, text_length: int = 7) -> dict[str, torch.Tensor]:
    arch = VARIANTS[variant]
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latent_shape = (GRID[0], 2 * GRID[1], 2 * GRID[2])
    given = {
        "latent": randn(batch, arch.out_channels, *latent_shape),
        "timestep": torch.tensor([999.0, 123.4, 500.0][:batch]),
        "text": randn(batch, text_length, arch.text_dim),
    }
    if arch.in_channels > arch.out_channels:
        given["image_latent"] = randn(batch, arch.in_channels - arch.out_channels, *latent_shape)
    if arch.clip_tokens:
        given["clip_features"] = randn(batch, arch.clip_tokens, arch.clip_dim)
    return given


def per_token(timestep: torch.Tensor) -> torch.Tensor:
    """As TI2V has it: the first frame is clean, all other tokens are at the sample's timestep."""
    expanded = timestep[:, None].repeat(1, NUM_TOKENS)
    expanded[:, : GRID[1] * GRID[2]] = 0
    return expanded


def rel_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# --- the same answer as diffusers ---


@pytest.mark.parametrize("batch", [1, 3])
@every_variant
def test_equals_diffusers(variant, batch):
    given = inputs(variant, batch)
    with torch.no_grad():
        out = random_model(variant)(**given)
    assert out.dtype == torch.float32
    assert out.shape == given["latent"].shape
    assert rel_l2(out, reference(variant)(**given)) < 1e-5


@every_variant
def test_equals_diffusers_with_a_timestep_per_token(variant):
    given = inputs(variant, batch=3)
    given["timestep"] = per_token(given["timestep"])
    with torch.no_grad():
        assert rel_l2(random_model(variant)(**given), reference(variant)(**given)) < 1e-5


@every_variant
def test_equals_diffusers_more_closely_where_its_fp32_sinusoid_is_exact(variant):
    given = inputs(variant, text_length=512) | {"timestep": torch.tensor([1.0])}
    with torch.no_grad():
        assert rel_l2(random_model(variant)(**given), reference(variant)(**given)) < 2e-6


def test_integer_timesteps():
    given = inputs("t2v")
    with torch.no_grad():
        expected = random_model("t2v")(**given)
        assert torch.equal(random_model("t2v")(**(given | {"timestep": torch.tensor([999])})), expected)


# --- weights ---


@every_variant
def test_state_dict_has_the_native_names_and_shapes(variant):
    with torch.device("meta"):
        model = WanTransformer(VARIANTS[variant], dtype=torch.bfloat16)
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(
        VARIANTS[variant].tensor_shapes()
    )
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert not list(model.buffers())


def test_a_meta_model_gets_its_weights_by_assignment():
    with torch.device("meta"):
        model = WanTransformer(VARIANTS["t2v"])
    model.load_state_dict(random_model("t2v").state_dict(), assign=True)
    given = inputs("t2v")
    with torch.no_grad():
        assert torch.equal(model(**given), random_model("t2v")(**given))


def test_a_meta_model_gives_the_shape_of_its_output():
    with torch.device("meta"):
        model = WanTransformer(VARIANTS["i2v_clip"])
    given = {name: tensor.to("meta") for name, tensor in inputs("i2v_clip").items()}
    assert model(**given).shape == given["latent"].shape


def test_a_copied_model_gives_the_same_answer():
    given = inputs("t2v")
    with torch.no_grad():
        expected = random_model("t2v")(**given)
        assert torch.equal(copy.deepcopy(random_model("t2v"))(**given), expected)


# --- parts ---


@every_variant
def test_context_stands_for_text_and_image_features(variant):
    model, given = random_model(variant), inputs(variant, batch=3)
    with torch.no_grad():
        expected = model(**given)
        context = model.embed_text(given.pop("text"), given.pop("clip_features", None))
        assert context.shape == (3, model.architecture.clip_tokens + 512, model.architecture.dim)
        assert torch.equal(model(**given, context=context), expected)


def test_equal_timesteps_per_token_are_one_timestep():
    model, given = random_model("ti2v"), inputs("ti2v", batch=3)
    expanded = given["timestep"][:, None].expand(-1, NUM_TOKENS)
    with torch.no_grad():
        assert rel_l2(model(**(given | {"timestep": expanded})), model(**given)) < 1e-6


def test_only_distinct_timesteps_are_embedded():
    model = random_model("ti2v")
    vector, modulation, index = model.embed_time(per_token(torch.tensor([900.0, 500.0, 900.0])))
    assert vector.shape == (3, 256)  # of 0, 500 and 900
    assert modulation.shape == (3, 6, 256)
    assert index.shape == (3, NUM_TOKENS)
    assert index[:, -1].tolist() == [2, 1, 2]


def test_sinusoid_has_cos_first():
    expected = [1.0] * 4 + [0.0] * 4
    assert sinusoid(torch.tensor([0]), 8)[0].tolist() == expected
    angles = 1000 * 10000.0 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(
        sinusoid(torch.tensor([1000]), 8)[0], torch.cat((angles.cos(), angles.sin())).float(), rtol=0, atol=0
    )


def test_rms_norm_of_bf16_is_computed_in_fp32_then_cast_then_weighted():
    norm, x = RMSNorm(64, torch.bfloat16), 3 * torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
        exact = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        assert torch.equal(norm(x), exact.bfloat16() * norm.weight)


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_gated_add_is_computed_in_fp32_and_rounded_once(stream):
    x, update = torch.randn(2, 5, 8).to(stream), torch.randn(2, 5, 8).bfloat16()
    gate = torch.randn(2, 8)
    out = gated_add(x, update, gate, None)
    torch.testing.assert_close(
        out, (x.float() + gate[:, None] * update.float()).to(stream), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("k", [1, 2])
def test_first_blocks(k):
    model, given = random_model("t2v"), inputs("t2v")
    short = WanTransformer(WanArchitecture(**(vars(VARIANTS["t2v"]) | {"num_layers": k})))
    short.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        whole = model(**given)
        with first_blocks(model, k) as same:
            assert same is model
            assert torch.equal(model(**given), short(**given))
        assert torch.equal(model(**given), whole)


@pytest.mark.parametrize("k", [0, 3])
def test_first_blocks_refuses_what_the_model_does_not_have(k):
    with pytest.raises(UserError, match=f"has 2 blocks.*found {k}"), first_blocks(random_model("t2v"), k):
        pass


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_16_bit_weights_stay_close_to_fp32(dtype, residual):
    given = inputs("i2v_clip", batch=3)
    model = WanTransformer(VARIANTS["i2v_clip"], dtype=dtype, residual=residual)
    model.load_state_dict(random_model("i2v_clip").state_dict())
    streams = []
    model.blocks[0].register_forward_hook(lambda block, args, out: streams.append(out.dtype))
    with torch.no_grad():
        out = model(**given)
        expected = random_model("i2v_clip")(**given)
    assert out.dtype == torch.float32
    assert streams == [residual or dtype]
    assert rel_l2(out, expected) < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_an_fp32_residual_changes_nothing_in_fp32():
    given = inputs("t2v")
    model = WanTransformer(VARIANTS["t2v"], residual=torch.float32)
    model.load_state_dict(random_model("t2v").state_dict())
    with torch.no_grad():
        assert torch.equal(model(**given), random_model("t2v")(**given))


def test_time_is_computed_in_fp32_from_bf16_weights():
    model = WanTransformer(VARIANTS["t2v"], dtype=torch.bfloat16)
    model.load_state_dict(random_model("t2v").state_dict())
    exact = WanTransformer(VARIANTS["t2v"])
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    timestep = torch.tensor([321.0, 7.0])
    with torch.no_grad():
        for found, expected in zip(model.embed_time(timestep), exact.embed_time(timestep), strict=True):
            assert (found is expected is None) or torch.equal(found, expected)


# --- training ---


def gradients(model: WanTransformer, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**given).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", ["flf2v", "ti2v"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model, given = copy.deepcopy(random_model(variant)), inputs(variant)
    given["timestep"] = per_token(given["timestep"])
    expected = gradients(model, given)
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    model.gradient_checkpointing = True
    found = gradients(model, given)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_bf16_trains():
    model = WanTransformer(VARIANTS["i2v_clip"], dtype=torch.bfloat16)
    found = gradients(model, inputs("i2v_clip"))
    assert all(gradient.dtype == torch.bfloat16 and gradient.isfinite().all() for gradient in found.values())


def test_training_works_after_inference_mode():
    model, given = copy.deepcopy(random_model("t2v")), inputs("t2v")
    with torch.inference_mode():
        model(**given)
    assert all(gradient.isfinite().all() for gradient in gradients(model, given).values())


# --- what spreads the model relies on ---


def test_blocks_and_head_may_live_on_other_devices():
    """A stand-in for other devices: block and head on `meta`, fed by hooks that move arguments only."""
    model = copy.deepcopy(random_model("ti2v"))
    given = inputs("ti2v")
    given["timestep"] = per_token(given["timestep"])

    def move(module: torch.nn.Module, args: tuple) -> tuple:
        return tree_map(lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, args)

    for module in (model.blocks[1], model.head):
        module.to("meta")
        module.register_forward_pre_hook(move)
    with torch.no_grad():
        out = model(**given)
    assert out.device.type == "meta"
    assert out.shape == given["latent"].shape


def test_a_block_leaves_its_arguments_as_they_are():
    model, seen = random_model("t2v"), []

    def remember(block: torch.nn.Module, args: tuple) -> None:
        seen.append((args, copy.deepcopy(args)))

    handles = [block.register_forward_pre_hook(remember) for block in model.blocks]
    with torch.no_grad():
        model(**inputs("t2v"))
    for handle in handles:
        handle.remove()
    for args, before in seen:
        tree_map(
            lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) if a is not None else None,
            args,
            before,
        )


def test_attention_can_be_replaced():
    model, given, calls = copy.deepcopy(random_model("i2v_clip")), inputs("i2v_clip"), []
    attend = model.blocks[0].self_attn.attend

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((tuple(q.shape), tuple(k.shape)))
        return attend(q, k, v)

    for block in model.blocks:
        block.self_attn.attend = counted
        block.cross_attn.attend = counted
    with torch.no_grad():
        assert torch.equal(model(**given), random_model("i2v_clip")(**given))
    video, text, image = (1, NUM_TOKENS, 2, 128), (1, 512, 2, 128), (1, 257, 2, 128)
    assert calls == [(video, video), (video, text), (video, image)] * 2


def test_set_attention():
    model, given = copy.deepcopy(random_model("t2v")), inputs("t2v")
    with torch.no_grad():
        expected = model(**given)
        model.set_attention("sdpa_math")
        assert rel_l2(model(**given), expected) < 1e-5
        model.set_attention("sdpa_cudnn")
        with pytest.raises(UserError, match="attention=sdpa_cudnn cannot run on cpu"):
            model(**given)
    with pytest.raises(UserError, match="unknown attention kernel"):
        model.set_attention("fastest")


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("t2v", {"latent": torch.zeros(1, 36, 3, 10, 6)}, r"latent must be \[batch, 16, .*found \[1, 36, 3"),
        ("t2v", {"latent": torch.zeros(1, 16, 3, 9, 6)}, "9 x 6; both must be even"),
        ("t2v", {"timestep": torch.zeros(2)}, r"timestep must be \[1\] .* or \[1, 45\] .*found \[2\]"),
        ("t2v", {"timestep": torch.zeros(1, 44)}, r"timestep must be .*found \[1, 44\]"),
        (
            "t2v",
            {"text": torch.zeros(1, 513, 24)},
            r"text must be \[batch, at most 512, 24\]; found \[1, 513",
        ),
        ("t2v", {"text": torch.zeros(2, 5, 24)}, r"context \(text, images\) must be \[1, 512, 256\]"),
        ("t2v", {"text": None}, "found neither"),
        ("t2v", {"context": torch.zeros(1, 512, 256)}, "not both"),
        ("t2v", {"text": None, "context": torch.zeros(1, 99, 256)}, r"found \[1, 99, 256\]"),
        ("t2v", {"image_latent": torch.zeros(1, 20, 3, 10, 6)}, "leave image_latent out"),
        ("t2v", {"clip_features": torch.zeros(1, 257, 20)}, "leave clip_features out"),
        ("i2v_2.2", {"image_latent": None}, r"needs image_latent \[1, 20, 3, 10, 6\]; found none"),
        ("i2v_2.2", {"image_latent": torch.zeros(1, 16, 3, 10, 6)}, r"image_latent must be \[1, 20, 3"),
        ("i2v_clip", {"clip_features": None}, r"needs clip_features \[1, 257, 20\]; found none"),
        (
            "flf2v",
            {"clip_features": torch.zeros(1, 257, 20)},
            r"must be \[1, 514, 20\]; found \[1, 257, 20\]",
        ),
    ],
)
def test_wrong_inputs_are_user_errors(variant, changes, message):
    with pytest.raises(UserError, match=message), torch.no_grad():
        random_model(variant)(**(inputs(variant) | changes))


def test_residual_is_none_or_fp32():
    with pytest.raises(UserError, match="residual"):
        WanTransformer(VARIANTS["t2v"], residual=torch.bfloat16)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_variant
def test_a_gpu_gives_the_answer_of_the_cpu(variant):
    given = inputs(variant, batch=3)
    given["timestep"] = per_token(given["timestep"])
    model = copy.deepcopy(random_model(variant)).cuda()
    with torch.no_grad():
        expected = random_model(variant)(**given)
        on_gpu = {name: tensor.cuda() for name, tensor in given.items()}
        assert rel_l2(model(**on_gpu).cpu(), expected) < 1e-5
        assert rel_l2(model.bfloat16()(**on_gpu).cpu(), expected) < 0.02
