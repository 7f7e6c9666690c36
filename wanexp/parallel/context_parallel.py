"""Context parallel: the video tokens of one forward split over ranks, whole again in its prediction.

    embeddings -> all tokens -> | mine -> blocks -> head | -> all-gather -> prediction, on every rank
                                          self-attention meets all tokens: by `ulysses.py`, `ring.py` or both

Buys latency. All ranks call the model with the same inputs and hold all its weights. Hooks split what has a token axis
(hidden states, RoPE tables, timestep index); image and text tokens of cross-attention stay whole. With both degrees
Ulysses runs inside and the ring across: after the exchange of heads a rank holds the tokens of its Ulysses group, which
is its block of the ring. A rank computes a few rows more than it has tokens, where products are faster for it; no such
row meets another, so the answer is exact, and nothing is masked. For inference.
"""

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from wanexp.errors import UserError
from wanexp.parallel.peer_memory import PeerMemory
from wanexp.parallel.ring import attend_around_ring
from wanexp.parallel.sequence_split import degree_of, gather_tokens, rank_in
from wanexp.parallel.shares import head_shares, padded_rows, token_shares
from wanexp.parallel.traffic import Traffic
from wanexp.parallel.ulysses import Exchange
from wanexp.wan.attention import (
    AttentionFunction,
    AttentionWithLse,
    attention_with_lse,
    is_lossy,
    kernel_name,
)
from wanexp.wan.block import SelfAttention, WanBlock
from wanexp.wan.fused import release
from wanexp.wan.operators import not_compiled
from wanexp.wan.rope import Rope
from wanexp.wan.transformer import WanTransformer

ROUNDS_AHEAD = 2  # of the ring, that the host may be ahead of the GPU
BlockInputs = tuple[Tensor, Tensor, Tensor, Rope, Tensor | None]


def context_parallel(
    model: WanTransformer,
    *,
    ulysses: ProcessGroup | None,
    ring: ProcessGroup | None,
    memory: PeerMemory | None = None,
    apart: bool = True,
) -> Traffic:
    """Split the tokens of every forward of `model` over the ranks of both groups; returns what counts the bytes sent.

    Comes after `set_attention`: the kernel of each block is the one it has now, and a ring uses the same one with its
    log-sum-exp.

    Args:
        ulysses: the ranks with this rank's ring rank, neighbours in token order; None for a degree of 1.
        ring: the ranks with this rank's Ulysses rank; None for a degree of 1.
        memory: of the Ulysses group, to have copy engines carry its exchanges; None: the group itself does.
        apart: with copy engines, attend own rows while those of the others travel, where the kernel allows it and
            it pays.

    Raises:
        LayoutError: more Ulysses ranks than heads; at the first forward, more ranks than tokens.
        UserError: a ring, or rows apart, over attention without a kernel name; at a forward, gradients switched on.
    """
    split = _SplitForward(ulysses, ring, memory, apart)
    head_shares(model.architecture.num_heads, split.num_ulysses)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, WanBlock)
        split.wrap(block.self_attn)
        if index == 0:
            block.register_forward_pre_hook(split.enter_first_block, with_kwargs=True)
        else:
            block.register_forward_pre_hook(split.enter_block)
    model.head.register_forward_pre_hook(split.enter_head)
    model.head.register_forward_hook(split.leave_head)
    return split.traffic


