"""`swap_lact_layers`: our layers in the place of the LaCT authors' in a model that exists."""

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

from torch import nn

from lact_kernels.compat.lact.bidirectional import BidirectionalLaCTSwiGLU
from lact_kernels.compat.lact.language_model import LaCTSWIGLULayer
from lact_kernels.compat.lact.projections import softplus
from lact_kernels.compat.lact.sliding_window import CausalLaCTSwiGLUWithSlidingWindowAttn
from lact_kernels.compat.lact.views import FastWeightGluMLPMultihead
from lact_kernels.layers import LaCTLayer
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend


class Kind(NamedTuple):
    """A layer of the authors, and how ours is made of it."""

    ours: type[nn.Module]
    parts: set[str]  # parameters and modules that every such layer has
    projections: set[str]  # modules of which nothing but the parameters goes over
    attributes: dict[str, str]  # of their layer, and the arguments that they were made of
    derived: Callable[[Any], dict[str, Any]]  # further arguments, from parameters
    norms: tuple[str, ...]


# The arguments of the language model's layer: all of ours but those that it does not have.
AUTHORS_OPTIONS = set(inspect.signature(LaCTLayer).parameters) - {
    "temporal_reduction",
    "backend",
    "device",
    "dtype",
}
_RENAMED = {"num_heads": "num_attn_heads", "num_fw_heads": "num_lact_heads"}
_FAST = {"w0", "w1", "w2"}


def _of_language_model(old: Any) -> dict[str, Any]:
    return {
        "lr_dim": old.lr_proj.out_features / (3 * old.num_fw_heads),
        "qkv_bias": old.qkv.bias is not None,
    }


def _of_views(old: Any) -> dict[str, Any]:
    head_dim, dh = old.w0.shape[1:]
    return {
        "head_dim": head_dim,
        "inter_multi": (dh + 0.5) / head_dim,  # times head_dim and rounded down: dh
        "bias": old.to_qkv.bias is not None,
        "base_lr": softplus(old.base_lr_inv),
        "use_gate_fn": hasattr(old, "gate_fn"),
    }


def _of_sliding_window(old: Any) -> dict[str, Any]:
    return {"ttt_scale_before_sum": hasattr(old, "ttt_scale_proj")}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_MINIMAL = ("dim", "head_dim", "inter_multi", "use_o_norm", "use_muon", "base_lr")
# A layer is of the first kind whose parts it has.
KINDS = (
    Kind(
        LaCTSWIGLULayer,
        _FAST | {"qkv", "o_proj", "lr_proj", "qk_scale", "qk_offset", "ttt_norm"},
        {"qkv", "o_proj", "lr_proj", "ttt_scale_proj", "momentum_proj.0"},
        _RENAMED
        | _same(*sorted(AUTHORS_OPTIONS - set(_RENAMED.values()) - {"lr_dim", "qkv_bias"})),
        _of_language_model,
        ("q_norm", "k_norm", "ttt_norm"),
    ),
    Kind(
        CausalLaCTSwiGLUWithSlidingWindowAttn,
        _FAST | {"to_qkv", "o_proj", "lr_proj", "o_norm", "qk_scale", "qk_offset"},
        {"to_qkv", "o_proj", "lr_proj", "ttt_scale_proj", "momentum_proj.0"},
        _same(*_MINIMAL, "attn_head_dim", "lact_chunk_size", "window_size", "use_momentum"),
        _of_sliding_window,
        ("o_norm",),
    ),
    Kind(
        BidirectionalLaCTSwiGLU,
        _FAST | {"to_qkv", "o_proj", "lr_proj", "o_norm"},
        {"to_qkv", "o_proj", "lr_proj"},
        _same(*_MINIMAL, "qk_l2_norm"),
        lambda old: {},
        ("o_norm",),
    ),
    Kind(
        FastWeightGluMLPMultihead,
        _FAST | {"to_qkv", "c_proj", "lr_fc", "o_norm"},
        {"to_qkv", "c_proj", "lr_fc", "gate_fn.0"},
        _same("dim", "num_heads", "muon_update_steps", "base_lr_inv"),
        _of_views,
        ("o_norm",),
    ),
)


