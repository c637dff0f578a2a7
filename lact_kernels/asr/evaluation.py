"""Word and character error rates of a recogniser, with confidence intervals."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jiwer
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lact_kernels.asr.audio import read_audio
from lact_kernels.asr.dataset import collate
from lact_kernels.asr.decoding import GreedyDecoder, text_of
from lact_kernels.asr.manifest import Utterance
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import Recogniser
from lact_kernels.asr.streaming import FrameStream
from lact_kernels.asr.text import normalize_text
from lact_kernels.asr.transcription import Decoder

logger = logging.getLogger(__name__)

READERS = 2  # threads that read recordings
BATCHES_AHEAD = 2  # are read while one is recognised
BATCH_SECONDS = 320  # of a batch, padding included; a longer recording is streamed if it can be
MIN_SPEAKERS = 10  # below, an interval over speakers would mean nothing


class ErrorRate(NamedTuple):
    """The error rate of a set of utterances.

    Attributes:
        rate: errors per word (or character) of the references. Insertions can raise it above 1.
        low, high: its 95% confidence interval; None if there is nothing to resample.
        substitutions, deletions, insertions: numbers of errors.
        units: number of words or characters in the references.
        utterances: their number.
    """

    rate: float
    low: float | None
    high: float | None
    substitutions: int
    deletions: int
    insertions: int
    units: int
    utterances: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    unit: Literal["word", "char"] = "word",
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ErrorRate:
    """The word or character error rate, with a bootstrap confidence interval.

    Sets of utterances are drawn with replacement; the interval is from the 2.5% to the 97.5% quantile of
    their error rates, `sum of errors / sum of reference units`. Errors of the same speaker are correlated:
    give `groups` to draw whole speakers, otherwise the interval is too narrow.

    Args:
        references, hypotheses: texts, one of each per utterance. Either may be empty.
        unit: "word", or "char", which counts spaces, too.
        groups: the speaker of each utterance; None to draw utterances.
        resamples: number of sets that are drawn; 0 for no interval.
        seed: of the draws.

    Raises:
        ValueError: another unit, different numbers of texts, or no word in the references.
    """
    if len(references) != len(hypotheses) or (
        groups is not None and len(groups) != len(references)
    ):
        raise ValueError(
            "references, hypotheses and groups must be equally many, got"
            f" {len(references)}, {len(hypotheses)} and {groups and len(groups)}"
        )
    counts = _counts(references, hypotheses, unit)
    substitutions, deletions, insertions, units = counts.sum(axis=0).tolist()
    if not units:
        raise ValueError("the references have no words: there is no error rate")
    rate = (substitutions + deletions + insertions) / units
    if groups is not None:
        counts = _sums(counts, groups)
    low, high = _interval(counts[:, :3].sum(axis=1), counts[:, 3], resamples, seed)
    return ErrorRate(rate, low, high, substitutions, deletions, insertions, units, len(references))


def transcribe_utterances(
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    decoder: Decoder | None = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str | None]:
    """The recognised text of each utterance, in their order; None for a broken recording, which is logged.

    Utterances of similar length share a batch. The longest come first, to show a lack of memory at once.

    Args:
        recogniser: on any device.
        utterances: their texts are not used.
        decoder: maps log-probabilities `[T, V]` to tokens; None for a `GreedyDecoder`.
        batch_size: the most utterances of a batch.
        progress: show a progress bar on a terminal.
    """
    model, tokenizer, _ = recogniser
    decoder = decoder or GreedyDecoder(tokenizer)
    hypotheses: list[str | None] = [None] * len(utterances)
    with tqdm(total=len(utterances), unit="utt", disable=None if progress else True) as bar:
        for indices, waveforms in _read_ahead(utterances, batch_size, model.config.sampling_rate):
            readable = [(i, x) for i, x in zip(indices, waveforms) if x is not None]
            log_probs = _log_probs(model, [x for _, x in readable]) if readable else []
            for (i, _), row in zip(readable, log_probs):
                hypotheses[i] = text_of(tokenizer, decoder(row))
            bar.update(len(indices))
    return hypotheses


def evaluate_set(
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    decoder: Decoder | None = None,
    *,
    batch_size: int = 16,
    resamples: int = 1000,
    progress: bool = True,
) -> tuple[dict[str, Any], list[str | None]]:
    """Error rates on a set of utterances, whose texts are normalised first.

    Returns:
        A dict for JSON, and the hypotheses of `transcribe_utterances`. The dict has `wer` and `cer`, the
        fields of `ErrorRate`; `resampled`, which is "speakers" if all utterances have one and there are at
        least 10 of them, else "utterances"; `skipped`, the number of broken recordings; `seconds` of speech;
        and `real_time_factor`, seconds that reading, model and decoder took per second of speech.

    Raises:
        ValueError: no text has words, or no recording whose text has words can be read.
    """
    references = [normalize_text(u.text) for u in utterances]
    if not any(references):
        raise ValueError("the texts of the utterances have no words: there is no error rate")
    start = time.perf_counter()
    hypotheses = transcribe_utterances(
        recogniser, utterances, decoder, batch_size=batch_size, progress=progress
    )
    elapsed = time.perf_counter() - start
    heard = [i for i, hypothesis in enumerate(hypotheses) if hypothesis is not None]
    if not any(references[i] for i in heard):
        raise ValueError("no recording whose text has words can be read")
    speakers = {utterances[i].speaker for i in heard}
    by_speaker = None not in speakers and len(speakers) >= MIN_SPEAKERS
    groups = [utterances[i].speaker for i in heard] if by_speaker else None
    wer, cer = (
        error_rate(
            [references[i] for i in heard],
            [hypotheses[i] for i in heard],
            unit,
            groups=groups,
            resamples=resamples,
        )
        for unit in ("word", "char")
    )
    seconds = sum(utterances[i].duration for i in heard)
    result = {
        "wer": wer._asdict(),
        "cer": cer._asdict(),
        "resampled": "speakers" if by_speaker else "utterances",
        "skipped": len(utterances) - len(heard),
        "seconds": round(seconds, 3),
        "real_time_factor": elapsed / seconds,
    }
    return result, hypotheses


def evaluate(
    recogniser: Recogniser,
    sets: Mapping[str, Sequence[Utterance]],
    decoder: Decoder | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """The result of `evaluate_set` for each set, by its name. Options are passed on."""
    return {
        name: evaluate_set(recogniser, utterances, decoder, **options)[0]
        for name, utterances in sets.items()
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of `evaluate` as a plain-text table, a row for each set, with 95% intervals."""
    head = "set", "utts", "skipped", "seconds", "WER %", "sub", "del", "ins", "CER %", "RTF"
    rows = [head, *(_cells(name, result) for name, result in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(x.rjust(w) for x, w in zip(cells, widths[1:]))])
        for name, *cells in rows
    )


