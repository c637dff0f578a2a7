"""A module of your own from the two operations, trained to recall tokens from outside of the window.

```
python -m examples.own_module
```

Random tokens are repeated with a period that is longer than the window. After one period every next token
could be known, but attention in the window cannot do better than chance. Fast weights can: while they read
the sequence, they are trained on pairs of neighbouring tokens. Exit status: 0 if they do. About 10 seconds on
two cores.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lact_kernels

VOCAB, PERIOD, T = 64, 48, 192
WINDOW, CHUNK = 16, 16
STEPS, BATCH = 40, 16


class Mixer(nn.Module):
    """Attention in a window and, optionally, fast weights that map a token to the next one."""

    def __init__(self, dim: int, heads: int, fast_weights: bool):
        super().__init__()
        self.heads, self.fast_weights = heads, fast_weights
        self.qkv = nn.Linear(dim, 3 * dim)
        self.fast_qv = nn.Linear(dim, 2 * dim)
        self.rate = nn.Linear(dim, 3 * heads)
        D = dim // heads
        self.w0, self.w1, self.w2 = (
            nn.Parameter(torch.randn(heads, D, D) * D**-0.5) for _ in range(3)
        )
        self.norm = nn.RMSNorm(D)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)  # [B, T, H, D]
        y = lact_kernels.window_attn(q, k, v, window_size=WINDOW)
        if self.fast_weights:
            q, v = self.fast_qv(x).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=2)
            q = F.normalize(q, dim=-1)
            k = F.pad(q, (0, 0, 0, 0, 1, -1))  # a value's key is the token before it
            lr0, lr1, lr2 = F.softplus(self.rate(x)).chunk(3, dim=-1)  # [B, T, H]
            o = lact_kernels.block_causal_ttt(
                q, k, v, self.w0, self.w1, self.w2, lr0, lr1, lr2, chunk_size=CHUNK
            )
            y = y + self.norm(o)
        return x + self.out(y.flatten(2))


def train(fast_weights: bool) -> float:
    """Train, and return the last loss on tokens of the third period and later, in nats."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(VOCAB, 64),
        Mixer(64, heads=2, fast_weights=fast_weights),
        nn.RMSNorm(64),
        nn.Linear(64, VOCAB),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        once = torch.stack([torch.randperm(VOCAB)[:PERIOD] for _ in range(BATCH)])
        tokens = once.repeat(1, T // PERIOD + 1)[:, : T + 1]
        logits = model(tokens[:, :-1])[:, 2 * PERIOD :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 2 * PERIOD + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"  step {step:3d}  loss {loss.item():.3f}", flush=True)
    return loss.item()


def main() -> int:
    print(
        f"Tokens repeat after {PERIOD}, the window is {WINDOW}. Chance: {math.log(VOCAB):.3f} nats."
    )
    print("Attention in the window alone:")
    alone = train(fast_weights=False)
    print("With fast weights:")
    both = train(fast_weights=True)
    print(f"Loss {alone:.3f} without fast weights, {both:.3f} with them.")
    return 0 if both < alone / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
