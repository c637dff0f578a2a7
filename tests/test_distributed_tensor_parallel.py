"""Heads of LaCT layers on several ranks: outputs and every gradient are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from lact_kernels import LaCTCache, LaCTLayer
from lact_kernels.compat.lact import LaCTSWIGLULayer
from lact_kernels.distributed import HeadParallel, SequencePieces, tensor_parallel_plan
from lact_kernels.layers.mlp import SwiGLUMLP
from tests.lact_layer_cases import CASES, SMALL, gradients, make_layer
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.xdist_group("ranks")

T = 29  # three chunks and a rest
FOUR_HEADS = dict(num_attn_heads=4, num_lact_heads=4)
LEFT_AND_RIGHT = [[0] * 9 + [1] * 20, [1] * 25 + [0] * 4]


def mesh_of(size):
    """The four ranks as groups of `size`."""
    return init_device_mesh(
        "cpu", (dist.get_world_size() // size, size), mesh_dim_names=("dp", "tp")
    )


def parallel(module, size, plan=None):
    """A copy of the module, over groups of `size`."""
    plan = HeadParallel() if plan is None else plan
    return parallelize_module(copy.deepcopy(module), mesh_of(size)["tp"], plan)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        y = whole(actual[name])
        assert y.shape == x.shape and torch.isfinite(y).all(), name
        error = (y - x).abs().max() / x.abs().max()
        assert error < 1e-10, f"{name}: {error:.1e}"


def parameter_gradients(model):
    """Of all parameters, each laid out as its parameter is: an optimizer adds them as they are."""
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            assert p.grad.placements == p.placements, name
    return {name: p.grad for name, p in model.named_parameters()}


def layer_equals_one_process(size, case, options, kwargs):
    layer = make_layer(case, **options)
    ours = parallel(layer, size)
    x = torch.randn(kwargs.pop("rows"), T, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = layer(x, **kwargs)
    expected = {"y": y} | gradients(layer, x, y, dy)
    y = ours(x, **kwargs)
    assert type(y) is torch.Tensor
    assert_equal({"y": y} | gradients(ours, x, y, dy), expected)
    # Each rank computes its own heads, and stores nothing but its part of what is sharded.
    assert ours.num_lact_heads == layer.num_lact_heads // size
    assert ours.w1.to_local().shape[0] == layer.num_lact_heads // size
    assert ours.qkv.weight.to_local().shape == (96 // size, 32)
    assert [name for name, p in ours.named_parameters() if p.placements[0].is_replicate()] == [
        name for name, _ in layer.named_parameters() if name.startswith(("ttt_norm", "temporal"))
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(ranks, case):
    ranks.run(layer_equals_one_process, 2, case, {}, {"rows": 2})


@pytest.mark.parametrize("case", ["paper-muon", "qk-norm-bias", "prenorm", "reduction"])
def test_four_ranks_equal_one_process(ranks, case):
    ranks.run(layer_equals_one_process, 4, case, FOUR_HEADS, {"rows": 2})


@pytest.mark.parametrize("case", ["qk-norm-bias", "reduction"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"rows": 1, "cu_seqlens": torch.tensor([0, 25, 26, 26, T], dtype=torch.int32)},
        {"rows": 2, "attention_mask": torch.tensor(LEFT_AND_RIGHT)},
    ],
    ids=["packed", "padded"],
)
def test_unequal_lengths(ranks, case, kwargs):
    ranks.run(layer_equals_one_process, 2, case, {}, kwargs)


def pieces_equal_one_call(case):
    layer = make_layer(case)
    ours, cache = parallel(layer, 2), LaCTCache()
    x = torch.randn(2, T, 32, dtype=torch.float64)
    with torch.no_grad():
        y = [ours(piece, cache=cache) for piece in x.split([12, 3, 3, 6, 5], dim=1)]
        assert_equal({"y": torch.cat(y, dim=1)}, {"y": layer(x)})
    assert cache.layers[0].kv.k.shape[2] == 2 and cache.layers[0].ttt.weights[1].shape[1] == 1
    with pytest.raises(ValueError, match="cache is of a layer of num_attn_heads=2"):
        layer(x, cache=cache)


@pytest.mark.parametrize("case", ["paper", "qk-norm-bias", "reduction"])
def test_a_cache_keeps_the_heads_of_its_rank(ranks, case):
    ranks.run(pieces_equal_one_call, case)


def layer_is_called_in_other_ways():
    layer = make_layer("qk-norm-bias")
    layer.qkv.weight.requires_grad_(False)
    ours = parallel(layer, 2)
    assert not ours.qkv.weight.requires_grad and ours.qkv.bias.requires_grad
    assert "rank" in repr(ours) and "of 2" in repr(ours)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in layer.state_dict().items()
    }
    x = torch.randn(2, T, 32, dtype=torch.float64)
    expected = {"y": layer(x)}
    replicated = distribute_tensor(x, ours.device_mesh, [Replicate()])
    assert_equal({"y": ours(replicated)}, expected)
    assert_equal({"y": copy.deepcopy(ours)(hidden_states=x)}, expected)
    with torch.inference_mode():
        assert_equal({"y": ours(x)}, expected)
    with pytest.raises(ValueError, match="hidden_states must be replicated"):
        ours(distribute_tensor(x, ours.device_mesh, [Shard(1)]))
    with pytest.raises(TypeError, match="hidden_states must be"):
        ours(None)

    authors = LaCTSWIGLULayer(**SMALL | CASES["paper"], dtype=torch.float64)
    y, _, cache = parallel(authors, 2)(x, past_key_values=LaCTCache())
    assert_equal({"y": y}, {"y": authors(x)[0]})
    assert cache.get_seq_length() == T


def test_other_calls(ranks):
    ranks.run(layer_is_called_in_other_ways)


def precision_is_that_of_one_process():
    layer = make_layer("qk-norm-bias", torch.float32)
    exact, ours = copy.deepcopy(layer).double(), parallel(layer, 2)
    x = torch.randn(2, T, 32, requires_grad=True)
    dy = torch.randn_like(x)

    def results(layer, x):
        y = layer(x)
        return {"y": y} | gradients(layer, x, y, dy.to(y.dtype))

    wide = x.detach().double().requires_grad_()
    expected = results(exact, wide)
    with torch.autocast("cpu", torch.bfloat16):
        one_process, actual = results(layer, x), results(ours, x)
    for name, value in actual.items():
        assert_close_to_float64(whole(value), one_process[name], expected[name], name)
    narrow = x.detach().bfloat16().requires_grad_()
    one_process, actual = results(layer.bfloat16(), narrow), results(ours.bfloat16(), narrow)
    for name, value in actual.items():
        assert_close_to_float64(whole(value), one_process[name], expected[name], name)

    # The squares of queries and keys are too large for float16, and the norms are not.
    layer = make_layer("defaults", torch.float16)
    nn.init.zeros_(layer.lr_proj.weight)
    exact, ours = copy.deepcopy(layer).double(), parallel(layer, 2)
    x = 200 * torch.randn(2, T, 32).half()
    with torch.no_grad():
        assert_close_to_float64(ours(x), layer(x), exact(x.double()), "y")


def test_precision(ranks):
    ranks.run(precision_is_that_of_one_process)


def make_model(**options):
    from lact_kernels.compat.transformers.causal_lm import LaCTForCausalLM, LaCTSWIGLUConfig

    config = LaCTSWIGLUConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attn_heads": 4,
            "num_lact_heads": 2,
            "window_size": 5,
            "lact_chunk_size": 8,
            "attn_qk_norm": True,
            "w0_w2_low_rank": 4,
            "intermediate_size": 48,
            "vocab_size": 50,
            "initializer_range": 0.2,
        }
        | options
    )
    return LaCTForCausalLM(config).double()


def model_equals_one_process():
    model = make_model()
    ours = parallel(model, 2, tensor_parallel_plan(model))
    tokens = torch.randint(50, (2, T))
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor(LEFT_AND_RIGHT)}
    loss = model.train()(**inputs, labels=tokens).loss
    loss.backward()
    expected = {"loss": loss} | parameter_gradients(model)
    ours.train()
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        loss = ours(**inputs, labels=tokens).loss
        loss.backward()
        assert_equal({"loss": loss} | parameter_gradients(ours), expected)

    generate = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    prompt = {name: x[:, :20] for name, x in inputs.items()}
    assert torch.equal(
        ours.eval().generate(**prompt, **generate), model.eval().generate(**prompt, **generate)
    )


def test_a_language_model(ranks):
    ranks.run(model_equals_one_process)


def make_speech_model():
    from lact_kernels.asr.config import LaCTASRConfig
    from lact_kernels.asr.model import LaCTForCTC

    options = dict(hidden_size=32, num_hidden_layers=2, num_attn_heads=2, num_lact_heads=2)
    return LaCTForCTC(LaCTASRConfig(**options, lact_chunk_size=8, vocab_size=9)).double()


def speech_model_equals_one_process():
    model = make_speech_model().eval()  # where nothing is random
    ours = parallel(model, 2, tensor_parallel_plan(model))
    waveforms = torch.randn(2, 16000, dtype=torch.float64)
    expected, actual = model(waveforms).logits, ours(waveforms).logits
    for logits in (expected, actual):  # the loss itself is float32
        logits.square().sum().backward()
    assert_equal(
        {"logits": actual} | parameter_gradients(ours),
        {"logits": expected} | parameter_gradients(model),
    )


def test_a_speech_model(ranks):
    ranks.run(speech_model_equals_one_process)


def fully_sharded_step_equals_one_process(low_rank):
    mesh, model = mesh_of(2), make_model(w0_w2_low_rank=low_rank)
    ours = parallel(model, 2, tensor_parallel_plan(model))
    for block in ours.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(ours, mesh=mesh["dp"])
    tokens = torch.randint(50, (2, T))
    row = tokens[mesh["dp"].get_local_rank()][None]
    for m, batch in ((model, tokens), (ours, row)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m.train()(batch, labels=batch).loss.backward()
        optimizer.step()
    assert_equal(parameter_gradients(ours), parameter_gradients(model))
    assert_equal(dict(ours.named_parameters()), dict(model.named_parameters()))
    assert ours.model.layers[0].attn.qkv.weight.to_local().shape == (24, 32)


# Two fast heads on 2 x 2 ranks: of a full-rank w1, two of them have one head and two have none.
@pytest.mark.parametrize("low_rank", [-1, 4])
def test_fully_shard_on_top(ranks, low_rank):
    ranks.run(fully_sharded_step_equals_one_process, low_rank)


def checkpoint_fits_any_number_of_ranks(folder):
    torch.manual_seed(1)
    model = make_model(num_lact_heads=4)
    saved = parallel(model, 4, tensor_parallel_plan(model))
    dcp.save({"model": saved.state_dict()}, checkpoint_id=folder)

    torch.manual_seed(2)
    other = make_model(num_lact_heads=4)
    sharded = parallel(other, 2, tensor_parallel_plan(other))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh_of(2)["dp"])
    for empty in (parallel(other, 2, tensor_parallel_plan(other)), sharded, other):
        state = {"model": empty.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        empty.load_state_dict(state["model"])
        for (name, x), y in zip(empty.named_parameters(), model.parameters()):
            assert torch.equal(whole(x), y), name


def test_a_checkpoint_fits_any_number_of_ranks(ranks, tmp_path):
    ranks.run(checkpoint_fits_any_number_of_ranks, str(tmp_path / "checkpoint"))


def compiled_layer_equals_one_process():
    layer = make_layer("defaults")
    ours = parallel(layer, 2)
    x = torch.randn(1, 11, 32, dtype=torch.float64, requires_grad=True)
    y, z = layer(x), torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    dy = torch.randn_like(y)
    assert_equal({"y": z} | gradients(ours, x, z, dy), {"y": y} | gradients(layer, x, y, dy))


def test_compiles_as_one_graph(two_ranks):
    two_ranks.run(compiled_layer_equals_one_process)


def bad_uses_raise_and_change_nothing():
    mesh = mesh_of(4)
    good = make_layer("qk-norm-bias", **FOUR_HEADS)
    odd = make_layer("paper")
    own = make_layer("paper", **FOUR_HEADS)
    own.gate = nn.Parameter(torch.zeros(()))
    for layer, on, error, message in (
        (nn.Linear(4, 4), mesh["tp"], TypeError, "is for a LaCTLayer, got Linear"),
        (good, mesh, ValueError, "device_mesh must have one dimension, got 2"),
        (odd, mesh["tp"], ValueError, "num_lact_heads must be divisible by the 4 ranks .* got 2"),
        (
            make_layer("paper", num_attn_heads=2, num_lact_heads=4),
            mesh["tp"],
            ValueError,
            "num_attn_heads must be divisible by the 4 ranks .* got 2",
        ),
        (own, mesh["tp"], ValueError, r"parameters that no LaCTLayer has: \['gate'\]"),
    ):
        before = (type(layer), vars(layer).copy(), list(layer.named_modules()))
        with pytest.raises(error, match=message):
            parallelize_module(layer, on, HeadParallel())
        assert (type(layer), vars(layer), list(layer.named_modules())) == before
        assert not any(isinstance(p, DTensor) for p in layer.parameters())

    ours = parallelize_module(good, mesh["tp"], HeadParallel())
    with pytest.raises(ValueError, match="distributed already"):
        parallelize_module(ours, mesh["tp"], HeadParallel())
    fully_shard(ours.lr_proj, mesh=mesh["dp"])
    with pytest.raises(
        RuntimeError, match="lr_proj.weight must be .* apply fully_shard to the layer"
    ):
        ours(torch.randn(1, 5, 32, dtype=torch.float64))


def test_errors(ranks):
    ranks.run(bad_uses_raise_and_change_nothing)


class Mixed(nn.Module):
    """A model of somebody who knows only that LaCT layers exist."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"lact": make_layer("paper"), "linear": nn.Linear(32, 32)})
        self.again = self.inner["lact"]


