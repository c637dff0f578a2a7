"""`window_attn_with_kvcache` as a registered op. It has no backward: it is for generation."""

from lact_kernels.autograd.registration import register_op
from lact_kernels.autograd.window_attn import empty_outputs
from lact_kernels.eager import window_attn_with_kvcache as eager

UNLIMITED = 2**30  # no window; positions and windows add up within 32 bits


@register_op(
    "window_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens,"
    " SymInt? window_size, float softmax_scale, str backend) -> (Tensor o, Tensor lse)",
    empty_outputs,
    without_backward="{} has no backward: use lact_kernels.window_attn",
    batched=True,
)
def window_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, backend
):
    window_size = UNLIMITED if window_size is None else min(window_size, UNLIMITED)
    inputs = (q, k_cache, v_cache, cache_seqlens, window_size, softmax_scale)
    if backend == "triton":
        from lact_kernels.triton.window_attn.with_kvcache import window_attn_with_kvcache as launch

        return launch(*inputs)
    return eager.window_attn_with_kvcache(*inputs)