def _cells(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    wer = result["wer"]
    return (
        name,
        str(wer["utterances"]),
        str(result["skipped"]),
        f"{result['seconds']:.0f}",
        _percent(wer),
        str(wer["substitutions"]),
        str(wer["deletions"]),
        str(wer["insertions"]),
        _percent(result["cer"]),
        f"{result['real_time_factor']:.4f}",
    )


def _percent(rate: Mapping[str, Any]) -> str:
    interval = (
        "" if rate["low"] is None else f" ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"
    )
    return f"{100 * rate['rate']:.1f}{interval}"


def _counts(references: Sequence[str], hypotheses: Sequence[str], unit: str) -> np.ndarray:
    """Substitutions, deletions, insertions and reference units of each utterance, `[n, 4]`."""
    if unit not in ("word", "char"):
        raise ValueError(f"unit must be 'word' or 'char', got {unit!r}")
    counts = np.zeros((len(references), 4), dtype=np.int64)
    if not len(references):
        return counts
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    output = process(list(references), list(hypotheses))
    for row, reference, chunks in zip(counts, output.references, output.alignments):
        for chunk in chunks:
            said = chunk.ref_end_idx - chunk.ref_start_idx
            if chunk.type == "substitute":
                row[0] += said
            elif chunk.type == "delete":
                row[1] += said
            elif chunk.type == "insert":
                row[2] += chunk.hyp_end_idx - chunk.hyp_start_idx
        row[3] = len(reference)
    return counts


def _sums(counts: np.ndarray, groups: Sequence[Any]) -> np.ndarray:
    """The counts of each group, `[groups, 4]`."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), counts.shape[1]), dtype=counts.dtype)
    np.add.at(sums, group, counts)
    return sums


def _interval(
    errors: np.ndarray, units: np.ndarray, resamples: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    n = len(errors)
    if n < 2 or not resamples:
        return None, None
    rng = np.random.default_rng(seed)
    rates = np.empty(resamples)
    for i in range(resamples):  # a matrix of all draws at once may be too large for the memory
        drawn = rng.integers(n, size=n)
        rates[i] = errors[drawn].sum() / max(units[drawn].sum(), 1)  # all drawn texts may be empty
    low, high = np.quantile(rates, (0.025, 0.975)).tolist()
    return low, high


def _read_ahead(
    utterances: Sequence[Utterance], batch_size: int, sampling_rate: int
) -> Iterator[tuple[list[int], list[Tensor | None]]]:
    """Batches of indices and waveforms. Threads read `BATCHES_AHEAD` batches in advance."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque()
        for indices in _batches(utterances, batch_size):
            reads = [pool.submit(_read, utterances[i], sampling_rate) for i in indices]
            ahead.append((indices, reads))
            if len(ahead) > BATCHES_AHEAD:
                indices, reads = ahead.popleft()
                yield indices, [read.result() for read in reads]
        for indices, reads in ahead:
            yield indices, [read.result() for read in reads]


def _batches(utterances: Sequence[Utterance], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices, longest utterances first, so that the first of a batch bounds how many fit."""
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].duration, reverse=True)
    start = 0
    while start < len(order):
        longest = max(utterances[order[start]].duration, 1.0)
        stop = start + max(1, min(batch_size, int(BATCH_SECONDS / longest)))
        yield order[start:stop]
        start = stop


def _read(utterance: Utterance, sampling_rate: int) -> Tensor | None:
    try:
        return read_audio(utterance.path, sampling_rate, utterance.offset, utterance.duration)
    except (OSError, ValueError) as error:  # ValueError: a recording of no length
        logger.warning("%s is skipped: %s", utterance.path, error)
        return None


@torch.inference_mode()
def _log_probs(model: LaCTForCTC, waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of each waveform's frames, float32 `[T, V]` on the CPU."""
    config = model.config
    is_long = len(waveforms) == 1 and len(waveforms[0]) > BATCH_SECONDS * config.sampling_rate
    if is_long and not config.looks_ahead:
        stream = FrameStream(model)  # the same frames with less memory
        return [torch.cat([stream.push(waveforms[0]), stream.finish()]).cpu()]
    nothing = torch.empty(0, dtype=torch.int64)
    batch = collate([{"input_values": x, "labels": nothing} for x in waveforms])
    logits = model(
        batch["input_values"].to(model.device), batch["attention_mask"].to(model.device)
    ).logits
    log_probs = logits.float().log_softmax(dim=-1).cpu()
    ratio = config.inputs_to_logits_ratio
    return [row[: -(-len(x) // ratio)] for row, x in zip(log_probs, waveforms)]
