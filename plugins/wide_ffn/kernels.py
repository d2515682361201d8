"""The launches of the wide FFN, in Triton.

    norm       n = rms_norm(x), quantized; for many tokens, whose norm is too much for every program of `gate_up`
    gate_up    [n = rms_norm(x), quantized]; inner = silu(gate @ n) * (up @ n), quantized if its scale is known
    down       y = residual + down @ inner, split along the width

Roundings are those of `plugins.wide_ffn.reference`. At decode time every weight byte is read once and nothing else is
large, so the products are built around that stream: tiles of a weight go to shared memory by asynchronous copies and
from there straight into the tensor cores, which get weights as their left operand (its 64 rows are always full) and
tokens as their right one (16, 32 or 64 columns). Products are therefore transposed, [rows, tokens].

Parameters come as inputs, 32-bit integers, outputs, because that is the order in which TensorRT passes them. Offsets
are 64 bits wide: a weight may have 2**33 elements. Nothing needs to be zero, or anything else, before the first launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from exporter.errors import TargetError

if not hasattr(triton, "constexpr_function"):
    raise TargetError("this Triton is too old for the wide FFN", expected="3.6 to 3.8", found=triton.__version__)

HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 added to it and subtracted is rounded to an integer
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)
LARGEST_FLOAT8 = tl.constexpr(448.0)
LARGEST_INT8 = tl.constexpr(127.0)
# Hopper's FP8 tensor cores keep 14 bits of a sum (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). So a step has at most
# so many products, starts from zero, and is added to a float32 register.
FLOAT8_SUM = tl.constexpr(128)
# One counter of finished parts per so many rows of y: no tile of `down` is smaller.
ROWS_PER_COUNTER = 32
_ROWS_PER_COUNTER = tl.constexpr(ROWS_PER_COUNTER)


@triton.jit
def _codes(values, scale, reciprocal, dtype: tl.constexpr):
    """float32 values / scale as codes, nearest even, saturating; NaN has no int8 code, see `_magnitude`.

    `reciprocal` is 1 / scale, rounded. A division would branch at every element. With the remainder of the rounded
    product, which a fused multiply-add gives exactly, the quotient comes out as a division rounds it (P. Markstein,
    IBM Journal of Research and Development 34, 1990). Limits are taken first, so that infinity has a remainder.
    """
    highest: tl.constexpr = LARGEST_INT8 if dtype == tl.int8 else LARGEST_FLOAT8
    lowest: tl.constexpr = -128.0 if dtype == tl.int8 else -LARGEST_FLOAT8
    limited = tl.maximum(values, scale * lowest, propagate_nan=tl.PropagateNan.ALL)
    limited = tl.minimum(limited, scale * highest, propagate_nan=tl.PropagateNan.ALL)
    quotient = limited * reciprocal
    quotient = tl.fma(tl.fma(-scale, quotient, limited), reciprocal, quotient)
    return (quotient + HALF_EVEN - HALF_EVEN).to(tl.int8) if dtype == tl.int8 else quotient.to(tl.float8e4nv)


@triton.jit
def _magnitude(values):
    """|values| as int32 that order as the numbers do, with NaN above all: so that a maximum keeps NaN."""
    return tl.abs(values).to(tl.int32, bitcast=True)


@triton.constexpr_function
def _is_largest_needed(activations, dtype):
    """Whether `down` wants the largest magnitudes of inner: for its scales, or because int8 codes cannot hold NaN."""
    return activations == "token" or (activations == "static" and dtype == tl.int8)


@triton.jit
def _scale_of(magnitude, dtype: tl.constexpr):
    """The scale of a token from the largest `_magnitude` of it."""
    amax = magnitude.to(tl.float32, bitcast=True)
    largest: tl.constexpr = LARGEST_INT8 if dtype == tl.int8 else LARGEST_FLOAT8
    scale = tl.maximum(tl.div_rn(amax, largest), SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def _normed(x, norm_weight, rstd):
    """norm_weight * (x * rstd), rounded to bfloat16 twice, as float32."""
    over_rms = (x.to(tl.float32) * rstd).to(tl.bfloat16).to(tl.float32)
    return (over_rms * norm_weight.to(tl.float32)).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _operand(weight, dtype: tl.constexpr):
    """A tile of a weight as the tensor cores take it beside `dtype`: 8-bit codes become bfloat16 for a weight-only."""
    if weight.dtype != dtype:
        weight = weight.to(tl.float32).to(tl.bfloat16)
    return weight


@triton.jit
def _scaled(total, weight_scale, row, is_row, scale, PER_ROW: tl.constexpr):
    """A product of codes, [rows, tokens], times the scales of its rows and tokens; either may be None."""
    if weight_scale is not None:
        factor = tl.load(weight_scale + row, mask=is_row, other=0.0)[:, None] if PER_ROW else tl.load(weight_scale)
        if scale is not None:
            factor = scale[None, :] * factor
        total *= factor
    return total


@triton.jit
def _step(weight, right, total, alone: tl.constexpr):
    """weight @ right of one step, alone or added to total."""
    return tl.dot(weight, right) if alone else tl.dot(weight, right, total, out_dtype=total.dtype)


@triton.jit
def _rstd(square_sum, hidden, EPSILON: tl.constexpr):
    """1 / sqrt(mean of squares + epsilon), float32, rounded as PyTorch rounds it on a CPU."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, hidden * 1.0) + EPSILON))


