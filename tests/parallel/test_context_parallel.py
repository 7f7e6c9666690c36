"""Context parallelism equals one device: the pure parts in this process, whole forwards on real gloo ranks."""

import random
import tempfile
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.ranks import on_ranks
from tests.parallel.shared_memory import SharedMemory
from wanexp.errors import LayoutError, UserError
from wanexp.parallel import ring as ring_attention
from wanexp.parallel import shares
from wanexp.parallel.context_parallel import context_parallel
from wanexp.parallel.ring import merge
from wanexp.parallel.shares import check_context_parallel, head_shares, rows_apart_pay, token_shares
from wanexp.parallel.traffic import context_parallel_bytes
from wanexp.parallel.ulysses import join_heads, pack_heads
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.attention import attention_function, attention_with_lse
from wanexp.wan.transformer import WanTransformer, first_blocks

SIZES = {"ffn_dim": 48, "num_layers": 3, "text_dim": 12, "text_len": 9, "freq_dim": 16, "clip_dim": 10}
EXACT = 1e-5


@dataclass(frozen=True)
class Case:
    """One layout of one small model. `dim` is heads * head_dim; the latent has 1 x 2 x 2 pixels a token."""

    ulysses: int = 1
    ring: int = 1
    heads: int = 4
    head_dim: int = 12
    grid: tuple[int, int, int] = (3, 5, 3)
    batch: int = 1
    kind: dict[str, int] = field(default_factory=dict, hash=False)
    per_token: bool = False
    dtype: torch.dtype = torch.float32
    blocks: int = 3
    kernel: str = "auto"
    compiled: bool = False
    wrong_merge: bool = False
    apart: bool = True  # by copies: rows of the attention whether it pays or not

    @property
    def architecture(self) -> WanArchitecture:
        return WanArchitecture(dim=self.heads * self.head_dim, num_heads=self.heads, **SIZES, **self.kind)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


CLIP = {"in_channels": 36, "clip_tokens": 257}
TI2V = {"in_channels": 48, "out_channels": 48}


def random_cases(ranks: int, number: int, seed: int) -> dict[str, Case]:
    choose = random.Random(seed)
    degrees = [
        (ulysses, ring)
        for ulysses in range(1, ranks + 1)
        for ring in range(1, ranks + 1)
        if ulysses * ring > 1 and ranks % (ulysses * ring) == 0
    ]
    cases = {}
    for index in range(number):
        ulysses, ring = choose.choice(degrees)
        cases[f"random {index}"] = Case(
            ulysses=ulysses,
            ring=ring,
            heads=choose.randint(ulysses, ulysses + 5),
            head_dim=choose.choice([6, 8, 10, 20]),
            grid=(choose.randint(1, 4), choose.randint(2, 5), choose.randint(4, 5)),
            batch=choose.randint(1, 3),
            kind=choose.choice([{}, CLIP, TI2V]),
            per_token=choose.random() < 0.3,
            blocks=choose.randint(1, 3),
            kernel=choose.choice(["auto", "sdpa_math"]),
        )
    return cases


