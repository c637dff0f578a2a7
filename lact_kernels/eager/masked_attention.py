"""Softmax attention under a mask, with its lse, both ways.

Tensors are `[N, H, rows, D]` and `[N, H, keys, D]`, Dv channels for v and o; the mask is additive,
`[rows, keys]`. A row whose scores are all -inf has the output 0, the lse -inf and no gradient.

On the CPU this is PyTorch's own flash kernel, called one level below `scaled_dot_product_attention`,
which does not hand out the lse. It has a causal form of its own, which needs no mask: row r sees the keys
up to r. On other devices, whose flash kernels take no such mask, it is written out.

The flash backward finds P again as `exp(score - lse)`. The rounding of the lse is a relative error of P.
Where that counts, the backward is written out on the CPU as well, and divides P by its own sums, which
takes about half as long again.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

PART_SCORES = 2**17  # that are written out at a time on a CPU, so that they stay in its cache
# The lse up to which its rounding counts less than that of the dtype, and in float32 how far it may be above
# the logarithm of the number of keys: the errors of many keys' sums outweigh those of a larger lse.
PRECISE_LSE = {torch.float64: 8, torch.float32: 8, torch.float16: 512, torch.bfloat16: 512}
PRECISE_MEAN = 4
LANES = 16  # numbers of float32 in a vector, at most
SMALL_SCORE = 32  # up to which q may be rounded


class Saved(NamedTuple):
    """What the forward has read and written, for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and accumulators: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_flash(q: Tensor, softcap: float | None = None) -> bool:
    """Whether the flash kernel runs here. It has no soft cap."""
    return q.is_cpu and softcap is None


def has_causal_flash(q: Tensor, scale: float, softcap: float | None = None) -> bool:
    """Whether its causal form is right: it scales the -inf of what a row does not see."""
    return has_flash(q, softcap) and scale >= torch.finfo(lse_dtype(q.dtype)).tiny


def split_scale(
    q: Tensor, k: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, float, float]:
    """q times a factor, the scale that is left, and the factor: 1, or what makes that a power of two.

    The flash forward scales the products, its backward scales q. With a power of two the scores of both are
    the same, and so is what the lse is made of. 16-bit q stay as they are: they would be rounded. So do
    those of large scores, for which a rounding of q in float32 is too much as well.
    """
    if not has_flash(q, softcap) or _same_scores(q, scale) or not (q.numel() and k.numel()):
        return q, scale, 1.0
    norms = [torch.linalg.vector_norm(x, dim=-1).max() for x in (q, k)]
    if not abs(scale) * norms[0] * norms[1] <= SMALL_SCORE:
        return q, scale, 1.0
    mantissa, exponent = math.frexp(scale)
    return q * (2 * mantissa), math.ldexp(1.0, exponent - 1), 2 * mantissa