def swap_lact_layers(model: nn.Module, *, backend: Backend = "auto") -> dict[str, nn.Module]:
    """Put our layer in the place of every layer of the LaCT authors in a model.

    These are found: `LaCTSWIGLULayer` of the language model, `FastWeightGluMLPMultihead` of novel views (and
    ZipMap's, with its gate), and the minimal implementations' `BidirectionalLaCTSwiGLU` and
    `CausalLaCTSwiGLUWithSlidingWindowAttn`. A layer is known by the names of its parts, wherever it stands;
    the authors' package is not needed. What its `forward` computes is not looked at: a copy that adds
    something under the same names and arguments loses it. A subclass with a forward of its own is refused.

    The new layers are called as the old ones were, have the very same parameters (nothing is copied,
    optimizers and tied weights go on) and the same state dict; hooks of layers and of their parts, and
    forwards that were set on an instance, stay with the old ones. All layers are examined before the first
    is replaced. A second call finds nothing to do.

        swap_lact_layers(model)

    What changes: Muon iterates in float16 or better instead of bfloat16; fast weights are float32
    whatever `fp32_states` says; padding and packed sequences (`cu_seqlens`) reach the fast weights of the
    language model's layer; bidirectional layers with Muon keep the weights that they update.

    Args:
        model: any module that contains such layers.
        backend: `"auto"`, `"triton"` or `"eager"`, for the new layers.

    Returns:
        The layers that were replaced, by their names in the model, in its order.

    Raises:
        NotImplementedError: a layer with another `ttt_loss_type`, `lr_parameterization` or number of
            learning rates than `LaCTLayer` has, with an option that ours does not have, and that is on,
            with arguments that ours is not called with, or of a subclass with a forward of its own.
        TypeError: `model` is no module.
        ValueError: `model` is itself such a layer, which has no place to put another one in, or a layer
            has parameters or buffers that ours does not know, projections with adapters, another norm
            than an RMS norm, or weights that accelerate has offloaded, or is what `torch.compile` returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_backend(backend)
    if _kind(model) is not None:
        raise ValueError("model is a LaCT layer itself: give the module that contains it")
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _kind(module) is not None
    }
    for name in found:
        if name.rpartition(".")[2] == "_orig_mod":
            raise ValueError(f"{name} is compiled: swap the layers before torch.compile")
    layers = {id(old): _swapped(name, old, _kind(old), backend) for name, old in found.items()}
    for name, old in found.items():
        model.set_submodule(name, layers[id(old)])
    return found


def _kind(module: nn.Module) -> Kind | None:
    """What a module of the authors is; None if it is none of theirs, or ours already."""
    if isinstance(module, (LaCTLayer, *(kind.ours for kind in KINDS))):
        return None
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    names = {name for name, _ in [*own, *module.named_children()]}
    return next((kind for kind in KINDS if kind.parts <= names), None)


def _swapped(name: str, old: nn.Module, kind: Kind, backend: Backend) -> nn.Module:
    """Our layer with the options and the parameters of an old one."""
    _check_parts(name, old, kind)
    _check_call(name, old, kind)
    options = _options(name, old, kind)
    try:
        new = kind.ours(**options, backend=backend, device="meta")
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    parameters = dict(old.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    if shapes != {n: tuple(p.shape) for n, p in new.named_parameters()}:
        raise ValueError(
            f"{name} must have the parameters of {_class(kind)} with the same options,"
            f" {[n for n, _ in new.named_parameters()]}, got {list(shapes)}"
        )
    more = sorted(old.state_dict().keys() - parameters.keys())
    if more:
        raise ValueError(f"{name} has the buffers {more}, which {_class(kind)} does not have")
    for path, parameter in parameters.items():
        parent, _, leaf = path.rpartition(".")
        new.get_submodule(parent).register_parameter(leaf, parameter)
    for norm in kind.norms:
        if hasattr(getattr(new, norm), "eps"):
            getattr(new, norm).eps = getattr(old, norm).eps
    return new.train(old.training)


def _check_parts(name: str, old: nn.Module, kind: Kind) -> None:
    """Nothing that an old layer's parts compute is lost when only their parameters go over."""
    if any(p.is_meta for p in old.parameters()) and hasattr(old, "_hf_hook"):
        raise ValueError(
            f"{name} has weights that accelerate keeps elsewhere until they are needed: swap the layers of"
            " a model in memory, and offload it then"
        )
    for path, module in old.named_modules():
        # Adapters and quantised layers have forwards of their own.
        if path in kind.projections and type(module).forward is not nn.Linear.forward:
            of = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"{name}.{path} must be a torch.nn.Linear, got {of}: swap the layers before adapters"
                " are added to them, and before they are quantised"
            )
    for norm in kind.norms:
        module = getattr(old, norm, None)
        if not isinstance(module, (nn.Identity, NoneType)) and not _is_rms_norm(module):
            of = type(module).__qualname__
            raise ValueError(f"{name}.{norm} must be an RMS norm with an eps, got {of}")


def _is_rms_norm(module: nn.Module) -> bool:
    """PyTorch's, or that of a library, whose name says so."""
    return "RMSNorm" in type(module).__name__ and isinstance(getattr(module, "eps", None), float)


def _check_call(name: str, old: nn.Module, kind: Kind) -> None:
    """Ours takes the arguments that the old layer takes, which nobody has derived another one from."""
    given, taken = (inspect.signature(x.forward).parameters for x in (type(old), kind.ours))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [x.name for x in given.values() if x.name not in taken and x.kind not in variadic]
    if more:
        raise NotImplementedError(
            f"{name} is called with {more}, which {_class(kind)} does not take: it is a layer of another kind"
        )
    owners = [x for x in type(old).__mro__ if "forward" in vars(x) and x is not nn.Module]
    if len(owners) > 1:
        raise NotImplementedError(
            f"{name} is a {type(old).__qualname__}, whose forward is not that of its base class"
            f" {owners[1].__qualname__}: what it adds would be lost"
        )


def _class(kind: Kind) -> str:
    return LaCTLayer.__name__ if kind.ours is LaCTSWIGLULayer else kind.ours.__name__


def _options(name: str, old: nn.Module, kind: Kind) -> dict[str, Any]:
    """The arguments of our layer."""
    missing = [attribute for attribute in kind.attributes if not hasattr(old, attribute)]
    if missing:
        raise ValueError(
            f"{name} has the parameters of a LaCT layer, but not its attributes {missing}"
        )
    known = inspect.signature(kind.ours).parameters
    given = inspect.signature(type(old)).parameters.keys()
    for option in sorted(given - known - kind.attributes.keys()):
        value = getattr(old, option, None)
        if value and isinstance(value, (bool, int, float, str)):
            raise NotImplementedError(
                f"{name} has the option {option}={value!r}, which {_class(kind)} does not have"
            )
    options = {option: getattr(old, attribute) for attribute, option in kind.attributes.items()}
    options |= kind.derived(old)
    return {option: value for option, value in options.items() if option in known}
