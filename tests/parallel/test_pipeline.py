"""Pipelined block distribution: its order and its times on paper, and the same bits as one device.

What streams and events guarantee on GPUs is checked twice: on the CPU by vector clocks, which see every pair of
accesses to a tensor that no wait puts in order, and on two GPUs with delayed streams and poisoned memory.
"""

import copy
import random
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wanexp.errors import LayoutError, UserError
from wanexp.parallel import block_distribution
from wanexp.parallel.block_distribution import (
    ForwardArguments,
    Lane,
    Pipeline,
    Wire,
    distribute_blocks,
    position_of,
)
from wanexp.parallel.pipeline import (
    Stage,
    best_chunks,
    pipeline_time,
    place_chunks,
    stages_of,
    wavefront,
)
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer, first_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_BLOCKS = 8
SIZES = {"dim": 64, "num_heads": 2, "ffn_dim": 96, "num_layers": NUM_BLOCKS, "text_dim": 24, "text_len": 16}
VARIANTS = {
    "t2v": WanArchitecture(**SIZES, freq_dim=32),
    "i2v_clip": WanArchitecture(**SIZES, freq_dim=32, in_channels=36, clip_tokens=257, clip_dim=20),
    "ti2v": WanArchitecture(**SIZES, freq_dim=32, in_channels=48, out_channels=48),
}
GRID = (3, 5, 3)
TOKENS = 45
CONTIGUOUS_2, INTERLEAVED_2 = place_chunks(NUM_BLOCKS, 2, 2), place_chunks(NUM_BLOCKS, 2, NUM_BLOCKS)
OWNERS = {
    "one": (0,) * NUM_BLOCKS,
    "contiguous 2": CONTIGUOUS_2,
    "contiguous 3": place_chunks(NUM_BLOCKS, 3, 3),
    "contiguous 4": place_chunks(NUM_BLOCKS, 4, 4),
    "interleaved 2": INTERLEAVED_2,
    "interleaved 3": place_chunks(NUM_BLOCKS, 3, NUM_BLOCKS),
    "interleaved 4 in 6": place_chunks(NUM_BLOCKS, 4, 6),
    "split 1, 5, 2": (0, 1, 1, 1, 1, 1, 2, 2),
    "home is not 0": (1, 1, 0, 0, 1, 2, 2, 0),
}


# --- placement and order ---


@pytest.mark.parametrize(
    ("arguments", "owner"),
    [
        ((6, 2, 2), (0, 0, 0, 1, 1, 1)),
        ((6, 2, 6), (0, 1, 0, 1, 0, 1)),
        ((7, 2, 4), (0, 0, 1, 1, 0, 0, 1)),
        ((5, 3, 4), (0, 0, 1, 2, 0)),
        ((3, 1, 2), (0, 0, 0)),
    ],
)
def test_chunks_are_dealt_round_robin(arguments, owner):
    assert place_chunks(*arguments) == owner


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 60))
def test_chunks_and_shares_differ_by_one_block(num_blocks, num_devices, num_chunks):
    if not num_devices <= num_chunks <= num_blocks:
        with pytest.raises(LayoutError):
            place_chunks(num_blocks, num_devices, num_chunks)
        return
    owner = place_chunks(num_blocks, num_devices, num_chunks)
    assert len(owner) == num_blocks and set(owner) == set(range(num_devices))
    if num_devices > 1:
        sizes = [
            stage.stop - stage.start for stage in stages_of(owner, num_blocks) if stage.start < num_blocks
        ]
        assert len(sizes) == num_chunks and max(sizes) - min(sizes) <= 1
    if num_chunks % num_devices == 0:
        shares = [owner.count(position) for position in range(num_devices)]
        assert max(shares) - min(shares) <= 1


