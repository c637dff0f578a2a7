"""What PyTorch does around an op: autocast, compile, export, checkpoints, DDP, saved tensors, inference.

What only a GPU can show is in test_gpu.py.
"""

import contextlib
import copy
import functools
import itertools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import count_launches
from lact_kernels import (
    Apply,
    NewtonSchulz,
    RingKVCache,
    TTTPlan,
    Update,
    block_causal_ttt,
    ttt,
    window_attn,
    window_attn_with_kvcache,
)
from lact_kernels.eager import masked_attention
from tests.cases import WRITES, TTTCase, WindowCase
from tests.ranks import Ranks

CASES = [
    WindowCase("dense", 40, 7, B=2, Hq=4),
    WindowCase("packed", 40, 7, Hq=4, cu_seqlens=(0, 10, 10, 40)),
]
dense_and_packed = pytest.mark.parametrize("case", CASES, ids=str)


def results(fn, inputs):
    """The outputs of `fn`, and the gradients of all inputs that have one, each output's cotangent ones."""
    outputs = fn(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return outputs
    return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def assert_same(actual, expected):
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# Autocast


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.fixture
def written_out(monkeypatch):
    """Attention in matrix products, as on other devices: autocast would cast those, if it came so far."""
    monkeypatch.setattr(masked_attention, "has_flash", lambda *_: False)


def cast_leaves(case, dtypes):
    inputs = case.inputs(torch.float32)
    return [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]


DOUBLE = (torch.float64,) * 3
MIXED = (torch.float32, torch.float32, torch.bfloat16)


@pytest.mark.usefixtures("written_out")
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, MIXED, DOUBLE], ids=str)
@dense_and_packed
def test_autocast_is_a_cast_by_hand(case, dtypes, backend):
    """Of all but float64, with gradients in the dtypes of the leaves."""
    fn = functools.partial(window_attn, **case.options(), return_lse=True, backend=backend)
    inputs = cast_leaves(case, dtypes)
    dtype = torch.float64 if dtypes == DOUBLE else torch.bfloat16
    o, lse, *grads = results(fn, [x.detach().to(dtype).requires_grad_() for x in inputs])
    with autocast():
        actual = results(fn, inputs)
    assert actual[0].dtype == dtype
    assert_same(actual, (o, lse, *(dx.to(x.dtype) for dx, x in zip(grads, inputs))))


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_accepts_the_dtypes_that_pytorchs_attention_accepts(enabled):
    """Also where it is off within a region where it is on."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for mix in itertools.product(dtypes, repeat=3):
        q, k, v = cast_leaves(WindowCase("", 5, None), mix)
        with autocast(), autocast(enabled):
            try:
                expected = F.scaled_dot_product_attention(q, k, v).dtype
            except RuntimeError:
                with pytest.raises(TypeError, match="must have the dtype"):
                    window_attn(q, k, v)
            else:
                assert window_attn(q, k, v).dtype == expected


@pytest.mark.usefixtures("written_out")
@pytest.mark.parametrize("fn_name", ["dense", "packed", "fast weights"])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_backward_inside_autocast_gives_the_same(fn_name, forward_inside):
    fn, make_inputs, (sizes, *_) = CHANGES[f"{fn_name}, length"]
    inputs = make_inputs(*sizes)
    with autocast(forward_inside):
        outputs = fn(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    ones = [torch.ones_like(x) for x in outputs]
    grads = []
    for backward_inside in (False, True):
        with autocast(backward_inside):
            grads.append(torch.autograd.grad(outputs, leaves, ones, retain_graph=True))
    assert_same(*grads)


@dense_and_packed
def test_autocast_inside_of_a_compiled_function(case):
    def fn(*inputs):
        with autocast():
            return window_attn(*inputs, **case.options(), return_lse=True)

    inputs = cast_leaves(case, MIXED)
    assert_same(results(compiled(fn)[0], inputs), results(fn, inputs))


@dense_and_packed
def test_autocast_around_a_compiled_function(case):
    """Which is compiled once for each state of autocast that it is called in."""
    fn = functools.partial(window_attn, **case.options(), return_lse=True)
    traced, counter = compiled(fn)
    inputs = case.inputs(torch.float32)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16), (False, torch.float32)):
        with autocast(enabled):
            actual = results(traced, inputs)
            assert_same(actual, results(fn, inputs))
        assert actual[0].dtype == dtype
    assert counter.frame_count == 2


@torch.no_grad()
def test_autocast_casts_queries_and_cache():
    q, k_cache, v_cache = cast_leaves(WindowCase("", 2, None, Tk=9, B=3), MIXED)
    lengths = torch.tensor([2, 9, 30], dtype=torch.int32)
    fn = functools.partial(
        window_attn_with_kvcache, window_size=5, cache_seqlens=lengths, return_lse=True
    )
    with autocast():
        actual = fn(q, k_cache, v_cache)
    assert actual[0].dtype == torch.bfloat16
    assert_same(actual, fn(q.bfloat16(), k_cache.bfloat16(), v_cache))
    with pytest.raises(TypeError, match="v_cache must have the dtype"):
        fn(q, k_cache, v_cache)


@torch.no_grad()
def test_decoding_under_autocast():
    """The keys and values of a projection come in autocast's dtype, which is then that of the cache."""
    case = WindowCase("", 12, 5)
    inputs = [x.bfloat16() for x in case.inputs(torch.float32)]
    outputs, cache = [], RingKVCache(1, 5, 2, 16, dtype=torch.bfloat16)
    with autocast():
        for q, k, v in zip(*(x.split(1, dim=1) for x in inputs)):
            cache.append(k, v)
            outputs.append(cache.window_attn(q.float()))
    o = window_attn(*inputs, 5)
    torch.testing.assert_close(torch.cat(outputs, dim=1), o, rtol=2e-2, atol=2e-2)


