"""Models with functions and layers of LaCT's family, trained, saved, streamed and rendered with ours.

They are compared in float64, Newton-Schulz included, with the default tolerance of `assert_close`, 1e-7:
rounding errors of 1e-16, of which Newton-Schulz makes up to 500 times as much at each update, and an
optimizer's steps some more, stay far below; whatever else differs is far above.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

from benchmarks import plain_family
from lact_kernels import NewtonSchulz, TTTPlan, ttt
from lact_kernels.compat import lact
from lact_kernels.compat.lact import swap_lact_layers
from tests.family_models import DIM, TOKENS, StreamModel, ViewModel, WindowModel, plain_windows
from tests.tolerance import assert_close_to_float64

F64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=F64)


def views_loss(model, given, wanted):
    return model(given, wanted).square().mean()


def stream_loss(model, frames, wanted):
    """Of the frames, in two pieces, and of what the state knows in the end."""
    first, states = model(frames[:, :1])
    second, states = model(frames[:, 1:], states)
    last = model.query(wanted.flatten(1, 2), states)
    return sum((y - 1).square().mean() for y in (first, second, last))


MODELS = {"views": (ViewModel, views_loss), "stream": (StreamModel, stream_loss)}


@pytest.fixture(params=MODELS)
def case(request):
    """A model with plain layers, its loss, and the batches to train it on."""
    make, loss = MODELS[request.param]
    batches = [(normal(2, 3, TOKENS, DIM), normal(2, 2, TOKENS, DIM)) for _ in range(4)]
    return make(muon_dtype=F64).double(), loss, batches


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def train(model, optimizer, loss, batches):
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(loss(model, *batch))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def assert_same_training(model, losses, plain, expected):
    assert len(expected.unique()) == len(expected)
    assert_close(losses, expected)
    assert_close(dict(model.state_dict()), dict(plain.state_dict()))


def of_import(model, optimizer, loss, batches, monkeypatch, _):
    """The function alone is another one."""
    function = lact.fast_weight_swish_glu_weight_norm_mini_batch_apply
    monkeypatch.setattr(plain_family, "mini_batch_apply", lambda *args, muon_dtype: function(*args))
    return model, train(model, optimizer, loss, batches)


def of_swap(model, optimizer, loss, batches, *_):
    """In the middle of training, with the optimizer that is there."""
    losses = train(model, optimizer, loss, batches[:2])
    assert len(swap_lact_layers(model)) == 2
    return model, torch.cat([losses, train(model, optimizer, loss, batches[2:])])


def of_checkpoints(model, optimizer, loss, batches, _, path):
    """From plain layers to ours, and back."""
    ours = copy.deepcopy(model)
    swap_lact_layers(ours)
    losses = [train(model, optimizer, loss, batches[:1])]
    for new, piece in ((ours, batches[1:3]), (copy.deepcopy(model), batches[3:])):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        saved = torch.load(path, weights_only=True)
        model, optimizer = new, adamw(new)
        model.load_state_dict(saved["model"], strict=True)
        optimizer.load_state_dict(saved["optimizer"])
        losses.append(train(model, optimizer, loss, piece))
    return model, torch.cat(losses)


@pytest.mark.parametrize("way", [of_import, of_swap, of_checkpoints], ids=lambda way: way.__name__)
def test_training_gives_the_same_losses_and_weights(case, way, monkeypatch, tmp_path):
    model, loss, batches = case
    plain = copy.deepcopy(model)
    expected = train(plain, adamw(plain), loss, batches)
    model, losses = way(model, adamw(model), loss, batches, monkeypatch, tmp_path / "saved.pt")
    assert_same_training(model, losses, plain, expected)


def storages(model):
    return {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}


def test_swapped_layers_share_everything_and_compute_the_same(case):
    model, loss, (batch, *_) = case
    parameters, memory = dict(model.named_parameters()), storages(model)
    expected = torch.autograd.grad(loss(model, *batch), list(parameters.values()))
    old = [block.layer for block in model.blocks]

    assert swap_lact_layers(model) == {f"blocks.{i}.layer": layer for i, layer in enumerate(old)}
    new = [block.layer for block in model.blocks]
    assert all(type(layer) is lact.FastWeightGluMLPMultihead for layer in new)
    assert storages(model) == memory
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[n] is p for n, p in parameters.items())
    assert_close(torch.autograd.grad(loss(model, *batch), list(parameters.values())), expected)

    assert swap_lact_layers(model) == {}
    assert [block.layer for block in model.blocks] == new


@torch.no_grad()
def test_views_are_rendered_with_weights_that_were_given():
    model = ViewModel(muon_dtype=F64).double()
    given, wanted = normal(2, 3, TOKENS, DIM), normal(2, 2, TOKENS, DIM)
    states = model.reconstruct(given)
    expected = model.render(wanted, states)
    swap_lact_layers(model)
    ours = model.reconstruct(given)
    assert_close(ours, states)
    assert_close(model.render(wanted, ours), expected)
    assert_close(model.render(wanted, states), expected)  # reconstructed with plain layers
    assert_close(model(given, wanted), expected)


@torch.no_grad()
def test_frames_come_one_by_one():
    """As with plain layers, of which frames in one call give slightly different outputs.

    A call brings weights back to the norms of those that it is given. After the call before it, these lack
    up to 1e-5 of the first ones'.
    """
    model = StreamModel(muon_dtype=F64).double()
    frames, wanted = normal(2, 4, TOKENS, DIM), normal(2, 20, DIM)

    def one_by_one():
        outputs, states = [], ({}, {})
        for frame in frames.split(1, dim=1):
            o, states = model(frame, states)
            outputs.append(o)
        return torch.cat(outputs, dim=1), states, model.query(wanted, states)

    expected, at_once = one_by_one(), model(frames)
    swap_lact_layers(model)
    assert_close(one_by_one(), expected)
    assert_close(model(frames), at_once)
    before = copy.deepcopy(expected[1])
    model.query(wanted, expected[1])
    assert_close(expected[1], before, rtol=0, atol=0)


def our_windows(tokens, weights, rates, momentum, window):
    """`plain_windows` by `ttt`, a call for each window."""
    weights = [w.mT for w in weights]
    outputs, state = [], None
    for start in range(0, momentum.shape[1], window):
        q, k, v, lr0, lr1, lr2, share = (
            x[:, start : start + window] for x in (*tokens, *rates, momentum)
        )
        o, state = ttt(
            *(q, k, v),
            *weights,
            *(lr0, lr1, lr2),
            TTTPlan.block_causal(q.shape[1], window),
            momentum=share,
            muon=NewtonSchulz([plain_family.MUON] * 5),
            momentum_after_muon=True,
            detach_norms=True,
            initial_state=state,
            return_state=True,
        )
        outputs.append(o)
    return torch.cat(outputs, dim=1)


def test_windows_hand_a_state_on():
    plain = WindowModel(plain_windows).double()
    ours = copy.deepcopy(plain)
    ours.fast_weights = our_windows
    batches = [(normal(2, 56, DIM), 16) for _ in range(3)]  # the last window is half full

    def loss(model, x, window):
        return (model(x, window) - 1).square().mean()

    expected = train(plain, adamw(plain), loss, batches)
    assert_same_training(ours, train(ours, adamw(ours), loss, batches), plain, expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # bfloat16 in a norm with float32 weights
def test_autocast_is_as_close_to_float64_as_with_plain_layers(case):
    """Newton-Schulz in float32 here, as in ours: in bfloat16 it would be most of their error."""
    model, _, (batch, *_) = case
    exact = outputs(model, batch)
    model, batch = model.float(), [x.float() for x in batch]
    for block in model.blocks:
        block.layer.muon_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = outputs(model, batch)
        swap_lact_layers(model)
        ours = outputs(model, batch)
    for name, actual in ours.items():
        assert_close_to_float64(actual, plain[name], exact[name], name)


@torch.no_grad()
def outputs(model, batch):
    if isinstance(model, ViewModel):
        return {"o": model(*batch)}
    o, states = model(batch[0])
    return {"o": o, "query": model.query(batch[1].flatten(1, 2), states)}