def test_impossible_chunks_are_refused_in_a_sentence():
    with pytest.raises(LayoutError, match="5 GPUs for 4 transformer blocks; write at most 4 GPUs"):
        place_chunks(4, 5, 5)
    for number in (1, 9):
        with pytest.raises(LayoutError, match=f"block_chunks is {number} for 2 GPUs and 8 .*; write 2 to 8"):
            place_chunks(8, 2, number)


def test_stages_end_at_the_head():
    assert stages_of((0, 0, 1, 0), 4) == [Stage(0, 0, 2), Stage(1, 2, 3), Stage(0, 3, 4)]
    assert stages_of((0, 0, 1, 1), 3) == [Stage(0, 0, 2), Stage(1, 2, 3)]
    assert stages_of((0, 0, 1, 1), 1) == [Stage(0, 0, 1), Stage(1, 1, 1)], (
        "fewer blocks run, the head is elsewhere"
    )
    assert stages_of((0, 1, 0), 1) == [Stage(0, 0, 1)]


def test_the_wavefront_by_hand():
    assert list(wavefront(3, 2)) == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (2, 1)]
    assert list(wavefront(2, 3)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


@given(st.integers(1, 12), st.integers(1, 5))
def test_the_wavefront_is_an_order_that_can_run(num_stages, num_microbatches):
    order = list(wavefront(num_stages, num_microbatches))
    assert sorted(order) == [(s, m) for s in range(num_stages) for m in range(num_microbatches)]
    position = {item: index for index, item in enumerate(order)}
    for stage, microbatch in order:
        for before in ((stage - 1, microbatch), (stage, microbatch - 1)):
            assert before not in position or position[before] < position[stage, microbatch]


# --- times ---


def speed_up(owner, num_microbatches, forward_s=2.3, seam_s=0.0):
    stages = stages_of(owner, len(owner))
    stage_s = [forward_s * (stage.stop - stage.start) / len(owner) for stage in stages]
    time_s = pipeline_time(stage_s, [stage.position for stage in stages], num_microbatches, seam_s)
    return num_microbatches * forward_s / time_s


@pytest.mark.parametrize("num_devices", [1, 2, 4, 5, 8])
def test_contiguous_stages_reach_their_bound(num_devices):
    owner = place_chunks(40, num_devices, num_devices)
    assert speed_up(owner, 1) == pytest.approx(1)
    assert speed_up(owner, 2) == pytest.approx(2 * num_devices / (num_devices + 1))
    assert speed_up(owner, 64) == pytest.approx(64 * num_devices / (num_devices + 63))


@pytest.mark.parametrize("num_chunks", [2, 4, 10, 20, 40])
def test_interleaved_stages_reach_their_bound(num_chunks):
    assert speed_up(place_chunks(40, 2, num_chunks), 2) == pytest.approx(2 * num_chunks / (num_chunks + 1))


def test_the_figures_of_a_14b_at_480p_over_nvlink():
    assert speed_up(place_chunks(40, 2, 40), 2, seam_s=0.85e-3) == pytest.approx(1.92, abs=0.01)
    assert speed_up(place_chunks(40, 2, 10), 2, seam_s=0.85e-3) == pytest.approx(1.81, abs=0.01)
    assert speed_up(place_chunks(40, 2, 2), 2, seam_s=0.85e-3) == pytest.approx(1.33, abs=0.01)
    assert speed_up(place_chunks(40, 2, 40), 4, seam_s=0.85e-3) > 1.95, (
        "two samples: seams hide behind the other's"
    )


@st.composite
def schedules(draw):
    num_devices = draw(st.integers(1, 5))
    owners = draw(st.lists(st.integers(0, num_devices - 1), min_size=1, max_size=12))
    owners = [owner for index, owner in enumerate(owners) if index == 0 or owner != owners[index - 1]]
    stage_s = draw(st.lists(st.floats(0.01, 3), min_size=len(owners), max_size=len(owners)))
    return stage_s, owners, draw(st.integers(1, 5)), draw(st.sampled_from([0.0, 0.01, 0.5]))


@given(schedules())
def test_no_schedule_beats_the_bounds_or_loses_to_one_after_another(schedule):
    stage_s, owners, num_microbatches, seam_s = schedule
    time_s = pipeline_time(*schedule)
    one = sum(stage_s) + (len(stage_s) - 1) * seam_s
    busiest = max(sum(s for s, owner in zip(stage_s, owners, strict=True) if owner == d) for d in set(owners))
    # Behind the first micro-batch, the others pass its slowest stage one by one.
    bounds = (num_microbatches * busiest, one + (num_microbatches - 1) * max(stage_s))
    assert time_s >= max(bounds) - 1e-9
    assert time_s <= num_microbatches * one + 1e-9
    if num_microbatches == 2:
        assert 2 * sum(stage_s) / time_s <= 2 * len(stage_s) / (len(stage_s) + 1) + 1e-9


def test_the_best_number_of_chunks_falls_with_the_cost_of_a_seam():
    chunks = [best_chunks(40, 2, 2.3, seam_s, 2) for seam_s in (0, 0.85e-3, 17e-3, 0.1, 3)]
    assert chunks[0] == 40 and chunks[-1] == 2
    assert chunks == sorted(chunks, reverse=True)
    assert best_chunks(40, 2, 2.3, 0.85e-3, 1) == 2, "one micro-batch gains nothing by seams"
    assert best_chunks(30, 4, 0.5, 0, 1) == 4
    with pytest.raises(LayoutError):
        best_chunks(4, 5, 1.0, 0, 2)


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 0.2), st.integers(1, 4))
@settings(max_examples=30)
def test_the_best_number_of_chunks_is_the_fastest(num_blocks, num_devices, seam_s, num_microbatches):
    if num_devices > num_blocks:
        return
    best = best_chunks(num_blocks, num_devices, 1.0, seam_s, num_microbatches)

    def rate(chunks):
        return speed_up(place_chunks(num_blocks, num_devices, chunks), num_microbatches, 1.0, seam_s)

    assert all(
        rate(best) >= rate(chunks) - 1e-6 for chunks in range(num_devices, num_blocks + 1, num_devices)
    )


