"""What the weights of a block take under each kind of linear layer. No torch, for the planner."""

from math import prod

from wanexp.wan.architecture import WanArchitecture

LINEARS = ("dtype", "fp8", "fp8_weight", "int8_weight")
"""`precision.linear`: as precision.dtype says; float8 products; or 8 bits in memory alone, products as without."""

SCALE_BYTES = 4  # fp32, one an output row of a quantised weight


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor `name` of `shape` is a weight that `quantize_linears` replaces: a matrix of a block."""
    return name.startswith("blocks.") and len(shape) == 2


def tensor_bytes(name: str, shape: tuple[int, ...], *, linear: str, element_bytes: int) -> int:
    """Bytes of a tensor (or of what a rank holds of it) on its device, its scales included.

    element_bytes: of what is not quantised.
    """
    if linear != "dtype" and is_quantized(name, shape):
        return prod(shape) + SCALE_BYTES * shape[0]
    return prod(shape) * element_bytes


def block_bytes(architecture: WanArchitecture, *, linear: str, element_bytes: int) -> int:
    """Bytes of one block's weights on its device."""
    return sum(
        tensor_bytes(f"blocks.0.{name}", shape, linear=linear, element_bytes=element_bytes)
        for name, shape in architecture.block_shapes().items()
    )
