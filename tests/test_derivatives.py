"""`torch.func` and the derivatives that there are; all others are refused by the name of the operation."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from lact_kernels import (
    LaCTLayer,
    block_causal_ttt,
    ttt_apply,
    window_attn,
    window_attn_with_kvcache,
)
from lact_kernels import distributed as lact_distributed
from tests.ranks import mesh_of

V, B, T, H = 3, 2, 7, 2  # entries of a vmapped axis, rows, tokens, heads
HAVE_NO_BACKWARD = (
    "silu_l2norm_rope_bwd",
    "rms_norm_scale_add_bwd",
    "ttt_bwd",
    "ttt_apply_bwd",
    "window_attn_bwd",
)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def op_calls():
    """The arguments of every registered op, the first one floating-point or a list of one that is."""
    ops = torch.ops.lact_kernels
    q, k, v = randn(3, B, T, H, 4)
    window = (3, 1, 0.5, 2.0, randn(B, H), None, None, "eager")
    o, lse = ops.window_attn_fwd(q, k, v, *window)
    yield "window_attn_fwd", (q, k, v, *window)
    yield "window_attn_bwd", (o, None, q, k, v, o, lse, *window)
    yield "window_attn_with_kvcache", (q, k, v, None, *window[:5], "eager")

    start = [*randn(3, B, H, 4, 4), *randn(3, B, H, 4)]
    tokens = (q, k, v, *randn(3, B, T, H), None, start, None)
    options = (2, None, False, True, False, False, 1, "eager", "")
    o, end, history = ops.ttt_fwd(*tokens, *options)
    yield "ttt_fwd", (*tokens, *options)
    yield "ttt_bwd", (o, end, history, *tokens, *options)

    weights = [randn(1, *shape) for shape in WEIGHTS]
    yield "ttt_apply_fwd", (q, *weights, "eager")
    yield "ttt_apply_bwd", (randn(B, T, H, 3), q, *weights, "eager")

    table = randn(2, 1, T, 2)
    qkv = (
        [randn(B, T, 24)],
        randn(8, 2),
        randn(8, 2),
        *table,
        2,
        2,
        True,
        True,
        True,
        True,
        "eager",
    )
    yield "silu_l2norm_rope_fwd", qkv
    yield "silu_l2norm_rope_bwd", (*ops.silu_l2norm_rope_fwd(*qkv), *qkv)
    parts = (q, k, randn(4), randn(B, T, H), 1e-5, "eager")
    yield "rms_norm_scale_add_fwd", parts
    yield "rms_norm_scale_add_bwd", (ops.rms_norm_scale_add_fwd(*parts), *parts[1:])


def of_first(name, args):
    """The op as a function of its first argument, to one number, and this argument."""

    def fn(x):
        first = [x] if isinstance(args[0], list) else x
        outputs = getattr(torch.ops.lact_kernels, name)(first, *args[1:])
        return sum(o.sum() for o in tree_leaves(outputs))

    return fn, tree_leaves(args[0])[0]


def test_no_op_has_forward_mode_derivatives():
    """Which would be 0, or an error that names nothing, as it depends on whether inputs need gradients."""
    calls = dict(op_calls())
    prefix = "lact_kernels::"
    registered = torch._C._dispatch_get_all_op_names()
    names = {prefix + name for name in (*calls, "packed_plan")}  # which is of integers
    assert names == {x for x in registered if x.startswith(prefix)}
    for name, args in calls.items():
        fn, first = of_first(name, args)
        for x in (first, first.clone().requires_grad_()):
            for transform in (lambda x: jvp(fn, (x,), (x,)), jacfwd(fn)):  # noqa: B023
                with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode"):
                    transform(x)
            with forward_ad.dual_level():
                with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode"):
                    fn(forward_ad.make_dual(x, x.detach()))
                fn(x)  # which no tangent reaches


def test_a_backward_has_no_backward():
    for name, args in op_calls():
        if name in HAVE_NO_BACKWARD:
            for derivative in (lambda f, x: torch.autograd.grad(f(x), x), lambda f, x: grad(f)(x)):
                fn, first = of_first(name, args)
                x = first.clone().requires_grad_()
                with pytest.raises(NotImplementedError, match=f"{name} has no second derivatives"):
                    derivative(fn, x)


# The public functions as `fn(q, *others)`, with arguments that have rows `[B, ...]`

WEIGHTS = ((H, 5, 4), (H, 3, 5), (H, 5, 4))


def attend(*x):
    return torch.cat([o.flatten() for o in window_attn(*x[:3], 3, return_lse=True)])


def attend_with_every_option(*x):
    """The sinks of the heads are made of what has the shape of fast weights."""
    options = {"softcap": 2.0, "sinks": x[3].mean(dim=(-1, -2)).flatten()[:H]}
    return torch.cat([o.flatten() for o in window_attn(*x[:3], (2, 1), **options, return_lse=True)])


def learn(*x, **options):
    return block_causal_ttt(*x[:9], chunk_size=3, **options)


def learn_with_every_option(*x):
    options = {"muon": True, "prenorm": True, "checkpoint_interval": 2}
    return learn(*x, momentum=x[9].sigmoid(), **options)


def apply(q, k, v, *others):
    return v * ttt_apply(q + k, *others[:3])


def arguments(*lead):
    tokens = [randn(*lead, B, T, H, d) for d in (4, 4, 3)]
    weights = [randn(*lead, B, *shape) for shape in WEIGHTS]
    return (
        *tokens,
        *weights,
        *(randn(*lead, B, T, H).abs() / 9 for _ in range(3)),
        randn(*lead, B, T, H),
    )


FUNCTIONS = {
    "window_attn": (attend, (0, 1, 2)),
    "window_attn, every option": (attend_with_every_option, (0, 1, 2, 3)),
    "block_causal_ttt": (learn, tuple(range(9))),
    "block_causal_ttt, every option": (learn_with_every_option, tuple(range(10))),
    "ttt_apply": (apply, tuple(range(6))),
}
functions = pytest.mark.parametrize("fn, argnums", FUNCTIONS.values(), ids=FUNCTIONS)


def squares(fn):
    return lambda *x: fn(*x).square().sum()


def gradients(fn, argnums, args):
    """By autograd, without a transform."""
    args = [x.detach().requires_grad_(i in argnums) for i, x in enumerate(args)]
    return torch.autograd.grad(fn(*args), [args[i] for i in argnums])


def stacked(results):
    return [torch.stack(x) for x in zip(*results)]


def assert_close(actual, expected):
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


@functions
def test_gradients(fn, argnums):
    args = arguments()
    expected = gradients(squares(fn), argnums, args)
    assert_close(grad(squares(fn), argnums)(*args), expected)
    pulled = vjp(squares(fn), *args)[1](torch.ones((), dtype=torch.float64))
    assert_close([pulled[i] for i in argnums], expected)


@functions
def test_gradients_of_a_transformed_function_reach_what_it_closes_over(fn, argnums):
    q, *others = arguments()
    for i in range(len(argnums) - 1):
        expected = gradients(squares(fn), (i + 1,), [q, *others])

        def pull_back(x):
            rest = [*others[:i], x, *others[i + 1 :]]  # noqa: B023
            return vjp(lambda q: fn(q, *rest), q)[0].square().sum()

        assert_close(gradients(pull_back, (0,), [others[i]]), expected)
        assert_close([grad(pull_back)(others[i])], expected)


@functions
def test_gradients_of_each_sample(fn, argnums):
    """Of the one axis, of two, with arguments that all samples share, and with vmap inside."""
    args = arguments(V)
    rows = [[x[n] for x in args] for n in range(V)]
    expected = stacked(gradients(squares(fn), argnums, row) for row in rows)
    assert_close(vmap(fn)(*args), torch.stack([fn(*row) for row in rows]))
    assert_close(vmap(grad(squares(fn), argnums))(*args), expected)
    inside = grad(lambda *x: vmap(squares(fn))(*x).sum(), argnums)
    assert_close(inside(*args), expected)
    twice = vmap(vmap(grad(squares(fn), argnums)))(*(torch.stack([x, x]) for x in args))
    assert_close(twice, stacked([expected, expected]))

    shared = [args[0], *rows[0][1:]]
    expected = stacked(gradients(squares(fn), argnums, [q, *shared[1:]]) for q in args[0])
    in_dims = (1, *(None for _ in args[1:]))
    actual = vmap(grad(squares(fn), argnums), in_dims)(args[0].transpose(0, 1), *shared[1:])
    assert_close(actual, expected)


@functions
def test_jacobian(fn, argnums):
    """Many cotangents of one call, or of one call for each of the samples."""

    def some(k, q, *others):
        return fn(q, k, *others).flatten()[5:60:9]

    q, k, *others = arguments(V)
    rows = [[x[n] for x in (k, q, *others)] for n in range(V)]
    expected = [
        torch.stack([gradients(lambda *x: some(*x)[i], (0,), row)[0] for i in range(7)])  # noqa: B023
        for row in rows
    ]
    assert_close(jacrev(some)(*rows[0]), expected[0])
    assert_close(vmap(jacrev(some))(k, q, *others), torch.stack(expected))
    of_all = jacrev(lambda k: vmap(some)(k, q, *others))(k)  # [V, 7, V, B, T, H, D]
    assert_close(torch.stack([of_all[n, :, n] for n in range(V)]), torch.stack(expected))
    assert not of_all[0, :, 1].any()


@functions
def test_second_derivatives_are_refused(fn, argnums):
    q, *others = arguments()

    def loss(q):
        return squares(fn)(q, *others)

    def penalty(q):
        return torch.autograd.grad(loss(q), q, create_graph=True)[0].square().sum()

    second = {
        "hessian": hessian(loss),
        "jacrev of jacrev": jacrev(jacrev(loss)),
        "grad of grad": grad(lambda q: grad(loss)(q).square().sum()),
        "jvp of grad": lambda q: jvp(grad(loss), (q,), (q,)),
        "grad of jvp": grad(lambda q: jvp(loss, (q,), (q,))[1]),
        "penalty": lambda q: torch.autograd.grad(penalty(q), q),
        "penalty beside what has derivatives": lambda q: (penalty(q) + q.sum()).backward(),
    }
    for name, derivative in second.items():
        with pytest.raises(NotImplementedError, match="lact_kernels"):
            derivative(q.clone().requires_grad_())
            pytest.fail(name)


def test_packed_sequences_of_each_sample():
    """With borders that they share, or their own; also where the borders are an argument of `grad`."""
    q, k, v = randn(3, V, 1, 10, H, 4)
    weights, rates = randn(3, H, 4, 4), randn(3, 1, 10, H).abs() / 9
    borders = torch.tensor([[0, 4, 10], [0, 0, 10], [0, 5, 10]], dtype=torch.int32)

    def attend(q, cu_seqlens, k, v):
        return window_attn(q, k, v, 3, cu_seqlens=cu_seqlens).square().sum()

    def learn(q, cu_seqlens, k, v):
        o = block_causal_ttt(q, k, v, *weights, *rates, chunk_size=2, cu_seqlens=cu_seqlens)
        return o.square().sum()

    for fn in (attend, learn):
        for shared in (True, False):
            cu_seqlens = borders[0] if shared else borders
            rows = [(q[n], borders[0 if shared else n], k[n], v[n]) for n in range(V)]
            expected = torch.stack([gradients(fn, (0,), row)[0] for row in rows])
            in_dims = (0, None if shared else 0, 0, 0)
            assert_close(vmap(grad(fn), in_dims)(q, cu_seqlens, k, v), expected)


def test_borders_that_are_read_on_the_host():
    """With a state they are read before the op is called: those of a vmapped axis have no one value."""
    q, k, v = randn(3, 1, 10, H, 4)
    weights, rates = randn(3, H, 4, 4), randn(3, 1, 10, H).abs() / 9
    borders = torch.tensor([0, 4, 10], dtype=torch.int32)

    def learn(q, cu_seqlens):
        options = {"chunk_size": 2, "cu_seqlens": cu_seqlens, "return_state": True}
        return block_causal_ttt(q, k, v, *weights, *rates, **options)[0].square().sum()

    (expected,) = gradients(learn, (0,), [q, borders])
    assert_close(grad(learn)(q, borders), expected)
    assert_close(grad(lambda q: learn(q, borders))(q), expected)
    assert_close(vmap(grad(learn), (0, None))(q[None], borders), expected[None])
    with pytest.raises(NotImplementedError, match="cu_seqlens is vmapped, and lact_kernels reads"):
        vmap(learn, (None, 0))(q, borders[None])


def test_a_cache_of_each_sample():
    q, k, v = randn(V, B, 1, H, 4), randn(V, B, 8, H, 4), randn(B, 8, H, 4)
    lengths = torch.tensor([[3, 8], [1, 12], [4, 4]], dtype=torch.int32)

    def attend(q, k, lengths, sinks):
        return window_attn_with_kvcache(q, k, v, (3, 1), cache_seqlens=lengths, sinks=sinks)

    own = randn(V, H)
    for sinks, of_each, dim in (
        (None, V * [None], None),
        (own, own, 0),
        (own[0], V * [own[0]], None),
    ):
        expected = torch.stack([attend(*row) for row in zip(q, k, lengths, of_each)])
        assert_close(vmap(attend, (0, 0, 0, dim))(q, k, lengths, sinks), expected)
    with pytest.raises(NotImplementedError, match="window_attn_with_kvcache has no backward"):
        grad(lambda q: vmap(attend)(q, k, lengths, own).sum())(q)


def test_a_layers_gradients_of_each_sample():
    layer = LaCTLayer(
        hidden_size=8, num_attn_heads=2, num_lact_heads=2, inter_multi=1, window_size=3,
        lact_chunk_size=3, use_muon=True, use_momentum=True, learnable_ttt_scale=True,
    ).double()  # fmt: skip
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    x = randn(V, T, 8)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    actual = vmap(grad(loss), (None, 0))(parameters, x)
    losses = [layer(row[None]).square().sum() for row in x]
    expected = stacked(torch.autograd.grad(one, list(layer.parameters())) for one in losses)
    assert_close(list(actual.values()), expected)


@pytest.mark.parametrize("fn, argnums", list(FUNCTIONS.values())[:2], ids=list(FUNCTIONS)[:2])
def test_compiled_gradients_of_each_sample(fn, argnums):
    args = arguments(V)
    transform = vmap(grad(squares(fn), argnums))
    torch._dynamo.reset()
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), transform(*args))


def test_transforms_under_autocast():
    q, k, v = torch.randn(3, B, T, H, 4)

    def loss(q):
        return window_attn(q, k, v, 3).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grad(loss)(q), gradients(loss, (0,), [q])[0])


class Pieces(nn.Module):
    """Both operations of `lact_kernels.distributed`, of a sequence whose other half another rank has."""

    def __init__(self, scheme):
        super().__init__()
        self.scheme = scheme
        self.pieces = lact_distributed.SequencePieces.of(mesh_of(2), 8)
        self.args = [randn(*shape) for shape in ((1, 8, H, 4),) * 2 + ((H, 4, 4),) * 3]
        self.rates = randn(3, 1, 8, H).abs() / 9

    def attend(self, q):
        return lact_distributed.window_attn(q, *self.args[:2], 3, pieces=self.pieces)

    def learn(self, q):
        options = {"pieces": self.pieces, "scheme": self.scheme, "chunk_size": 3}
        o, state = lact_distributed.block_causal_ttt(
            q, *self.args, *self.rates, **options, return_state=True
        )
        return o.sum() + state.weights[0].sum()


def refuses_all_but_first_derivatives():
    for scheme in ("across_chunks", "within_chunks"):
        module, q = Pieces(scheme), randn(1, 8, H, 4)
        for fn, name in ((module.attend, "window_attn"), (module.learn, "block_causal_ttt")):
            name = f"lact_kernels.distributed.{name}"
            for x in (q, q.clone().requires_grad_()):
                with forward_ad.dual_level():
                    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode"):
                        fn(forward_ad.make_dual(x, q))
            transforms = (grad(lambda q: fn(q).sum()), vmap(fn))  # noqa: B023
            for transform in transforms:
                with pytest.raises(NotImplementedError, match=f"{name} cannot be transformed"):
                    transform(q if transform is transforms[0] else q[None])
            leaf = q.clone().requires_grad_()
            (first,) = torch.autograd.grad(fn(leaf).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="[.:](window_attn|ttt_bwd) has no second"):
                (first.sum() + leaf.sum()).backward()


@pytest.mark.xdist_group("ranks")
def test_operations_in_pieces_have_first_derivatives_only(ranks):
    ranks.run(refuses_all_but_first_derivatives)