CASES = {
    4: {
        "ulysses 2": Case(ulysses=2),
        "ulysses 4": Case(ulysses=4),
        "ulysses 4, rows together": Case(ulysses=4, heads=5, batch=3, apart=False),
        "ring 2": Case(ring=2),
        "ring 4": Case(ring=4),
        "2 x 2": Case(ulysses=2, ring=2),
        "2 x 2, i2v, batch 3": Case(ulysses=2, ring=2, kind=CLIP, batch=3),
        "2 x 2, ti2v, a timestep a token, batch 3": Case(
            ulysses=2, ring=2, kind=TI2V, per_token=True, batch=3
        ),
        "ulysses 4, ti2v, a timestep a token": Case(ulysses=4, kind=TI2V, per_token=True),
        "ring 4, i2v, batch 3": Case(ring=4, kind=CLIP, batch=3),
        "3 heads on 2 ranks, 7 tokens": Case(ulysses=2, heads=3, grid=(1, 7, 1)),
        "5 heads on 4 ranks, batch 3": Case(ulysses=4, heads=5, batch=3),
        "a token a rank": Case(ulysses=2, ring=2, grid=(2, 2, 1)),
        "even everything": Case(ulysses=2, ring=2, grid=(2, 4, 4), batch=2),
        "1 of 3 blocks": Case(ulysses=2, ring=2, blocks=1),
        "math": Case(ulysses=2, ring=2, kernel="sdpa_math"),
        "heads of 12 bytes, not in words of 8": Case(ulysses=2, heads=3, head_dim=6, dtype=torch.bfloat16),
        "ulysses 4, bf16": Case(ulysses=4, dtype=torch.bfloat16, head_dim=16),
        "ring 4, bf16, batch 3": Case(ring=4, dtype=torch.bfloat16, head_dim=16, batch=3),
        "2 x 2, bf16": Case(ulysses=2, ring=2, dtype=torch.bfloat16, head_dim=16),
        "compiled blocks": Case(ulysses=2, ring=2, compiled=True),
        "wrong merge": Case(ring=4, wrong_merge=True),
        **random_cases(4, 16, seed=0),
    },
    8: {
        "2 x 4": Case(ulysses=2, ring=4),
        "4 x 2": Case(ulysses=4, ring=2, batch=3),
        "12 heads on 8 ranks": Case(ulysses=8, heads=12),
        "12 heads on 8 ranks, batch 3, 11 tokens": Case(ulysses=8, heads=12, batch=3, grid=(1, 11, 1)),
        "ring 8": Case(ring=8),
        **random_cases(8, 8, seed=1),
    },
}
ALL = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


# --- what a rank does ---