# --- the same bits as one device, on logical devices ---


@cache
def plain_model(variant: str, dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(1)
    return WanTransformer(VARIANTS[variant], dtype=dtype).requires_grad_(False)


def make_pipeline(variant: str, owner, dtype: torch.dtype = torch.float32) -> Pipeline:
    model = copy.deepcopy(plain_model(variant, dtype))
    devices = [torch.device("cpu")] * (max(owner) + 1)
    seams = distribute_blocks(model, block_owner=owner, devices=devices)
    return Pipeline(model, block_owner=owner, devices=devices, seams=seams)


def make_requests(variant: str, number: int, batch: int = 1, device: str = "cpu") -> list[ForwardArguments]:
    """As of a denoising step: each micro-batch another latent and text. TI2V: the first frame at time 0."""
    arch, generator = VARIANTS[variant], torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    requests = []
    for index in range(number):
        timestep = torch.tensor([999.0, 123.4, 500.0][:batch], device=device) - index
        if variant == "ti2v":
            timestep = timestep[:, None].repeat(1, TOKENS)
            timestep[:, : GRID[1] * GRID[2]] = 0
        latent_shape = (GRID[0], 2 * GRID[1], 2 * GRID[2])
        image = arch.in_channels > arch.out_channels
        requests.append(
            ForwardArguments(
                randn(batch, arch.out_channels, *latent_shape),
                timestep,
                randn(batch, 7, arch.text_dim),
                randn(batch, arch.in_channels - arch.out_channels, *latent_shape) if image else None,
                randn(batch, arch.clip_tokens, arch.clip_dim) if arch.clip_tokens else None,
            )
        )
    return requests


def one_by_one(model: WanTransformer, requests: list[ForwardArguments]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**vars(request)) for request in requests]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("placement", OWNERS)
def test_the_bits_of_one_device(variant, placement):
    pipeline = make_pipeline(variant, OWNERS[placement])
    for number in (1, 2, 3, 4):
        requests = make_requests(variant, number, batch=1 + number % 2)
        expected = one_by_one(plain_model(variant), requests)
        assert expected[0].std() > 0.01
        for _ in range(2):
            assert_equal(pipeline.run(requests), expected)
        assert_equal(one_by_one(pipeline.model, requests), expected)  # the hooks work again
    assert pipeline.run([]) == []


