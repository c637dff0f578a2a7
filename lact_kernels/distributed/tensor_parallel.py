"""Tensor parallelism: each rank has some of the heads of a `LaCTLayer`.

    model = parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
    model = fully_shard(model, mesh=mesh["dp"])                                         (if wanted, after it)

Parameters are DTensors with the names and shapes of before, so that `torch.distributed.checkpoint` loads
them on any number of ranks. A layer's own code runs on plain tensors, those of its rank's heads:

    x, on all ranks        q, k, v, rates, scale: of this rank's heads         gradients of x are summed
    heads                  attention and fast weights                          nothing to exchange
    o_proj, C/n columns    a part of every output                              outputs are summed
"""

import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.func import functional_call

from lact_kernels.layers import LaCTLayer
from lact_kernels.layers.mlp import SwiGLUMLP

# qkv has all rows of q before those of k and v: a rank stores others than it needs, see `_rows_of_heads`.
_PLACEMENTS = {
    "qkv.weight": Shard(0),
    "qkv.bias": Shard(0),
    "q_norm.weight": Shard(0),
    "k_norm.weight": Shard(0),
    "o_proj.weight": Shard(1),
    "w0": Shard(0),
    "w0.w_left": Shard(0),
    "w0.w_right": Shard(0),
    "w1": Shard(0),
    "w2": Shard(0),
    "w2.w_left": Shard(0),
    "w2.w_right": Shard(0),
    "lr_proj.weight": Shard(0),
    "lr_proj.bias": Shard(0),
    "qk_scale": Shard(0),
    "qk_offset": Shard(0),
    "ttt_scale_proj.weight": Shard(0),
    "ttt_scale_proj.bias": Shard(0),
    "ttt_norm.weight": Replicate(),
    "momentum_proj.0.weight": Shard(0),
    "momentum_proj.0.bias": Shard(0),
    "temporal_conv.weight": Replicate(),
    "temporal_conv.bias": Replicate(),
}


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """What `parallelize_module` needs to know of a model: how to cut each of its LaCT layers and MLPs.

    Every `LaCTLayer` is cut by heads, every `SwiGLUMLP` by its hidden channels, wherever they stand. All
    else (embeddings, norms, convolutions, heads of the vocabulary) stays as it is, and computes the same
    on all ranks: they must be given the same inputs, and the same seed where something is random.

    An optimizer then has DTensors and plain tensors, which its `foreach` and `fused` implementations do
    not take together, the default on a GPU among them: give it a group of parameters for each kind, or
    `foreach=False`. After `fully_shard` all are DTensors, and there is nothing to do. `clip_grad_norm_`
    fails in both cases. The norm is that of the norms (`get_total_norm`, `full_tensor`) of the kinds, that
    is, of the parameters of each `device_mesh` or none, and `clip_grads_with_norm_` scales each.

    Args:
        model: any module, itself a LaCT layer or an MLP too.

    Returns:
        A style for the name of each module. The number of ranks must divide the heads of both branches,
        and the hidden channels of the MLPs.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, LaCTLayer):
            plan[name] = HeadParallel()
        elif isinstance(module, SwiGLUMLP):
            prefix = f"{name}." if name else ""
            plan[prefix + "gate_proj"] = ColwiseParallel()
            plan[prefix + "up_proj"] = ColwiseParallel()
            plan[prefix + "down_proj"] = RowwiseParallel()
    return plan


class HeadParallel(ParallelStyle):
    """The n ranks of a mesh have a part of the heads of a `LaCTLayer` each, of both branches.

    The layer is changed in place. It is called as before, with the same `hidden_states` on all ranks,
    plain or as a replicated DTensor, and returns the same plain tensor on all of them. A `LaCTCache`
    keeps what belongs to the heads of its rank. `num_attn_heads` and `num_lact_heads` become those of the
    rank, and `device_mesh` is the mesh. Sums over the ranks are taken in the dtype of what is summed, as in
    `RowwiseParallel`: the outputs in that of `o_proj`, those of `attn_qk_norm` in float32 (float64 for
    float64).

    Parameters become DTensors over the mesh. Their shapes, state dict and gradients, as whole tensors,
    are those of the layer on one process. `ttt_norm` and the convolution of `temporal_reduction` are on
    all ranks, all others are sharded. In each call the rows of `qkv`, which the ranks store in order, go
    to the ranks that have their heads: 2 all-to-alls of `3 C^2 / n` elements.

    `fully_shard` comes after this, on the layer or what contains it, and not on parts of the layer.

    Raises (from `parallelize_module`, before the layer is changed):
        TypeError: the module is no `LaCTLayer`.
        ValueError: a mesh that is not 1-D, a layer whose heads its ranks do not divide, or one that is
            distributed already or has parameters of its own.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, device_mesh)
        n = device_mesh.size()
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name)
            if norm is not None:
                setattr(module, name, _ChannelParallelRMSNorm(norm, device_mesh))
        for name, parameter in list(module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            sharded = distribute_tensor(
                parameter, device_mesh, [_PLACEMENTS[name]], src_data_rank=self.src_data_rank
            )
            module.get_submodule(path).register_parameter(
                leaf, nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            )
        module.num_attn_heads //= n
        module.num_lact_heads //= n
        module.device_mesh = device_mesh
        module.o_proj.register_forward_hook(lambda _, inputs, output: _summed(output, device_mesh))
        vars(module)["_own_forward"] = _OwnForward(module)  # no submodule: it contains the layer
        module.__class__ = _head_parallel_class(type(module))
        return module


class _HeadParallelMixin:
    """Runs the forward of the class behind it on the heads of this rank."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        x, mesh = hidden_states, self.device_mesh
        if isinstance(x, DTensor):
            if x.device_mesh != mesh or not x.placements[0].is_replicate():
                raise ValueError(
                    f"hidden_states must be replicated over {mesh}, got a DTensor of"
                    f" {x.placements} over {x.device_mesh}"
                )
            x = x.to_local()
        if isinstance(x, Tensor):
            x = _shared(x, mesh)
        gradients = torch.is_grad_enabled()
        # Nothing can be redistributed in inference mode.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            parameters = {
                f"layer.{name}": _of_this_rank(name, parameter, mesh)
                for name, parameter in self.named_parameters()
            }
        return functional_call(self._own_forward, parameters, (x, *args), kwargs)

    def extra_repr(self) -> str:
        mesh = self.device_mesh
        return f"{super().extra_repr()}, rank {mesh.get_local_rank()} of {mesh.size()}"


class _OwnForward(nn.Module):
    """The forward that a layer has behind the mixin, as a module: calling the layer would run its hooks."""

    def __init__(self, layer: _HeadParallelMixin):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return super(_HeadParallelMixin, self.layer).forward(*args, **kwargs)


@functools.cache
def _head_parallel_class(cls: type[LaCTLayer]) -> type[LaCTLayer]:
    return type(f"HeadParallel{cls.__name__}", (_HeadParallelMixin, cls), {})


class _ChannelParallelRMSNorm(nn.RMSNorm):
    """`norm`, over channels of which each rank has a part: sums of squares are added over the ranks.

    Computed in float32 (float64 for float64 inputs) and rounded once.
    """

    def __init__(self, norm: nn.RMSNorm, device_mesh: DeviceMesh):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight = norm.weight
        self.device_mesh = device_mesh

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        squares = wide.square().sum(dim=-1, keepdim=True)
        # One sum for all ranks, each of which uses it for its own channels.
        squares = _shared(_summed(squares, self.device_mesh), self.device_mesh)
        factor = torch.rsqrt(squares / self.normalized_shape[0] + self.eps)
        return (wide * factor * self.weight).to(x.dtype)


def _shared(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, which is the same on all ranks and used by each in its own way: gradients are summed."""
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return x.to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' x. It is used in the same way by all, and so its gradient is that of x."""
    x = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local()


def _of_this_rank(name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> Tensor:
    """What this rank needs of a parameter, as a plain tensor that passes its gradient on."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
        raise RuntimeError(
            f"{name} must be a DTensor over {mesh} while the layer is called: apply fully_shard to the"
            " layer or what contains it, not to parts of it"
        )
    if name in ("qkv.weight", "qkv.bias"):
        return _rows_of_heads(parameter)
    if parameter.placements[0].is_replicate():
        # Each rank's gradient is that of its heads. `redistribute` is where the backward sums them.
        shared = parameter.redistribute(placements=[Replicate()])
        return shared.to_local(grad_placements=[Partial()])
    return parameter.to_local()


def _rows_of_heads(parameter: DTensor) -> Tensor:
    """Of `[3C, ...]`, which is sharded as it lies, this rank's rows of q, of k and of v: `[3C/n, ...]`."""
    # Only an axis that is not sharded can be cut into three: meanwhile columns are, where there are any.
    between = Shard(1) if parameter.ndim == 2 else Replicate()
    thirds = parameter.redistribute(placements=[between]).unflatten(0, (3, -1))
    return thirds.redistribute(placements=[Shard(1)]).to_local().flatten(0, 1)


def _check(layer: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(layer, LaCTLayer):
        raise TypeError(f"HeadParallel is for a LaCTLayer, got {type(layer).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have one dimension, got {mesh.ndim}, {mesh}: choose one by its name,"
            " device_mesh['tp']"
        )
    names = dict(layer.named_parameters())
    distributed = [name for name, parameter in names.items() if isinstance(parameter, DTensor)]
    if distributed:
        raise ValueError(
            f"the layer is distributed already ({distributed[0]} is a DTensor): HeadParallel is applied"
            " once, and before fully_shard"
        )
    unknown = [name for name in names if name not in _PLACEMENTS]
    if unknown:
        raise ValueError(f"the layer has parameters that no LaCTLayer has: {unknown}")
    for name in ("num_attn_heads", "num_lact_heads"):
        heads = getattr(layer, name)
        if heads % mesh.size():
            raise ValueError(
                f"{name} must be divisible by the {mesh.size()} ranks of device_mesh, got {heads}"
            )