def build(case: Case, dtype: torch.dtype) -> WanTransformer:
    """A model whose every tensor matters, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    model = WanTransformer(case.architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif "modulation" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    model.set_attention(case.kernel)
    return model.to(dtype)


def inputs(case: Case, step: int) -> dict[str, torch.Tensor]:
    arch = case.architecture
    generator = torch.Generator().manual_seed(step)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latent_shape = (case.grid[0], 2 * case.grid[1], 2 * case.grid[2])
    timestep = torch.tensor([999.0, 123.4, 500.0][: case.batch]) - step
    if case.per_token:  # the first frame is clean
        timestep = timestep[:, None].repeat(1, case.tokens)
        timestep[:, : case.grid[1] * case.grid[2]] = 0
    return {
        "latent": randn(case.batch, arch.out_channels, *latent_shape),
        "timestep": timestep,
        "text": randn(case.batch, 7, arch.text_dim),
        **(
            {"image_latent": randn(case.batch, arch.in_channels - arch.out_channels, *latent_shape)}
            if arch.in_channels > arch.out_channels
            else {}
        ),
        **({"clip_features": randn(case.batch, arch.clip_tokens, arch.clip_dim)} if arch.clip_tokens else {}),
    }


def groups_of(rank: int, world_size: int, ulysses: int, ring: int, made: dict) -> tuple:
    """This rank's groups in replicas of ulysses x ring ranks. All ranks make all groups, in one order."""
    own = []
    for degree, stride in ((ulysses, 1), (ring, ulysses)):
        firsts = [r for r in range(world_size) if r // stride % degree == 0]
        for members in (tuple(range(first, first + degree * stride, stride)) for first in firsts):
            if members not in made:
                made[members] = dist.new_group(list(members))
            if rank in members:
                own.append(made[members] if degree > 1 else None)
    return tuple(own)


def rel_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def mean_of_parts(out, lse, block_out, _block_lse):
    return (out + block_out) / 2, lse


@mock.patch("wanexp.parallel.ulysses.TILE_ROWS", 2)  # so that few rows are attended in two runs, too
def run_cases(rank: int, world_size: int, folder: str | None = None) -> dict[str, dict]:
    """folder: of memory that all ranks write to, to have copies carry the exchanges of Ulysses."""
    made: dict = {}
    results = {}
    for name, case in CASES[world_size].items():
        ulysses, ring_group = groups_of(rank, world_size, case.ulysses, case.ring, made)
        memory = None
        if folder is not None and ulysses is not None:
            memory = made.setdefault(ulysses, SharedMemory(ulysses, folder))
        model = build(case, case.dtype)
        steps = [inputs(case, step) for step in range(2)]
        with torch.inference_mode(), first_blocks(model, case.blocks):
            plain = [model(**step) for step in steps]
            with first_blocks(full := build(case, torch.float32), case.blocks):
                full_precision = [full(**step) for step in steps]
        traffic = context_parallel(model, ulysses=ulysses, ring=ring_group, memory=memory)
        if case.compiled:
            for block in model.blocks:
                block.compile(backend="eager")
        ring_attention.merge = mean_of_parts if case.wrong_merge else merge
        shares.MIN_HEADS_SENT = 0 if case.apart else float("inf")
        found = []
        # inference_mode and no_grad in turn: tensors kept from one step serve the next.
        for step, mode in zip(steps, (torch.inference_mode, torch.no_grad), strict=True):
            traffic.reset()
            with mode(), first_blocks(model, case.blocks):
                found.append(model(**step))
        ring_attention.merge = merge
        results[name] = {
            "error": max(map(rel_l2, found, plain)),
            "to_full": max(map(rel_l2, found, full_precision)),
            "plain_to_full": max(map(rel_l2, plain, full_precision)),
            "bytes": traffic.num_bytes,
            "shape": (found[0].shape, found[0].dtype),
        }
    return results


@cache
def by_rank(ranks: int) -> list[dict[str, dict]]:
    return on_ranks(ranks, run_cases, ranks)


@cache
def by_rank_with_copies(ranks: int) -> list[dict[str, dict]]:
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(ranks, run_cases, ranks, folder)


# --- whole forwards ---


def check_answers(case, results):
    """What all ranks found, against one device."""
    worst = max(result["error"] for result in results)
    print(f"{worst:.1e}")
    grid = (case.grid[0], 2 * case.grid[1], 2 * case.grid[2])
    shape = (case.batch, case.architecture.out_channels, *grid)
    assert {result["shape"] for result in results} == {(shape, torch.float32)}
    if case.wrong_merge:
        assert worst > 100 * EXACT  # the comparison can fail
    elif case.dtype == torch.float32:
        assert worst <= EXACT
    else:
        assert max(result["to_full"] for result in results) <= 2 * results[0]["plain_to_full"]


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_equals_one_device(ranks, name):
    check_answers(CASES[ranks][name], [results[name] for results in by_rank(ranks)])


@pytest.mark.parametrize(("ranks", "name"), [pair for pair in ALL if CASES[pair[0]][pair[1]].ulysses > 1])
def test_copies_carry_the_same(ranks, name):
    """By the memory of the other ranks, rows attended apart: the same answer, and as many bytes."""
    found = [results[name] for results in by_rank_with_copies(ranks)]
    check_answers(CASES[ranks][name], found)
    assert [one["bytes"] for one in found] == [results[name]["bytes"] for results in by_rank(ranks)]


def bytes_by_rank(tokens, heads, head_dim, layers, ulysses, ring, element_size, batch, out_features):
    """What each rank sends, share by share: the formula without its assumption that all divides."""
    shares, own_heads = token_shares(tokens, ulysses=ulysses, ring=ring), head_shares(heads, ulysses)
    blocks = [sum(block) for block in shares]
    for ring_rank, block in enumerate(shares):
        for ulysses_rank, own in enumerate(block):
            mine = own_heads[ulysses_rank]
            moved = 3 * own * (heads - mine) + (sum(block) - own) * mine  # rows of head_dim
            if ring > 1:  # every block but the one that the next rank began with
                moved += 2 * mine * (tokens - blocks[(ring_rank + 1) % ring])
            rows = max(block) * (ulysses - 1) + max(blocks) * (ring - 1)
            yield batch * (layers * head_dim * element_size * moved + rows * out_features * 4)


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_bytes_moved_are_counted(ranks, name):
    case = CASES[ranks][name]
    arch = case.architecture
    degrees = (case.ulysses, case.ring, case.dtype.itemsize)
    features = 4 * arch.out_channels
    sent = [results[name]["bytes"] for results in by_rank(ranks)]
    expected = bytes_by_rank(
        case.tokens, case.heads, case.head_dim, case.blocks, *degrees, case.batch, features
    )
    assert sent == list(expected) * (ranks // (case.ulysses * case.ring))
    if case.tokens % (case.ulysses * case.ring) == 0:
        formula = context_parallel_bytes(
            case.tokens, arch.dim, case.blocks, *degrees, batch=case.batch, out_features=features
        )
        assert formula == round(sum(sent) / ranks)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (8, 1), (1, 8), (4, 2), (3, 5)])
