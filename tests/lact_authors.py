"""The LaCT authors' own code, from a checkout of github.com/a1600012888/LaCT at the path LACT_CHECKOUT."""

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import reference
from benchmarks import peers

# What these modules import beside torch and einops, and do not need for what is tested here.
NOT_NEEDED = (
    "flash_attn.bert_padding",
    "minVid.models.wan",
    "minVid.models.wan.wan_base",
    "minVid.models.wan.wan_base.modules",
    "minVid.models.wan.wan_base.modules.attention",
    "minVid.models.wan.wan_base.modules.model",
)


def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size[1] <= 0
    return reference.window_attn(q, k, v, None if window_size[0] < 0 else window_size[0] + 1)


def module(folder: str, name: str) -> types.ModuleType:
    """A module of theirs. The test is skipped where it, or what it needs, is not there."""
    pytest.importorskip("einops")
    stubs = {name: mock.MagicMock() for name in NOT_NEEDED}
    stubs["flash_attn"] = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=None
    )
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        return peers.lact_script(os.environ.get("LACT_CHECKOUT"), folder, name)
    except peers.Unavailable as error:
        pytest.skip(f"LACT_CHECKOUT: {error}")
    finally:  # what torch has imported meanwhile stays
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Their code uncompiled, with this dtype where it casts to bfloat16 (Newton-Schulz) and to float32."""
    cast = lambda x: x.to(dtype)  # noqa: E731
    with (
        torch.compiler.set_stance("force_eager"),
        mock.patch.object(torch.Tensor, "bfloat16", cast),
        mock.patch.object(torch.Tensor, "float", cast),
    ):
        yield
