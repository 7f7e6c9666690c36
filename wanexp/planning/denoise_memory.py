"""What one device allocates in a denoising step, weights aside: the forwards of `activations.py`, as a layout has them.

Beside the blocks' own tensors, with U = [batch, own tokens, dim] in the compute dtype and P the bytes of one block:

    ring, ulysses   tokens are divided for blocks and head; the first block's input, latent and RoPE tables are whole
                    ulysses: v and k are on their way (packed and received) while q is turned        + 2 U
                    (copy engines: what is received has its places, for good                         + 4 U)
                    ring:    two blocks of k and v, two results and their fp32 merging               + 6 U (7 U above 2)
    tp              the FFN's columns are divided; where kernels are fused, q, k and v too
    shard           the weights outside of the blocks, and 3 P: the block in use, the buffer it was gathered in (FSDP2
                    frees it at the next block) and the gathering of the next one
                    (copy engines: 2 P for good, of each expert)
    blocks          pipelined: a hidden state more for each micro-batch that has left or is to come back
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from wanexp.config import RunConfig
from wanexp.parallel.layout import Layout
from wanexp.parallel.pipeline import Stage, stages_of, wavefront
from wanexp.parallel.shares import SHARD_BUFFERS
from wanexp.planning import activations, fused_activations
from wanexp.planning.activations import Sizes
from wanexp.planning.block_work import kernels_of
from wanexp.planning.exchanges import attended, place_bytes, score_bytes
from wanexp.planning.heap import Heap
from wanexp.planning.plan import Plan, RankPlan
from wanexp.planning.sizes import input_bytes, share_of, sizes_of
from wanexp.workloads.sizes import forwards_per_step

STEADY_BLOCKS = 3  # the allocator's pattern repeats from the second block on
STEADY_ROUNDS = 3  # and that of a pipeline's visits to a device from the second on


def denoise_heap(config: RunConfig, plan: Plan, rank: RankPlan, position: int) -> Heap:
    """The allocations of one step on the device at `position` of `rank`."""
    heap = Heap()
    samples, is_home = sizes_of(config, rank.num_samples), position == plan.block_owner[0]
    if is_home:
        for size in input_bytes(config, rank.num_samples):
            heap.new(size)
    own = share_of(samples, plan.layout)
    for _ in range(config.model.num_experts):
        for _ in range(forwards_per_step(config)):
            heap.new(samples.context)  # with and without the prompt; other devices keep a copy each
        for tables in (samples,) if own.grid == samples.grid else (samples, own):
            heap.new(tables.rope)
            heap.new(tables.rope)
    forwards = forwards_per_step(config) // plan.layout.cfg
    kernels = kernels_of(config, plan.devices[rank.devices[position]])
    whole = replace(
        sizes_of(config, 1) if plan.is_pipelined else samples,
        writes_float8=kernels.writes_float8,
        widens_weights=kernels.linear.endswith("_weight"),
        float8_attention=kernels.has_float8_attention,
    )
    copies = plan.transport == "copies"
    heap.new(4 * place_bytes(own, plan.layout) if copies else 0)
    heap.new(config.model.num_experts * buffer_bytes(samples, plan.layout) if copies else 0)
    forward = Forward(heap, config, whole, plan.layout, is_fused=kernels.is_fused, copies=copies)
    if plan.is_pipelined:
        stages = stages_of(plan.block_owner, len(plan.block_owner))
        _pipelined(forward, stages, position, forwards * rank.num_samples)
    else:
        _one_after_another(forward, plan.block_owner, position, forwards)
    return heap


def buffer_bytes(s: Sizes, layout: Layout) -> int:
    """What a rank computes from that reads shards out of others' memory, of one expert; 0 without shards."""
    if layout.shard == 1:
        return 0
    return s.compute * min(SHARD_BUFFERS, s.arch.num_layers) * s.arch.num_block_parameters()