@pytest.mark.parametrize("tokens", [32760, 32761])
def test_the_formula_is_the_mean_of_the_ranks(tokens, ulysses, ring):
    sent = list(bytes_by_rank(tokens, 12, 128, 30, ulysses, ring, 2, 1, 64))
    formula = context_parallel_bytes(tokens, 12 * 128, 30, ulysses, ring, 2)
    assert formula == pytest.approx(sum(sent) / len(sent), rel=1e-4)


def refuse(_rank: int) -> list[str]:
    messages = []
    for attempt in (with_gradients, over_an_unknown_kernel, with_too_few_heads, with_too_few_tokens):
        with pytest.raises(UserError) as caught:
            attempt(dist.group.WORLD)
        messages.append(str(caught.value))
    return messages


def with_gradients(world):
    model = build(Case(), torch.float32)
    context_parallel(model, ulysses=world, ring=None)
    model(**inputs(Case(), 0))


def over_an_unknown_kernel(world):
    model = build(Case(), torch.float32)
    model.blocks[0].self_attn.attend = lambda q, k, v: q
    context_parallel(model, ulysses=None, ring=world)


def with_too_few_heads(world):
    context_parallel(build(Case(heads=1), torch.float32), ulysses=world, ring=None)


def with_too_few_tokens(world):
    case = Case(grid=(1, 1, 1))
    model = build(case, torch.float32)
    context_parallel(model, ulysses=None, ring=world)
    with torch.no_grad():
        model(**inputs(case, 0))


def test_refusals():
    for messages in on_ranks(2, refuse):
        gradients, kernel, heads, tokens = messages
        assert "gradients are switched on; call the model under torch.inference_mode()" in gradients
        assert "an attention kernel with a name is wanted" in kernel
        assert "1 attention heads" in heads and "ulysses 2 ranks" in heads
        assert "1 video tokens over ulysses 1 x ring 2 = 2 ranks" in tokens


# --- the pure parts ---


@pytest.mark.parametrize(
    ("num_heads", "ulysses", "batch", "expected"),
    [
        (40, 2, 1, True),  # 14B: of each token of the video a rank sends 10 heads
        (40, 4, 1, True),  # 7.5
        (40, 8, 1, False),  # 4.4
        (12, 2, 1, False),  # 1.3B: 3
        (12, 2, 2, True),
        (12, 8, 1, False),
    ],
)
def test_where_rows_go_apart(num_heads, ulysses, batch, expected):
    for num_tokens in (32760, 75600):
        tokens = token_shares(num_tokens, ulysses=ulysses, ring=1)[0]
        assert rows_apart_pay(batch, tokens, head_shares(num_heads, ulysses)) == expected


def test_the_check_names_every_factor():
    check_context_parallel(num_heads=12, num_tokens=32760, ulysses=8, ring=2)
    with pytest.raises(LayoutError, match=r"12 attention heads .* ulysses 16 ranks.*ulysses=12 or less"):
        check_context_parallel(num_heads=12, num_tokens=32760, ulysses=16, ring=2)
    with pytest.raises(LayoutError, match=r"7 video tokens over ulysses 2 x ring 4 = 8 ranks"):
        check_context_parallel(num_heads=12, num_tokens=7, ulysses=2, ring=4)


