"""What is computed between the matrix products of a block, as Triton kernels. `fused.py` calls them; it says what for.

One program a row (a token); a row of DIM elements is a tuple of tiles of TILE elements that stays in registers between
its one read and its one write, so that each kernel moves the bytes it must and no more. Arithmetic is fp32; each place
where a value is rounded to the storage dtype is one where the plain torch path rounds, too.

This is the only file that imports Triton.
"""

# mypy: disable-error-code="assignment"
# (tuples that grow as loops are unrolled)

import triton
import triton.language as tl

from wanexp.wan.quantize_rows import E4M3, LIMITS, TINY

E4M3_MAX = tl.constexpr(LIMITS[E4M3])
LEAST_PEAK = tl.constexpr(TINY)


@triton.jit
def _load_row(row, DIM: tl.constexpr, TILE: tl.constexpr, evict: tl.constexpr):
    """The row that starts at pointer `row`, as tiles; what is beyond DIM reads as 0."""
    tiles = ()
    for start in tl.static_range(0, DIM, TILE):
        columns = start + tl.arange(0, TILE)
        if DIM % TILE == 0:
            tile = tl.load(row + columns, eviction_policy=evict)
        else:
            tile = tl.load(row + columns, mask=columns < DIM, other=0.0, eviction_policy=evict)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store_tile(row, start: tl.constexpr, tile, DIM: tl.constexpr, TILE: tl.constexpr):
    columns = start + tl.arange(0, TILE)
    if DIM % TILE == 0:
        tl.store(row + columns, tile)
    else:
        tl.store(row + columns, tile, mask=columns < DIM)


