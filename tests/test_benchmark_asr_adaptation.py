"""The adaptation experiment: its variants are what they say, and its table counts right."""

import pytest
import soundfile
import torch

from benchmarks import asr_adaptation
from benchmarks.asr_adaptation import FROZEN, UPDATED, VARIANTS, WITHOUT, Row, build, summary
from lact_kernels.asr.manifest import Utterance
from lact_kernels.asr.pretrained import Recogniser
from lact_kernels.asr.text import build_tokenizer


def test_variants_have_as_many_parameters():
    models = {variant: build(variant, 12, seed=0) for variant in VARIANTS}
    counts = {
        variant: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for variant, model in models.items()
    }
    assert counts[FROZEN] == counts[UPDATED]
    assert counts[WITHOUT] == pytest.approx(counts[UPDATED], rel=0.01)


def test_variants_differ_where_they_should():
    """Frozen fast weights are those of the first chunk; without the branch nothing of it is left."""
    models = {variant: build(variant, 12, seed=0).eval() for variant in VARIANTS}
    chunk, shift = models[UPDATED].config.lact_chunk_size, models[UPDATED].config.look_ahead
    x = 0.1 * torch.randn(1, 640 * 3 * chunk)
    with torch.no_grad():
        updated, frozen = (models[v](x).logits[0] for v in (UPDATED, FROZEN))
        torch.testing.assert_close(updated[: chunk - shift], frozen[: chunk - shift])
        assert (updated - frozen)[chunk:].abs().max() > 1e-3
        without = models[WITHOUT](x).logits
        for block in models[WITHOUT].layers:
            block.attn.w1.mul_(3)
            block.attn.lr_proj.bias.add_(3)
        torch.testing.assert_close(models[WITHOUT](x).logits, without)


def test_every_utterance_is_counted_once_at_the_time_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(asr_adaptation, "TIMES", (0, 2, 4))
    tokenizer = build_tokenizer(["one two three"], "word")
    soundfile.write(
        tmp_path / "a.wav", torch.zeros(25600).numpy(), 16000
    )  # 1.6 s, and 0.4 s of gap
    texts = ["one", "one two", "one two three"]
    utterances = [Utterance(str(tmp_path / "a.wav"), text, 1.6) for text in texts]
    recogniser = Recogniser(build(UPDATED, len(tokenizer), 0).eval(), tokenizer, ())
    with torch.no_grad():  # one word, "three", for the whole recording
        recogniser.model.ctc_head.weight.zero_()
        recogniser.model.ctc_head.bias[tokenizer.convert_tokens_to_ids("three")] = 9
    counted = list(asr_adaptation._listen(recogniser, utterances))
    assert counted == [(0, 1, 1), (2, 2, 2), (4, 2, 3)]


def test_the_table_has_the_rates_and_their_differences():
    def rows(variant, errors):
        return [
            Row(variant, seed, 1, 9, 100, "test_voice", speaker, time, n, 100)
            for seed in (0, 1)
            for speaker in ("a", "b")
            for time, n in errors.items()
        ]

    lines = list(
        summary(
            rows(UPDATED, {0: 10, 10: 4})
            + rows(FROZEN, {0: 11, 10: 11})
            + rows(WITHOUT, {0: 12, 10: 13})
        )
    )
    lines = lines[: next(i for i, line in enumerate(lines) if "test_accent" in line)]
    table = {line[:24].strip(): line[24:] for line in lines}
    assert table[UPDATED].split("(")[0].strip() == "10.00"
    assert "4.00 (4.00 .. 4.00)" in table[UPDATED]  # all pairs are alike: no spread
    assert "-1.00 (-1.00 .. -1.00)" in table["updated - frozen"]
    assert "-9.00 (-9.00 .. -9.00)" in table["updated - without"]
    assert table[UPDATED].rstrip().endswith("-")  # nobody spoke so long
    after_frozen = lines[
        lines.index(next(x for x in lines if x.startswith("updated - frozen"))) + 1
    ]
    assert "-6.00 (-6.00 .. -6.00)" in after_frozen


def test_a_bad_argument(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["asr_adaptation", "--seeds", "0"])
    with pytest.raises(SystemExit) as error:
        asr_adaptation.main()
    assert error.value.code == 2 and "--seeds" in capsys.readouterr().err
