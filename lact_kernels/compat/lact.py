"""What the LaCT authors' `lact_llm/lact_model` offers: two causal functions, and the layer of a model.

`block_causal_lact_swiglu` and `prenorm_block_causal_lact_swiglu` are called as theirs are;
`swap_lact_layers` puts ours in the place of the layers of a model that exists.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lact_kernels.layers import LaCTCache, LaCTLayer
from lact_kernels.layers.padding import mask_of_last
from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import block_causal_ttt
from lact_kernels.ops.checks import Backend

__all__ = [
    "LaCTSWIGLULayer",
    "block_causal_lact_swiglu",
    "prenorm_block_causal_lact_swiglu",
    "swap_lact_layers",
]


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
    """Each of the b*h rows is a batch row of one head, with weights of its own. These are views."""
    _check_inputs(weights, tokens, lrs, momentum)
    chunk_size = checks.check_count("chunk_size", chunk_size)
    checks.check_flag("use_muon", use_muon)
    dtype = tokens[2].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype)[:, :, None] for x in tokens)  # [b*h, l, 1, d]
    w0, w1, w2 = (w.to(wide)[:, None] for w in weights)  # [b*h, 1, rows, columns]
    lr0, lr1, lr2 = (lr.to(wide) for lr in lrs)  # [b*h, l, 1]
    o = block_causal_ttt(
        q,
        k,
        v,
        w0,
        w1,
        w2,
        lr0,
        lr1,
        lr2,
        chunk_size=chunk_size,
        momentum=None if momentum is None else momentum.to(wide),
        muon=use_muon,
        prenorm=prenorm,
        backend=backend,
    )
    return o[:, :, 0]


def _check_inputs(weights, tokens, lrs, momentum) -> None:
    """Types, dtypes, devices and shapes, in the layout of this module."""
    q, k, v = tokens
    tensors = dict(zip(("v", "q", "k", "w0", "w1", "w2"), (v, q, k, *weights)))
    rates = dict(zip(("lr0", "lr1", "lr2"), lrs))
    if momentum is not None:
        rates["momentum"] = momentum
    for name, x in (tensors | rates).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}")
        if x.ndim != 3:
            raise ValueError(f"{name} must have three axes, b*h first, got {tuple(x.shape)}")
        if x.device != v.device:
            raise ValueError(f"{name} must be on {v.device} like v, got {x.device}")

    double = v.dtype == torch.float64
    for name, x in tensors.items():
        if (x.dtype == torch.float64) != double:
            expected = "float64" if double else "float32, bfloat16 or float16"
            raise TypeError(f"{name} must be {expected} as v is {v.dtype}, got {x.dtype}")

    rows, l, dk = q.shape
    dv, dh = v.shape[2], tensors["w0"].shape[1]
    shapes = {
        "k": ("[b*h, l, dk]", (rows, l, dk)),
        "v": ("[b*h, l, dv]", (rows, l, dv)),
        "w0": ("[b*h, dh, dk]", (rows, dh, dk)),
        "w1": ("[b*h, dv, dh]", (rows, dv, dh)),
        "w2": ("[b*h, dh, dk]", (rows, dh, dk)),
    }
    for name, (layout, shape) in shapes.items():
        _check_shape(name, tensors[name], layout, shape)
    for name, x in rates.items():
        if x.shape[2] != 1:
            raise ValueError(
                f"{name} must have one value per token, [b*h, l, 1] = {(rows, l, 1)}: a last axis"
                f" other than 1 (values per channel) is not supported, got {tuple(x.shape)}"
            )
        _check_shape(name, x, "[b*h, l, 1]", (rows, l, 1))


def _check_shape(name: str, x: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have the shape {layout} = {shape}, got {tuple(x.shape)}")


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


# The parameters and modules that every layer of the authors has.
_PARTS = {"qkv", "o_proj", "w0", "w1", "w2", "lr_proj", "qk_scale", "qk_offset", "ttt_norm"}
_PROJECTIONS = {"qkv", "o_proj", "lr_proj", "ttt_scale_proj", "momentum_proj.0"}
# The arguments of their layer: all of ours but those that it does not have.
AUTHORS_OPTIONS = set(inspect.signature(LaCTLayer).parameters) - {
    "temporal_reduction",
    "backend",
    "device",
    "dtype",
}
# Attributes of their layer, and the arguments that they were made of. Two more follow from parameters.
_RENAMED = {"num_heads": "num_attn_heads", "num_fw_heads": "num_lact_heads"}
_ATTRIBUTES = _RENAMED | {
    name: name for name in sorted(AUTHORS_OPTIONS - set(_RENAMED.values()) - {"lr_dim", "qkv_bias"})
}


def swap_lact_layers(model: nn.Module, *, backend: Backend = "auto") -> dict[str, nn.Module]:
    """Put our layer in the place of every layer of the LaCT authors in a model.

    A layer is known by the names of its parts, wherever it stands; the authors' package is not needed.
    The new layers are called as the old ones were, have the very same parameters (nothing is copied,
    optimizers and tied weights go on) and the same state dict; hooks of layers and of their parts, and
    forwards that were set on an instance, stay with the old ones. All layers are examined before the first
    is replaced. A second call finds nothing to do.

        swap_lact_layers(model)

    What changes: Muon iterates in float16 or better instead of bfloat16; fast weights are float32
    whatever `fp32_states` says; padding and packed sequences (`cu_seqlens`) reach the fast weights.

    Args:
        model: any module that contains such layers.
        backend: `"auto"`, `"triton"` or `"eager"`, for the new layers.

    Returns:
        The layers that were replaced, by their names in the model, in its order.

    Raises:
        NotImplementedError: a layer with another `ttt_loss_type`, `lr_parameterization` or number of
            learning rates than `LaCTLayer` has.
        TypeError: `model` is no module.
        ValueError: `model` is itself such a layer, which has no place to put another one in, or a layer
            has parameters that `LaCTLayer` does not know, projections with adapters, or weights that
            accelerate has offloaded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_backend(backend)
    if _is_lact_layer(model):
        raise ValueError("model is a LaCT layer itself: give the module that contains it")
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_lact_layer(module)
    }
    layers = {id(old): _swapped(name, old, backend) for name, old in found.items()}
    for name, old in found.items():
        model.set_submodule(name, layers[id(old)])
    return found


