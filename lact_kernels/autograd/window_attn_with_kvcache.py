"""`window_attn_with_kvcache` as a registered op. It has no backward: it is for generation."""

from lact_kernels.autograd.registration import register_op
from lact_kernels.autograd.window_attn import empty_outputs
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.eager import window_attn_with_kvcache as eager

UNLIMITED = 2**30  # as many tokens before a query; positions and windows add up within 32 bits


@register_op(
    "window_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens,"
    " SymInt? left, SymInt? right, float softmax_scale, float? softcap, Tensor? sinks, str backend)"
    " -> (Tensor o, Tensor lse)",
    empty_outputs,
    without_backward="{} has no backward: use lact_kernels.window_attn",
    batched=True,
)
def window_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens, left, right, softmax_scale, softcap, sinks, backend
):
    options = AttentionOptions(left, right, softmax_scale, softcap).within(q.shape[1], UNLIMITED)
    inputs = (q, k_cache, v_cache, cache_seqlens, options, sinks)
    if backend == "triton":
        from lact_kernels.triton.window_attn.with_kvcache import window_attn_with_kvcache as launch

        return launch(*inputs)
    return eager.window_attn_with_kvcache(*inputs)