def _same_scores(q: Tensor, scale: float) -> bool:
    """Whether the flash backward has the scores of the forward, as far as the dtype tells."""
    return q.dtype != lse_dtype(q.dtype) or abs(math.frexp(scale)[0]) == 0.5


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs in the dtype of q, and lse `[N, H, rows]`. Causal is for the flash kernel alone."""
    if not has_flash(q, softcap):
        return forward_written_out(q, k, v, mask, scale, softcap)
    rows, Dv = q.size(2), v.size(3)
    if rows == 1 and q.dtype == torch.bfloat16:
        q = torch.cat([q, q], dim=2)  # products of one row take several times as long as of two
    q, k, v = _equally_wide(q, k, v)
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    options = {"is_causal": causal, "attn_mask": mask, "scale": scale}
    o, lse = flash(q, k, v, **options)
    if mask is None and k.size(2) < LANES and not lse.all():
        # The kernel takes a row of NaN for one of -inf where it has no mask, and so few keys.
        unseen = q.new_full((q.size(2), k.size(2)), -math.inf)
        mask = unseen.triu(1 if causal else k.size(2))
        options = {"is_causal": False, "attn_mask": mask, "scale": scale}
        o, lse = flash(q, k, v, **options)
    if not lse.all():  # 0 is also what the kernel gives for a row of -inf, whose output is always 0
        ones = v.new_ones(v.shape[2:]).expand_as(v)
        sums, _ = flash(q, k, ones, **options)
        lse.masked_fill_(sums[..., 0] == 0, -math.inf)
    if rows < q.size(2) or Dv < q.size(3):
        o, lse = o[:, :, :rows, :Dv], lse[:, :, :rows]
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    sinks: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of o and lse after `add_sinks`. Causal is for `flash_is_precise` alone."""
    q, k, v, o, lse = saved
    if softcap is not None or not flash_is_precise(q, lse, k.shape[2], scale):
        return backward_written_out(do, dlse, saved, sinks, mask, scale, softcap)
    D, Dv = q.shape[-1], v.shape[-1]
    if dlse is not None:
        # A value channel of ones, whose output is given as 0 and whose gradient is dlse, adds
        # dlse to every row of dP and nothing to delta: the gradient of the lse.
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o = F.pad(o, (0, 1))
        do = torch.cat([do, dlse[..., None].to(do.dtype)], dim=-1)
    do, q, k, v, o = _equally_wide(do, q, k, v, o)
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dq, dk, dv = flash(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq[..., :D], dk[..., :D], dv[..., :Dv]


def flash_is_precise(q: Tensor, lse: Tensor, keys: int, scale: float) -> bool:
    """Whether `exp(score - lse)` gives probabilities as exact as the dtype: False for -inf and NaN."""
    limit = max(PRECISE_LSE[q.dtype], PRECISE_MEAN + math.log(keys))
    return has_flash(q) and _same_scores(q, scale) and bool((lse.abs() <= limit).all())


def forward_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(q, k, mask, scale, softcap)
    lse = scores.logsumexp(dim=-1)
    return (_probabilities(scores, lse) @ v.to(lse.dtype)).to(q.dtype), lse


def backward_written_out(
    do: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    sinks: Tensor | None,  # [N, H]
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse = saved
    gradients = [x.new_empty(x.shape, dtype=lse.dtype) for x in (q, k, v)]
    for part in _parts(q, k):
        # One batch axis, for which overlapping windows are copied once.
        do_part, q_part, k_part, v_part, lse_part = (
            x[part].to(lse.dtype).flatten(0, 1) for x in (do, q, k, v, lse)
        )
        scores, bent = _scores(q_part, k_part, mask, scale, softcap)
        if sinks is None:
            p = _probabilities(scores, lse_part)
        else:
            lse_part = scores.logsumexp(dim=-1)
            share = share_of_keys(lse_part, sinks[part].flatten()[:, None])
            p = _probabilities(scores, lse_part).mul_(share[..., None])
        dp = do_part @ v_part.mT
        ds = aten._softmax_backward_data(dp, p, -1, p.dtype)
        if dlse is not None:
            ds.addcmul_(p, dlse[part].flatten(0, 1)[..., None])
        if bent is not None:
            ds.mul_(1 - bent.square())
        parts = (ds @ k_part).mul_(scale), (ds.mT @ q_part).mul_(scale), p.mT @ do_part
        for x, rows in zip(gradients, parts):
            x[part] = rows.view(x[part].shape)
    dq, dk, dv = gradients
    return dq, dk, dv


def share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left to the keys, whose lse this is, by sinks; 0 where there are no keys."""
    return torch.sigmoid(lse - sinks).masked_fill(lse == -math.inf, 0.0)


def add_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, H, Dv]` and lse `[B, H, T]` of keys, with a logit more in every row of a head.

    Without its gradient, `[B, H]` like the sinks themselves: that is `sinks_backward`.
    """
    sinks = sinks[..., None]
    share = share_of_keys(lse, sinks)
    o = (o * share.mT[..., None]).to(o.dtype)
    return o, torch.logaddexp(lse, sinks)


def sinks_backward(do: Tensor, dlse: Tensor | None, saved: Saved, sinks: Tensor) -> Tensor:
    """The gradient of `sinks [B, H]`, of o and lse after `add_sinks`."""
    lse = saved.lse
    delta = torch.einsum("bthd,bthd->bht", do.to(lse.dtype), saved.o.to(lse.dtype))
    if dlse is not None:
        delta = delta - dlse
    p = torch.exp(sinks[..., None] - lse).masked_fill(lse == -math.inf, 0.0)
    return -(p * delta).sum(dim=-1)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores under the mask, and with a soft cap the tanh that they are a multiple of."""
    dtype, bent = lse_dtype(q.dtype), None
    products = q.to(dtype) @ k.to(dtype).mT
    if softcap is not None:
        bent = products = products.mul_(scale / softcap).tanh_()
        scale = softcap
    scores = products * scale if mask is None else torch.add(mask, products, alpha=scale)
    return scores, bent


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax of each row, and 0 in rows of -inf, whose softmax is NaN."""
    p, blind = scores.softmax(dim=-1), lse == -math.inf
    if not blind.is_cpu or blind.any():
        p.masked_fill_(blind[..., None], 0.0)
    return p


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """All of N and H: on a CPU in parts of about PART_SCORES scores, or one head, for each thread."""
    N, H, rows, _ = q.shape
    heads = N * H
    if q.is_cpu:
        heads = torch.get_num_threads() * max(1, PART_SCORES // (rows * k.shape[2]))
    step_n, step_h = max(1, heads // H), min(heads, H)
    for n in range(0, N, step_n):
        for h in range(0, H, step_h):
            yield slice(n, n + step_n), slice(h, h + step_h)


def band(rows: int, window_size: int, like: Tensor) -> Tensor:
    """The additive mask `[R, R + W]`: 0 where r < s <= r + W, -inf elsewhere."""
    row = like.new_full((rows + window_size + 1,), -math.inf)
    row[1 : 1 + window_size] = 0.0
    # Each row has it one further to the right, which is one element more than a row is long.
    return row.repeat(rows)[:-rows].view(rows, rows + window_size)


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    """As many channels in each, zeros behind its own, and a last stride of 1; in place where that is so."""
    channels = max([x.size(-1) for x in tensors])
    if any([x.size(-1) < channels for x in tensors]):
        tensors = tuple(F.pad(x, (0, channels - x.size(-1))) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