def _is_lact_layer(module: nn.Module) -> bool:
    if isinstance(module, LaCTLayer):
        return False
    own = [*module.named_parameters(recurse=False), *module.named_children()]
    return _PARTS <= {name for name, _ in own}


def _swapped(name: str, old: nn.Module, backend: Backend) -> LaCTSWIGLULayer:
    """Our layer with the options and the parameters of an old one."""
    if any(p.is_meta for p in old.parameters()) and hasattr(old, "_hf_hook"):
        raise ValueError(
            f"{name} has weights that accelerate keeps elsewhere until they are needed: swap the layers of"
            " a model in memory, and offload it then"
        )
    for path, module in old.named_modules():
        # Of a module with a forward of its own (an adapter, a quantised layer) only parameters would go over.
        if path in _PROJECTIONS and type(module).forward is not nn.Linear.forward:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"{name}.{path} must be a torch.nn.Linear, got {kind}: swap the layers before adapters"
                " are added to them, and before they are quantised"
            )
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(old, attribute)]
    if missing:
        raise ValueError(
            f"{name} has the parameters of a LaCT layer, but not its attributes {missing}"
        )
    options = {option: getattr(old, attribute) for attribute, option in _ATTRIBUTES.items()}
    options["lr_dim"] = old.lr_proj.out_features / (3 * old.num_fw_heads)
    options["qkv_bias"] = old.qkv.bias is not None
    try:
        new = LaCTSWIGLULayer(**options, backend=backend, device="meta")
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    parameters = dict(old.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    if shapes != {n: tuple(p.shape) for n, p in new.named_parameters()}:
        raise ValueError(
            f"{name} must have the parameters of LaCTLayer with the same options,"
            f" {[n for n, _ in new.named_parameters()]}, got {list(shapes)}"
        )
    for path, parameter in parameters.items():
        parent, _, leaf = path.rpartition(".")
        new.get_submodule(parent).register_parameter(leaf, parameter)
    for norm in ("q_norm", "k_norm", "ttt_norm"):
        if getattr(new, norm) is not None:
            getattr(new, norm).eps = getattr(old, norm).eps
    return new.train(old.training)