class _SplitForward:
    """The hooks of a model, and the shares of the forward that is under way."""

    def __init__(
        self,
        ulysses: ProcessGroup | None,
        ring: ProcessGroup | None,
        memory: PeerMemory | None,
        apart: bool,
    ) -> None:
        self.traffic = Traffic()
        self.num_ulysses, self.num_ring = degree_of(ulysses), degree_of(ring)
        self.ulysses = ulysses if self.num_ulysses > 1 else None
        self.ring = ring if self.num_ring > 1 else None
        self.ulysses_rank, self.ring_rank = rank_in(self.ulysses), rank_in(self.ring)
        self._rounds: deque[torch.cuda.Event] = deque()  # of the ring, the last ones
        self.shares: tuple[tuple[int, ...], ...] = ()  # tokens of each rank, [ring rank][ulysses rank]
        self._own: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # Around a ring all rows go together.
        self.apart = apart and memory is not None and ring is None
        self.exchange: Exchange | None = None
        if self.ulysses is not None:
            self.exchange = Exchange(self.ulysses, lambda: self.group_shares, self.traffic, memory)

    def own(self, tensor: Tensor, axis: int) -> Tensor:
        """A view of this rank's tokens of a tensor that has all of them along `axis`."""
        start = sum(self.block_shares[: self.ring_rank]) + sum(self.group_shares[: self.ulysses_rank])
        return tensor.narrow(axis, start, self.own_tokens)

    @property
    def group_shares(self) -> tuple[int, ...]:
        """Tokens of each rank of this rank's Ulysses group."""
        return self.shares[self.ring_rank]

    @property
    def block_shares(self) -> list[int]:
        """Tokens of each block of the ring, a Ulysses group each."""
        return [sum(shares) for shares in self.shares]

    @property
    def own_tokens(self) -> int:
        return self.group_shares[self.ulysses_rank]

    @property
    def rows(self) -> int:
        """Of the tensors that this rank computes with: its tokens, and zeros behind them."""
        return padded_rows(self.own_tokens)

    def own_rows(self, tensor: Tensor, axis: int) -> Tensor:
        """A copy of `own` with all rows."""
        own = self.own(tensor, axis)
        shape = list(own.shape)
        shape[axis] = self.rows
        padded = own.new_empty(shape)
        padded.narrow(axis, 0, self.own_tokens).copy_(own)
        padded.narrow(axis, self.own_tokens, self.rows - self.own_tokens).zero_()
        return padded

    def own_constant(self, tensor: Tensor, axis: int) -> Tensor:
        """As `own_rows`, but one that serves all blocks for as long as `tensor` lives."""
        if tensor not in self._own:
            self._own[tensor] = self.own_rows(tensor, axis)
        return self._own[tensor]

    # The hooks call collectives and look into a dictionary of tensors: not for a compiler to trace.

    @not_compiled
    def enter_first_block(
        self, block: nn.Module, args: BlockInputs, kwargs: dict[str, Any]
    ) -> tuple[BlockInputs, dict[str, Any]]:
        if torch.is_grad_enabled():
            raise UserError(
                "context_parallel is for inference, gradients are switched on; call the model under "
                "torch.inference_mode(), or train with distributed or fsdp"
            )
        hidden_states, modulation, context, rope, timestep_index = self.enter_block(block, args)
        own = self.own_rows(hidden_states, 1)
        if kwargs.get("in_place"):  # its caller needs it no more, and holds it until the block returns
            release(hidden_states)
        return (own, modulation, context, rope, timestep_index), kwargs

    @not_compiled
    def enter_block(self, _block: nn.Module, args: BlockInputs) -> BlockInputs:
        hidden_states, modulation, context, (cos, sin), timestep_index = args
        # At every block, for forwards of different sizes may take turns.
        self.shares = token_shares(len(cos), ulysses=self.num_ulysses, ring=self.num_ring)
        rope = (self.own_constant(cos, 0), self.own_constant(sin, 0))
        if timestep_index is not None:
            timestep_index = self.own_constant(timestep_index, 1)
        return hidden_states, modulation, context, rope, timestep_index

    @not_compiled
    def enter_head(self, _head: nn.Module, args: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Any, ...]:
        hidden_states, time_vector, timestep_index = args
        if timestep_index is not None:
            timestep_index = self.own_constant(timestep_index, 1)
        return hidden_states, time_vector, timestep_index

    @not_compiled
    def leave_head(self, _head: nn.Module, _args: Any, patches: Tensor) -> Tensor:
        patches = patches[:, : self.own_tokens]
        if self.ulysses is not None:
            patches = gather_tokens(patches, self.group_shares, group=self.ulysses, traffic=self.traffic)
        if self.ring is not None:
            patches = gather_tokens(patches, self.block_shares, group=self.ring, traffic=self.traffic)
        return patches

    def wrap(self, attention: SelfAttention) -> None:
        """Put what meets the other ranks around the kernel of `attention`."""
        attend = attention.attend
        apart = self.apart and not is_lossy(kernel_name(attend))  # in float8 all rows of q have one scale
        if self.ring is not None:
            attend = partial(self._around_ring, attention_with_lse(kernel_name(attend)))
        attention.send = self._send
        attention.attend = partial(self._attend, attend, apart)

    @not_compiled
    def _send(self, x: Tensor) -> Any:
        """Of v or k [batch, rows, heads, head_dim] the tokens, on their way where they are exchanged."""
        own = x[:, : self.own_tokens]
        return own if self.exchange is None else self.exchange.send(own)

    @not_compiled
    def _attend(self, attend: AttentionFunction, apart: bool, q: Tensor, k: Any, v: Any) -> Tensor:
        """q and the result: [batch, rows, heads, head_dim]; k and v as of `_send`."""
        own = q[:, : self.own_tokens]
        if self.exchange is not None:
            return self.exchange.attend(attend, own, k, v, rows=self.rows, apart=apart)
        attended = attend(own, k, v)
        if len(own[0]) == len(q[0]):
            return attended
        padded = q.new_zeros(q.shape)  # only now, as nothing of the ring is held any more
        padded[:, : self.own_tokens] = attended
        return padded

    def _around_ring(self, attend: AttentionWithLse, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.ring is not None
        attended = attend_around_ring(
            attend, q, k, v, group=self.ring, tokens=self.block_shares, traffic=self.traffic
        )
        if q.is_cuda:
            # What NCCL sends and receives is kept from reuse until the GPU has come there: a host that runs a whole
            # forward ahead has the allocator take new memory at every block (720p: 68 GiB for 31).
            self._rounds.append(torch.cuda.current_stream(q.device).record_event())
            if len(self._rounds) > ROUNDS_AHEAD:
                self._rounds.popleft().synchronize()
        return attended
