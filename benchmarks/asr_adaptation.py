"""Does test-time training help a recogniser? The same model with and without it, on long recordings.

```
python -m benchmarks.asr_adaptation                 # about half an hour on two cores
python -m benchmarks.asr_adaptation --seeds 1 --epochs 1 --jobs 1
```

Three models are trained on digit strings of many synthesised voices, with equal steps and as many
parameters: with updates of the fast weights, with fast weights that stay as they were initialised (and
trained), and without their branch, whose parameters go to wider MLPs. Training hears utterances of one
speaker joined to `--join-seconds`, so that it sees updates.

They are tested on voices and on an accent that training has not heard, each speaker in one recording
of minutes. If fast weights adapt, their model gets better while it listens, compared with the others: errors
are counted by the time at which an utterance begins. Every utterance comes at every time, in recordings
that begin elsewhere in the same order, so that times differ in nothing but how much was heard before.

Intervals (95%) are bootstrapped over pairs of a training's seed and a speaker; the differences are of the
same pairs. Models and a row for each pair and time are kept: an interrupted run goes on.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import report
from benchmarks.run import positive
from examples.synthesize import synthesize
from lact_kernels.asr.audio import read_audio
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.decoding import collapse, text_of
from lact_kernels.asr.evaluation import error_rate
from lact_kernels.asr.manifest import Utterance, read_manifest
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import load_recogniser
from lact_kernels.asr.streaming import FrameStream
from lact_kernels.asr.text import build_tokenizer
from lact_kernels.asr.training import TrainingOptions, new_model, read_training_set, train, usable

UPDATED, FROZEN, WITHOUT = VARIANTS = ("updated", "frozen", "without")
NEVER = 1 << 20  # frames of a chunk that no recording fills
SETS = ("test_voice", "test_accent")
TIMES = (0, 10, 30, 60, 120)  # seconds at which the parts of a recording begin
GAP_SECONDS = 0.4  # between utterances
ROTATIONS = 2  # recordings of a speaker that begin elsewhere
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Row:
    """Errors of one training on one speaker, in utterances that begin from `time` to the next time."""

    variant: str
    seed: int
    epochs: int
    join_seconds: float
    parameters: int
    set: str
    speaker: str
    time: int
    errors: int
    words: int


def build(variant: str, vocab_size: int, seed: int) -> LaCTForCTC:
    """The untrained model. All variants have parameters as many as of `updated`, but for 1%."""
    options = {}
    if variant == FROZEN:
        options["lact_chunk_size"] = NEVER
    if variant == WITHOUT:
        config = LaCTASRConfig.named("tiny", vocab_size=vocab_size)
        branch = 3 * config.inter_multi * config.hidden_size**2 / config.num_lact_heads
        width = config.intermediate_size + round(branch / (3 * config.hidden_size))
        options["intermediate_size"] = width
    model = new_model(LaCTASRConfig.named("tiny", vocab_size=vocab_size, **options), seed)
    if variant == WITHOUT:
        for block in model.layers:  # whatever the branch computes, it adds nothing
            block.attn.ttt_norm.weight.requires_grad_(False).zero_()
            for p in (block.attn.w0, block.attn.w1, block.attn.w2):
                p.requires_grad_(False)
    return model


def train_one(corpus: Path, out: Path, variant: str, seed: int, epochs: int, join: float) -> Path:
    """The folder of the trained recogniser. A finished one is left as it is."""
    folder = out / f"{variant}-{seed}-{epochs}-{join:g}"
    if (folder / "config.json").is_file():
        return folder
    train_set, dev_set = (
        read_training_set([corpus / f"{name}.jsonl"]) for name in ("train", "dev")
    )
    tokenizer = build_tokenizer((u.text for u in train_set), "word")
    model = build(variant, len(tokenizer), seed)
    options = TrainingOptions(
        epochs=epochs, join_seconds=join, seed=seed, workers=0, save_steps=300, logging_steps=100
    )
    train_set, dev_set = (
        usable(utterances, tokenizer, model.config, options)[0]
        for utterances in (train_set, dev_set)
    )
    train(folder, model, tokenizer, train_set, dev_set, options)
    return folder


def count_errors(folder: Path, corpus: Path) -> Iterator[tuple[str, str, int, int, int]]:
    """Set, speaker, time, errors and words of a recogniser."""
    recogniser = load_recogniser(folder)
    for name in SETS:
        by_speaker = defaultdict(list)
        for utterance in read_manifest(corpus / f"{name}.jsonl"):
            by_speaker[utterance.speaker].append(utterance)
        for speaker, utterances in by_speaker.items():
            counts = defaultdict(lambda: np.zeros(2, dtype=int))
            for rotation in range(ROTATIONS):
                begin = rotation * len(utterances) // ROTATIONS
                order = utterances[begin:] + utterances[:begin]
                for time, errors, words in _listen(recogniser, order):
                    counts[time] += (errors, words)
            for time, (errors, words) in counts.items():
                yield name, speaker, time, int(errors), int(words)


def _listen(recogniser, utterances: list[Utterance]) -> Iterator[tuple[int, int, int]]:
    """Time, errors and words of each utterance in one recording of all of them."""
    model, tokenizer, _ = recogniser
    rate = model.config.sampling_rate
    stream, frames, ends = FrameStream(model), [], []
    for utterance in utterances:
        audio = read_audio(utterance.path, rate, utterance.offset, utterance.duration)
        frames.append(stream.push(torch.cat([audio, torch.zeros(int(GAP_SECONDS * rate))])))
        ends.append((ends[-1] if ends else 0) + len(audio) / rate + GAP_SECONDS)
    likely = torch.cat([*frames, stream.finish()]).argmax(dim=1).tolist()
    begin = 0.0
    for utterance, end in zip(utterances, ends):
        first, last = (round(t / model.config.seconds_per_frame) for t in (begin, end))
        tokens = collapse(likely[first:last], model.config.pad_token_id)
        measured = error_rate([utterance.text], [text_of(tokenizer, tokens)], resamples=0)
        yield max(t for t in TIMES if t <= begin), measured.errors, measured.units
        begin = end


def summary(rows: list[Row]) -> Iterator[str]:
    """Lines of a table: word error rates by time, and differences with their intervals."""
    for name in SETS:
        yield f"\n{name}: word error rate, %, of utterances that begin after so many seconds"
        yield " " * 24 + "".join(f"{f'{time} s':>24}" for time in TIMES)
        pairs = sorted({(row.seed, row.speaker) for row in rows if row.set == name})
        generator = np.random.default_rng(0)
        draws = generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))
        tables = {v: _table(rows, name, v, pairs) for v in VARIANTS}
        rates = {v: _rates(table, draws) for v, table in tables.items()}
        for variant, rate in rates.items():
            yield _line(variant, rate)
        for other in (FROZEN, WITHOUT):
            difference = rates[UPDATED] - rates[other]
            yield _line(f"{UPDATED} - {other}", difference, signed=True)
            yield _line("  since the first part", difference - difference[:, :1], signed=True)


def _table(rows: list[Row], name: str, variant: str, pairs: list) -> np.ndarray:
    """Errors and words `[pairs, times, 2]`."""
    table = np.zeros((len(pairs), len(TIMES), 2))
    for row in rows:
        if (row.set, row.variant) == (name, variant):
            place = pairs.index((row.seed, row.speaker)), TIMES.index(row.time)
            table[place] += (row.errors, row.words)
    return table


def _rates(table: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Word error rates in percent, `[1 + RESAMPLES, times]`: of all pairs first."""
    sums = np.concatenate([table.sum(axis=0)[None], table[draws].sum(axis=1)])
    with np.errstate(invalid="ignore"):
        return 100 * sums[..., 0] / sums[..., 1]


