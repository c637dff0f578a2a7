"""Ranks that share updates: their weight gradients are summed before each."""

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.ranks import Ranks


class SharedUpdates(Ranks):
    """Ranks that have a part of each update's keys: the weight gradients are summed before it.

    All of them then make the same update. Of the gradients that they know alike, the first rank gives all.
    """

    share_chunks = True

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.is_first = group, dist.get_rank(group) == 0
        self.name = f"shared updates, {group.group_name}"

    def sum_(self, *tensors: Tensor) -> None:
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0], group=self.group)
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat, group=self.group)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view(x.shape))

    def sum_gradients(self, dend: FastWeights) -> FastWeights:
        total = dend.map(torch.clone)
        self.sum_(*total.to_list())
        return total

    def part(self, x: Tensor) -> Tensor:
        return x if self.is_first else torch.zeros_like(x)