def styles(model):
    return {name: type(style).__name__ for name, style in tensor_parallel_plan(model).items()}


def test_the_plan_finds_layers_and_mlps_anywhere():
    mlp = {
        "gate_proj": "ColwiseParallel",
        "up_proj": "ColwiseParallel",
        "down_proj": "RowwiseParallel",
    }
    blocks = {}
    for i in range(2):
        blocks[f"layers.{i}.attn"] = "HeadParallel"
        blocks |= {f"layers.{i}.mlp.{name}": style for name, style in mlp.items()}
    assert styles(make_speech_model()) == blocks
    assert styles(make_model()) == {f"model.{name}": style for name, style in blocks.items()}
    assert styles(Mixed()) == {"inner.lact": "HeadParallel"}
    assert styles(make_layer("paper")) == {"": "HeadParallel"}
    assert styles(SwiGLUMLP(32)) == mlp
    assert styles(nn.Linear(4, 4)) == {}


def root_and_shared_layers_are_found():
    x = torch.randn(1, T, 32, dtype=torch.float64)
    layer, mixed = make_layer("paper"), Mixed()
    ours = parallel(layer, 2, tensor_parallel_plan(layer))
    assert isinstance(ours, LaCTLayer) and ours.num_lact_heads == 1
    ours = parallel(mixed, 2, tensor_parallel_plan(mixed))
    assert ours.again is ours.inner["lact"]
    assert_equal({"y": ours.again(x)}, {"y": mixed.again(x)})


def test_the_plan_of_a_root_and_of_a_shared_layer(ranks):
    ranks.run(root_and_shared_layers_are_found)


def pieces_and_heads_equal_one_process(case):
    layer = make_layer(case)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "heads"))
    ours = parallelize_module(copy.deepcopy(layer), mesh["heads"], HeadParallel())
    x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = layer(x)
    expected = gradients(layer, x, y, dy)
    pieces = SequencePieces.of(mesh["sequence"], (11, 18)[mesh["sequence"].get_local_rank()])
    mine = pieces.take(x.detach()).requires_grad_()
    my_y = ours(mine, pieces=pieces)
    actual = gradients(ours, mine, my_y, pieces.take(dy))
    for name, _ in ours.named_parameters():  # parts of a sum over the pieces
        dist.all_reduce(actual[name].to_local(), group=mesh["sequence"].get_group())
    expected["x"] = pieces.take(expected["x"])
    assert_equal({"y": my_y} | actual, {"y": pieces.take(y)} | expected)


def test_heads_and_pieces_on_a_mesh_of_two_dimensions(ranks):
    ranks.run(pieces_and_heads_equal_one_process, "qk-norm-bias")