class Forward:
    """The parts of one forward on a heap. Tensors are numbers, as of `Heap`."""

    def __init__(
        self, heap: Heap, config: RunConfig, whole: Sizes, layout: Layout, *, is_fused: bool, copies: bool
    ) -> None:
        self.heap, self.whole, self.layout, self.is_fused = heap, whole, layout, is_fused
        self.copies = copies
        self.own = share_of(whole, layout)
        self.score_bytes = score_bytes(self.own, self.layout) if config.attention == "sdpa_math" else 0

    def begin(self) -> tuple[int, tuple[int, ...]]:
        """Embeddings: the hidden states, and what all blocks get beside them."""
        index = self.heap.new(self.whole.timestep_index)
        hidden, modulation = activations.embed(self.heap, self.whole)
        return hidden, (modulation, index)

    def arrive(self) -> tuple[int, tuple[int, ...]]:
        """As `begin`, on a device where copies of both come from another."""
        hidden, modulation = self.heap.new(self.whole.stream), self.heap.new(self.whole.modulation)
        return hidden, (modulation, self.heap.new(self.whole.timestep_index))

    def block(self, hidden: int, *, first: bool) -> int:
        """The next hidden states; the given ones go."""
        if first and self.layout.ring * self.layout.ulysses > 1:  # in goes a copy of this rank's rows
            own = self.heap.new(self.own.hidden)
            self.heap.free(hidden)
            hidden = own
        if self.is_fused:
            return fused_activations.block(
                self.heap,
                self.own,
                hidden,
                layout=self.layout,
                copies=self.copies,
                first=first,
                score_bytes=self.score_bytes,
            )
        if self.layout.ulysses > 1 or self.layout.ring > 1:
            # Self-attention once more, with what travels
            normed = self.heap.new(self.own.hidden)
            self.heap.free(normed, attended(self.heap, self.own, self.layout, copies=self.copies))
        return activations.block(self.heap, self.own, hidden, first=first, score_bytes=self.score_bytes)

    def blocks(self, hidden: int, number: int, *, first: bool) -> int:
        for index in range(min(number, STEADY_BLOCKS)):
            hidden = self.block(hidden, first=first and index == 0)
        return hidden

    def head(self, hidden: int) -> int:
        path = fused_activations if self.is_fused else activations
        return path.head(self.heap, self.own, hidden)

    def gather(self, num_blocks: int) -> list[int]:
        """What FSDP2 puts together of its shards for a forward of so many blocks."""
        if self.layout.shard == 1 or self.copies:
            return []
        arch = self.whole.arch
        block_bytes = self.whole.compute * arch.num_block_parameters()
        gathered = [self.heap.new(block_bytes) for _ in range(min(3, num_blocks + 1))]
        return [self.heap.new(self.whole.compute * arch.num_outer_parameters()), *gathered]


def _one_after_another(forward: Forward, block_owner: Sequence[int], position: int, forwards: int) -> None:
    heap = forward.heap
    is_home, is_last = position == block_owner[0], position == block_owner[-1]
    num_blocks = sum(owner == position for owner in block_owner)
    num_visits = sum(stage.position == position for stage in stages_of(block_owner, len(block_owner)))
    for number in range(forwards):
        gathered = forward.gather(num_blocks)
        hidden, constants = forward.begin() if is_home else forward.arrive()
        for index in range(min(num_blocks, STEADY_BLOCKS)):
            if num_visits > 1 and index:  # it went to the next device and came back as a copy
                heap.free(hidden)
                hidden = heap.new(forward.whole.stream)
            hidden = forward.block(hidden, first=is_home and index == 0)
        if is_last:
            hidden = forward.head(hidden)
        if is_home:
            flow = heap.new(forward.whole.latent(forward.whole.arch.out_channels))
            heap.free(flow if number == forwards - 1 else 0)
        heap.free(hidden, *constants, *gathered)


def _pipelined(forward: Forward, stages: Sequence[Stage], position: int, num_microbatches: int) -> None:
    """As `block_distribution.Pipeline` enqueues it: in host order, which is the order of allocations."""
    heap, stages = forward.heap, steady_stages(stages)
    hidden: dict[int, int] = {}
    constants: dict[int, tuple[int, ...]] = {}
    spare: dict[int, int] = {}  # kept for the micro-batch that will come back
    leaving: deque[int] = deque()  # held until a stage later
    for index, number in wavefront(len(stages), num_microbatches):
        stage, later = stages[index], stages[index + 1 :]
        if stage.position == position:
            while len(leaving) > 1:
                heap.free(leaving.popleft())
            if index == 0:
                hidden[number], constants[number] = forward.begin()
            out = forward.blocks(hidden.pop(number), stage.stop - stage.start, first=index == 0)
            if not later:
                leaving.append(forward.head(out))
            elif any(following.position == position for following in later):
                spare[number] = out
            else:
                leaving.append(out)
        elif later and later[0].position == position:
            if number in constants:
                hidden[number] = spare.pop(number)
            else:
                hidden[number], constants[number] = forward.arrive()
    heap.free(*leaving, *(tensor for tensors in constants.values() for tensor in tensors))


def steady_stages(stages: Sequence[Stage]) -> list[Stage]:
    """The first rounds of stages over the devices and the last: those between allocate as those before them."""
    per_round = len({stage.position for stage in stages})
    if len(stages) <= (STEADY_ROUNDS + 1) * per_round:
        return list(stages)
    return [*stages[: STEADY_ROUNDS * per_round], *stages[-per_round:]]
