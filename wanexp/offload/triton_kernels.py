"""The quantisation of activations as a Triton kernel. `quantize_rows.py` launches it."""

import triton
import triton.language as tl


@triton.jit
def quantize_rows(x, values, scales, width, tiny, limit, inverse, TILE: tl.constexpr):
    """values = x / scale and scale = max |x| * inverse of limit, a row a program, in registers meanwhile.

    The division rounds to nearest, as torch's does, so that both give the same bits.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < width
    numbers = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), axis=0), tiny) * inverse
    quotients = tl.div_rn(numbers, tl.broadcast_to(scale, (TILE,)))
    quotients = tl.minimum(tl.maximum(quotients, -limit), limit)
    tl.store(values + row * width + columns, quotients.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)