@triton.jit
def _in_e4m3(x, inverse):
    """x * inverse, which may round to above the largest number; what is not a number stays so."""
    return tl.clamp(x * inverse, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_quantized(row, scale_at, tiles, DIM: tl.constexpr, TILE: tl.constexpr):
    """A row of fp32 tiles to pointer `row` in e4m3, and to `scale_at` the scale that takes its peak to the largest."""
    peaks = tl.zeros((TILE,), tl.float32)
    for i in tl.static_range(len(tiles)):
        magnitudes = tl.abs(tiles[i])
        if DIM % TILE != 0:
            magnitudes = tl.where(i * TILE + tl.arange(0, TILE) < DIM, magnitudes, 0.0)
        peaks = tl.maximum(peaks, magnitudes)
    scale = tl.maximum(tl.max(peaks, 0), LEAST_PEAK) * (1 / E4M3_MAX)
    inverse = 1.0 / scale
    for i in tl.static_range(len(tiles)):
        quantized = _in_e4m3(tiles[i], inverse).to(row.dtype.element_ty)
        _store_tile(row, i * TILE, quantized, DIM, TILE)
    tl.store(scale_at, scale)


@triton.jit
def _gelu(x):
    """GELU of fp32 by its tanh form: as 0.5 (1 + tanh u) = sigmoid(2u), x * sigmoid(2u)."""
    return x * tl.sigmoid(
        1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    )  # 2 sqrt(2 / pi) (x + 0.044715 x^3)


@triton.jit
def add_and_norm(
    x,
    update,
    gate,
    factor,
    offset,
    index,
    x_out,
    normed,
    scales,
    tokens,
    gate_stride,
    vector_stride,
    eps,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_MODULATED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """x_out = x + gate * update; normed = LayerNorm(x_out) * factor + offset, modulated: * (1 + factor) + offset.

    x, update, x_out, normed: rows of DIM; scales: fp32 [rows] where normed is e4m3. gate: rows `gate_stride` apart,
    factor and offset `vector_stride` apart (0: the same for all tokens); a token takes the row of its sample or, with
    an index, the one named there.
    """
    row = tl.program_id(0).to(tl.int64)
    vector = tl.load(index + row).to(tl.int64) if HAS_INDEX else row // tokens
    x_tiles = _load_row(x + row * DIM, DIM, TILE, "evict_first")
    tiles = ()
    if HAS_UPDATE:
        updates = _load_row(update + row * DIM, DIM, TILE, "evict_first")
        if HAS_GATE:
            gates = _load_row(gate + vector * gate_stride, DIM, TILE, "evict_last")
        for i in tl.static_range(len(x_tiles)):
            total = updates[i].to(tl.float32)
            if HAS_GATE:
                total = total * gates[i]
            total = (x_tiles[i].to(tl.float32) + total).to(x_out.dtype.element_ty)
            _store_tile(x_out + row * DIM, i * TILE, total, DIM, TILE)
            tiles = tiles + (total.to(tl.float32),)
    else:
        for i in tl.static_range(len(x_tiles)):
            tiles = tiles + (x_tiles[i].to(tl.float32),)

    if HAS_NORM:
        partial_sums = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(len(tiles)):
            partial_sums += tiles[i]
        mean = tl.sum(partial_sums, 0) / DIM
        squares = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(len(tiles)):
            centred = tiles[i] - mean
            if DIM % TILE != 0:
                centred = tl.where(i * TILE + tl.arange(0, TILE) < DIM, centred, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
        factors = _load_row(factor + vector * vector_stride, DIM, TILE, "evict_last")
        offsets = _load_row(offset + vector * vector_stride, DIM, TILE, "evict_last")
        outs = ()
        for i in tl.static_range(len(tiles)):
            scale = factors[i].to(tl.float32)
            if IS_MODULATED:
                scale += 1.0
            out = (tiles[i] - mean) * rstd * scale + offsets[i].to(tl.float32)
            if HAS_SCALES:
                outs = outs + (out,)
            else:
                _store_tile(normed + row * DIM, i * TILE, out.to(normed.dtype.element_ty), DIM, TILE)
        if HAS_SCALES:
            _store_quantized(normed + row * DIM, scales + row, outs, DIM, TILE)


@triton.jit
def rms_norm_and_rope(
    x,
    weight,
    cos,
    sin,
    sums,
    tokens,
    full_dim,
    eps,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """RMSNorm, then RoPE, of the rows of `x` in place.

    cos, sin: fp32 [tokens, PAIRS], the same for every head. DIM or else TILE is a multiple of a head's 2 * PAIRS
    channels, so every tile begins with a head. sums: fp32 [rows], sums of squares over a whole row of which `x` holds a
    part of `full_dim`.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    tiles = _load_row(x + row * DIM, DIM, TILE, "evict_first")
    if HAS_ROPE:
        angles = (row % tokens) * PAIRS + tl.arange(0, TILE // 2) % PAIRS
        cosines, sines = tl.load(cos + angles), tl.load(sin + angles)
    if HAS_SUMS:
        square_sum = tl.load(sums + row)
    else:
        squares = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(len(tiles)):
            values = tiles[i].to(tl.float32)
            squares += values * values
        square_sum = tl.sum(squares, 0)
    rstd = tl.rsqrt(square_sum / full_dim + eps)
    weights = _load_row(weight, DIM, TILE, "evict_last")
    for i in tl.static_range(len(tiles)):
        # Rounded before and after the weight, as by RMSNorm.
        out = (tiles[i].to(tl.float32) * rstd).to(dtype).to(tl.float32)
        out = (out * weights[i].to(tl.float32)).to(dtype)
        if HAS_ROPE:
            even, odd = tl.split(out.to(tl.float32).reshape(TILE // 2, 2))
            turned = tl.join(even * cosines - odd * sines, even * sines + odd * cosines)
            out = turned.reshape(TILE).to(dtype)
        _store_tile(x + row * DIM, i * TILE, out, DIM, TILE)


@triton.jit
def gelu_tanh(x, size, BLOCK: tl.constexpr):
    """GELU(tanh), in place."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    values = tl.load(x + elements, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + elements, _gelu(values).to(x.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows(x, values, scales, DIM: tl.constexpr, TILE: tl.constexpr, HAS_GELU: tl.constexpr):
    """The rows of x, or of its GELU(tanh), in e4m3 with a scale each."""
    row = tl.program_id(0).to(tl.int64)
    loaded = _load_row(x + row * DIM, DIM, TILE, "evict_first")
    tiles = ()
    for i in tl.static_range(len(loaded)):
        tile = loaded[i].to(tl.float32)
        tiles = tiles + (_gelu(tile) if HAS_GELU else tile,)
    _store_quantized(values + row * DIM, scales + row, tiles, DIM, TILE)


# Of one head: TOKENS tokens of its HEAD_DIM channels, a tile of TOKENS x WIDTH. Programs of neighbouring heads run
# side by side, so that together they read whole rows.


@triton.jit
def _tile_of_head(tokens, token_stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """Where the elements of this program's tile are in a sample's head, and which of them exist."""
    own = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channels = tl.arange(0, WIDTH)[None, :]
    return own.to(tl.int64) * token_stride + channels, (own < tokens) & (channels < HEAD_DIM)


@triton.jit
def peaks_of_heads(
    x,
    peaks,
    tokens,
    sample_stride,
    token_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """peaks = max |x| of each head, fp32 [batch, heads] of zeros at first. x: [batch, tokens, heads, HEAD_DIM]."""
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    places, inside = _tile_of_head(tokens, token_stride, HEAD_DIM, WIDTH, TOKENS)
    tile = tl.load(x + sample * sample_stride + head * head_stride + places, mask=inside, other=0.0)
    peak = tl.max(tl.max(tl.abs(tile.to(tl.float32)), 1), 0)
    tl.atomic_max(peaks + sample * tl.num_programs(0) + head, peak, sem="relaxed")


@triton.jit
def quantize_heads(
    x,
    peaks,
    values,
    descales,
    tokens,
    sample_stride,
    token_stride,
    head_stride,
    tiny,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """values = x / descale in e4m3, contiguous; descales = peaks / the largest number, fp32 [batch, heads]."""
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    descale = tl.maximum(tl.load(peaks + sample * heads + head) * (1 / E4M3_MAX), tiny)
    places, inside = _tile_of_head(tokens, token_stride, HEAD_DIM, WIDTH, TOKENS)
    tile = tl.load(x + sample * sample_stride + head * head_stride + places, mask=inside, other=0.0)
    quantized = _in_e4m3(tile.to(tl.float32), 1.0 / descale).to(values.dtype.element_ty)
    places, inside = _tile_of_head(tokens, heads * HEAD_DIM, HEAD_DIM, WIDTH, TOKENS)
    tl.store(values + (sample * tokens * heads + head) * HEAD_DIM + places, quantized, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(descales + sample * heads + head, descale)