@triton.jit
def norm(
    x,  # bfloat16 [tokens, hidden]
    norm_weight,  # bfloat16 [hidden]
    input_scale,  # float32 [1] for static activations, else None
    hidden,
    normed,  # [tokens, hidden]: bfloat16, or codes
    scales,  # float32 [tokens] of those codes; None for bfloat16
    EPSILON: tl.constexpr,
    ACTIVATIONS: tl.constexpr,  # "none", "static" or "token"
    DEPTH: tl.constexpr,  # a power of two, hidden or more
):
    """The norm of one token per program, and its codes."""
    token = tl.program_id(0)
    k = tl.arange(0, DEPTH)
    inside = k < hidden
    place = token.to(tl.int64) * hidden + k
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + k, mask=inside, other=0.0)
    n = _normed(values, weight, _rstd(tl.sum(values * values, axis=0), hidden, EPSILON))
    if ACTIVATIONS == "none":
        tl.store(normed + place, n.to(tl.bfloat16), mask=inside)
    else:
        codes: tl.constexpr = normed.dtype.element_ty
        if ACTIVATIONS == "static":
            scale = tl.load(input_scale) + tl.sum(values * 0.0, axis=0)  # NaN has no int8 code: it travels in the scale
        else:
            scale = _scale_of(tl.max(_magnitude(n), axis=0), codes)
        tl.store(normed + place, _codes(n, scale, tl.div_rn(1.0, scale), codes), mask=inside)
        tl.store(scales + token, scale)


