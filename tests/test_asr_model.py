"""LaCTForCTC: features, padding, CTC, named configurations, and what transformers asks of a model."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from transformers import AutoModelForCTC, pipeline

from lact_kernels.asr.config import NAMED, LaCTASRConfig
from lact_kernels.asr.features import FLOOR, LogMel, SpecAugment
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import load_recogniser, save_recogniser
from lact_kernels.asr.text import build_tokenizer

SMALL = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attn_heads": 2,
    "num_lact_heads": 2,
    "window_size": 5,
    "lact_chunk_size": 4,
    "intermediate_size": 32,
}
OPTIONS = {
    "plain": {},
    "grouped": {"temporal_reduction": 2},
    "no look-ahead": {"look_ahead": 0},
    "one convolution": {"conv_kernel_sizes": (3,), "conv_strides": (1,), "look_ahead": 9},
    "no window": {"window_size": None},
}
TWO_SIDED = {"window_size": (3, 2)}
LOOKING_AHEAD = {
    "two-sided": TWO_SIDED,
    "two-sided, grouped": {"window_size": (0, 1), "temporal_reduction": 2, "look_ahead": 3},
    "seeing all": {"window_size": (-1, -1), "look_ahead": 0},
}
ALL_OPTIONS = OPTIONS | LOOKING_AHEAD


def small_model(seed: int = 0, **options) -> LaCTForCTC:
    """A model whose parameters and statistics are all far from their initial values."""
    torch.manual_seed(seed)
    model = LaCTForCTC(LaCTASRConfig(**SMALL | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "running_mean")):
                buffer.normal_()
    return model.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms with garbage behind their ends, and their mask."""
    x = noise(len(lengths), max(lengths))
    return x, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def test_log_mel_is_that_of_the_samples_heard():
    config = LaCTASRConfig()
    model, x = LogMel(config), noise(1, 8000)
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    filters = torchaudio.functional.melscale_fbanks(257, 0.0, 8000.0, 80, 16000).double().numpy()
    frames = model(x)[0]
    assert frames.shape == (50, 80)
    for t in (0, 1, 2, 3, 25, 49):
        heard = np.zeros(512)
        past = x[0, max(160 * (t + 1) - 512, 0) : 160 * (t + 1)].double().numpy()
        heard[512 - len(past) :] = past
        expected = np.log(np.abs(np.fft.rfft(heard * window)) ** 2 @ filters + FLOOR)
        np.testing.assert_allclose(frames[t].numpy(), expected, atol=2e-4)