def test_the_bits_of_one_device_in_bf16_and_after_other_shapes():
    pipeline = make_pipeline("t2v", INTERLEAVED_2, torch.bfloat16)
    requests = [make_requests("t2v", 2, batch=3)[1], make_requests("t2v", 1, batch=2)[0]]
    assert_equal(pipeline.run(requests), one_by_one(plain_model("t2v", torch.bfloat16), requests))


@pytest.mark.parametrize("placement", OWNERS)
def test_the_first_blocks_alone(placement):
    pipeline = make_pipeline("t2v", OWNERS[placement])
    requests = make_requests("t2v", 2)
    for number in range(1, NUM_BLOCKS + 1):
        with first_blocks(pipeline.model, number), first_blocks(plain_model("t2v"), number):
            assert_equal(pipeline.run(requests), one_by_one(plain_model("t2v"), requests))


@pytest.mark.parametrize("placement", OWNERS)
def test_blocks_run_in_the_order_of_the_wavefront(placement, monkeypatch):
    owner = OWNERS[placement]
    pipeline = make_pipeline("t2v", owner)
    started, ran = [], []
    begin, run_blocks = pipeline.model.begin, pipeline.model.run_blocks

    def note_begin(*args, **kwargs):
        started.append(begin(*args, **kwargs))
        return started[-1]

    def note_blocks(pending, start, stop):
        ran.append((start, [id(one) for one in started].index(id(pending))))
        run_blocks(pending, start, stop)

    monkeypatch.setattr(pipeline.model, "begin", note_begin)
    monkeypatch.setattr(pipeline.model, "run_blocks", note_blocks)
    pipeline.run(make_requests("t2v", 3))
    starts = [stage.start for stage in stages_of(owner, NUM_BLOCKS)]
    assert ran == [(starts[stage], microbatch) for stage, microbatch in wavefront(len(starts), 3)]


# fp32 bytes of one sample
HIDDEN, MODULATION, TIME_VECTOR = TOKENS * 64 * 4, 6 * 64 * 4, 64 * 4
CONTEXT, ROPE, OUTPUT = 16 * 64 * 4, 2 * TOKENS * 16 * 4, TOKENS * 64 * 4


@pytest.mark.parametrize("placement", OWNERS)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_bytes_that_cross(placement, number):
    owner = OWNERS[placement]
    pipeline = make_pipeline("t2v", owner)
    requests = make_requests("t2v", number)
    with torch.no_grad():
        requests = [
            ForwardArguments(r.latent, r.timestep, context=pipeline.model.embed_text(r.text))
            for r in requests
        ]
    seams, others = len(stages_of(owner, NUM_BLOCKS)) - 1, len(set(owner)) - 1
    each_forward = seams * HIDDEN + others * MODULATION
    if owner[-1] != owner[0]:
        each_forward += TIME_VECTOR + OUTPUT
    pipeline.run(requests)
    assert pipeline.seams.num_bytes == number * (each_forward + others * CONTEXT) + others * ROPE
    pipeline.seams.reset()
    pipeline.run(requests)
    assert pipeline.seams.num_bytes == number * each_forward, "no constant crosses twice"
    copies = pipeline.seams.num_copies
    pipeline.seams.reset()
    for request in requests:
        pipeline.model(**vars(request))
    assert (pipeline.seams.num_bytes, pipeline.seams.num_copies) == (number * each_forward, copies), (
        "as the hooks"
    )