def test_bytes_of_the_14b_model_at_480p_on_two_ranks():
    ulysses = context_parallel_bytes(32760, 5120, 40, 2, 1, 2)
    assert ulysses == 40 * 335_462_400 + 32760 * 64 * 4 // 2 == 13_422_689_280
    # A ring of two sends as much: its keys and values go whole, of Ulysses' four tensors a half stays.
    assert context_parallel_bytes(32760, 5120, 40, 1, 2, 2) == ulysses
    assert context_parallel_bytes(32760, 5120, 40, 1, 1, 2) == 0


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 6))
def test_token_shares(tokens, ulysses, ring):
    if tokens < ulysses * ring:
        with pytest.raises(LayoutError):
            token_shares(tokens, ulysses=ulysses, ring=ring)
        return
    shares = token_shares(tokens, ulysses=ulysses, ring=ring)
    flat = [share for block in shares for share in block]
    assert sum(flat) == tokens
    assert len(shares) == ring and {len(block) for block in shares} == {ulysses}
    assert min(flat) >= 1 and max(flat) - min(flat) <= 1


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(1, 5),
    more_heads=st.integers(0, 5),
    more_tokens=st.integers(0, 9),
    batch=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_there_and_back_between_tokens_and_heads(ranks, more_heads, more_tokens, batch, head_dim, dtype):
    """The exchange without processes: chunk i of rank j becomes chunk j of rank i."""
    num_heads, num_tokens = ranks + more_heads, ranks + more_tokens
    heads = head_shares(num_heads, ranks)
    (tokens,) = token_shares(num_tokens, ulysses=ranks, ring=1)
    shape = (batch, num_tokens, num_heads, head_dim)
    x = torch.randn(shape).to(dtype)

    def exchange(packed: list[torch.Tensor], sizes: list[list[int]]) -> list[torch.Tensor]:
        chunks = [one.split(size) for one, size in zip(packed, sizes, strict=True)]
        return [torch.cat([chunks[source][target] for source in range(ranks)]) for target in range(ranks)]

    row = batch * head_dim
    packed = [x.new_empty(part.numel()) for part in x.split(tokens, dim=1)]
    for flat, part in zip(packed, x.split(tokens, dim=1), strict=True):
        pack_heads(part, heads, flat.split([row * part.shape[1] * share for share in heads]))
    received = exchange(packed, [[row * own * share for share in heads] for own in tokens])
    mine = []
    for rank, first in enumerate(accumulate(heads[:-1], initial=0)):
        found = received[rank].view(num_tokens, batch, heads[rank], head_dim).transpose(0, 1)
        assert torch.equal(found, x[:, :, first : first + heads[rank]])
        mine.append(found)
    back = [one.transpose(0, 1).flatten() for one in mine]
    received = exchange(back, [[row * own * share for own in tokens] for share in heads])
    joined = []
    for one, own in zip(received, tokens, strict=True):
        cut = own // 3  # what a rank has itself may come in two runs
        runs = [
            chunk.split([size for size in (row * cut * share, row * (own - cut) * share) if size])
            for chunk, share in zip(one.split([row * own * share for share in heads]), heads, strict=True)
        ]
        joined.append(join_heads(runs, (batch, own, head_dim), heads, own + 3))
    assert torch.equal(torch.cat([one[:, :-3] for one in joined], dim=1), x)
    assert not any(one[:, -3:].any() for one in joined)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(0.1, 30), st.integers(0, 2**16))
def test_merged_parts_are_attention_to_the_whole(sizes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for length in (5, sum(sizes), sum(sizes)))
    q = q * scale  # up to scores so peaked that a part weighs nothing
    attend = attention_with_lse("sdpa_math")
    merged = None
    for part in zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True):
        merged = attend(q, *part) if merged is None else merge(*merged, *attend(q, *part))
    out, lse = attend(q.double(), k.double(), v.double())
    torch.testing.assert_close(merged[0].double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[1], lse, rtol=1e-5, atol=1e-4)


def test_merge_is_in_fp32_for_parts_of_16_bits():
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    attend = attention_with_lse("auto")
    parts = [attend(q, k[:, half], v[:, half]) for half in (slice(0, 2), slice(2, 6))]
    out, lse = merge(*parts[0], *parts[1])
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, attention_function("auto")(q, k, v).float(), rtol=0.02, atol=0.02)


def test_every_case_is_legal_and_fills_its_ranks():
    for ranks, cases in CASES.items():
        for case in cases.values():
            assert ranks % (case.ulysses * case.ring) == 0
            check_context_parallel(
                num_heads=case.heads, num_tokens=case.tokens, ulysses=case.ulysses, ring=case.ring
            )
