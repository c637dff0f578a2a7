"""Backward of the update (see `ttt_update`), row by row, and the gradients per token that remain.

From dw', the gradient of the new weights, with n the length of a row of x' and t its target norm:

```
    along = <dw', x'> / (n + eps)         dnorm += along
    dx' = (dw' - x' along / n) t / (n + eps)      pre-norm: + the gradient of the masters so far
    dstep = dx'                           Muon: through its orthogonalisation
    dM' = dstep + dM                      dbeta = <dM', M>       dM <- beta dM'
    dG = dM'                              in the dtype of the products
```

dx' is carried on to the update before: to its weights (post-norm) or its masters (pre-norm). Without Muon one
launch does all of this; with Muon one ends at dx', and another begins with the iteration's gradient. A
row whose n is 0, or whose squares underflow, has no direction, and only its length's part is lost. Without
renorm dx' is dw' and what is carried. Where momentum comes after Muon the first launch ends at dM', and
what the iteration gives is dG.

A matrix that is not trained has no update: what its versions get is added up in `kept`.

With Muon dG is about dw' 490 / |G|, which is beyond float16: there each matrix of each head has a unit, the
power of two that brings it to at most 2^14. It is known before dG is, from the norms of the terms of dG.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core import newton_schulz
from lact_kernels.triton.configs import TRITON, TTTConfig
from lact_kernels.triton.fast_weights.layout import (
    ALL_MATRICES,
    TOKEN_ARGUMENTS,
    Dims,
    Heads,
    Run,
    dims_constexprs,
    launcher_over_tokens,
    power_of_two_from,
)
from lact_kernels.triton.fast_weights.primitives import (
    GRADIENT_BITS,
    chunk_tokens,
    matrix_place,
    matrix_shape,
    matrix_total,
    power_of_two,
)
from lact_kernels.triton.fast_weights.update import (
    NUM_WARPS,
    RENORM_EPS,
    matrix_rows,
    row_config,
    row_lengths,
    row_programs,
    sum_parts,
)
from lact_kernels.triton.launch import launch

INFINITY = tl.constexpr(float("inf"))
NEWTON_SCHULZ_EPS = tl.constexpr(newton_schulz.EPS)
TOKEN_BLOCK = 256


@triton.jit(
    do_not_specialize=[
        "num_parts",
        "num_apply_parts",
        "first",
        "next_first",
        "apply_first",
        "begun",
    ]
)
def _ttt_update_bwd_kernel(
    parts_ptr,  # [parts, .., SIZE]: gradients of the new weights by the update after this one
    apply_ptr,  # [parts, heads of a run, SIZE]: and by apply; None: they are among the others
    carry_ptr,  # [heads, SIZE]: read and written
    kept_ptr,  # [heads, SIZE]: added to, of the matrices that are not trained
    sums_ptr,  # [heads of all, SIZE]: x'
    norms_ptr,  # [heads, ROWS], or None without renorm
    dnorms_ptr,  # [heads, ROWS]: added to
    betas_ptr,  # [heads of all], or None without momentum
    steps_ptr,  # [heads of all, SIZE]: M
    next_steps_ptr,  # [heads of all, SIZE]: M', or what else Muon got
    dnext_steps_ptr,  # [heads, SIZE]: written: the gradient of M' where momentum comes after Muon
    dsquares_ptr,  # [heads, ROWS]: squares of the rows' norms of dx' or dM', with Muon
    squares_ptr,  # [heads, ROWS]: of what Muon got
    dx_ptr,  # [heads, SIZE]: the iteration's gradient: the second launch with Muon, else None
    inner_ptr,  # [heads, ROWS]: rows of <dx, M'>
    dx_squares_ptr,  # [heads, ROWS]: of dx, like the next and the units None where dG has none
    dbuffers_squares_ptr,  # [heads, ROWS]: of dM, or None without momentum
    units_ptr,  # [heads of all, 4]: the first three are written, those of dG0, dG1 and dG2
    dbuffers_ptr,  # [heads, SIZE]: dM, read and written
    dbetas_ptr,  # [heads of all, ROWS]
    dsteps_ptr,  # [heads of all, SIZE]: dG, in the dtype of the products; None: the first launch with Muon
    num_parts,
    stride_part,
    num_apply_parts,
    stride_apply_part,
    first,  # of the heads of all, those of the chunks that are updated
    next_first,  # and of the chunks after them
    apply_first,  # and of a run, the latter
    begun,  # heads of which what is read and written holds gradients; of the others there are none yet
    NET: tl.constexpr,
    PRENORM: tl.constexpr,
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOTAL: tl.constexpr,
):
    head, matrix, rows, real, offsets, inside = matrix_rows(
        NET, TILES0, TILES1, TILES2, BLOCK_ROWS, BLOCK_COLUMNS
    )
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    element, row = matrix_place(head, matrix, NET)
    offsets += element
    rows += row
    first = tl.cast(first, tl.int64)
    now = offsets + first * NET.SIZE
    then = offsets + tl.cast(next_first, tl.int64) * NET.SIZE
    if dx_ptr is None:
        held = inside & (head < begun)
        dweights = sum_parts(parts_ptr, offsets, held, num_parts, stride_part)
        if apply_ptr is not None:
            applied = offsets + tl.cast(apply_first, tl.int64) * NET.SIZE
            dweights += sum_parts(apply_ptr, applied, inside, num_apply_parts, stride_apply_part)
        if not (NET.W0 and NET.W1 and NET.W2):
            # The update's backward writes no gradient that is 0: what was in its place has been read.
            if not (NET.W0 or NET.W2):
                tl.store(parts_ptr + offsets, tl.zeros_like(dweights), mask=inside & (matrix == 1))
            if not (NET.W0 or NET.W1):
                tl.store(parts_ptr + offsets, tl.zeros_like(dweights), mask=inside & (matrix == 2))
            TRAINED: tl.constexpr = NET.W0 + 2 * NET.W1 + 4 * NET.W2
            if (TRAINED >> matrix) % 2 == 0:
                dweights += tl.load(kept_ptr + offsets, mask=held, other=0.0)
                tl.store(kept_ptr + offsets, dweights, mask=inside)
                return
        if norms_ptr is None:
            dstep = dweights + tl.load(carry_ptr + offsets, mask=held, other=0.0)
        else:
            if not PRENORM:
                dweights += tl.load(carry_ptr + offsets, mask=held, other=0.0)
            x = tl.load(sums_ptr + then, mask=inside, other=0.0)
            norm = tl.load(norms_ptr + rows, mask=real, other=0.0)
            length = row_lengths(x)
            along = tl.div_rn(tl.sum(dweights * x, axis=1), length + RENORM_EPS)
            dnorm = tl.load(dnorms_ptr + rows, mask=real & (head < begun), other=0.0)
            tl.store(dnorms_ptr + rows, dnorm + along, mask=real)
            radial = x * tl.div_rn(along, tl.where(length > 0.0, length, INFINITY))[:, None]
            dstep = (dweights - radial) * tl.div_rn(norm, length + RENORM_EPS)[:, None]
            if PRENORM:  # read late: across the divisions and roots it would not stay in registers
                if head < begun:
                    dstep += tl.load(carry_ptr + offsets, mask=inside, other=0.0)
        tl.store(carry_ptr + offsets, dstep, mask=inside)
    else:
        # Back through the division by the Frobenius norm that begins the iteration.
        shorter = tl.minimum(num_rows, num_columns).to(tl.float32)
        dlength = tl.sqrt_rn(matrix_total(dsquares_ptr + row, num_rows, BLOCK_TOTAL))
        scale = tl.div_rn(dlength, tl.sqrt_rn(shorter))
        length = tl.sqrt_rn(matrix_total(squares_ptr + row, num_rows, BLOCK_TOTAL))
        along = scale * matrix_total(inner_ptr + row, num_rows, BLOCK_TOTAL)
        divisor = length * (length + NEWTON_SCHULZ_EPS)
        along = tl.div_rn(along, tl.where(length > 0.0, divisor, INFINITY))
        dx = scale * tl.load(dx_ptr + offsets, mask=inside, other=0.0)
        step = tl.load(next_steps_ptr + then, mask=inside, other=0.0)
        dstep = (dx - step * along) * tl.div_rn(1.0, length + NEWTON_SCHULZ_EPS)
    if betas_ptr is not None:
        beta = tl.load(betas_ptr + first + head)
        dstep += tl.load(dbuffers_ptr + offsets, mask=inside & (head < begun), other=0.0)
        before = tl.load(steps_ptr + now, mask=inside, other=0.0)
        tl.store(dbuffers_ptr + offsets, beta * dstep, mask=inside)
        tl.store(
            dbetas_ptr + first * (2 * NET.DH + NET.DV) + rows,
            tl.sum(dstep * before, axis=1),
            mask=real,
        )
    if dsteps_ptr is None:
        if dnext_steps_ptr is not None:
            tl.store(dnext_steps_ptr + offsets, dstep, mask=inside)
        step = tl.load(next_steps_ptr + then, mask=inside, other=0.0)
        tl.store(dsquares_ptr + rows, tl.sum(dstep * dstep, axis=1), mask=real)
        tl.store(squares_ptr + rows, tl.sum(step * step, axis=1), mask=real)
    else:
        if units_ptr is not None:
            size = scale * tl.sqrt_rn(matrix_total(dx_squares_ptr + row, num_rows, BLOCK_TOTAL))
            size = tl.div_rn(size, length + NEWTON_SCHULZ_EPS)
            if dbuffers_squares_ptr is not None:
                squares = matrix_total(dbuffers_squares_ptr + row, num_rows, BLOCK_TOTAL)
                size += tl.sqrt_rn(squares)
            unit = power_of_two(size * 2.0**-GRADIENT_BITS)
            is_first = rows == row
            place = units_ptr + (first + head) * 4 + matrix + tl.zeros_like(rows)
            tl.store(place, tl.where(is_first, unit, 0.0), mask=is_first)
            dstep *= tl.div_rn(1.0, unit)
        tl.store(dsteps_ptr + now, dstep.to(dsteps_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_rates(out_ptr, parts_ptr, offsets, tokens, inside, num_parts, stride_part):
    """The sum of parts as the gradient of one learning rate, if it has one."""
    if out_ptr is not None:
        total = sum_parts(parts_ptr, tokens, inside, num_parts, stride_part)
        tl.store(out_ptr + offsets, total, mask=inside)


@triton.jit(do_not_specialize=[*TOKEN_ARGUMENTS, "num_tiles"])
def _ttt_rates_bwd_kernel(
    dlr_parts_ptr,  # [tiles, 3, H, rows]
    dbetas_ptr,  # [places, H, ROWS], or None without momentum
    dlr0_ptr,  # [B, T, H], contiguous, like the next three; None: that weight is not trained
    dlr1_ptr,
    dlr2_ptr,
    dmomentum_ptr,
    table_ptr,
    place,
    first_chunk,
    first_row,
    B,
    T,
    shift,
    chunk_size,
    width,
    num_rows,
    H,
    num_k,
    num_v,
    num_h,
    num_tiles,
    NET: tl.constexpr,
    BLOCK_TOTAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles_t = tl.cdiv(width, BLOCK_T)
    pid = tl.program_id(0)
    chunk_head = pid // tiles_t
    chunk = chunk_head // H
    h = tl.cast(chunk_head % H, tl.int64)
    b, first, number, row = chunk_tokens(
        chunk, table_ptr, first_chunk, first_row, B, T, shift, chunk_size, width
    )
    tokens = pid % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < number
    offsets = (b * T + first + tokens) * H + h
    plane = tl.cast(num_rows, tl.int64) * H
    parts_ptr = dlr_parts_ptr + h * num_rows + row
    _store_rates(dlr0_ptr, parts_ptr, offsets, tokens, inside, num_tiles, 3 * plane)
    _store_rates(dlr1_ptr, parts_ptr + plane, offsets, tokens, inside, num_tiles, 3 * plane)
    _store_rates(dlr2_ptr, parts_ptr + 2 * plane, offsets, tokens, inside, num_tiles, 3 * plane)
    if dbetas_ptr is not None:
        ROWS: tl.constexpr = 2 * NET.DH + NET.DV
        dbetas_ptr += (tl.cast(place + chunk, tl.int64) * H + h) * ROWS
        dbeta = matrix_total(dbetas_ptr, ROWS, BLOCK_TOTAL)
        share = tl.full([BLOCK_T], 0.0, tl.float32) + tl.div_rn(dbeta, chunk_size.to(tl.float32))
        tl.store(dmomentum_ptr + offsets, share, mask=inside)


UPDATE_BWD_KERNELS = {TRITON: _ttt_update_bwd_kernel}
RATES_BWD_KERNELS = {TRITON: _ttt_rates_bwd_kernel}


def ttt_update_bwd(
    dweights: Tensor,  # `[parts, sequences, H, SIZE]`, float32 like all but dsteps
    carry: Tensor,  # `[sequences, H, SIZE]`: read and written, like kept, dnorms and dbuffers
    kept: Tensor | None,  # `[sequences, H, SIZE]`: of matrices that are not trained
    sums: Tensor,  # `[places, H, SIZE]`: x'
    norms: Tensor | None,  # `[sequences, H, ROWS]`; None without renorm
    dnorms: Tensor,  # `[sequences, H, ROWS]`
    dims: Dims,
    *,
    prenorm: bool,
    betas: Tensor | None = None,  # `[places, H]`, with momentum, like the next three
    steps: Tensor | None = None,  # `[places, H, SIZE]`: M
    dbuffers: Tensor | None = None,  # `[sequences, H, SIZE]`
    dbetas: Tensor | None = None,  # `[places, H, ROWS]`: written
    next_steps: Tensor | None = None,  # `[places, H, SIZE]`: what Muon got, like the next two
    squares: tuple[Tensor, Tensor]
    | None = None,  # `[heads, ROWS]`: of the rows' norms of dx' or dM' and of next_steps
    dnext_steps: Tensor | None = None,  # `[heads, SIZE]`: written: dM' where momentum is after Muon
    units: Tensor | None = None,  # `[places, H, 4]`: the first three are written
    dsteps: Tensor | None = None,  # `[places, H, SIZE]`: written; None: the first launch with Muon
    second: bool = False,  # the second launch with Muon
) -> Callable[..., None]:
    """Backward of one update of some heads, or with Muon the first or the second part of it.

    It is given the heads; of how many there are gradients by later updates; those by the queries of the
    new weights, `[parts, chunks, H, SIZE]`, and which head in these is the first. Or, as the second part, the
    results of `Iteration.backward`.
    """
    # The first launch has those matrices, too, that are not trained.
    programs, constexprs = row_programs(dims, dims if second else dims.having(*ALL_MATRICES))
    config = row_config(dims)
    dsquares, squares = squares or (None, None)
    arguments = {
        "parts_ptr": dweights, "carry_ptr": carry, "kept_ptr": kept, "sums_ptr": sums, "norms_ptr": norms,
        "dnorms_ptr": dnorms, "betas_ptr": betas, "steps_ptr": steps, "next_steps_ptr": next_steps,
        "dnext_steps_ptr": dnext_steps, "dsquares_ptr": dsquares, "squares_ptr": squares,
        "units_ptr": units, "dbuffers_ptr": dbuffers, "dbetas_ptr": dbetas, "dsteps_ptr": dsteps,
        "num_parts": dweights.shape[0], "stride_part": dweights.stride(0),
        "PRENORM": prenorm, "BLOCK_TOTAL": total_block(dims), **constexprs,
    }  # fmt: skip

    def update_bwd(
        heads: Heads,
        begun: int,
        dapply: Tensor | None = None,
        apply_first: int = 0,
        iteration: tuple[Tensor | None, ...] = (None,) * 4,
    ) -> None:
        dx, inner, dx_squares, dbuffers_squares = iteration
        launch(
            UPDATE_BWD_KERNELS, config, (heads.number * programs,), apply_ptr=dapply, dx_ptr=dx,
            inner_ptr=inner, dx_squares_ptr=dx_squares, dbuffers_squares_ptr=dbuffers_squares,
            num_apply_parts=0 if dapply is None else dapply.shape[0],
            stride_apply_part=0 if dapply is None else dapply.stride(0),
            first=heads.first, next_first=heads.next_first, apply_first=apply_first, begun=begun,
            **arguments,
        )  # fmt: skip

    return update_bwd


def ttt_rates_bwd(
    dlr_parts: Tensor,  # `[tiles, 3, H, rows]`
    dbetas: Tensor | None,  # `[places, H, ROWS]`
    dlr: tuple[Tensor | None, ...],  # three `[B, T, H]`: written, like dmomentum
    dmomentum: Tensor | None,  # `[B, T, H]`
    dims: Dims,
) -> Callable[[Run], None]:
    """The gradients of the learning rates, from their parts, and of momentum, from that of its mean."""
    return launcher_over_tokens(
        RATES_BWD_KERNELS, TTTConfig(TOKEN_BLOCK, 1, 1, NUM_WARPS, 3), 1,
        (dlr_parts, dbetas, *dlr, dmomentum), (dlr_parts.shape[0],), dlr_parts[0], dims,
        **rates_constexprs(dims),
    )  # fmt: skip


def total_block(dims: Dims) -> int:
    """For all rows of one matrix."""
    return power_of_two_from(max(dims.Dh, dims.Dv))


def rates_constexprs(dims: Dims) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        "BLOCK_TOTAL": power_of_two_from(dims.rows),
        "BLOCK_T": TOKEN_BLOCK,
    }
