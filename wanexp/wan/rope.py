"""Rotary position embedding over the three axes of a video's token grid."""

from typing import Any, Self

import torch
from torch import Tensor

THETA = 10000.0
MAX_CACHED_GRIDS = 4

Rope = tuple[Tensor, Tensor]
"""cos and sin, each fp32 [tokens, head_dim / 2]: one angle for each token and each pair of channels."""


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head that encode time, height and width: 44, 42 and 42 of 128.

    Height and width get a third each, rounded down to an even number; time gets the rest.
    """
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_tables(head_dim: int, grid: tuple[int, int, int], device: torch.device | str) -> Rope:
    """cos and sin of the angle of every token, fp32 [frames * rows * columns, head_dim / 2] on `device`.

    Channel pair i of an axis with d channels turns by position * THETA^(-2i / d) (RoFormer, arXiv 2104.09864,
    section 3.2.2; each axis has its own d). Angles are float64; tokens run over columns first, frames last.
    """
    cos: list[Tensor] = []
    sin: list[Tensor] = []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        # On the CPU, where the few positions of one axis cost nothing: every device gets the same bits.
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
        positions = torch.arange(size, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, THETA**-exponents)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        for parts, values in ((cos, angles.cos()), (sin, angles.sin())):
            parts.append(values.float().to(device).view(shape).expand(*grid, -1))
    return torch.cat(cos, dim=-1).flatten(0, 2), torch.cat(sin, dim=-1).flatten(0, 2)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn each channel pair (2i, 2i + 1) of `x` [batch, tokens, heads, head_dim] by its token's angle.

    Computed in fp32 and rounded once to the dtype of `x`.
    """
    cos, sin = (table.unsqueeze(1) for table in rope)  # the same for every head
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    # Products of x (16 bits) with an fp32 table promote to fp32 without an fp32 copy of x.
    turned_even = (even * cos - odd * sin).to(x.dtype)
    turned_odd = (even * sin + odd * cos).to(x.dtype)
    return torch.stack((turned_even, turned_odd), dim=-1).flatten(-2)


class RopeCache:
    """The tables of the last few (token grid, device) pairs: constant over the steps of one video."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[tuple[tuple[int, int, int], torch.device], Rope] = {}

    def __call__(self, grid: tuple[int, int, int], device: torch.device) -> Rope:
        """Tables as of `rope_tables`, built on the first call for this grid and device."""
        key = (grid, device)
        if key not in self._tables:
            while len(self._tables) >= MAX_CACHED_GRIDS:
                del self._tables[next(iter(self._tables))]
            # A table made under inference_mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._tables[key] = rope_tables(self.head_dim, grid, device)
        return self._tables[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model (a replica for another device) builds its own tables."""
        return type(self)(self.head_dim)

    def __getstate__(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim, "_tables": {}}
