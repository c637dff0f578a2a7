"""What `count_launches` counts, and what it does not."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.launches import count_launches, count_python_calls
from lact_kernels import block_causal_ttt, window_attn
from tests.cases import TTTCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X = torch.arange(12.0).reshape(3, 4)
MASK = X > 5

# What runs, the device operations it makes, and the times the host waits.
CALLS = {
    "matrix product": (lambda: X @ X.T, {"mm": 1}, 0),
    "einsum is its products": (lambda: torch.einsum("ab,cb->ac", X, X), {"bmm": 1}, 0),
    "views": (lambda: X.T.reshape(1, 4, 3)[:, :2].expand(5, 2, 3).detach().chunk(2), {}, 0),
    "reshape that copies": (lambda: X.T.reshape(12), {"clone": 1}, 0),
    "contiguous": (lambda: (X.contiguous(), X.T.contiguous()), {"clone": 1}, 0),
    "cast": (lambda: (X.float(), X.half()), {"_to_copy": 1}, 0),
    "empty tensors": (lambda: (torch.empty(3), X.new_empty(2), torch.empty_like(X)), {}, 0),
    "zeros": (lambda: (torch.zeros(3), X.new_zeros(2)), {"zeros": 1, "new_zeros": 1}, 0),
    "metadata": (lambda: (X.shape, X.stride(), X.is_contiguous(), X.dtype), {}, 0),
    "in place": (lambda: X.clone().mul_(2).t_(), {"clone": 1, "mul_": 1}, 0),
    "many at once": (lambda: torch._foreach_add_([X.clone()], 1), {"clone": 1, "_foreach_add_": 1}, 0),
    "item": (lambda: X[0, 0].item(), {}, 1),
    "condition": (lambda: bool(X.sum() > 0), {"sum": 1, "gt": 1}, 1),
    "tolist": (lambda: X.tolist(), {}, 1),
    "to the host": (lambda: (X.cpu(), X.numpy()), {}, 2),
    "nonzero": (lambda: MASK.nonzero(), {"nonzero": 1}, 1),
    "mask": (lambda: X[MASK], {"index": 1}, 1),
    "index": (lambda: X[torch.tensor([0, 2])], {"index": 1}, 0),
    "equal": (lambda: torch.equal(X, X), {"equal": 1}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_torch_operations(case):
    fn, ops, syncs = CALLS[case]
    launches = count_launches(fn)
    assert launches.op_names == {f"aten::{name}": n for name, n in ops.items()}
    assert launches.ops == launches.total == sum(ops.values())
    assert launches.syncs == syncs
    assert launches.kernels == 0


@torch.library.custom_op("lact_kernels_tests::scaled_mean", mutates_args=())
def scaled_mean(x: Tensor, scale: float) -> Tensor:
    assert x.tolist()
    return scaled(x, scale).mean(dim=0)


@torch.library.custom_op("lact_kernels_tests::scaled_mean_bwd", mutates_args=())
def scaled_mean_bwd(dy: Tensor, scale: float, rows: int) -> Tensor:
    return dy.mul(scale / rows).expand(rows, -1).contiguous()


@torch.library.custom_op("lact_kernels_tests::scaled", mutates_args=())
def scaled(x: Tensor, scale: float) -> Tensor:
    return x * scale


scaled_mean.register_autograd(
    lambda ctx, dy: (scaled_mean_bwd(dy, *ctx.saved), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "saved", (inputs[1], len(inputs[0]))),
)


def test_custom_ops_are_looked_into_forward_and_backward():
    x = X.clone().requires_grad_()
    forward = count_launches(lambda: scaled_mean(x, 2.0))
    assert forward.op_names == {"aten::mul": 1, "aten::mean": 1}
    assert forward.sync_names == {"Tensor.tolist": 1}
    y, dy = scaled_mean(x, 2.0), torch.ones(4)
    gradients = []
    backward = count_launches(lambda: gradients.extend(torch.autograd.grad(y, x, dy)))
    assert backward.op_names == {"aten::mul": 1, "aten::clone": 1}
    torch.testing.assert_close(gradients[0], torch.full((3, 4), 2 / 3))


def test_custom_op_with_nothing_to_see_is_one():
    @torch.library.custom_op("lact_kernels_tests::opaque", mutates_args=())
    def opaque(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    assert count_launches(lambda: opaque(X)).op_names == {"lact_kernels_tests::opaque": 1}


def test_device_work_alone_counts_where_there_is_a_device():
    meta = torch.empty(3, device="meta")
    launches = count_launches(lambda: (meta * 2, X * 2, X + 1, X.sum().item()))
    assert launches.op_names == {"aten::mul": 1}


@triton.jit
def _add_one_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < n) + 1, i < n)


def test_triton_kernels():
    x = torch.zeros(100, device=DEVICE)

    @torch.library.custom_op("lact_kernels_tests::add_two", mutates_args=())
    def add_two(x: Tensor) -> Tensor:
        y, z = torch.empty_like(x), torch.empty_like(x)
        _add_one_kernel[(4,)](x, y, 100, BLOCK=32)
        _add_one_kernel[(4,)](y, z, 100, BLOCK=32)
        return z

    results = []
    launches = count_launches(lambda: results.append(add_two(x) * 2))
    assert launches.kernel_names == {"_add_one_kernel": 2}  # four programs each are one launch
    assert launches.op_names == {"aten::mul": 1}  # the interpreter's own copies do not count
    assert (launches.kernels, launches.ops, launches.total, launches.syncs) == (2, 1, 3, 0)
    assert (results[0] == 4).all()


def test_everything_is_as_before_afterwards():
    before = type(_add_one_kernel).run, torch.Tensor.tolist, torch.Tensor.cpu
    with pytest.raises(ZeroDivisionError):
        count_launches(lambda: 1 / 0)
    assert (type(_add_one_kernel).run, torch.Tensor.tolist, torch.Tensor.cpu) == before
    assert count_launches(lambda: X * 2).ops == 1


def test_windowed_attention_is_one_kernel_forward_and_two_backward():
    q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    outputs = []
    forward = count_launches(lambda: outputs.append(window_attn(q, k, v, 7, backend="triton")))
    do = torch.ones_like(outputs[0])
    backward = count_launches(lambda: torch.autograd.grad(outputs[0], (q, k, v), do))
    assert forward.kernels == 1 and backward.kernels == 2
    assert forward.syncs == backward.syncs == 0


def test_python_calls():
    def called():
        return len("abc")

    assert count_python_calls(called) == 1
    assert count_python_calls(lambda: [called() for _ in range(3)]) == 2 + 3
    assert count_python_calls(lambda: sum(x for x in range(3))) == 1 + 4
    x = torch.zeros(100, device=DEVICE)
    launch = 1 + 2  # the lambda, and what Triton's `kernel[grid]` calls
    assert count_python_calls(lambda: _add_one_kernel[(4,)](x, x, 100, BLOCK=32)) == launch
    assert not x.any()  # nothing was launched


@pytest.mark.parametrize(
    "options, most",
    [({}, 30), ({"momentum": True}, 30), ({"momentum": True, "muon": True}, 50)],
    ids=["plain", "momentum", "muon"],
)
def test_little_python_for_each_chunk(options, most):
    """What can be made before the scan is not made in it: three launches are five calls each, with Muon five.

    Calls, not times, which are not the same everywhere.
    """
    counts = []
    for chunks in (8, 16):
        case = TTTCase("", B=1, H=2, T=4 * chunks, chunk_size=4, Dk=16, Dv=16, Dh=16, **options)
        inputs = case.inputs(torch.float32, DEVICE)
        outputs = []

        def run(inputs=inputs, case=case, outputs=outputs):
            outputs.append(block_causal_ttt(**inputs, **case.options(DEVICE), backend="triton"))

        def derive(inputs=inputs, outputs=outputs):
            o = outputs[-1]
            with torch.autograd.set_multithreading_enabled(False):  # here, where calls are counted
                torch.autograd.grad(o, list(inputs.values()), torch.empty_like(o))

        count_python_calls(lambda run=run, derive=derive: (run(), derive()))  # fills caches
        counts.append((count_python_calls(run), count_python_calls(derive)))
    (few, few_backward), (many, many_backward) = counts
    assert 3 * 5 < (many - few) / 8 <= most
    assert 3 * 5 < (many_backward - few_backward) / 8 <= most


def test_few_operations_of_torch_beside_the_kernels():
    """Of a dense call with momentum, forward and backward, whose last chunk no update reads."""
    case = TTTCase("", B=1, H=4, T=12, chunk_size=4, Dk=16, Dv=16, Dh=16, momentum=True)
    inputs = case.inputs(torch.float32, DEVICE)
    outputs = []

    def run():
        outputs.append(block_causal_ttt(**inputs, **case.options(DEVICE), backend="triton"))

    forward = count_launches(run)
    do = torch.ones_like(outputs[0])
    leaves = list(inputs.values())
    backward = count_launches(lambda: torch.autograd.grad(outputs[0], leaves, do))
    assert not forward.syncs and not backward.syncs
    # The rates of three weights in one tensor; the values times theirs.
    assert forward.op_names == {"aten::stack": 1, "aten::mul": 1}
    # The rates again; the gradients of k, v, three rates and momentum where there are none.
    assert backward.op_names == {"aten::stack": 1, "aten::zero_": 6}
