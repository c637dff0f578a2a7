"""Small models of LaCT's family: novel views, a stream of frames, and windows that hand a state on.

Their layers are the plain ones of `benchmarks/plain_family.py`, which other layers can take the place of.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_family import FastWeightGluMLPMultihead, TTTOperator, windows

DIM = 16
TOKENS = 12  # of a view or a frame

States = list[dict[str, Tensor]]  # the fast weights of each layer


class Block(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(DIM), layer
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x: Tensor, info: dict) -> tuple[Tensor, dict[str, Tensor]]:
        o, state = self.layer(self.norm(x), info)
        x = x + o
        return x + self.mlp(x), state


class Model(nn.Module):
    """Blocks that share the order of their updates and applies."""

    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(FastWeightGluMLPMultihead(DIM, base_lr=0.03, **options)) for _ in range(2)
        )
        self.head = nn.Linear(DIM, 3)

    def run(
        self, x: Tensor, order: list[TTTOperator], states: Sequence[dict[str, Tensor]] = ({}, {})
    ) -> tuple[Tensor, States]:
        new = []
        for block, given in zip(self.blocks, states):
            x, state = block(x, {"ttt_op_order": order, **given})
            new.append(state)
        return x, new


class ViewModel(Model):
    """Views `[B, views, TOKENS, DIM]`: those that are given make the fast weights, which read all of them."""

    def __init__(self, **options):
        super().__init__(head_dim=8, inter_multi=2, muon_update_steps=5, **options)

    def forward(self, given: Tensor, wanted: Tensor) -> Tensor:
        x = torch.cat([given, wanted], dim=1).flatten(1, 2)
        n = given.shape[1] * TOKENS
        order = [TTTOperator(0, n, True, False), TTTOperator(0, x.shape[1], False, True)]
        x, _ = self.run(x, order)
        return self.head(x[:, n:]).unflatten(1, (-1, TOKENS))

    def reconstruct(self, given: Tensor) -> States:
        x = given.flatten(1, 2)
        return self.run(x, [TTTOperator(0, x.shape[1], True, True)])[1]

    def render(self, wanted: Tensor, states: States) -> Tensor:
        """View by view, with an order for all of them: it ends beyond the tokens of one."""
        order = [TTTOperator(0, wanted.shape[1] * TOKENS, False, True)]
        views = [self.run(view, order, states)[0] for view in wanted.unbind(1)]
        return self.head(torch.stack(views, dim=1))


class StreamModel(Model):
    """Frames `[B, frames, TOKENS, DIM]`, each of which updates the fast weights that read it."""

    def __init__(self, **options):
        super().__init__(
            head_dim=DIM, inter_multi=2, bias=True, muon_update_steps=5, use_gate_fn=True, **options
        )

    def forward(
        self, frames: Tensor, states: Sequence[dict[str, Tensor]] = ({}, {})
    ) -> tuple[Tensor, States]:
        starts = range(0, frames.shape[1] * TOKENS, TOKENS)
        order = [TTTOperator(start, start + TOKENS, True, True) for start in starts]
        x, states = self.run(frames.flatten(1, 2), order, states)
        return self.head(x).unflatten(1, (-1, TOKENS)), states

    def query(self, x: Tensor, states: States) -> Tensor:
        """What the state knows of tokens `[B, T, DIM]`, which do not change it."""
        return self.head(self.run(x, [TTTOperator(0, -1, False, True)], states)[0])


class WindowModel(nn.Module):
    """A sequence `[B, T, DIM]`, read window by window by fast weights that those before it have made.

    `fast_weights` is `plain_windows`, or a function of the same arguments.
    """

    def __init__(self, fast_weights: Callable[..., Tensor]):
        super().__init__()
        H, D, Dh = 2, DIM // 2, DIM
        self.fast_weights = fast_weights
        self.w0, self.w2 = (nn.Parameter(torch.randn(H, D, Dh) * D**-0.5) for _ in range(2))
        self.w1 = nn.Parameter(torch.randn(H, Dh, D) * Dh**-0.5)
        self.qkv, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3)
        self.rates = nn.Linear(DIM, 3 * H + 1)  # and a share of momentum for all heads
        self.norm = nn.RMSNorm(D)

    def forward(self, x: Tensor, window: int) -> Tensor:
        H = len(self.w0)
        q, k, v = F.silu(self.qkv(x)).unflatten(2, (3, H, -1)).unbind(2)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        rates = F.softplus(self.rates(x)[..., :-1] - 2).unflatten(2, (3, H)).unbind(2)
        momentum = self.rates(x)[..., -1:].sigmoid().expand(-1, -1, H)
        weights = self.w0, self.w1, self.w2
        o = self.fast_weights((q, k, v), weights, rates, momentum, window)
        return self.head(x + self.norm(o).flatten(2))


def plain_windows(
    tokens: tuple[Tensor, Tensor, Tensor],  # q, k, v [B, T, H, D]
    weights: tuple[Tensor, Tensor, Tensor],  # w0, w2 [H, Dk, Dh], w1 [H, Dh, Dv]
    rates: tuple[Tensor, Tensor, Tensor],  # [B, T, H]
    momentum: Tensor,  # [B, T, H]
    window: int,
) -> Tensor:
    """Of each window the outputs, then a step: momentum of what Newton-Schulz has made, norms detached."""
    B, T, H, _ = tokens[0].shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in tokens)  # [b*h, l, D]
    *rates, momentum = (x.mT.reshape(B * H, T, 1) for x in (*rates, momentum))
    weights = [w.repeat(B, 1, 1) for w in weights]
    o, *_ = windows(*weights, q, k, v, *rates, momentum, window, muon_dtype=q.dtype)
    return o.unflatten(0, (B, H)).transpose(1, 2)