def test_a_bad_request_leaves_the_pipeline_usable():
    pipeline = make_pipeline("t2v", INTERLEAVED_2)
    good = make_requests("t2v", 3)
    bad = ForwardArguments(good[0].latent[:, :3], good[0].timestep, good[0].text)
    with pytest.raises(UserError, match="latent must be"):
        pipeline.run([*good[:2], bad])
    assert not pipeline.seams.hooks_rest and not any(pipeline._leaving)
    assert_equal(pipeline.run(good), one_by_one(plain_model("t2v"), good))


# --- streams and events on paper: vector clocks ---


class Clocks:
    """Streams that run nothing but know what must have run before what, and every access of every tensor.

    A stream is a name; its clock says how far into each other stream it has waited. A tensor freed by the host goes
    back to the computing stream of its position, whose next kernel may write there: so by then that stream must have
    waited for every access by another one.
    """

    def __init__(self) -> None:
        self.clocks: dict[str, dict[str, int]] = {}
        self.accesses: dict[int, list[tuple[str, int, bool]]] = {}
        self.num_hidden: Counter[str] = Counter()
        self.max_hidden: Counter[str] = Counter()
        self.errors: list[str] = []
        self.active = ""

    def tick(self, stream: str) -> dict[str, int]:
        clock = self.clocks.setdefault(stream, {})
        clock[stream] = clock.get(stream, 0) + 1
        return clock

    def mark(self, stream: str) -> dict[str, int]:
        return dict(self.tick(stream))

    def wait(self, stream: str, event: dict[str, int]) -> None:
        clock = self.clocks.setdefault(stream, {})
        for other, time in event.items():
            clock[other] = max(clock.get(other, 0), time)

    def access(self, stream: str, tensor: Tensor, *, writes: bool) -> None:
        clock = self.tick(stream)
        before = self.accesses.setdefault(id(tensor), [])
        for other, time, wrote in before:
            if writes or wrote:
                assert clock.get(other, 0) >= time, f"{stream} may overtake {other}"
        before.append((stream, clock[stream], writes))

    def owned_by(self, lane: str, tensor: Tensor) -> None:
        """Watch the memory of `tensor`, allocated for the computing stream `lane`."""
        self.accesses[id(tensor)] = []
        is_hidden = tensor.shape[1:] == (TOKENS, SIZES["dim"])
        self.num_hidden[lane] += is_hidden
        self.max_hidden[lane] = max(self.max_hidden[lane], self.num_hidden[lane])
        weakref.finalize(tensor, self.freed, lane, id(tensor), is_hidden)

    def freed(self, lane: str, key: int, is_hidden: bool) -> None:
        self.num_hidden[lane] -= is_hidden
        clock = self.clocks.get(lane, {})
        for other, time, _ in self.accesses.pop(key):
            if clock.get(other, 0) < time:
                self.errors.append(f"memory of {lane} is given back while {other} uses it")


