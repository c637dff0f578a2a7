"""The functions and the layer of the LaCT authors' language model, `lact_llm/lact_model`."""

from typing import Any

from torch import Tensor

from lact_kernels.compat.lact.rows import Rows
from lact_kernels.layers import LaCTCache, LaCTLayer
from lact_kernels.layers.padding import mask_of_last
from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import block_causal_ttt
from lact_kernels.ops.checks import Backend


def block_causal_lact_swiglu(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    chunk_size: int = 2048,
    use_muon: bool = False,
    momentum: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`lact_kernels.block_causal_ttt` with post-norm, called as the authors' function of this name is.

    Batch and heads are one axis, `b*h`. Inputs and output are read and written in this layout:
    nothing is copied but to change a dtype.

    Args:
        w0: initial gate weights `[b*h, dh, dk]`; float16, bfloat16 or float32. They are cast to
            float32, and so are all updates; gradients come back in the dtype given. Below, float64
            for q, k, v and the weights together is possible too.
        w1: initial output weights `[b*h, dv, dh]`.
        w2: initial up weights `[b*h, dh, dk]`.
        q: queries `[b*h, l, dk]`. Cast to the dtype of v, in which all products are taken.
        k: keys `[b*h, l, dk]`. Cast to the dtype of v.
        v: values `[b*h, l, dv]`; float16, bfloat16, float32 or float64.
        lr0: learning rate of each token for w0, `[b*h, l, 1]`, of any floating dtype; cast to float32.
        lr1: the same for w1.
        lr2: the same for w2.
        chunk_size: tokens from one update to the next, at least 1. The last chunk may be shorter.
            Its queries are answered and its keys train nothing.
        use_muon: orthogonalise each step by five Newton-Schulz iterations.
        momentum: `[b*h, l, 1]`, of any floating dtype; cast to float32. Its mean over a
            chunk is the share of the last step kept.
        backend: as in `block_causal_ttt`.

    Returns:
        The outputs `[b*h, l, dv]` in the dtype of v. Gradients flow to every tensor.

    What differs from the authors' function:
        Precision. Theirs takes every product in bfloat16 on a GPU, and iterates Newton-Schulz in
        bfloat16 everywhere, which changes the outputs by several percent. Here products take the
        dtype of v and accumulate in float32, and Newton-Schulz is more precise (see
        `block_causal_ttt`). An active `torch.autocast` changes neither.
        Learning rates per channel (a last axis other than 1), and rates or momentum that broadcast
        over `b*h`, which theirs accepts, are errors.
        Their fused variant (`ttt_operation_fused_kernel.py`) is the same function without Muon only:
        with Muon it orthogonalises the steps of w0 and w2 stacked into one matrix, while here, as in
        their `ttt_operation.py`, each of the three steps is orthogonalised on its own.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument.

    Source: arXiv 2505.23884; the signature is that of github.com/a1600012888/LaCT at 1f84d47.
    """
    weights, tokens = (w0, w1, w2), (q, k, v)
    options = (chunk_size, use_muon, momentum, False, backend)
    return _block_causal_lact_swiglu(weights, tokens, (lr0, lr1, lr2), *options)


def prenorm_block_causal_lact_swiglu(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    chunk_size: int = 2048,
    use_muon: bool = False,
    momentum: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`block_causal_lact_swiglu` with pre-norm: steps add up in weights that are not normalised.

    Arguments, result, errors and differences from the authors' function of this name are the same.
    """
    weights, tokens = (w0, w1, w2), (q, k, v)
    options = (chunk_size, use_muon, momentum, True, backend)
    return _block_causal_lact_swiglu(weights, tokens, (lr0, lr1, lr2), *options)


def _block_causal_lact_swiglu(
    weights, tokens, lrs, chunk_size, use_muon, momentum, prenorm, backend
):
    checks.check_flag("use_muon", use_muon)
    rows = Rows.of(weights, tokens, lrs, momentum)
    o = block_causal_ttt(
        *rows.tokens,
        *rows.weights,
        *rows.rates,
        chunk_size=checks.check_count("chunk_size", chunk_size),
        momentum=rows.momentum,
        muon=use_muon,
        prenorm=prenorm,
        backend=backend,
    )
    return o[:, :, 0]


class LaCTSWIGLULayer(LaCTLayer):
    """`lact_kernels.LaCTLayer`, called as the LaCT authors' layer of this name is."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LaCTCache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, LaCTCache | None]:
        """`(outputs, None, past_key_values)`.

        Args:
            hidden_states: `[B, T, C]`.
            attention_mask: `[B, T]`, or with the tokens of earlier calls before them; 0 where there is
                no token. It reaches both branches; theirs sees padding in the fast weights.
            past_key_values: a `LaCTCache`, or None. Theirs cannot carry fast weights.
            output_attentions: False.
            use_cache: has no effect; what is given is used.
            kwargs: `cu_seqlens` as in `LaCTLayer`; others have no effect.

        Raises:
            NotImplementedError: `output_attentions`.
            TypeError: a cache of another kind, or an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or value.
        """
        if output_attentions:
            raise NotImplementedError("output_attentions is not supported: no probabilities exist")
        if past_key_values is not None and not isinstance(past_key_values, LaCTCache):
            raise TypeError(
                "past_key_values must be a lact_kernels.LaCTCache or None, got"
                f" {type(past_key_values).__name__}: call the model with use_cache=False"
            )
        if attention_mask is not None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            attention_mask = mask_of_last(attention_mask, hidden_states, past)
        cu_seqlens = kwargs.get("cu_seqlens")
        o = super().forward(hidden_states, attention_mask, past_key_values, cu_seqlens)
        return o, None, past_key_values
