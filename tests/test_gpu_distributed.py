"""Sequences in pieces on GPUs, over NCCL: as many ranks as there are GPUs, up to four.

With one GPU the group has one rank: kernels then see the chunks of pieces, and collectives run, but no
message travels.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import lact_kernels
from lact_kernels.distributed import SequencePieces, block_causal_ttt, window_attn
from tests.lact_layer_cases import gradients, make_layer
from tests.tolerance import assert_close_to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu-ranks")]

# All tokens of a chunk have the same gradient of momentum: it takes many chunks to judge rounding by.
T, CHUNK, WINDOW, HEADS, D = 4000, 128, 300, 2, 64
TOKENS = ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")


def run_on_ranks(function, *args):
    size = min(4, torch.cuda.device_count())
    port = 20000 + os.getpid() % 20000
    mp.spawn(_rank, (size, port, function, args), nprocs=size)


def _rank(rank, size, port, function, args):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.set_float32_matmul_precision("highest")
    dist.init_process_group(
        "nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank)
    )
    torch.manual_seed(0)
    function(init_device_mesh("cuda", (size,)), *args)
    dist.barrier()
    dist.destroy_process_group()


def lengths(mesh):
    """Uneven, and no multiples of the chunk."""
    rest = T // mesh.size()
    first = rest - 37 * (mesh.size() > 1)
    cuts = [0, first, *(first + rest * i for i in range(1, mesh.size() - 1)), T]
    rank = mesh.get_local_rank()
    return cuts[rank + 1] - cuts[rank] if mesh.size() > 1 else T


def attention_is_as_exact(mesh, dtype, packed):
    borders = torch.tensor([0, 5, 290, T], dtype=torch.int32) if packed else None
    x = [torch.randn(1, T, HEADS, D, dtype=torch.float64) for _ in range(4)]

    def value_and_gradients(attend, *tensors, do):
        tensors = [y.requires_grad_() for y in tensors]
        o = attend(*tensors)
        return o, *torch.autograd.grad(o, tensors, do)

    def one_process(dtype, backend):
        *tensors, do = (y.to("cuda", dtype) for y in x)
        cu_seqlens = None if borders is None else borders.cuda()
        options = {"cu_seqlens": cu_seqlens, "backend": backend}
        return value_and_gradients(
            lambda *y: lact_kernels.window_attn(*y, WINDOW, **options), *tensors, do=do
        )

    pieces = SequencePieces.of(mesh, lengths(mesh), borders)
    *tensors, do = (pieces.take(y).to("cuda", dtype) for y in x)
    actual = value_and_gradients(
        lambda *y: window_attn(*y, WINDOW, pieces=pieces, backend="triton"), *tensors, do=do
    )
    same, exact = one_process(dtype, "eager"), one_process(torch.float64, "eager")
    for name, a, s, e in zip(("o", "dq", "dk", "dv"), actual, same, exact):
        assert_close_to_float64(pieces.gather(a.detach()), s, e, name)


def attention_of_both_kinds(mesh, dtype):
    for packed in (False, True):
        attention_is_as_exact(mesh, dtype, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention(dtype):
    run_on_ranks(attention_of_both_kinds, dtype)


def fast_weights_are_as_exact(mesh, dtype, scheme, rows):
    x = {name: torch.randn(rows, T, HEADS, D, dtype=torch.float64) for name in "qkv"}
    x["k"] /= D**0.5
    for name in ("lr0", "lr1", "lr2"):
        x[name] = 0.01 * torch.rand(rows, T, HEADS, dtype=torch.float64)
    x["momentum"] = torch.rand(rows, T, HEADS, dtype=torch.float64)
    for name in ("w0", "w1", "w2"):
        x[name] = torch.randn(HEADS, D, D, dtype=torch.float64) / D**0.5
    do = torch.randn(rows, T, HEADS, D, dtype=torch.float64)

    def prepared(dtype, take=lambda y: y):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: (take(y) if name in TOKENS else y)
            .to("cuda", dtype if name in "qkv" else wide)
            .requires_grad_()
            for name, y in x.items()
        }

    def value_and_gradients(function, tensors, do, **options):
        o = function(**tensors, chunk_size=CHUNK, prenorm=True, **options)
        return o, dict(zip(tensors, torch.autograd.grad(o, list(tensors.values()), do.to(o))))

    pieces = SequencePieces.of(mesh, lengths(mesh))
    o, grads = value_and_gradients(
        block_causal_ttt, prepared(dtype, pieces.take), pieces.take(do),
        pieces=pieces, scheme=scheme, backend="triton",
    )  # fmt: skip
    one = lact_kernels.block_causal_ttt
    same_o, same = value_and_gradients(one, prepared(dtype), do, backend="eager")
    exact_o, exact = value_and_gradients(one, prepared(torch.float64), do, backend="eager")
    assert_close_to_float64(pieces.gather(o.detach()), same_o, exact_o, "o")
    for name, grad in grads.items():
        if name in TOKENS:
            grad = pieces.gather(grad)
        else:
            dist.all_reduce(grad)
        assert_close_to_float64(grad, same[name], exact[name], name)


def fast_weights_of_both_schemes(mesh, dtype):
    for scheme in ("across_chunks", "within_chunks"):
        for rows in (1, 2):
            fast_weights_are_as_exact(mesh, dtype, scheme, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fast_weights(dtype):
    run_on_ranks(fast_weights_of_both_schemes, dtype)


def layer_equals_one_process(mesh):
    layer = make_layer("paper-muon", torch.float64, backend="eager").cuda()
    x = torch.randn(1, 100, 32, dtype=torch.float64).cuda().requires_grad_()
    dy = torch.randn_like(x)
    y = layer(x)
    expected = gradients(layer, x, y, dy)
    pieces = SequencePieces.even(mesh, 100)
    mine = pieces.take(x.detach()).requires_grad_()
    my_y = layer(mine, pieces=pieces)
    torch.testing.assert_close(my_y, pieces.take(y))
    actual = gradients(layer, mine, my_y, pieces.take(dy))
    torch.testing.assert_close(actual.pop("x"), pieces.take(expected.pop("x")))
    for name, grad in actual.items():
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-8)


def test_layer():
    run_on_ranks(layer_equals_one_process)