def _line(name: str, values: np.ndarray, signed: bool = False) -> str:
    form, cells = "+.2f" if signed else ".2f", []
    for rate, *resampled in values.T:
        if np.isnan(rate):
            cells.append("-")
            continue
        low, high = np.nanquantile(resampled, (0.025, 0.975))
        cells.append(f"{rate:{form}} ({low:{form}} .. {high:{form}})")
    return f"{name:<24}" + "".join(f"{cell:>24}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, default="asr-adaptation", help="for corpus and models")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="for the rows")
    parser.add_argument("--seeds", type=positive, default=3, help="trainings of each variant")
    parser.add_argument("--epochs", type=positive, default=3, help="of each training")
    parser.add_argument("--join-seconds", type=positive, default=9, help="of training recordings")
    parser.add_argument("--train", type=positive, default=2500, help="training utterances")
    parser.add_argument("--test", type=positive, default=900, help="utterances of each test set")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="trainings at once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows_file = report.open_rows(args.out, torch.device("cpu"), kind="asr-adaptation")
    if rows_file is None:
        return 2
    corpus = args.work / f"digits-{args.train}-{args.test}"
    synthesize(corpus, "digits", num_train=args.train, num_test=args.test)
    runs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    rows = []
    with ProcessPoolExecutor(
        args.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        for more in pool.map(
            _run,
            *zip(*((corpus, args.work, *run, args.epochs, args.join_seconds) for run in runs)),
        ):
            for row in more:
                rows_file.append(row)
            rows += more
            words = sum(row.words for row in more)
            rate = 100 * sum(row.errors for row in more) / words
            print(f"{more[0].variant} {more[0].seed}: {rate:.2f}% of {words} words", flush=True)
    print("\n".join(summary(rows)))
    print(f"\nrows: {rows_file.path}")
    return 0


def _run(corpus: Path, out: Path, variant: str, seed: int, epochs: int, join: float) -> list[Row]:
    warnings.filterwarnings("ignore", "the fast weights never learn")  # it is the point
    folder = train_one(corpus, out, variant, seed, epochs, join)
    parameters = sum(p.numel() for p in build(variant, 12, seed).parameters() if p.requires_grad)
    return [
        Row(variant, seed, epochs, join, parameters, *counts)
        for counts in count_errors(folder, corpus)
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