def test_every_op_has_a_rule_for_autocast():
    """In the dispatcher, where nothing else comes between."""
    names = [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("lact_kernels::")]
    assert len(names) >= 5
    for name, device in itertools.product(names, ("CPU", "CUDA")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{device}"), name


# torch.compile


def compiled(fn, dynamic=None):
    """`fn` traced whole, and a counter of its compilations. It needs no C++ compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=counter), counter


# The compiler takes sizes that are equal at first to be equal for good, so no other is among these.
HEADS = {"Hq": 6, "Hkv": 3, "D": 16, "Dv": 24}


def call_dense(q, k, v):
    return window_attn(q, k, v, 7, return_lse=True)


def dense_inputs(B, T):
    return WindowCase("", T, 7, B=B, **HEADS).inputs(torch.float32)


def call_packed(q, k, v, cu_seqlens):
    return window_attn(q, k, v, 7, cu_seqlens=cu_seqlens, return_lse=True)


def packed_inputs(N, T):
    return *dense_inputs(1, T), torch.linspace(0, T, N + 1, dtype=torch.int32)


def call_kvcache(q, k_cache, v_cache, cache_seqlens, sinks):
    options = {"cache_seqlens": cache_seqlens, "sinks": sinks}
    return window_attn_with_kvcache(q, k_cache, v_cache, (6, 1), **options, return_lse=True)


def kvcache_inputs(B, S):
    inputs = WindowCase("", 2, 7, B=B, Tk=S, **HEADS).inputs(torch.float32)
    lengths = torch.full((B,), S + 1, dtype=torch.int32)
    return *(x.detach() for x in inputs), lengths, torch.randn(HEADS["Hq"])


def call_fast_weights(*inputs):
    *inputs, momentum = inputs
    return (block_causal_ttt(*inputs, momentum=momentum, chunk_size=4, muon=True),)


def fast_weights_inputs(B, T):
    return tuple(TTTCase("", B=B, T=T, H=3, momentum=True).inputs(torch.float32).values())


def call_plan(*inputs):
    *inputs, momentum = inputs
    plan = TTTPlan([Update(0, 4), Apply(2), Update(4), Apply(0, 8)])
    muon = NewtonSchulz([(3.4445, -4.7750, 2.0315)])
    return (ttt(*inputs, plan, momentum=momentum, muon=muon),)


CHANGES = {
    "dense, batch": (call_dense, dense_inputs, [(5, 33), (2, 33), (9, 33), (16, 33)]),
    "dense, length": (call_dense, dense_inputs, [(5, 33), (5, 34), (5, 2), (5, 200)]),
    "packed, length": (call_packed, packed_inputs, [(4, 33), (4, 34), (4, 9), (4, 200)]),
    "packed, sequences": (call_packed, packed_inputs, [(4, 33), (1, 33), (2, 33), (40, 33)]),
    "kvcache, batch": (call_kvcache, kvcache_inputs, [(5, 33), (8, 33), (9, 33), (16, 33)]),
    "kvcache, slots": (call_kvcache, kvcache_inputs, [(5, 33), (5, 34), (5, 8), (5, 200)]),
    "fast weights, length": (call_fast_weights, fast_weights_inputs, [(2, 11), (2, 12), (2, 30)]),
    "plan, batch": (call_plan, fast_weights_inputs, [(2, 11), (3, 11), (4, 11)]),
}


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("change", CHANGES)
def test_new_sizes_compile_nothing_again(change, dynamic):
    """Unasked, the compiler takes the second size it sees for a sign that there are more."""
    fn, make_inputs, sizes = CHANGES[change]
    traced, counter = compiled(fn, dynamic)
    for size in sizes:
        inputs = make_inputs(*size)
        assert_same(results(traced, inputs), results(fn, inputs))
    assert counter.frame_count == (1 if dynamic else 2)


def test_compiled_decoding_compiles_once_for_all_steps():
    """And once more unasked: `max_seqlen` grows with every step."""
    caches = [RingKVCache(2, 5, 3, 16) for _ in range(2)]

    def step(cache, q, k, v):
        cache.append(k, v)
        return cache.window_attn(q)

    traced, counter = compiled(step)
    with torch.no_grad():
        for _ in range(7):
            inputs = torch.randn(3, 2, 1, 3, 16)
            assert torch.equal(traced(caches[0], *inputs), step(caches[1], *inputs))
    assert counter.frame_count == 2
    assert caches[0].max_seqlen == 7


# A module around each operation


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(10, 3 * 3 * 8)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
        return window_attn(q, k, v, 7, cu_seqlens=cu_seqlens).flatten(2)


class FastWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(10, 3 * 3 * 8)
        self.lr = nn.Linear(10, 3 * 3)
        self.w0, self.w1, self.w2 = (nn.Parameter(torch.randn(3, 8, 8) / 3) for _ in range(3))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
        rates = F.softplus(self.lr(x)).unflatten(-1, (3, 3)).unbind(2)
        weights = (self.w0, self.w1, self.w2)
        return block_causal_ttt(
            q, k, v, *weights, *rates, chunk_size=4, cu_seqlens=cu_seqlens
        ).flatten(2)


MODULES = (Attention, FastWeights)


def module_inputs(packed, n=3, T=20):
    """Of n rows of T tokens, or n packed sequences of as many between them."""
    if not packed:
        return (torch.randn(n, T, 10),)
    return torch.randn(1, T, 10), torch.linspace(0, T, n + 1, dtype=torch.int32)


def gradients(module, inputs):
    module.zero_grad()
    module(*inputs).square().sum().backward()
    return [p.grad for p in module.parameters()]


@pytest.fixture(params=MODULES, ids=lambda x: x.__name__)
def module(request):
    return request.param()


layouts = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@pytest.mark.parametrize("use_reentrant", [False, True])
@layouts
def test_checkpoint(module, packed, use_reentrant):
    x, *rest = module_inputs(packed)
    grads = []
    for forward in (module, functools.partial(checkpoint, module, use_reentrant=use_reentrant)):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        forward(leaf, *rest).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert_same(*grads)


@layouts
def test_functional_call(module, packed):
    inputs = module_inputs(packed)
    values = {name: x.detach() / 2 for name, x in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict(values)
    expected = gradients(twin, inputs)
    parameters = {name: x.requires_grad_() for name, x in values.items()}
    o = torch.func.functional_call(module, parameters, inputs)
    assert_same([o], [twin(*inputs)])
    assert_same(torch.autograd.grad(o.square().sum(), list(parameters.values())), expected)


@layouts
def test_exported_program_runs_on_other_sizes(module, packed):
    inputs = module_inputs(packed)
    length, number = {1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    dynamic_shapes = (length, number) if packed else (length | number,)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes).module()
    for n, T in ((3, 20), (2, 21), (7, 200)):
        inputs = module_inputs(packed, n, T)
        torch.testing.assert_close(program(*inputs), module(*inputs))


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copied_module(module, copied):
    inputs = module_inputs(packed=True)
    module(*inputs)
    assert_same(gradients(copied(module), inputs), gradients(module, inputs))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copied_cache_goes_its_own_way(copied):
    cache = RingKVCache(1, 5, 2, 16)
    q, k, v = torch.randn(3, 1, 1, 2, 16)
    cache.append(k, v)
    before = cache.window_attn(q)
    other = copied(cache)
    assert torch.equal(other.window_attn(q), before)
    other.append(v, k)
    assert torch.equal(cache.window_attn(q), before)
    assert not torch.equal(other.window_attn(q), before)


def equals_the_mean_of_all_gradients():
    """Each rank has tokens of its own."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for make_module, packed in itertools.product(MODULES, (False, True)):
        torch.manual_seed(0)
        module = make_module()
        inputs = [module_inputs(packed, n=2 + r) for r in range(world_size)]
        means = [sum(x) / world_size for x in zip(*(gradients(module, x) for x in inputs))]
        distributed = DistributedDataParallel(copy.deepcopy(module))
        torch.testing.assert_close(gradients(distributed, inputs[rank]), means)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("world_size", [1, 2])
def test_distributed_data_parallel(world_size):
    with contextlib.closing(Ranks(world_size)) as group:
        group.run(equals_the_mean_of_all_gradients)


# What the backward keeps

STRIDES = {
    "contiguous": lambda B: torch.randn(3, B, 40, 2, 16).unbind(0),
    "sliced from one projection": lambda B: torch.randn(B, 40, 3, 2, 16).unbind(2),
    "heads first": lambda B: torch.randn(3, B, 2, 40, 16).transpose(2, 3).unbind(0),
    "channels not last": lambda B: torch.randn(3, B, 40, 16, 2).transpose(3, 4).unbind(0),
}


@dense_and_packed
@pytest.mark.parametrize("strides", STRIDES)
def test_backward_keeps_inputs_output_and_lse_alone(strides, case):
    """As they are: not a copy of q, k or v, and nothing beside them but a copy of the borders."""
    inputs = [x.requires_grad_() for x in STRIDES[strides](case.B)]
    options = case.options()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, lse = window_attn(*inputs, **options, return_lse=True)
    if case.cu_seqlens is not None:
        *saved, own_q, own_k = saved
        assert own_q is own_k and torch.equal(own_q, options["cu_seqlens"])
    places = {(x.data_ptr(), x.shape, x.stride()) for x in (*inputs, o, lse)}
    assert {(x.data_ptr(), x.shape, x.stride()) for x in saved} == places
    assert not any(isinstance(x, Tensor) for x in tree_leaves(vars(o.grad_fn)))


# Borders and masks in memory that changes


def borders(*values):
    return torch.tensor(values, dtype=torch.int32)


def syncs(fn, *args):
    return count_launches(lambda: fn(*args)).sync_names


def packed_attention(cu_seqlens):
    q, k, v = torch.randn(3, 1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    q.requires_grad_()
    return window_attn(q, k, v, 6, cu_seqlens=cu_seqlens), q


def packed_fast_weights(cu_seqlens):
    torch.manual_seed(0)
    inputs = TTTCase("", B=1, T=20).inputs(torch.float64)
    return block_causal_ttt(**inputs, chunk_size=4, cu_seqlens=cu_seqlens), inputs["q"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("fn", [packed_attention, packed_fast_weights])
def test_borders_in_a_buffer_that_is_used_again(fn, write):
    """By another call, also before the backward of the first one."""
    buffer = borders(0, 8, 20)
    first, q = fn(buffer)
    write(buffer, 1, 13)
    second, _ = fn(buffer)
    for o, expected in ((first, borders(0, 8, 20)), (second, borders(0, 13, 20))):
        assert torch.equal(o, fn(expected)[0])
    (dq,) = torch.autograd.grad(first.square().sum(), q)
    o, q = fn(borders(0, 8, 20))
    assert torch.equal(dq, torch.autograd.grad(o.square().sum(), q)[0])
    write(buffer, 1, 30)
    with pytest.raises(ValueError, match="cu_seqlens descends from 30 to 20 at index 2"):
        fn(buffer)


def test_borders_are_read_once_per_call():
    cu_seqlens = borders(0, 8, 20)
    for _ in range(2):
        reads = syncs(packed_attention, cu_seqlens)
        assert reads["Tensor.tolist"] == 1 and not reads["Tensor.cpu"] and not reads["Tensor.numpy"]


def test_borders_may_be_on_the_host():
    q, k, v = torch.randn(3, 1, 20, 2, 8, device="meta")
    assert window_attn(q, k, v, 6, cu_seqlens=borders(0, 8, 20)).is_meta
    fast = {name: x.to("meta") for name, x in TTTCase("", B=1, T=20).inputs(torch.float32).items()}
    assert block_causal_ttt(**fast, chunk_size=4, cu_seqlens=borders(0, 8, 20)).is_meta


def test_nothing_holds_cu_seqlens():
    cu_seqlens = borders(0, 4, 20)
    packed_attention(cu_seqlens)
    reference = weakref.ref(cu_seqlens)
    del cu_seqlens
    assert reference() is None


# The cache and autograd


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cache_without_autograd(mode, made_inside):
    q, k, v = WindowCase("", 12, 5).inputs(torch.float32)
    with mode() if made_inside else contextlib.nullcontext():
        cache = RingKVCache(1, 5, 2, 16)
    outputs = []
    with mode():
        for token in zip(*(x.split(1, dim=1) for x in (q, k, v))):
            cache.append(*token[1:])
            outputs.append(cache.window_attn(token[0]))
    o = torch.cat(outputs, dim=1)
    assert not o.requires_grad
    torch.testing.assert_close(o, window_attn(q, k, v, 5).detach())


def test_cache_does_not_join_the_graph():
    q, k, v = WindowCase("", 3, 5).inputs(torch.float32)
    cache = RingKVCache(1, 5, 2, 16)
    cache.append(k * 2, v * 2)
    query = q[:, -1:]
    outputs = (*cache.view(), cache.window_attn(query.detach()))
    assert not any(x.requires_grad for x in (cache.k, cache.v, cache.seqlens, *outputs))
    with pytest.raises(ValueError, match="q requires a gradient"):
        cache.window_attn(query)
