"""What masks of `transformers` say to "lact_window_attn", against the library's own dense masks."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from transformers import masking_utils  # noqa: E402
from transformers.models.gemma3 import modeling_gemma3  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4  # noqa: E402
from transformers.models.t5gemma2 import modeling_t5gemma2  # noqa: E402

import lact_kernels  # noqa: E402
from lact_kernels.compat.transformers import attention as compat  # noqa: E402
from lact_kernels.compat.transformers.masks import SequenceMask, Window, sequence_mask, values_of  # noqa: E402

T = 9
causal = masking_utils.causal_mask_function
window = masking_utils.sliding_window_causal_mask_function(3)
two_sided = masking_utils.sliding_window_bidirectional_mask_function(2)
everything = masking_utils.bidirectional_mask_function
no_images = masking_utils.blockwise_overlay(torch.full((2, T), -1))
PACKED = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 3 + [2] * 4])
packed = masking_utils.packed_sequence_mask_function(PACKED)
POSITIONS = torch.tensor([[*range(4), *range(5)], [*range(2), *range(3), *range(4)]])


def model_window(model, *args):
    return model.sliding_window_mask_function(*args)


FUNCTIONS = {
    "causal": causal,
    "window": window,
    "two sides": two_sided,
    "everything": everything,
    "both windows": masking_utils.and_masks(window, two_sided),
    "either window": masking_utils.or_masks(window, two_sided),
    "Gemma 3, full": masking_utils.or_masks(causal, lambda *args: torch.tensor(True)),
    "Gemma 3, window": masking_utils.or_masks(
        window, modeling_gemma3._bidirectional_window_overlay(3)
    ),
    "Gemma 3, text": masking_utils.and_masks(
        masking_utils.or_masks(causal, no_images), masking_utils.sliding_window_overlay(4)
    ),
    "two sizes": model_window(modeling_gemma4, (4, 3)),
    "two sizes, left alone": model_window(modeling_gemma4, [4, 0]),
    "T5Gemma 2": masking_utils.and_masks(everything, model_window(modeling_t5gemma2, 5, False)),
    "T5Gemma 2, even": model_window(modeling_t5gemma2, 4, False),
    "T5Gemma 2, causal": model_window(modeling_t5gemma2, 4, True),
    "packed": masking_utils.and_masks(causal, packed),
    "packed, in a window": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(window, POSITIONS), packed
    ),
    "packed, in two sides": masking_utils.and_masks(two_sided, packed),
}
FUNCTIONS["Gemma 3, full"].__closure__[0].cell_contents[1].__module__ = modeling_gemma3.__name__
PADDED = torch.ones(2, T, dtype=torch.bool)
PADDED[0, :3] = PADDED[1, 7:] = False


def dense(mask: SequenceMask) -> torch.Tensor:
    """Which keys of a row the queries see."""
    see, numbers = mask.window, values_of(mask).long()
    i, j = torch.arange(T)[:, None], torch.arange(T)
    left, right = (T if limit is None else limit for limit in see)
    same = numbers[:, :, None] == numbers[:, None]
    return (i - left <= j) & (j <= i + right) & same & (numbers[:, None] > 0)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_mask_functions(function, padding):
    sizes = {"batch_size": 2, "q_length": T, "kv_length": T}
    expected = masking_utils.sdpa_mask(
        **sizes, mask_function=function, attention_mask=padding, allow_is_causal_skip=False
    )[:, 0]
    mask = sequence_mask(**sizes, mask_function=function, attention_mask=padding)
    is_query = torch.ones(2, T, dtype=torch.bool) if padding is None else padding
    assert torch.equal(dense(mask)[is_query], expected[is_query])


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "padded"])
def test_a_mask_made_in_advance_keeps_its_window(padding):
    made = sequence_mask(2, T, T, mask_function=window, attention_mask=padding)
    mask = sequence_mask(2, T, T, mask_function=causal, attention_mask=made.to(torch.bool))
    assert torch.equal(dense(mask), dense(made)) and mask.is_full == made.is_full


def test_a_mask_that_is_known_to_be_full_is_not_read_again():
    made = SequenceMask.of(torch.zeros(2, T, dtype=torch.bool), Window(2, 0), is_full=True)
    assert sequence_mask(2, T, T, mask_function=window, attention_mask=made).is_full


def a_window_that_means_something_else(sliding_window):
    def function(b, h, q, k):
        return (k > q - 2 * sliding_window) & (k <= q)

    function.__module__ = causal.__module__
    function.__qualname__ = masking_utils.sliding_window_overlay(3).__qualname__
    return function


def foreign(b, h, q, k):
    return q >= k


foreign.__qualname__ = window.__qualname__
BAD_FUNCTIONS = {
    "chunks": (masking_utils.chunked_overlay(3, torch.zeros(1)), "chunked_overlay.*, of chunks"),
    "images": (
        masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.zeros(2, T))),
        "blockwise_overlay.*, of images whose tokens see each other,",
    ),
    "no key": (masking_utils.sliding_window_causal_mask_function(0), "sliding_window_overlay"),
    "no key before": (model_window(modeling_gemma4, (0, 3)), "sliding_window_mask_function"),
    "no function": (masking_utils.or_masks(causal, torch.nn.Identity()), "Identity"),
    "foreign": (foreign, "sliding_window_causal_mask_function|and_masks"),
    "foreign, and": (masking_utils.and_masks(causal, foreign), "and_masks"),
    "same name": (a_window_that_means_something_else(3), "sliding_window_overlay"),
    "packed or": (masking_utils.or_masks(causal, packed), "or_masks of functions of packed"),
    "packed twice": (masking_utils.and_masks(packed, packed), "and_masks of several"),
}


@pytest.mark.parametrize("function, name", BAD_FUNCTIONS.values(), ids=BAD_FUNCTIONS.keys())
def test_other_mask_functions_are_errors(function, name):
    with pytest.raises(NotImplementedError, match=f"the mask function ({name})"):
        sequence_mask(2, T, T, mask_function=function)


def test_two_sides_over_free_slots_are_an_error():
    with pytest.raises(
        NotImplementedError, match="two sides of 9 queries over 12 keys, of which 9"
    ):
        sequence_mask(2, T, 12, mask_function=two_sided)


def test_a_mask_can_be_moved_and_asked():
    mask = SequenceMask.of(PADDED.clone(), Window(2, 0))
    for moved in (mask.to(torch.int32), mask.to("cpu", non_blocking=True), mask.clone().detach()):
        assert isinstance(moved, SequenceMask) and moved.window == (2, 0)
    assert mask.shape == (2, T) and not mask.all() and mask.is_cpu


COMPUTED = {
    "a column": lambda mask: mask[:, 0],
    "slice": lambda mask: mask[:, None, None, :T],
    "add": lambda mask: torch.zeros(2, 1, T, T) + mask,
    "compare": lambda mask: mask == 0,
    "concatenate": lambda mask: torch.cat([mask, torch.zeros(2, 1, T, T)], dim=-1),
    "pad": lambda mask: torch.nn.functional.pad(mask, (0, 2)),
    "scores": lambda mask: mask.to(torch.float32),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_model_that_computes_with_its_mask_is_refused(compute):
    with pytest.raises(NotImplementedError, match="the model computes with its mask"):
        compute(SequenceMask.of(PADDED.clone(), Window(2, 0)))


@pytest.mark.parametrize("padding", [None, PADDED.int()], ids=["full", "padded"])
def test_a_model_with_attention_of_its_own_is_refused(padding):
    """Which adds the mask to the scores, and would see later tokens if there were none."""
    config = transformers.BloomConfig(vocab_size=67, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation=compat.NAME)
    with pytest.raises(NotImplementedError, match="the model computes with its mask"):
        model(torch.randint(1, 67, (2, T)), attention_mask=padding)


def tensors(Tq=T, Tk=T, dtype=torch.float64):
    return [
        torch.randn(2, H, n, 16, dtype=dtype, requires_grad=True)
        for H, n in ((4, Tq), (2, Tk), (2, Tk))
    ]


def layer(**attributes):
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def ours(module, *args, **kwargs):
    return compat.lact_window_attn_forward(module, *args, **kwargs)[0]


def expected_rows(q, k, v, size, lengths, **options):
    """`window_attn` of each row alone, of the tokens `(first, last)`."""
    rows = []
    for row, (first, last) in enumerate(lengths):
        parts = (x[row : row + 1, :, first:last].transpose(1, 2) for x in (q, k, v))
        rows.append(lact_kernels.window_attn(*parts, size, **options)[0])
    return torch.cat(rows)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("size", [4, (2, 2), (-1, 3)], ids=str)
def test_sinks_and_soft_caps_and_their_gradients(size, padding):
    """Of the rows of a batch, as of each alone."""
    q, k, v = tensors()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    left, right = (3, 0) if size == 4 else size
    is_token, lengths = torch.ones_like(PADDED), [(0, T), (0, T)]
    if padding is not None:
        is_token, lengths = padding, [(3, T), (0, 7)]
    mask = SequenceMask.of(is_token.clone(), Window(None if left == -1 else left, right))
    o = ours(layer(), q, k, v, mask, softcap=1.5, s_aux=sinks)[is_token]
    expected = expected_rows(q, k, v, size, lengths, softcap=1.5, sinks=sinks)
    weights = torch.randn_like(o)
    results = [
        (x, *torch.autograd.grad((x * weights).sum(), (q, k, v, sinks))) for x in (o, expected)
    ]
    torch.testing.assert_close(*results)


def test_layers_without_a_mask_say_themselves_what_they_see():
    q, k, v = tensors()
    for module, options, size in (
        (layer(), {"sliding_window": 3}, 3),
        (layer(), {"sliding_window": 3, "is_causal": False}, (2, 2)),
        (layer(is_causal=False), {"sliding_window": 3}, (2, 2)),
        (layer(is_causal=False), {"sliding_window": None}, (-1, -1)),
        (layer(is_causal=False), {}, (-1, -1)),
        (layer(is_causal=False), {"position_ids": POSITIONS}, (-1, -1)),
        (layer(is_causal=False), {"is_causal": True}, None),
    ):
        o = ours(module, q, k, v, None, **options).flatten(0, 1)
        torch.testing.assert_close(o, expected_rows(q, k, v, size, [(0, T)] * 2))


@pytest.mark.parametrize(
    "mask_window, sliding_window, differ",
    [
        (Window(2, 0), 3, False),
        (Window(2, 0), 4, True),
        (Window(2, 0), None, True),
        (Window(None, 0), 3, True),
        (Window(2, 2), 3, False),
        (Window(3, 3), 3, True),
    ],
    ids=str,
)
def test_a_mask_decides_and_says_where_the_layer_differs(mask_window, sliding_window, differ):
    q, k, v = tensors()
    mask = SequenceMask.of(torch.ones(2, T, dtype=torch.bool), mask_window)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        o = ours(layer(), q, k, v, mask, sliding_window=sliding_window).flatten(0, 1)
    assert ["Module has a sliding_window of" in str(x.message) for x in caught] == [True] * differ
    size = tuple(-1 if limit is None else limit for limit in mask_window)
    torch.testing.assert_close(o, expected_rows(q, k, v, size, [(0, T)] * 2))


@pytest.mark.parametrize("Tq", [4, T, 12])
def test_cross_attention(Tq):
    """Queries see all keys of another sequence, whose padding is not theirs, as many as they may be."""
    q, k, v = tensors(Tq)
    mask = sequence_mask(2, Tq, T, mask_function=everything, attention_mask=PADDED)
    o = ours(layer(), q, k, v, mask)
    for row, keys in enumerate((slice(3, T), slice(0, 7))):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[row], *(x[row, :, keys].repeat_interleave(2, 0) for x in (k, v))
        )
        torch.testing.assert_close(o[row].transpose(0, 1), expected)


@pytest.mark.parametrize(
    "seen, is_right",
    [
        (Window(2, 2), False),
        (Window(None, 2), False),
        (Window(T, T), True),
        (Window(None, 0), True),
    ],
    ids=str,
)
def test_padding_between_tokens(seen, is_right):
    """Distances count it, which matters where a limit is nearer than the row is long."""
    q, k, v = tensors()
    gap = torch.ones(2, T, dtype=torch.bool)
    gap[0, 3] = False
    mask = SequenceMask.of(gap, seen)
    if not is_right:
        with pytest.raises(NotImplementedError, match="padding between the tokens of a row"):
            ours(layer(), q, k, v, mask)
        return
    i, j = torch.arange(T)[:, None], torch.arange(T)
    see = gap[:, None, None] & (j <= i if seen.right == 0 else True)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, see).transpose(1, 2)
    torch.testing.assert_close(ours(layer(), q, k, v, mask)[gap], expected[gap])


def test_numbers_of_sequences_that_descend_are_an_error():
    q, k, v = tensors()
    numbers = torch.tensor([[1, 1, 2, 2, 1, 1, 3, 3, 0], [1] * T])
    with pytest.raises(ValueError, match="attention_mask must number .* do not descend"):
        ours(layer(), q, k, v, numbers, sliding_window=3)


def tiny(config_class, auto=transformers.AutoModelForCausalLM, **options):
    config = config_class(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        **options,
    )
    return auto.from_config(config, attn_implementation="lact_window_attn").eval()


def test_checkpoints_of_layers_that_have_their_window_from_the_mask():
    """Two batches wait for their backward, and each has masks of its own."""
    model = tiny(
        transformers.PhimoeConfig, sliding_window=3, num_local_experts=2, num_experts_per_tok=1
    )
    model.config.attention_dropout = 0.0
    ids = torch.randint(1, 67, (2, T))
    results = []
    for checkpoints in (False, True):
        if checkpoints:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        losses = [
            model(ids, attention_mask=x, use_cache=False).logits.sin().mean()
            for x in (None, PADDED)
        ]
        gradients = torch.autograd.grad(sum(losses), model.model.embed_tokens.weight)
        results.append((*losses, *gradients))
    torch.testing.assert_close(*results)


class Compiled(torch.nn.Module):
    def forward(self, q, k, v, padding):
        mask = sequence_mask(2, T, T, mask_function=window, attention_mask=padding)
        return ours(self, q, k, v, mask) + 1


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "padded"])
def test_compiled(padding):
    inputs = [x.detach() for x in tensors()]
    compiled = torch.compile(Compiled(), backend="eager")
    torch.testing.assert_close(compiled(*inputs, padding), Compiled()(*inputs, padding))
