"""Bytes between ranks: what a mode sends in a forward by its formula, and what was counted. Pure; no torch."""

from dataclasses import dataclass

from wanexp.wan.architecture import WanArchitecture


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks for one mode since `reset`."""

    num_bytes: int = 0

    def reset(self) -> None:
        self.num_bytes = 0


def context_parallel_bytes(
    tokens: int,
    dim: int,
    layers: int,
    ulysses: int,
    ring: int,
    element_size: int,
    *,
    batch: int = 1,
    out_features: int = 64,
) -> int:
    """Bytes that a rank sends in one forward, the mean over all ranks.

    A layer: three tensors of tokens * dim to the heads' ranks and one back, of which 1 / (ulysses * ring) starts at a
    rank and 1 / ulysses of that stays there; keys and values of the heads of a rank ring - 1 times to its neighbour.
    Then the fp32 prediction. Exact where the heads or the tokens divide by `ulysses` and, for the prediction, the
    tokens by the ranks.

    tokens: of one sample. element_size: bytes of an element of q, k and v. out_features: of the head, patch volume *
    out_channels.
    """
    ranks = ulysses * ring
    exchanged = 4 * (ulysses - 1) / (ulysses * ranks)
    passed_on = 2 * (ring - 1) / ranks
    gathered = (ulysses - 1) / ranks + (ring - 1) / ring
    hidden_bytes = batch * tokens * dim * element_size
    return round(
        layers * hidden_bytes * (exchanged + passed_on) + batch * tokens * out_features * 4 * gathered
    )


def tensor_parallel_bytes(
    architecture: WanArchitecture, *, batch: int, tokens: int, element_size: int, degree: int
) -> int:
    """Bytes that a rank sends in one forward, by rings: 2 (degree - 1) / degree of every all-reduced tensor.

    A block: three [batch, tokens, dim] of `element_size` an element, and one fp32 sum of squares a row of q and k (of
    both attentions, and of k_img).
    """
    hidden = 3 * batch * tokens * architecture.dim * element_size
    sums = 4 * batch * (3 * tokens + architecture.text_len + architecture.clip_tokens)
    return round(architecture.num_layers * (hidden + sums) * ring_factor(degree))


def fsdp_bytes(
    num_parameters: int, *, element_size: int, shards: int, replicas: int = 1, training: bool
) -> int:
    """Bytes that a rank sends in one forward, in training with the backward pass that follows.

    Every gather sends this rank's shard to the shards - 1 others. Training gathers again for the backward pass and
    scatters the gradients the same way back; copies of a shard then all-reduce its gradient (a ring). Padding of
    tensors whose rows do not divide comes on top.
    """
    num_bytes = num_parameters * element_size
    gather = num_bytes * (shards - 1) / shards
    if not training:
        return round(gather)
    return round(3 * gather + 2 * num_bytes / shards * (replicas - 1) / replicas)


def ring_factor(degree: int) -> float:
    """Share of a tensor that a rank sends in an all-reduce by a ring (NCCL's performance notes)."""
    return 2 * (degree - 1) / degree
