"""`LaCTLayer` and the models on sequences that ranks hold in pieces, against one process."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lact_kernels.distributed import SequencePieces
from tests.lact_layer_cases import CASES, make_layer
from tests.ranks import Ranks, mesh_of

pytestmark = pytest.mark.xdist_group("ranks")

# Pieces that are no multiples of the chunk (8), shorter than the window (5) or not, one without a token.
LENGTHS = {2: (19, 22), 4: (13, 0, 3, 25)}
PACKED = (0, 9, 9, 12, 41)


def relative_error(actual, expected):
    if not expected.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def layer_equals_one_process(cases, size, cu_seqlens, as_mesh):
    mesh = mesh_of(size)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    for case in cases:
        torch.manual_seed(0)
        layer = make_layer(case)
        x = torch.randn(1 if cu_seqlens else 2, sum(LENGTHS[size]), 32, dtype=torch.float64)
        lengths = LENGTHS[size]
        if layer.temporal_reduction > 1:
            lengths = {2: (18, 23), 4: (12, 0, 3, 26)}[size]
        dy = torch.randn_like(x)
        x.requires_grad_()
        y = layer(x, cu_seqlens=borders)
        expected = torch.autograd.grad(y, [x, *layer.parameters()], dy)

        pieces = SequencePieces.of(mesh, lengths[mesh.get_local_rank()], borders)
        mine = pieces.take(x.detach()).requires_grad_()
        if as_mesh:
            actual_y = layer(mine, pieces=mesh, cu_seqlens=borders)
        else:
            if borders is not None:
                with torch.inference_mode():
                    layer(
                        mine, pieces=pieces
                    )  # what it has made of the pieces must serve the training
            actual_y = layer(mine, pieces=pieces)
        actual = torch.autograd.grad(actual_y, [mine, *layer.parameters()], pieces.take(dy))
        for g in actual[1:]:
            dist.all_reduce(g, group=mesh.get_group())
        bound = 1e-8 if "muon" in case else 1e-10  # of an ill-conditioned iteration
        assert relative_error(actual_y, pieces.take(y)) < bound, case
        assert relative_error(actual[0], pieces.take(expected[0])) < bound, case
        for (name, _), a, e in zip(layer.named_parameters(), actual[1:], expected[1:]):
            assert relative_error(a, e) < bound, (case, name)


@pytest.mark.parametrize("size", [2, 4])
def test_layer_of_every_option(ranks: Ranks, size):
    ranks.run(layer_equals_one_process, list(CASES), size, None, False)


def test_packed_layer(ranks: Ranks):
    cases = ["paper-muon", "qk-norm-bias", "prenorm", "full-attention", "two-sided", "sees-all"]
    ranks.run(layer_equals_one_process, cases, 4, PACKED, False)


def test_layer_takes_the_mesh_itself(ranks: Ranks):
    ranks.run(layer_equals_one_process, ["paper"], 4, PACKED, True)


def layer_refuses(size):
    mesh = mesh_of(size)
    layer = make_layer("reduction")
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    pieces = SequencePieces.of(mesh, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    borders = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="multiples of temporal_reduction = 3"):
        layer(x, pieces=pieces)
    layer = make_layer("paper")
    with pytest.raises(ValueError, match="attention_mask and pieces exclude each other"):
        layer(x, mask, pieces=pieces)
    with pytest.raises(ValueError, match="cu_seqlens and pieces exclude each other"):
        layer(x, cu_seqlens=borders, pieces=pieces)
    with pytest.raises(ValueError, match="must have the 10 tokens of this rank's piece"):
        layer(x[:, 1:], pieces=pieces)
    with pytest.raises(TypeError, match="pieces must be SequencePieces or a DeviceMesh, got int"):
        layer(x, pieces=3)
    with pytest.raises(ValueError, match="mesh must have one dimension"):
        layer(x, pieces=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))


def test_layer_refuses_what_does_not_fit(ranks: Ranks):
    ranks.run(layer_refuses, 4)


@contextlib.contextmanager
def float64_losses():
    """Losses are computed in float32, which would hide what this compares."""
    before, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    yield
    torch.Tensor.float = before


def language_model():
    from lact_kernels.compat.transformers import LaCTForCausalLM, LaCTSWIGLUConfig

    torch.manual_seed(0)
    config = LaCTSWIGLUConfig(
        hidden_size=32, num_hidden_layers=2, num_attn_heads=4, num_lact_heads=2, vocab_size=50,
        window_size=7, lact_chunk_size=8, use_muon=True, w0_w2_low_rank=4, intermediate_size=48,
    )  # fmt: skip
    return LaCTForCausalLM(config).double().train()


def gradients_equal(model, whole, loss, whole_loss, size):
    """The mean over ranks of the losses and of the gradients."""
    world = dist.get_world_size()
    loss.backward()
    whole_loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert abs(total / world - whole_loss).item() < 1e-12
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        assert p.grad is not None, name
        grad = p.grad.clone()
        dist.all_reduce(grad)
        assert relative_error(grad / world, q.grad) < 1e-8, name


def language_model_equals_one_process(size, masked, counted):
    whole = language_model()
    ids = torch.randint(3, 50, (2, 45))
    options = {"labels": ids}
    if masked:
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 11] = -100  # behind padding, which cannot predict it
        options = {"attention_mask": mask, "labels": labels}
    if counted:
        options["num_items_in_batch"] = torch.tensor(100)
    model = copy.deepcopy(whole)
    model.sequence_mesh = mesh_of(size)
    with float64_losses():
        expected, actual = whole(ids, **options), model(ids, **options)
    places = actual.places
    logits = expected.logits.flatten(0, 1)[places]
    assert relative_error(actual.logits, logits) < 1e-9
    gradients_equal(model, whole, actual.loss, expected.loss, size)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["whole-rows", "padded"])
def test_language_model(ranks: Ranks, size, masked):
    ranks.run(language_model_equals_one_process, size, masked, size == 4)


def checkpointed_language_model(size, chunk_size):
    """A recomputed forward takes part in all communication once more."""
    model = language_model()
    for block in model.model.layers:
        block.attn.lact_chunk_size = chunk_size
    model.sequence_mesh = mesh_of(size)
    ids = torch.randint(3, 50, (2, 45))
    model(ids, labels=ids).loss.backward()
    for use_reentrant in (False, True):
        checkpointed = copy.deepcopy(model)
        checkpointed.zero_grad()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        checkpointed(ids, labels=ids).loss.backward()
        for p, q in zip(checkpointed.parameters(), model.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("size, chunk_size", [(4, 8), (2, 32)], ids=["across", "within"])
def test_gradient_checkpointing(ranks: Ranks, size, chunk_size):
    ranks.run(checkpointed_language_model, size, chunk_size)


def compiled_layer(size):
    layer = make_layer("paper")
    pieces = SequencePieces.even(mesh_of(size), 41)
    x = pieces.take(torch.randn(2, 41, 32, dtype=torch.float64))
    expected = torch.autograd.grad(layer(x, pieces=pieces).sum(), layer.parameters())
    y = torch.compile(layer, backend="aot_eager")(x, pieces=pieces)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.parameters()), expected)


def test_compiled_layer(two_ranks: Ranks):
    two_ranks.run(compiled_layer, 2)


def recogniser_equals_one_process(size, reduction, window_size):
    from lact_kernels.asr import LaCTASRConfig, LaCTForCTC

    torch.manual_seed(0)
    config = LaCTASRConfig(
        hidden_size=32, num_hidden_layers=2, num_attn_heads=4, num_lact_heads=2, vocab_size=12,
        window_size=window_size, lact_chunk_size=8, intermediate_size=48,
        temporal_reduction=reduction, dropout=0.0,
    )  # fmt: skip
    whole = LaCTForCTC(config).double().train()
    whole.spec_augment.eval()
    model = copy.deepcopy(whole)
    model.sequence_mesh = mesh_of(size)
    waveforms = torch.randn(2, 23000)
    mask = torch.ones(2, 23000, dtype=torch.int64)
    mask[1, 17000:] = 0
    labels = torch.tensor([[3, 4, 5, 3], [6, 7, -100, -100]])
    for m in (whole, model):  # features are float32, the loss is to be float64
        m._loss = float64_losses()(m._loss)
    expected = whole(waveforms, mask, labels, output_hidden_states=True)
    actual = model(waveforms, mask, labels, output_hidden_states=True)
    assert actual.hidden_states[0].shape[1] < expected.hidden_states[0].shape[1]
    assert relative_error(actual.logits, expected.logits) < 1e-10
    gradients_equal(model, whole, actual.loss, expected.loss, size)
    for a, b in zip(model.buffers(), whole.buffers()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size, reduction, window_size", [(2, 1, 7), (4, 2, 7), (4, 2, (4, 3))])
def test_recogniser(ranks: Ranks, size, reduction, window_size):
    ranks.run(recogniser_equals_one_process, size, reduction, window_size)


def draws_are_the_same(size):
    from lact_kernels.asr import LaCTASRConfig, LaCTForCTC

    torch.manual_seed(0)
    config = LaCTASRConfig(
        hidden_size=32, num_hidden_layers=1, num_attn_heads=4, num_lact_heads=2, vocab_size=12,
        window_size=7, lact_chunk_size=8, intermediate_size=48, dropout=0.5,
    )  # fmt: skip
    model = LaCTForCTC(config).train()
    model.sequence_mesh = mesh_of(size)
    waveforms = torch.randn(1, 16000)
    torch.manual_seed(dist.get_rank())  # the generators of ranks are at different states
    before = torch.get_rng_state()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        first, second = model(waveforms).logits, model(waveforms).logits
    after = torch.get_rng_state()
    assert not torch.equal(first, second)
    all_first = [torch.empty_like(first) for _ in range(size)]
    dist.all_gather(all_first, first, group=model.sequence_mesh.get_group())
    assert all(torch.equal(x, first) for x in all_first)
    assert not torch.equal(before, after)  # ranks go on with draws of their own
    return model.encoder.layers[0].norm.running_mean


def test_ranks_augment_alike(ranks: Ranks):
    means = ranks.run(draws_are_the_same, 2)
    assert torch.equal(means[0], means[1]) and torch.equal(means[2], means[3])
    assert not torch.equal(means[0], means[2])  # the two groups are at different places
