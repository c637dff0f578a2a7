"""Make a speech recogniser from nothing: corpus, training, evaluation, transcription, streaming, a picture.

```
python -m examples.asr_demo                     # strings of digits, about 4 minutes on two cores
python -m examples.asr_demo --task commands     # a grammar of 70 words, about 10 minutes
```

Every step is a command, which is printed before it runs: `examples.synthesize` makes the corpus with
espeak-ng, and `lact-asr` does the rest. Without espeak-ng, a corpus of digits in the repository is used. The
same command continues an interrupted run. Exit status: 0 if the word error rate on held-out voices and
sentences is within the limit, 1 if it is not.

This shows that all steps work together. It says nothing about human speech: see docs/asr.md.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch

from examples import synthesize
from examples.asr_picture import draw
from lact_kernels.asr import cli
from lact_kernels.asr.audio import read_audio
from lact_kernels.asr.decoding import GreedyDecoder
from lact_kernels.asr.manifest import read_manifest
from lact_kernels.asr.pretrained import load_recogniser
from lact_kernels.asr.streaming import FrameStream
from lact_kernels.asr.transcription import Transcriber

SHIPPED = Path(__file__).parent / "data" / "spoken_digits"
SECONDS = 20  # of speech in the recording that is transcribed and streamed

TASKS = {
    "digits": {
        "limit": 0.06,
        "hears": 12500,  # utterances that training sees, in all epochs together
        "train": ["--unit", "word", "--save-steps", "300"],
        "decode": [],
    },
    "commands": {
        "limit": 0.08,
        "synthesize": ["--train", "4000"],
        "hears": 28000,
        "train": ["--save-steps", "500"],
        "decode": ["--beam", "50"],
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=tuple(TASKS), default="digits")
    parser.add_argument("--seed", type=int, default=0, help="of the training (0)")
    parser.add_argument("--out", type=Path, default="asr-demo-results", help="for everything made")
    args = parser.parse_args()
    task, start = TASKS[args.task], time.perf_counter()
    out = args.out / f"{args.task}-{args.seed}"
    corpus = _corpus(args, task)
    model = str(out / "model")

    sets = sorted(str(path) for path in corpus.glob("test_*.jsonl"))
    train, dev = corpus / "train.jsonl", corpus / "dev.jsonl"
    with open(train, encoding="utf-8") as lines:
        epochs = round(task["hears"] / sum(1 for _ in lines))
    # One thread trains while another process reads and augments: a small model is no faster with two threads.
    options = ["--epochs", epochs, "--seed", args.seed, "--threads", 1, *task["train"]]
    _lact_asr("train", model, "--train", train, "--dev", dev, *options)
    results, hypotheses = out / "results.json", out / "hypotheses.jsonl"
    files = ["--json", results, "--hypotheses", hypotheses]
    _lact_asr("evaluate", model, *sets, *task["decode"], *files)

    recording, spoken = _recording(corpus / "test_voice.jsonl", out / "recording.flac")
    print(
        f"\n{recording}, of a voice and of sentences that the model has never heard. Spoken is:\n{spoken}"
    )
    _lact_asr("transcribe", model, recording, *task["decode"])
    _lact_asr("stream", model, recording, *task["decode"])
    difference = _streaming_difference(model, recording)
    print(f"streamed and offline log-probabilities differ by at most {difference:.1e}")
    _draw(out / "asr_demo.png", model, recording, hypotheses)

    rate = json.loads(results.read_text())["sets"]["test_voice"]["wer"]["rate"]
    met = rate <= task["limit"] and difference <= 1e-4
    print(
        f"\nword error rate on held-out voices and sentences: {100 * rate:.1f}%, the limit is"
        f" {100 * task['limit']:.0f}%: {'passed' if met else 'FAILED'}"
        f"\n{time.perf_counter() - start:.0f} s; everything is in {out}"
    )
    return 0 if met else 1


def _corpus(args: argparse.Namespace, task: dict) -> Path:
    """Make the corpus, and return the folder of its manifests."""
    if shutil.which("espeak-ng"):
        corpus = args.out / f"{args.task}-corpus"
        arguments = [corpus, "--task", args.task, *task.get("synthesize", ())]
        _run(synthesize.main, "python -m examples.synthesize", *arguments)
        return corpus
    if args.task != "digits":
        sys.exit(
            f"{args.task} needs espeak-ng: apt-get install espeak-ng, or brew install espeak-ng"
        )
    print(f"espeak-ng is not installed (apt-get install espeak-ng): {SHIPPED} serves")
    return SHIPPED


def _lact_asr(*arguments) -> None:
    _run(cli.main, "lact-asr", *arguments)


def _run(main: Callable[[list[str]], int], program: str, *arguments) -> None:
    """Print a command as it would be typed, and run it in this process."""
    command = [str(x) for x in arguments]
    print(f"\n$ {program} {shlex.join(command)}", flush=True)
    status = main(command)
    if status:
        sys.exit(status)


def _recording(manifest: Path, path: Path) -> tuple[Path, str]:
    """Join utterances of one speaker, with pauses, into one file. Returns it and the texts."""
    utterances = read_manifest(manifest)
    utterances = [u for u in utterances if u.speaker == utterances[0].speaker]
    parts, texts = [], []
    for u in utterances:
        if sum(map(len, parts)) > SECONDS * 16000:
            break
        parts += [read_audio(u.path, 16000, u.offset, u.duration), torch.zeros(12000)]
        texts.append(u.text)
    soundfile.write(path, torch.cat(parts).numpy(), 16000)
    return path, "\n".join(texts)


def _streaming_difference(model: str, recording: Path) -> float:
    """The largest difference between one pass and a stream of blocks of 40 ms."""
    model, x = load_recogniser(model).model, read_audio(recording)
    stream = FrameStream(model)
    streamed = torch.cat([*(stream.push(block) for block in x.split(640)), stream.finish()])
    with torch.no_grad():
        whole = model(x[None]).logits[0].log_softmax(dim=-1)
    return (streamed - whole).abs().max().item()


def _draw(path: Path, model: str, recording: Path, hypotheses: Path) -> None:
    """Draw the confusions on held-out voices, and the alignment of the first segment of the recording."""
    recogniser = load_recogniser(model)
    config = recogniser.model.config
    lines = [json.loads(line) for line in hypotheses.read_text().splitlines()]
    pairs = [(x["reference"], x["hypothesis"]) for x in lines if x["set"] == "test_voice"]
    pairs = [(reference, heard) for reference, heard in pairs if heard is not None]
    transcriber = Transcriber(recogniser, GreedyDecoder(recogniser.tokenizer))
    x = read_audio(recording)
    segments = transcriber.push(x) + transcriber.finish()
    if not segments:
        print("nothing was recognised: there is nothing to draw")
        return
    end = int((segments[0].end + 0.3) * config.sampling_rate)
    end -= end % config.inputs_to_logits_ratio
    x = x[None, :end]
    with torch.no_grad():
        log_mel = recogniser.model.features.log_mel(x)[0]
        posteriors = recogniser.model(x).logits[0].softmax(dim=-1)
    tokens = recogniser.tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    words = [(word.text, word.start, word.end) for word in segments[0].words]
    hop = config.hop_length / config.sampling_rate
    if draw(path, pairs, log_mel, hop, posteriors, config.seconds_per_frame, tokens, words):
        print(f"confusions and alignment: {path}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
