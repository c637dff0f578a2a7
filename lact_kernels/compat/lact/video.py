"""The functions of LaCT's autoregressive video models, `lact_ar_video/minVid/models/blocks`.

In training a video is noisy and clean pieces in turns: each clean piece updates the fast weights, through
which it goes itself, and so does the noisy one behind it, which is the next piece of the video. When a video
is generated, pieces come one by one (`..._inference`), and only finished ones update.
"""

import torch.nn.functional as F
from torch import Tensor

from lact_kernels.compat.lact.rows import Rows
from lact_kernels.compat.lact.views import newton_schulz
from lact_kernels.core.ttt_plan import Apply, TTTPlan, Update
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.ttt import ttt
from lact_kernels.ops.ttt_apply import ttt_apply

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def ar_fast_weight_swish_glu_weight_norm_mini_batch(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    w_scale: float,
    num_repeat: int = 1,
    mini_batch_size: int = -1,
    update_length: int = -1,
    update_every: int = -1,
    use_moun: bool = False,
    num_moun_iters: int = 3,
    weight_norm: bool = True,
    *,
    backend: Backend = "auto",
) -> Results:
    """A whole video at once, for training: `lact_kernels.ttt`, called as the authors' function is.

    The first `update_every - mini_batch_size` queries, which are noisy, go through the initial weights. From
    there on, each `update_every` tokens begin with `mini_batch_size` clean ones, which update the weights;
    then all of them go through the new weights. With `num_repeat` the updates of the whole video are done
    as often, one pass behind the other, and the outputs are those of the last.

    Args:
        w0: initial gate weights `[b*h, dh, dk]`; float16, bfloat16 or float32. They are cast to float32, and
            so are all updates; gradients come back in the dtype given. Below, float64 for q, k, v and the
            weights together is possible too.
        w1: initial output weights `[b*h, dv, dh]`.
        w2: initial up weights `[b*h, dh, dk]`.
        q: queries `[b*h, l, dk]`. Cast to the dtype of v, in which all products are taken.
        k: keys `[b*h, l, dk]`. Cast to the dtype of v.
        v: values `[b*h, l, dv]`; float16, bfloat16, float32 or float64.
        lr0: learning rate of each key for w0, `[b*h, l, 1]`, of any floating dtype; cast to float32.
        lr1: the same for w1.
        lr2: the same for w2.
        w_scale: factor on all rates.
        num_repeat: passes over the video, at least 1.
        mini_batch_size: tokens of a clean piece; -1 is `update_length`.
        update_length: where updates end: none begins at this token or behind it. -1 is l.
        update_every: tokens from one update to the next, at least `mini_batch_size`; -1 is twice that.
        use_moun: orthogonalise each update by Newton-Schulz steps.
        num_moun_iters: how many of these.
        weight_norm: bring the rows of the weights back to their initial norms after each update.
        backend: as in `ttt`.

    Returns:
        The outputs `[b*h, l, dv]` in the dtype of v, 0 where a piece is behind the last update's, and the new
        w0, w1 and w2 in the layout given, float32 (float64 for float64). Gradients flow to every tensor,
        through the norms, too.

    What differs from the authors' function:
        Precision, as in `fast_weight_swish_glu_weight_norm_mini_batch_apply`. Learning rates per channel (a
        last axis other than 1), and sizes by which theirs takes slices that do not fit, are errors.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument.

    Source: arXiv 2505.23884, section 3; the signature is that of github.com/a1600012888/LaCT at 1f84d47.
    """
    options = _options(use_moun, num_moun_iters, weight_norm, backend)
    num_repeat = checks.check_positive_int("num_repeat", num_repeat)
    rows = _scaled_rows((w0, w1, w2), (q, k, v), (lr0, lr1, lr2), w_scale, any_queries=False)
    T = k.shape[1]
    update_length = _size("update_length", update_length, T, at_most=T)
    mini_batch_size = _size("mini_batch_size", mini_batch_size, update_length)
    update_every = _size("update_every", update_every, 2 * mini_batch_size)
    if update_every < mini_batch_size:
        raise ValueError(
            f"update_every must be at least mini_batch_size = {mini_batch_size}, got {update_every}"
        )
    first = min(update_every - mini_batch_size, T)
    starts = range(first, update_length, update_every) if update_every else ()
    updates = [Update(i, min(i + mini_batch_size, T)) for i in starts]
    applies = [Apply(i, min(i + update_every, T)) for i in starts]
    last = [step for pair in zip(updates, applies) for step in pair]
    noisy = [Apply(0, first)] if first else []
    plan = TTTPlan(noisy + updates * (num_repeat - 1) + last)
    o, *weights = _run(rows, plan, options)
    done = applies[-1].stop if applies else first
    return F.pad(o, (0, 0, 0, T - done)), *weights


