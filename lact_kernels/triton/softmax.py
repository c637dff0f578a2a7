"""The softmax of the attention kernels: online in the forward, from the lse again in the backward.

With a soft cap the scores are `tanh(Q K^T * bend)`, and the factor of the exponents is the soft cap in place
of the scale of Q K^T: nothing else changes. A sink is a logit that counts in the sum of a row alone.
"""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import LOG2_E

LN_2 = tl.constexpr(0.6931471805599453)
# The running maximum before any key: finite, so that a row that has seen no key gives no NaN.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def softcapped(scores, bend, FULL_PRECISION: tl.constexpr):
    """tanh(scores * bend), or the scores themselves if `bend` is None."""
    if bend is not None:
        scores = tanh(scores, bend, FULL_PRECISION)
    return scores


@triton.jit
def tanh(x, factor, FULL_PRECISION: tl.constexpr):
    """tanh(x * factor), to within 2e-7 of itself; for 16-bit inputs to within 6e-7 of 1."""
    if FULL_PRECISION:
        x = x * factor
        size = tl.abs(x)
        large = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2_E)))
        large = tl.where(x < 0.0, -large, large)
        square = x * x
        series = -0.005704987 * square + 0.020639086  # of tanh(x) / x, fitted up to 0.625
        series = series * square - 0.053739715
        series = series * square + 0.13331442
        series = series * square - 0.3333328
        result = tl.where(size < 0.625, x + x * square * series, large)
    else:
        # 2 / (1 + e^2x) is this squared. A division would take more instructions, and registers.
        root = tl.rsqrt(0.5 + tl.exp2(x * (factor * (2.0 * LOG2_E)) - 1.0))
        result = 1.0 - root * root
    return result


@triton.jit
def softmax_step(scores, row_max, row_sum, scale_log2, FULL_PRECISION: tl.constexpr):
    """One tile of the online softmax, over the last axis of `scores` [BLOCK_M, BLOCK_N].

    Returns the unnormalised probabilities, the factor by which earlier sums shrink, and the new
    maximum and sum. For 16-bit inputs the maximum is in units of `scores * scale_log2`, so that an
    element takes one fused operation. Its rounding is a factor of the whole row, which the row's sum
    takes out again. For float32 inputs it is in the units of `scores`, and is subtracted before
    scaling: interpreted kernels have no fused operation, and would round the product of each element.
    """
    if FULL_PRECISION:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # [BLOCK_M]
        probs = tl.exp2((scores - new_max[:, None]) * scale_log2)  # [BLOCK_M, BLOCK_N]
        decay = tl.exp2((row_max - new_max) * scale_log2)  # [BLOCK_M]
    else:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
    return probs, decay, new_max, row_sum * decay + tl.sum(probs, axis=1)


@triton.jit
def softmax_end(acc, row_max, row_sum, scale, sink, FULL_PRECISION: tl.constexpr):
    """Normalised outputs and lse of the rows, where nothing was seen 0 and the sink (-inf if that is None).

    `sink` is a logit, or one for each row.
    """
    blind = row_sum == 0.0
    unit = scale if FULL_PRECISION else LN_2  # of row_max
    if sink is None:
        row_sum = tl.where(blind, 1.0, row_sum)
        lse = tl.where(blind, float("-inf"), row_max * unit + tl.log(row_sum))
        weight = 1.0 / row_sum
    else:
        # The log of what the keys have more than the sink, rounded once.
        lead = tl.where(blind, float("-inf"), tl.fma(row_max, unit, -sink))
        kept = tl.exp(tl.minimum(lead, 0.0))
        row_sum = row_sum * kept + tl.exp(tl.minimum(-lead, 0.0))
        lse = tl.where(lead < 0.0, sink, row_max * unit) + tl.log(row_sum)
        weight = kept / row_sum
    return acc * weight[:, None], lse


@triton.jit
def minus_lse_log2(lse, scale):
    """The lse as `softmax_from_lse` takes it: times what `scale * LOG2_E`, rounded, is of the scale.

    So the rounding of that factor counts for the difference of scores and lse alone.
    """
    scale_log2 = scale * LOG2_E
    rounding = tl.fma(scale, -LOG2_E, scale_log2)  # exact
    return tl.fma(lse, -LOG2_E, lse * (-1.0 * rounding / scale))


@triton.jit
def softmax_from_lse(scores, minus_lse, scale_log2):
    """Probabilities again, by one fused operation and one exponential per score. For 16-bit inputs.

    `minus_lse` is that of `minus_lse_log2` and broadcasts against the scores, `scale_log2` the scale times
    log2(e). The roundings of the lse, here and by the forward, are a relative error of up to 2 |lse| / 2^24.
    It reaches that of rounding to bfloat16 at an lse around 16000, and to float16 around 2000. Attention
    that is computed in these dtypes rounds the scores themselves, and is off by up to |score| / 2^9 and
    |score| / 2^12.

    But for these errors no exponent is positive. Each gets a negative sign, which the instruction of the
    exponential has room for: nothing exceeds 1 where scores are so large that the lse is coarse, and
    nothing overflows. What a query does not see has some probability from 0 to 1 here: mask it afterwards.
    """
    scale_log2 = tl.full(scores.shape, scale_log2, tl.float32)
    minus_lse = tl.broadcast_to(minus_lse, scores.shape)
    return tl.exp2(tl.abs(tl.fma(scores, scale_log2, minus_lse)) * -1.0)


@triton.jit
def softmax_from_shift(scores, shift, scale):
    """Probabilities again, each row times a number of its own that is close to 1.

    `shift` is the lse in the units of `scores`. Its rounding, with scores of some hundreds a thousand times
    that of a float32 probability, is the same for a whole row: the row's sum takes it out. The bound
    keeps the sum finite where the lse is coarser still, and keys that are not seen, to be masked afterwards.
    """
    return tl.exp2(tl.minimum((scores - shift) * (scale * LOG2_E), 64.0))