def test_features_are_normalised_by_what_was_measured():
    model = LogMel(LaCTASRConfig())
    speech = [noise(5000, seed=1), noise(8000, seed=2), noise(100, seed=3)]
    model.measure(speech)
    frames = torch.cat([model(x[None, : len(x) // 160 * 160])[0] for x in speech])
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(80), atol=1e-3, rtol=0)
    torch.testing.assert_close(frames.std(dim=0, correction=0), torch.ones(80), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="at least one frame"):
        model.measure([noise(159)])


def test_features_do_not_follow_the_dtype_of_the_model():
    model, x = small_model(), noise(1, 4800)
    expected = model.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.features(x), expected, rtol=0, atol=0)
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low.features.log_mel(x).dtype == torch.float32
    torch.testing.assert_close(low.features.log_mel(x), model.features.log_mel(x), rtol=0, atol=0)
    assert low(x.bfloat16()).logits.dtype == torch.bfloat16


def test_spec_augment_masks_each_row_in_training_only():
    augment = SpecAugment(LaCTASRConfig())
    x = torch.ones(4, 200, 80)
    torch.manual_seed(0)
    masked = augment.train()(x)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    bands = (masked == 0).all(dim=1).sum(dim=1)  # of each row
    frames = (masked == 0).all(dim=2).sum(dim=1)
    assert (bands <= 26).all() and (frames <= 30).all() and bands.max() > 0 and frames.max() > 0
    assert any(not torch.equal(masked[0], row) for row in masked[1:])
    assert augment.eval()(x) is x


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_a_padded_batch_equals_its_rows(options):
    model = small_model(**options)
    lengths = [9000, 20000, 1, 640, 641, 0, 12799]
    x, mask = padded_batch(lengths)
    ratio, shift = model.config.inputs_to_logits_ratio, model.config.look_ahead
    with torch.no_grad():
        together = model(x, mask).logits
        for row, length in enumerate(lengths):
            alone = model(x[row : row + 1, :length]).logits[0]
            assert len(alone) == -(-length // ratio)
            waveform = F.pad(x[row : row + 1, :length], (0, -length % ratio))
            heard, _ = model.encode(model.features(waveform))  # in which nothing is ever padded
            expected = model.ctc_head(heard[0, shift : shift + len(alone)])
            torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            behind = together[row, len(alone) :].softmax(dim=-1)
            assert (behind[:, 0] == 1).all()  # blank
    assert not together.isnan().any()


@pytest.mark.parametrize("mode, windows", [("train", {}), ("eval", {}), ("train", TWO_SIDED)])
def test_more_padding_changes_nothing(mode, windows):
    """Loss, gradients, and in training the statistics of the batch norms."""
    options = {"dropout": 0.0, "num_freq_masks": 0, "num_time_masks": 0} | windows
    lengths = [9000, 20000, 14000]
    x, mask = padded_batch(lengths)
    labels = torch.tensor([[1, 2, -100], [3, 3, 4], [5, -100, -100]])
    results = []
    for extra in (0, 7000):
        model = small_model(**options).train(mode == "train")
        padded = torch.cat([x, noise(3, extra, seed=9)], dim=1)
        loss = model(padded, F.pad(mask, (0, extra)), labels).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        buffers = {name: b.float() for name, b in model.named_buffers()}
        results.append({"loss": loss.detach()} | gradients | buffers)
    for name, expected in results[0].items():
        scale = expected.abs().max()
        torch.testing.assert_close(
            results[1][name], expected, atol=1e-5 * float(scale) + 1e-7, rtol=1e-4, msg=name
        )
    if mode == "train":
        before = small_model(**options).encoder.layers[0].norm.running_mean
        after = results[0]["encoder.layers.0.norm.running_mean"]
        assert not torch.allclose(before, after)


def test_loss_is_that_of_each_row_alone():
    model = small_model()
    x, mask = padded_batch([9000, 20000, 14000])
    labels = torch.tensor([[1, 2, -100], [3, 3, 4], [5, -100, -100]])
    with torch.no_grad():
        loss = model(x, mask, labels).loss
        rows = []
        for row, label in enumerate(labels):
            label = label[label >= 0]
            logits = model(x[row : row + 1, : mask[row].sum()]).logits[0]
            log_probs = logits.double().log_softmax(-1)
            rows.append(-_log_probability(log_probs, label.tolist()) / len(label))
    torch.testing.assert_close(loss.double(), sum(rows) / 3, rtol=1e-5, atol=0)


def _log_probability(log_probs: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Of all alignments, by the forward recursion of CTC written out."""
    states = [0] + [s for label in labels for s in (label, 0)]
    alpha = {-1: torch.tensor(0.0, dtype=torch.float64)}  # state -1: before the first frame
    for frame in log_probs:
        new = {}
        for s, label in enumerate(states):
            skip = s > 1 and label and label != states[s - 2]
            sources = {s, s - 1} | ({s - 2} if skip else set())
            if -1 in alpha:
                sources = {-1} if s < 2 else set()
            terms = [alpha[p] for p in sources if p in alpha]
            if terms:
                new[s] = torch.logsumexp(torch.stack(terms), 0) + frame[label]
        alpha = new
    ends = [alpha[s] for s in (len(states) - 1, len(states) - 2) if s in alpha]
    return torch.logsumexp(torch.stack(ends), 0)


def test_an_utterance_too_short_for_its_text_does_no_harm():
    model = small_model().train()
    loss = model(noise(1, 640), labels=torch.tensor([[1, 1, 1]])).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("windows", [{}, TWO_SIDED], ids=["causal", "two-sided"])
def test_gradient_checkpointing_gives_the_same_gradients(windows):
    gradients, (x, mask) = [], padded_batch([9000, 6000])
    for checkpointing in (False, True):
        model = small_model(**windows).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(x, mask, torch.tensor([[1, 2], [3, 4]])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("windows", [{}, TWO_SIDED], ids=["causal", "two-sided"])
def test_hidden_states(windows):
    model = small_model(**windows)
    x, mask = padded_batch([6400, 3200])
    outputs = model(x, mask, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert {state.shape for state in outputs.hidden_states} == {(2, 10 + 4, 16)}
    last = model.ctc_head(outputs.hidden_states[-1][:, model.config.look_ahead :])
    for row, n in enumerate((10, 5)):
        torch.testing.assert_close(last[row, :n], outputs.logits[row, :n])


def test_the_learning_rate_of_fast_weights_before_training():
    from lact_kernels.layers.lact import BASE_LR

    model = LaCTForCTC(LaCTASRConfig(**SMALL, fast_weight_lr=0.02))
    shift = np.log(np.expm1(BASE_LR))
    rate = F.softplus(model.layers[0].attn.lr_proj.bias.double() + shift)
    torch.testing.assert_close(rate, torch.full_like(rate, 0.02), rtol=1e-5, atol=0)


DOCUMENT = {  # hidden, layers, attention heads, fast heads, convolutions, norm of q and k, rank, words, theta
    "base": (768, 12, 12, 4, 2, False, 32, 32, 1e6, 0.1),
    "improved": (1024, 18, 16, 8, 3, True, -1, 32, 5e5, 0.15),
    "regularized": (640, 12, 8, 4, 3, True, -1, 29, 5e5, 0.25),
    "large": (1024, 24, 16, 8, 3, False, 32, 32, 1e6, 0.1),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_configurations_run(name):
    config = LaCTASRConfig.named(name)
    if name in DOCUMENT:
        assert DOCUMENT[name] == (
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attn_heads,
            config.num_lact_heads,
            len(config.conv_strides),
            config.attn_qk_norm,
            config.w0_w2_low_rank,
            config.vocab_size,
            config.rope_theta,
            config.dropout,
        )
        assert config.window_size == config.lact_chunk_size == 4096
        assert config.use_muon and config.use_momentum and config.learnable_ttt_scale
        assert config.seconds_per_update == pytest.approx(40.96)
    config = LaCTASRConfig.named(name, num_hidden_layers=1)  # all blocks are alike
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LaCTForCTC(config).train()
    loss = model(noise(2, 8000), labels=torch.tensor([[1, 2], [3, 4]])).loss
    loss.backward()
    assert loss.isfinite() and model.layers[0].attn.qkv.weight.grad.isfinite().all()


def test_a_chunk_that_no_utterance_fills_is_said():
    with pytest.warns(UserWarning, match=r"never learn.*40\.96 s.*lact_chunk_size=4096"):
        LaCTForCTC(LaCTASRConfig(**SMALL | {"lact_chunk_size": 4096}, conv_strides=(1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LaCTForCTC(LaCTASRConfig(**SMALL))
        for name in ("tiny", "stream"):
            LaCTForCTC(LaCTASRConfig.named(name))


def test_folder_of_a_recogniser(tmp_path):
    tokenizer = build_tokenizer(["one two three"], "char")
    model = small_model(vocab_size=len(tokenizer), **TWO_SIDED)
    save_recogniser(tmp_path, model, tokenizer, ["one", "three", "two"])
    assert (tmp_path / "model.safetensors").is_file()
    loaded = load_recogniser(tmp_path)
    x = noise(1, 8000)
    torch.testing.assert_close(loaded.model(x).logits, model(x).logits, rtol=0, atol=0)
    assert loaded.words == ("one", "three", "two")
    assert loaded.model.config.window_size == (3, 2)  # a list in its file
    assert loaded.tokenizer("one").input_ids == tokenizer("one").input_ids
    assert not loaded.model.training
    automatic = AutoModelForCTC.from_pretrained(tmp_path)
    assert isinstance(automatic, LaCTForCTC)
    assert automatic.config.to_dict() == loaded.model.config.to_dict()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_recogniser(tmp_path / "nothing")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"weights of another model: layers\.2\."):
        load_recogniser(tmp_path)


@pytest.mark.parametrize("unit, window_size", [("char", 8), ("word", (5, 2))])
def test_pipeline_of_transformers(tmp_path, unit, window_size):
    """Long recordings in chunks, batches, and the times of words."""
    tokenizer = build_tokenizer(["one two three"], unit)
    model = small_model(vocab_size=len(tokenizer), window_size=window_size)
    x = noise(100_000).numpy()
    with torch.no_grad():
        model.ctc_head.weight.mul_(20)
        logits = model(torch.from_numpy(x)[None]).logits[0]
        model.ctc_head.bias.sub_(logits.mean(dim=0))  # all tokens occur
        logits = model(torch.from_numpy(x)[None]).logits[0]
    save_recogniser(tmp_path, model, tokenizer, [])
    recognise = pipeline("automatic-speech-recognition", model=str(tmp_path))
    expected = tokenizer.decode(logits.argmax(-1))
    result = recognise(x.copy(), return_timestamps="word")
    assert result["text"] == expected and len(expected.split()) > 3
    words = [chunk["text"] for chunk in result["chunks"]]
    assert words == expected.split()
    times = [t for chunk in result["chunks"] for t in chunk["timestamp"]]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 6.28
    assert recognise([x[:50_000].copy(), x[:30_000].copy()], batch_size=2) == [
        recognise(x[:n].copy()) for n in (50_000, 30_000)
    ]
    chunked = recognise(x.copy(), chunk_length_s=4, stride_length_s=1, return_timestamps="word")
    assert chunked["chunks"][0] == result["chunks"][0]
    assert 5.5 < chunked["chunks"][-1]["timestamp"][1] <= 6.28


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conv_strides": (2,)}, "one number for each convolution"),
        ({"conv_kernel_sizes": (1, 5)}, "no less"),
        ({"look_ahead": -1}, "look_ahead must be at least 0, got -1"),
        ({"hop_length": 500}, "must ascend, got 500, 400 and 512"),
        ({"pad_token_id": 40}, "below vocab_size = 7"),
        ({"fast_weight_lr": 0.0}, "fast_weight_lr must be positive"),
        ({"num_attn_heads": 5}, "num_attn_heads must divide hidden_size"),
        ({"window_size": (3, -2)}, "window_size must have sides of at least 0, or -1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        LaCTForCTC(LaCTASRConfig(**SMALL | options))


def test_an_unknown_name():
    with pytest.raises(ValueError, match="no configuration 'huge', choose one of tiny, stream"):
        LaCTASRConfig.named("huge")


def test_bad_inputs():
    model, x = small_model(), noise(2, 6400)
    mask = torch.ones(2, 6400, dtype=torch.long)
    hole = mask.clone()
    hole[0, 100] = 0
    for error, arguments, message in (
        (TypeError, (x.long(),), "floating-point"),
        (ValueError, (x[0],), r"shape \[B, samples\], got \(6400,\)"),
        (ValueError, (x, mask[:, :-1]), r"got \(2, 6399\)"),
        (ValueError, (x, hole), "got a hole"),
        (ValueError, (x, mask, torch.tensor([[7], [1]])), "below vocab_size = 7, .* got 7"),
        (ValueError, (x, mask, torch.tensor([[1, 0], [1, 2]])), r"not the blank \(0\), .* got 0"),
    ):
        with pytest.raises(error, match=message):
            model(*arguments)
