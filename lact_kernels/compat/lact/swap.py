"""`swap_lact_layers`: our layers in the place of the LaCT authors' in a model that exists."""

import inspect

from torch import nn

from lact_kernels.compat.lact.language_model import LaCTSWIGLULayer
from lact_kernels.layers import LaCTLayer
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend

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
