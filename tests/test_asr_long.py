"""Twenty minutes of speech take no more memory than two."""

import contextlib
import json
import resource
from pathlib import Path

import pytest
import soundfile
import torch

from lact_kernels.asr.cli import main
from lact_kernels.asr.pretrained import save_recogniser
from lact_kernels.asr.text import build_tokenizer
from tests.ranks import PATIENCE, warm_processes
from tests.test_asr_model import noise, small_model

MINUTES = (2, 20)


def transcribe_all(folder: Path) -> None:
    """One recording after the other, and behind each the most memory that this process has had."""
    for minutes in MINUTES:
        arguments = ["transcribe", str(folder / "model"), str(folder / f"{minutes}.wav")]
        with open(folder / f"{minutes}.json", "w") as file, contextlib.redirect_stdout(file):
            assert main([*arguments, "--format", "json", "--threads", "1"]) == 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        (folder / f"{minutes}.peak").write_text(str(peak * 1024))


@pytest.mark.xdist_group("ranks")  # which have the warm processes
def test_memory_does_not_grow_with_the_recording(tmp_path):
    tokenizer = build_tokenizer(["one two three"], "word")
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    minute = torch.cat([noise(50 * 16000, seed=1), torch.zeros(10 * 16000)])
    with torch.no_grad():  # something is said in noise, nothing in silence
        heard = model(minute[None]).logits[0].mean(dim=0)
        model.ctc_head.bias.sub_(heard)
    save_recogniser(tmp_path / "model", model, tokenizer, [])
    for minutes in MINUTES:
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", 16000, 1, "ULAW") as file:
            for _ in range(minutes):
                file.write(minute.numpy())
    process = warm_processes().Process(target=transcribe_all, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    peaks = []
    for minutes in MINUTES:
        transcript = json.loads((tmp_path / f"{minutes}.json").read_text())
        assert transcript["duration"] == pytest.approx(60 * minutes)
        assert transcript["segments"][-1]["end"] > 60 * minutes - 20
        peaks.append(int((tmp_path / f"{minutes}.peak").read_text()))
    samples = (MINUTES[1] - MINUTES[0]) * minute.nbytes
    assert peaks[1] - peaks[0] < samples / 3