def ar_fast_weight_swish_glu_weight_norm_mini_batch_inference(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    w_scale: float,
    num_repeat: int = 1,
    mini_batch_size: int = -1,
    do_update: bool = False,
    use_moun: bool = False,
    num_moun_iters: int = 3,
    weight_norm: bool = True,
    *,
    backend: Backend = "auto",
) -> Results:
    """One piece of a video that is being generated: all queries through the weights as they have become.

    Args:
        w0, w1, w2, k, v, lr0, lr1, lr2, w_scale, use_moun, num_moun_iters, weight_norm, backend: as in
            `ar_fast_weight_swish_glu_weight_norm_mini_batch`.
        q: queries `[b*h, lq, dk]`. Cast to the dtype of v.
        num_repeat: updates, one behind the other, at least 1.
        mini_batch_size: the first so many keys, which are clean, update the weights. -1 is all.
        do_update: whether there is an update. Without one no key is read.

    Returns:
        The outputs `[b*h, lq, dv]` in the dtype of v, and w0, w1 and w2 for the next call: after an update
        float32 (float64 for float64), without one as they were given. Gradients, differences from the
        authors' function, errors and source are those of `ar_fast_weight_swish_glu_weight_norm_mini_batch`.
        The norms that the weights are brought back to are those of the weights given, as in theirs.
    """
    options = _options(use_moun, num_moun_iters, weight_norm, backend)
    num_repeat = checks.check_positive_int("num_repeat", num_repeat)
    checks.check_flag("do_update", do_update)
    given = (w0, w1, w2)
    rows = _scaled_rows(given, (q, k, v), (lr0, lr1, lr2), w_scale, any_queries=True)
    T = k.shape[1]
    mini_batch_size = _size("mini_batch_size", mini_batch_size, T, at_most=T)
    if not do_update or T == 0:
        return ttt_apply(rows.tokens[0], *rows.weights, backend=backend)[:, :, 0], *given
    plan = TTTPlan([Update(0, mini_batch_size)] * num_repeat + [Apply(0)])
    return _run(rows, plan, options)


def _options(use_moun, num_moun_iters, weight_norm, backend) -> dict:
    """Those of `ttt`."""
    checks.check_flags(use_moun=use_moun, weight_norm=weight_norm)
    checks.check_backend(backend)
    steps = newton_schulz("num_moun_iters", num_moun_iters)
    return {"muon": use_moun and steps, "weight_norm": weight_norm, "backend": backend}


def _scaled_rows(weights, tokens, rates, w_scale, any_queries: bool) -> Rows:
    w_scale = checks.check_finite_number("w_scale", w_scale)
    rows = Rows.of(weights, tokens, rates, any_queries=any_queries)
    return rows._replace(rates=tuple(lr * w_scale for lr in rows.rates))


def _size(name: str, value: int, default: int, at_most: int | None = None) -> int:
    """A number of tokens; -1 is the default."""
    value = checks.check_int(name, value)
    if value == -1:
        return default
    if value < 1 or (at_most is not None and value > at_most):
        expected = "at least 1" if at_most is None else f"from 1 to the {at_most} tokens"
        raise ValueError(f"{name} must be {expected}, or -1, got {value}")
    return value


def _run(rows: Rows, plan: TTTPlan, options: dict) -> Results:
    o, state = ttt(*rows.tokens, *rows.weights, *rows.rates, plan, return_state=True, **options)
    return o[:, :, 0], *(w[:, 0] for w in state.weights)
