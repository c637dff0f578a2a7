"""A few cases of each kind of the soak, always the same, and faults that it has to find."""

import re

import pytest
import torch

import lact_kernels.eager.window_attn as eager_window_attn
from lact_kernels import RingKVCache, TTTState
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.layers.padding import Padding
from lact_kernels.ops import block_causal_ttt as ttt_ops
from lact_kernels.ops import checks
from lact_kernels.ops import fast_weights as shared_ops
from tests.soak import __main__ as soak
from tests.soak.bar import DRAWS, Gradients, Rounding, hold, hold_gradients
from tests.soak.draw import KINDS, fault_of


@pytest.mark.parametrize("name", KINDS)
def test_fixed_cases(name):
    faults = {f"{name}:{seed}": fault_of(name, seed)[0] for seed in range(1, 9)}
    assert not any(faults.values()), "\n".join(f"{k}  {x}" for k, x in faults.items() if x)


def one_key_too_many(patch):
    within = AttentionOptions.within

    def wider(options, Tq, Tk):
        options = within(options, Tq, Tk)
        return options._replace(left=min(options.left + 1, max(Tk - 1, 0)))

    patch.setattr(AttentionOptions, "within", wider)


def last_key_lost(patch):
    forward = eager_window_attn.window_attn_fwd

    def lose(q, k, v, *args):
        v = torch.cat([v[:, :-1], 0 * v[:, -1:]], dim=1)
        return forward(q, k, v, *args)

    patch.setattr(eager_window_attn, "window_attn_fwd", lose)


def rounded_to_half(patch):
    forward = eager_window_attn.window_attn_fwd

    def rounded(*args):
        o, lse = forward(*args)
        return o.half().to(o.dtype), lse

    patch.setattr(eager_window_attn, "window_attn_fwd", rounded)


def input_changed(patch):
    forward = eager_window_attn.window_attn_fwd

    def scaled_in_place(q, *args):
        result = forward(q, *args)
        q.data.mul_(2)
        return result

    patch.setattr(eager_window_attn, "window_attn_fwd", scaled_in_place)


def token_lost(patch):
    append = RingKVCache.append

    def lose(self, k, v, lengths=None):
        append(self, torch.cat([k[:, :-1], 0 * k[:, -1:]], dim=1), v, lengths)

    patch.setattr(RingKVCache, "append", lose)


def rates_exchanged(patch):
    op = shared_ops.ttt_fwd
    patch.setattr(shared_ops, "ttt_fwd", lambda q, k, v, a, b, c, *x: op(q, k, v, c, b, a, *x))


def pending_tokens_lost(patch):
    patch.setattr(TTTState, "append", lambda state, tokens: state)


def stale_weights(patch):
    run = ttt_ops.run

    def forget(call, backend):
        o, end = run(call, backend)
        return o, end and end._replace(weights=call.start.weights)

    patch.setattr(ttt_ops, "run", forget)


def mask_not_read(patch):
    patch.setattr(Padding, "of", lambda mask: None)


def number_not_checked(patch):
    patch.setattr(checks, "check_positive_int", lambda name, value: None)


FOUND_BY = {  # within so many cases
    one_key_too_many: ("window_attn", 5),
    last_key_lost: ("window_attn", 5),
    rounded_to_half: ("window_attn", 5),
    input_changed: ("window_attn", 5),
    token_lost: ("ring_kv_cache", 5),
    rates_exchanged: ("ttt", 8),
    pending_tokens_lost: ("ttt_state", 8),
    stale_weights: ("ttt_state", 8),
    mask_not_read: ("lact_layer", 20),
    number_not_checked: ("wrong_argument", 100),
}


@pytest.mark.parametrize("fault", FOUND_BY, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault, monkeypatch):
    name, cases = FOUND_BY[fault]
    seeds = range(100, 100 + cases)
    fault(monkeypatch)
    assert any(fault_of(name, seed)[0] for seed in seeds)


def normal(*shape):
    return torch.randn(*shape)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_rounding_is_right_and_more_is_wrong(size):
    """Of few elements, too: the noise of two roundings passes, a hundred of them do not."""
    eps = torch.finfo(torch.float32).eps

    def plain(x):
        return {"y": (x["a"] * x["b"]).sum(-1)}

    def off_by(roundings):
        def ours(x):
            exact = plain({name: y.double() for name, y in x.items()})["y"]
            scale = (x["a"] * x["b"]).abs().sum(-1)
            return {"y": (exact + roundings * eps * scale).float()}

        return ours

    inputs = {"a": normal(size, 9), "b": normal(size, 9)}
    hold(off_by(1.0), plain, inputs, torch.float32)
    with pytest.raises(AssertionError, match="y is wrong: rms error .* plain PyTorch"):
        hold(off_by(100.0), plain, inputs, torch.float32)


def test_what_cancels_is_held_by_its_terms():
    """A gradient that is 0 but for rounding has no size of its own."""
    how = Gradients(0, torch.float32)

    def plain(x):
        return {"p": x["s"].softmax(-1)}

    def ours(x):
        weights = x["s"].exp()
        return {"p": weights / weights.sum(-1, keepdim=True)}

    hold_gradients(ours, plain, how, {"s": normal(5, 1)})


def test_draws_know_the_conditioning():
    x = torch.full((1000,), 100.0, dtype=torch.float64)
    with Rounding(torch.float32):
        errors = x.exp() / x.exp().mean() - 1
    assert 20 * 2**-23 < errors.std() < 100 * 2**-23 and DRAWS > 1


def test_one_case_again(capsys):
    assert soak.main(["--only", "wrong_argument:3"]) == 0
    assert capsys.readouterr().out == "wrong_argument:3 is right\n"
    with pytest.MonkeyPatch.context() as patch:
        number_not_checked(patch)
        seed = next(n for n in range(1000) if fault_of("wrong_argument", n)[0])
        assert soak.main(["--only", f"wrong_argument:{seed}"]) == 1
    told = capsys.readouterr()
    assert f"wrong_argument:{seed} is wrong: " in told.out and "Traceback" in told.err


def test_cases_depend_on_the_seed_alone():
    first, again, other = (
        [case for case, _ in zip(soak.cases(seed, list(KINDS)), range(50))] for seed in (1, 1, 2)
    )
    assert first == again and not set(first) & set(other)


def test_a_run(capsys):
    """In a process of its own, which counts as wrong what it does not survive."""
    arguments = ["--cases", "3", "--processes", "1", "--kinds", "layer_branches"]
    assert soak.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"layer_branches +3 +- +\d+\nall +3 +-\n", out), out


def test_summary_names_what_is_wrong(capsys):
    tally = soak.Tally()
    tally.add(("ttt", 5), 0.1, None)
    tally.add(("ttt", 6), 0.3, "o is wrong")
    assert "WRONG  ttt:6  o is wrong" in capsys.readouterr().out
    assert re.search(r"ttt +2 +1 +200\n", tally.summary())
    assert tally.summary().endswith("wrong:\n    python -m tests.soak --only ttt:6")


@pytest.mark.parametrize("arguments", [["--only", "ttt"], ["--only", "x:1"], ["--processes", "0"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        soak.main(arguments)
    assert error.value.code == 2 and arguments[0] in capsys.readouterr().err
