"""An hour of speech takes no more memory than ten minutes."""

import json
import subprocess
import sys

import pytest
import soundfile
import torch

from lact_kernels.asr.pretrained import save_recogniser
from lact_kernels.asr.text import build_tokenizer
from tests.test_asr_model import noise, small_model

PEAK = """
import resource, sys
from lact_kernels.asr.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)  # KiB
sys.exit(status)
"""


def transcribe(model, recording) -> tuple[dict, int]:
    """The transcript, and the peak memory of the process in KiB."""
    command = [sys.executable, "-c", PEAK, "transcribe", str(model), str(recording)]
    command += ["--format", "json", "--threads", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), int(done.stderr.split()[-1])


@pytest.mark.slow
def test_memory_of_an_hour_is_that_of_ten_minutes(tmp_path):
    tokenizer = build_tokenizer(["one two three"], "word")
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    minute = torch.cat([noise(50 * 16000, seed=1), torch.zeros(10 * 16000)])
    with torch.no_grad():  # something is said in noise, nothing in silence
        heard = model(minute[None]).logits[0].mean(dim=0)
        model.ctc_head.bias.sub_(heard)
    save_recogniser(tmp_path / "model", model, tokenizer, [])
    peaks = []
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 16000, 1, "ULAW") as file:
            for _ in range(minutes):
                file.write(minute.numpy())
        transcript, peak = transcribe(tmp_path / "model", path)
        assert transcript["duration"] == pytest.approx(60 * minutes)
        assert transcript["segments"][-1]["end"] > 60 * minutes - 20
        peaks.append(peak)
    assert peaks[1] <= 1.1 * peaks[0]
