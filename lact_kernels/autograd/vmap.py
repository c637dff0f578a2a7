"""`torch.func.vmap` of the registered ops: as more rows of the batch, or as one call for each entry."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

OPAQUE = "history"  # what an op leaves to its backward under this name, in a layout of its own
PACKED = ("cu_seqlens", "plan")  # how an op is told of packed sequences


def vmap_rule(overload: torch._ops.OpOverload, batched: bool) -> Callable:
    """How an op is called for all N entries of an axis, as `torch.library.register_vmap` takes it.

    With `batched` the batch is the first axis of every tensor, and its rows know nothing of each other. Then
    the axis goes into the batch, unless sequences are packed.
    """
    arguments = [argument.name for argument in overload._schema.arguments]
    results = [result.name for result in overload._schema.returns]
    # A history is of all entries at once where the inputs of the forward had the axis.
    first_input = arguments.index(OPAQUE) + 1 if OPAQUE in arguments else 0

    def rule(info, in_dims, *args):
        borders = (x for name, x in zip(arguments, args) if name.startswith(PACKED))
        inputs_have_axis = any(dim is not None for dim in tree_leaves(in_dims[first_input:]))
        if batched and inputs_have_axis and all(x is None for x in borders):
            return at_once(info.batch_size, in_dims, args)
        return one_by_one(info.batch_size, in_dims, args)

    def at_once(N: int, in_dims, args):
        folded = (
            x if name == OPAQUE else tree_map(lambda x, dim: _fold(x, dim, N), x, dims)
            for name, x, dims in zip(arguments, args, in_dims)
        )
        outputs, dims = [], []
        for name, x in zip(results, overload(*folded)):
            if name != OPAQUE:
                x = tree_map(lambda x: x.unflatten(0, (N, len(x) // N)), x)
            outputs.append(x)
            dims.append(tree_map(lambda _, dim=None if name == OPAQUE else 0: dim, x))
        return tuple(outputs), tuple(dims)

    def one_by_one(N: int, in_dims, args):
        def entry(n: int):
            return tree_map(lambda x, dim: x if dim is None else x.select(dim, n), args, in_dims)

        outputs = tree_map(lambda *x: torch.stack(x), *(overload(*entry(n)) for n in range(N)))
        return outputs, tree_map(lambda _: 0, outputs)

    return rule


def _fold(x, dim: int | None, N: int):
    """`[N, B, ...]` as `[N * B, ...]`; without the axis `dim` it is the same for all N entries."""
    if not isinstance(x, Tensor):
        return x
    return (x.expand(N, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