@triton.jit(do_not_specialize=["tokens"])
def gate_up(
    x,  # bfloat16 [tokens, hidden]; after `norm` what it has left
    norm_weight,  # bfloat16 [hidden]; None after `norm`
    gate,  # [width, hidden]
    up,  # [width, hidden]
    gate_scale,  # float32 [width] or [1]; None for bfloat16 weights
    up_scale,
    input_scale,  # float32 [1] for static activations, else None; after `norm` its scales, float32 [tokens]
    inner_scale,  # float32 [1] for static activations, else None
    tokens,
    hidden,
    width,
    inner,  # [tokens, width]: codes for static activations, else bfloat16
    largest_parts,  # int32 [programs, TOKENS]: largest `_magnitude` of inner that each program saw
    arrivals,  # int32 [cdiv(hidden, ROWS_PER_COUNTER)]: zeroed for `down`
    EPSILON: tl.constexpr,
    ACTIVATIONS: tl.constexpr,  # "none", "static" or "token"
    GATE_SCALE_PER_ROW: tl.constexpr,
    UP_SCALE_PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM_DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # hidden is a multiple of DEPTH
    ALIGNED: tl.constexpr,  # gate and up begin at multiples of 16 bytes
):
    """Norm unless `norm` has run, gate, up and SwiGLU. A program goes over every `programs`-th tile of rows.

    A tile is ROWS rows of gate above the same rows of up, so that one product serves both.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    codes: tl.constexpr = gate.dtype.element_ty
    operand: tl.constexpr = tl.bfloat16 if ACTIVATIONS == "none" else codes
    alone: tl.constexpr = operand == tl.float8e4nv  # see FLOAT8_SUM
    tl.static_assert(not alone or DEPTH <= FLOAT8_SUM)
    token = tl.arange(0, TOKENS)
    is_token = token < tokens
    x_rows = x + token.to(tl.int64)[:, None] * hidden

    counters = tl.cdiv(hidden, _ROWS_PER_COUNTER)
    for start in range(program * 128, counters, programs * 128):
        counter = start + tl.arange(0, 128)
        tl.store(arrivals + counter, tl.zeros([128], tl.int32), mask=counter < counters)

    if norm_weight is None:
        if ACTIVATIONS != "none":
            scale = tl.load(input_scale + token, mask=is_token, other=1.0)
    else:
        squares = tl.zeros([TOKENS, NORM_DEPTH], tl.float32)
        broken = tl.zeros([TOKENS, NORM_DEPTH], tl.float32)  # NaN where NaN or infinity went by
        for start in tl.range(0, hidden, NORM_DEPTH, num_stages=4):
            k = start + tl.arange(0, NORM_DEPTH)
            inside = is_token[:, None] & (k < hidden)[None, :]
            values = tl.load(x_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += values * values
            broken += values * 0.0
        rstd = _rstd(tl.sum(squares, axis=1), hidden, EPSILON)
        if ACTIVATIONS == "static":
            scale = tl.load(input_scale) + tl.sum(broken, axis=1)  # as in `norm`
        elif ACTIVATIONS == "token":
            largest = tl.zeros([TOKENS, NORM_DEPTH], tl.int32)
            for start in tl.range(0, hidden, NORM_DEPTH, num_stages=4):
                k = start + tl.arange(0, NORM_DEPTH)
                inside = is_token[:, None] & (k < hidden)[None, :]
                values = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
                weight = tl.load(norm_weight + k, mask=k < hidden, other=0.0)
                largest = tl.maximum(largest, _magnitude(_normed(values, weight[None, :], rstd[:, None])))
            scale = _scale_of(tl.max(largest, axis=1), codes)
        if ACTIVATIONS != "none":
            reciprocal = tl.div_rn(1.0, scale)[:, None]
    if ACTIVATIONS == "none":
        scale = None
    if ACTIVATIONS == "static":
        static_scale = tl.load(inner_scale)
        static_reciprocal = tl.div_rn(1.0, static_scale)

    largest_seen = tl.zeros([TOKENS], tl.int32)
    both = tl.arange(0, 2 * ROWS)
    matrix = tl.where(both < ROWS, gate, up)
    if ALIGNED:
        matrix = tl.multiple_of(matrix, 16)  # Triton 3.8 and 3.9 lose it in `where`, and with it asynchronous copies
    for tile in range(program, tl.cdiv(width, ROWS), programs):
        # Past the end the last row is read again, and nothing of it kept. Stores use the plain row: that these are
        # neighbours is what lets them be wide.
        offsets = tl.minimum(tile * ROWS + both % ROWS, width - 1).to(tl.int64) * hidden
        weights = (matrix + offsets)[:, None]
        total = tl.zeros([2 * ROWS, TOKENS], tl.int32 if operand == tl.int8 else tl.float32)
        for start in range(0, hidden, DEPTH):
            k = start + tl.arange(0, DEPTH)
            if EVEN:
                right = tl.load(x_rows + k[None, :], mask=is_token[:, None], other=0.0)
                weight_tile = tl.load(weights + k[None, :])
            else:
                inside = (k < hidden)[None, :]
                right = tl.load(x_rows + k[None, :], mask=is_token[:, None] & inside, other=0.0)
                weight_tile = tl.load(weights + k[None, :], mask=inside, other=0.0)
            if norm_weight is not None:
                norm_tile = tl.load(norm_weight + k) if EVEN else tl.load(norm_weight + k, mask=k < hidden, other=0.0)
                n = _normed(right, norm_tile[None, :], rstd[:, None])
                right = n.to(tl.bfloat16) if ACTIVATIONS == "none" else _codes(n, scale[:, None], reciprocal, codes)
            step = _step(_operand(weight_tile, operand), right.T, total, alone)
            total = total + step if alone else step
        g, u = tl.split(tl.permute(tl.reshape(total.to(tl.float32), [2, ROWS, TOKENS]), [1, 2, 0]))
        row = tile * ROWS + tl.arange(0, ROWS)
        is_row = row < width
        g = _scaled(g, gate_scale, row, is_row, scale, GATE_SCALE_PER_ROW)
        u = _scaled(u, up_scale, row, is_row, scale, UP_SCALE_PER_ROW)
        product = (g / (1.0 + tl.exp(-g)) * u).to(tl.bfloat16)
        kept = is_row[:, None] & is_token[None, :]
        if _is_largest_needed(ACTIVATIONS, codes):
            # What is not kept is the last row again, or zero.
            largest_seen = tl.maximum(largest_seen, tl.max(_magnitude(product.to(tl.float32)), axis=0))
        if ACTIVATIONS == "static":
            product = _codes(product.to(tl.float32), static_scale, static_reciprocal, codes)
        tl.store(inner + token.to(tl.int64)[None, :] * width + row[:, None], product, mask=kept)
    if _is_largest_needed(ACTIVATIONS, codes):
        tl.store(largest_parts + program * TOKENS + token, largest_seen)


@triton.jit(do_not_specialize=["tokens", "parts"])
def down(
    inner,  # [tokens, width] of `gate_up`
    largest_parts,  # int32 [parts, TOKENS] of `gate_up`
    arrivals,  # int32 [cdiv(hidden, ROWS_PER_COUNTER)], zeros: counts the finished splits of every tile
    weight,  # [hidden, width]
    weight_scale,  # float32 [hidden] or [1]; None for bfloat16 weights
    inner_scale,  # float32 [1] for static activations, else None
    residual,  # bfloat16 [tokens, hidden] or None
    tokens,
    hidden,
    width,
    parts,  # programs of `gate_up`
    sums,  # float32 [splits, TOKENS, hidden]; None if the width is not split
    y,  # bfloat16 [tokens, hidden]
    ACTIVATIONS: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # width is a multiple of DEPTH
):
    """Down and residual. Program (i, j) multiplies tile i of rows with part j of the width, one step of DEPTH or more.

    The last to arrive at a tile adds up all its parts, in order: the result does not depend on who was last.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    codes: tl.constexpr = weight.dtype.element_ty
    operand: tl.constexpr = tl.bfloat16 if ACTIVATIONS == "none" else codes
    alone: tl.constexpr = operand == tl.float8e4nv
    tl.static_assert(not alone or DEPTH <= FLOAT8_SUM)
    token = tl.arange(0, TOKENS)
    is_token = token < tokens
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < hidden
    kept = is_row[:, None] & is_token[None, :]

    if ACTIVATIONS == "static":
        scale = tl.zeros([TOKENS], tl.float32) + tl.load(inner_scale)
    if _is_largest_needed(ACTIVATIONS, codes):
        largest = tl.zeros([TOKENS], tl.int32)
        for start in range(0, parts, 8192 // TOKENS):
            part = start + tl.arange(0, 8192 // TOKENS)
            some = tl.load(
                largest_parts + part[:, None] * TOKENS + token[None, :], mask=(part < parts)[:, None], other=0
            )
            largest = tl.maximum(largest, tl.max(some, axis=0))
        if ACTIVATIONS == "token":
            scale = _scale_of(largest, codes)
        else:
            amax = largest.to(tl.float32, bitcast=True)
            scale = tl.where(amax == amax, scale, amax)  # NaN, which int8 codes cannot hold, goes on
    if ACTIVATIONS == "token":
        reciprocal = tl.div_rn(1.0, scale)[:, None]
    if ACTIVATIONS == "none":
        scale = None

    inner_rows = inner + token.to(tl.int64)[:, None] * width
    offsets = tl.minimum(row, hidden - 1).to(tl.int64)[:, None] * width  # as in `gate_up`
    steps = tl.cdiv(width, DEPTH)
    first = split * steps // splits * DEPTH
    stop = tl.minimum((split + 1) * steps // splits * DEPTH, width)
    # With a way around the loop the assembler would have each tensor-core instruction wait for the one before it.
    tl.assume(first < stop)
    total = tl.zeros([ROWS, TOKENS], tl.int32 if operand == tl.int8 else tl.float32)
    for start in range(first, stop, DEPTH):
        k = start + tl.arange(0, DEPTH)
        if EVEN:
            values = tl.load(inner_rows + k[None, :], mask=is_token[:, None], other=0.0)
            weight_tile = tl.load(weight + offsets + k[None, :])
        else:
            inside = (k < width)[None, :]
            values = tl.load(inner_rows + k[None, :], mask=is_token[:, None] & inside, other=0.0)
            weight_tile = tl.load(weight + offsets + k[None, :], mask=inside, other=0.0)
        if ACTIVATIONS == "token":
            values = _codes(values.to(tl.float32), scale[:, None], reciprocal, codes)
        step = _step(_operand(weight_tile, operand), values.T, total, alone)
        total = total + step if alone else step
    total = total.to(tl.float32)

    is_last = True
    if sums is not None:
        part = tl.full([], TOKENS, tl.int64) * hidden
        places = sums + token.to(tl.int64)[None, :] * hidden + row[:, None]
        tl.store(places + split * part, total, mask=kept, cache_modifier=".cg")
        tl.debug_barrier()  # every thread has stored before one of them says so
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if is_last:
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            together: tl.constexpr = max(1, min(4, 16384 // (ROWS * TOKENS)))  # loads in flight, as registers allow
            for start in range(0, splits, together):
                for i in tl.static_range(together):
                    is_part = tl.where(start + i < splits, kept, False)
                    total += tl.load(places, mask=is_part, other=0.0, cache_modifier=".cg")
                    places += part
    if is_last:
        total = _scaled(total, weight_scale, row, is_row, scale, SCALE_PER_ROW)
        at = token.to(tl.int64)[None, :] * hidden + row[:, None]
        if residual is not None:
            total += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
        tl.store(y + at, total.to(tl.bfloat16), mask=kept)
