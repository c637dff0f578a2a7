"""A sequence given to `block_causal_ttt` in pieces, as decoding and long inputs do."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lact_kernels import TTTState

TOKENS = ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")


def in_pieces(fn: Callable, cuts: Sequence[int], **arguments) -> tuple[Tensor, TTTState]:
    """The outputs of a call of `fn` per piece, the state passed on, and the last state.

    Packed sequences are all cut at the same places.
    """
    cu_seqlens = arguments.pop("cu_seqlens", None)
    T, device = arguments["q"].shape[1], arguments["q"].device
    borders = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    spans = list(zip(borders, borders[1:]))
    longest = max(stop - start for start, stop in spans)
    state, outputs, order = None, [], []
    for begin, end in zip((0, *cuts), (*cuts, longest)):
        places = [range(min(a + begin, b), min(a + end, b)) for a, b in spans]
        at = [t for place in places for t in place]
        piece = {name: x[:, at] if name in TOKENS else x for name, x in arguments.items()}
        if cu_seqlens is not None:
            lengths = torch.tensor([0, *map(len, places)], dtype=torch.int32, device=device)
            piece["cu_seqlens"] = lengths.cumsum(0, dtype=torch.int32)
        o, state = fn(**piece, initial_state=state, return_state=True)
        outputs.append(o)
        order += at
    return torch.cat(outputs, dim=1)[:, torch.tensor(order, device=device).argsort()], state