@contextmanager
def clocks_in_place(monkeypatch, pipeline: Pipeline):
    """`pipeline` with lanes and wires that keep clocks."""
    clocks = Clocks()

    class ClockLane(Lane):
        def __init__(self, position: int) -> None:
            super().__init__(torch.device("cpu"))
            self.name = f"compute {position}"

        @contextmanager
        def active(self):
            clocks.active, before = self.name, clocks.active
            yield
            clocks.active = before

        def mark(self):
            return clocks.mark(self.name)

        def wait(self, event):
            clocks.wait(self.name, event)

    class ClockWire(Wire):
        def __init__(self, source: ClockLane, target: ClockLane) -> None:
            super().__init__(source, target)
            self.name, self.target = f"copy {source.name} to {target.name}", target

        def carry(self, tensor, onto, *, after):
            for event in after:
                clocks.wait(self.name, event)
            if id(onto) not in clocks.accesses:
                # New memory: kernels of its stream enqueued so far may have had it before.
                clocks.owned_by(self.target.name, onto)
                enqueued = clocks.clocks.get(self.target.name, {}).get(self.target.name, 0)
                assert clocks.clocks[self.name].get(self.target.name, 0) >= enqueued, "writes too early"
            clocks.access(self.name, tensor, writes=False)
            clocks.access(self.name, onto, writes=True)
            onto.copy_(tensor)
            return clocks.mark(self.name)

    model = pipeline.model
    begin, run_blocks, finish = model.begin, model.run_blocks, model.finish

    def made(*tensors: Tensor) -> None:
        for tensor in tensors:
            if id(tensor) not in clocks.accesses:
                clocks.owned_by(clocks.active, tensor)
                clocks.access(clocks.active, tensor, writes=True)

    def watched_begin(**kwargs):
        pending = begin(**kwargs)
        made(*(x for x in tree_leaves((pending.inputs, pending.time_vector)) if x is not None))
        return pending

    def watched_blocks(pending, start, stop):
        for tensor in tree_leaves((pending.hidden_states, pending.inputs)):
            if tensor is not None and id(tensor) in clocks.accesses:
                clocks.access(clocks.active, tensor, writes=False)
        run_blocks(pending, start, stop)
        if stop > start:
            made(pending.hidden_states)

    def watched_finish(pending):
        for tensor in (pending.hidden_states, pending.time_vector):
            clocks.access(clocks.active, tensor, writes=False)
        output = finish(pending)
        made(output)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(block_distribution, "Wire", ClockWire)
        patch.setattr(pipeline, "_wires", {})
        patch.setattr(pipeline, "lanes", [ClockLane(index) for index in range(len(pipeline.lanes))])
        patch.setattr(model, "begin", watched_begin)
        patch.setattr(model, "run_blocks", watched_blocks)
        patch.setattr(model, "finish", watched_finish)
        yield clocks


@pytest.mark.parametrize("placement", OWNERS)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_every_access_is_in_order(monkeypatch, placement, number):
    pipeline = make_pipeline("t2v", OWNERS[placement])
    requests = make_requests("t2v", number)
    expected = one_by_one(plain_model("t2v"), requests)
    with clocks_in_place(monkeypatch, pipeline) as clocks:
        for _ in range(3):
            outputs = pipeline.run(requests)
            home = f"compute {OWNERS[placement][0]}"
            for output in outputs:
                clocks.access(home, output, writes=False)  # the caller's
            assert_equal(outputs, expected)
            # Where the caller goes on, all is over.
            for stream, clock in clocks.clocks.items():
                if not stream.startswith("compute"):
                    assert clocks.clocks[home].get(stream, 0) >= clock[stream] - 1
        del output, outputs
    assert clocks.errors == []


@pytest.mark.parametrize("broken", ["arrival", "produced", "leaving", "spare"])
def test_the_clocks_see_a_missing_wait(monkeypatch, broken):
    """The check above can fail."""
    pipeline = make_pipeline("t2v", INTERLEAVED_2 if broken == "spare" else CONTIGUOUS_2)
    with clocks_in_place(monkeypatch, pipeline) as clocks:
        if broken == "arrival":
            for lane in pipeline.lanes:
                monkeypatch.setattr(lane, "wait", lambda event: None)
        elif broken == "produced":
            monkeypatch.setattr(pipeline.lanes[0], "mark", dict)
        elif broken == "leaving":
            monkeypatch.setattr(
                pipeline, "_let_go", lambda position, keep: pipeline._leaving[position].clear()
            )
        else:

            class Forgetful(dict):
                def __setitem__(self, key, value):
                    pass

            class ForgetfulFlight(block_distribution.Flight):
                def __init__(self, request):
                    super().__init__(request)
                    self.spare = Forgetful()

            monkeypatch.setattr(block_distribution, "Flight", ForgetfulFlight)
        problem = ""
        try:
            pipeline.run(make_requests("t2v", 3))
        except AssertionError as error:
            problem = str(error)
        assert problem or clocks.errors


def test_copies_do_not_wait_for_their_target(monkeypatch):
    """Interleaved, from a micro-batch's second visit on, copies pass by what their target has been given to do."""
    pipeline = make_pipeline("t2v", INTERLEAVED_2)
    with clocks_in_place(monkeypatch, pipeline) as clocks:
        after_counts = []
        carry = pipeline._carry

        def note(flight, tensor, source, target, *, after, onto=None):
            result = carry(flight, tensor, source, target, after=after, onto=onto)
            if onto is not None:
                stream = f"copy compute {source} to compute {target}"
                lane = f"compute {target}"
                after_counts.append(
                    clocks.clocks[lane][lane] - clocks.clocks[stream].get(lane, 0)
                )  # how much of what is enqueued on the target it does not wait for
            return result

        monkeypatch.setattr(pipeline, "_carry", note)
        pipeline.run(make_requests("t2v", 4))
    assert len(after_counts) == 4 * (NUM_BLOCKS - 2)
    assert min(after_counts[8:]) > 0, "once all four micro-batches have been on both devices"


@pytest.mark.parametrize("placement", OWNERS)
def test_memory_of_hidden_states_is_bounded(monkeypatch, placement):
    """On each device at most one hidden state for each micro-batch; fewer where none comes back."""
    owner = OWNERS[placement]
    pipeline = make_pipeline("t2v", owner)
    for number in (1, 2, 6):
        with clocks_in_place(monkeypatch, pipeline) as clocks:
            pipeline.run(make_requests("t2v", number))
        assert max(clocks.max_hidden.values()) <= number
        if placement.startswith("contiguous"):
            assert max(clocks.max_hidden.values()) <= 3
        assert not any(clocks.num_hidden.values())


# --- on two GPUs ---

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def gpu_pipeline(architecture: WanArchitecture, owner, devices, dtype=torch.bfloat16) -> Pipeline:
    """Random weights of unit-variance activations, each where `position_of` says."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanTransformer(architecture, dtype=dtype).requires_grad_(False)
    for name, parameter in list(model.named_parameters()):
        device = devices[position_of(name, owner)]
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        value = torch.randn(parameter.shape, dtype=dtype, device=device) / fan_in**0.5
        if "norm" in name and name.endswith("weight"):
            value += 1
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, torch.nn.Parameter(value, requires_grad=False))
    seams = distribute_blocks(model, block_owner=owner, devices=devices)
    return Pipeline(model, block_owner=owner, devices=devices, seams=seams)


def gpu_requests(
    architecture: WanArchitecture, number: int, latent: tuple[int, int, int], device: torch.device
) -> list[ForwardArguments]:
    return [
        ForwardArguments(
            torch.randn(1, architecture.out_channels, *latent, device=device),
            torch.full((1,), 900.0 - index, device=device),
            context=torch.randn(
                1, architecture.text_len, architecture.dim, device=device, dtype=torch.bfloat16
            ),
        )
        for index in range(number)
    ]


def poison(devices, gib: float = 1.0) -> None:
    """Fill memory with NaN and give it back to the allocator: what is read before it is written shows."""
    for device in set(devices):
        sizes = (int(gib * 2**27), 2**22, 2**20, 2**18)
        held = [torch.full((size,), float("nan"), device=device) for size in sizes for _ in range(4)]
        del held


MID = WanArchitecture(dim=1536, ffn_dim=8960, num_heads=12, num_layers=12)


def delay_everything(monkeypatch, pipeline: Pipeline, rng: random.Random) -> None:
    """Random stretches of idling, in the computing streams and in the copies."""
    carry = Wire.carry

    def slow_carry(self, tensor, onto, *, after):
        with torch.cuda.stream(self.sending):
            torch.cuda._sleep(rng.choice([0, 0, 100_000, 2_000_000]))
        return carry(self, tensor, onto, after=after)

    def slow_block(_module, _args):
        torch.cuda._sleep(rng.choice([0, 0, 50_000, 500_000]))  # on the current device: that of the stage

    monkeypatch.setattr(Wire, "carry", slow_carry)
    for block in pipeline.model.blocks:
        block.register_forward_pre_hook(slow_block)


def same_bits_under_stress(monkeypatch, devices, num_chunks: int, repetitions: int) -> None:
    owner = place_chunks(MID.num_layers, len(devices), num_chunks)
    pipeline = gpu_pipeline(MID, owner, devices)
    requests = gpu_requests(MID, 4, (5, 30, 52), devices[0])
    expected = [output.cpu() for output in one_by_one(pipeline.model, requests)]
    assert all(output.isfinite().all() for output in expected)
    rng = random.Random(num_chunks)
    delay_everything(monkeypatch, pipeline, rng)
    for _ in range(repetitions):
        poison(devices)
        chosen = [rng.randrange(4) for _ in range(rng.randint(1, 4))]
        outputs = pipeline.run([requests[index] for index in chosen])
        poison(devices)  # without waiting: nothing of the run may be lost by what comes after it
        assert_equal([output.cpu() for output in outputs], [expected[index] for index in chosen])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_chunks", [2, 6, 12])
def test_the_same_bits_on_two_positions_of_one_gpu(monkeypatch, num_chunks):
    same_bits_under_stress(monkeypatch, [torch.device("cuda:0")] * 2, num_chunks, repetitions=10)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@two_gpus
@pytest.mark.parametrize("num_chunks", [2, 6, 12])
def test_the_same_bits_on_two_gpus(monkeypatch, num_chunks):
    same_bits_under_stress(monkeypatch, [torch.device("cuda:0"), torch.device("cuda:1")], num_chunks, 50)


def sequential_and_pipelined_s(
    pipeline: Pipeline, requests: list[ForwardArguments], repetitions: int = 5
) -> tuple[float, float]:
    """Median seconds of all `requests`, one after another by the hooks, and pipelined; alternating."""
    import statistics
    import time

    def seconds(run) -> float:
        for lane in pipeline.lanes:
            lane.synchronize()
        begin = time.perf_counter()
        run()
        for lane in pipeline.lanes:
            lane.synchronize()
        return time.perf_counter() - begin

    runs = (lambda: one_by_one(pipeline.model, requests), lambda: pipeline.run(requests))
    samples = [[seconds(run) for run in runs] for _ in range(repetitions + 1)][1:]  # the first warms up
    sequential_s, pipelined_s = (statistics.median(column) for column in zip(*samples, strict=True))
    return sequential_s, pipelined_s


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.slow
@two_gpus
def test_two_gpus_work_at_the_same_time(capsys):
    """A 1.3B at 480p, 12 of its blocks, cond and uncond; prints the table that the schedule predicts, and finds."""
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    for num_chunks, least in ((2, 1.2), (6, 1.45), (12, 1.5)):
        owner = place_chunks(MID.num_layers, 2, num_chunks)
        pipeline = gpu_pipeline(MID, owner, devices)
        requests = gpu_requests(MID, 2, (21, 60, 104), devices[0])
        sequential_s, pipelined_s = sequential_and_pipelined_s(pipeline, requests)
        predicted = speed_up(owner, 2, forward_s=sequential_s / 2)
        peaks = [torch.cuda.max_memory_allocated(device) / 2**30 for device in devices]
        with capsys.disabled():
            print(
                f"\n{num_chunks:3} chunks: {1000 * sequential_s:.1f} ms one by one, {1000 * pipelined_s:.1f} ms "
                f"pipelined, {sequential_s / pipelined_s:.2f}x (schedule without seams {predicted:.2f}x), "
                f"peak {peaks[0]:.2f} + {peaks[1]:.2f} GiB",
                end="",
            )
        assert sequential_s / pipelined_s > least
