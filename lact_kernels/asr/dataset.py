"""Utterances as training examples: reading, augmentation, batches of similar length.

What is random about an example comes from the seed and the number of its draw alone: it is the same
with any number of worker processes, and after a resume.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizer

from lact_kernels.asr.audio import SAMPLING_RATE, read_audio, resampler
from lact_kernels.asr.manifest import Utterance

logger = logging.getLogger(__name__)

IGNORED = -100  # a label that is not there, for transformers
GAP_SECONDS = (0.1, 0.5)  # silence between joined utterances
POOL = 50  # batches whose utterances are sorted by length together

Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a waveform, drawn uniformly from ranges. None turns one off.

    Args:
        speeds: one of these factors on the speed, by resampling: the pitch changes too.
        gain_db: gain, dB.
        lead_seconds: digital silence before the speech, seconds.
        tail_seconds: digital silence after it, seconds.
        snr_db: white noise on speech and silence; the ratio is that of the speech to it, dB.
    """

    speeds: tuple[float, ...] | None = (0.9, 1.0, 1.1)
    gain_db: Range | None = (-6.0, 6.0)
    lead_seconds: Range | None = (0.0, 0.3)
    tail_seconds: Range | None = (0.0, 0.4)
    snr_db: Range | None = (10.0, 35.0)

    def __call__(self, x: Tensor, sampling_rate: int, generator: torch.Generator) -> Tensor:
        """A waveform `[samples]`, changed, as `[other number of samples]`."""
        if self.speeds:
            speed = self.speeds[_integer(len(self.speeds), generator)]
            x = resampler(round(speed * sampling_rate), sampling_rate)(x)
        if self.gain_db:
            x = x * 10 ** (_uniform(self.gain_db, generator) / 20)
        rms = x.square().mean().sqrt()
        lead, tail = (
            round(_uniform(seconds, generator) * sampling_rate) if seconds else 0
            for seconds in (self.lead_seconds, self.tail_seconds)
        )
        x = F.pad(x, (lead, tail))
        if self.snr_db:
            noise = rms * 10 ** (-_uniform(self.snr_db, generator) / 20)
            x = x + noise * torch.randn(len(x), generator=generator)
        return x


class SpeechDataset(Dataset):
    """Draws of utterances: number `epoch * len(self) + index` is an utterance as that epoch hears it.

    A recording that cannot be read is logged once, and the next one that can takes its place.

    Args:
        utterances: their texts are tokenized as they are.
        tokenizer: of `lact_kernels.asr.text`.
        sampling_rate: of the examples, Hz.
        augmentation: of each example; None leaves it as it is recorded.
        join_seconds: if above 0, random other utterances of the speaker follow, with silence
            between them, while the sum (before augmentation) stays below. Models that adapt
            need long recordings of one speaker.
        seed: of all that is random.

    Raises:
        ValueError: no utterances, or none has a speaker and they are to be joined.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: PreTrainedTokenizer,
        *,
        sampling_rate: int = SAMPLING_RATE,
        augmentation: Augmentation | None = None,
        join_seconds: float = 0.0,
        seed: int = 0,
    ):
        self.utterances = list(utterances)
        self.tokenizer = tokenizer
        self.sampling_rate = sampling_rate
        self.augmentation = augmentation
        self.join_seconds = join_seconds
        self.seed = seed
        if not self.utterances:
            raise ValueError("a dataset needs at least one utterance")
        self._of_speaker = defaultdict(list)
        for index, utterance in enumerate(self.utterances):
            if utterance.speaker is not None:
                self._of_speaker[utterance.speaker].append(index)
        if join_seconds > 0 and not self._of_speaker:
            raise ValueError("join_seconds needs utterances with a speaker, and none has one")
        self._broken = torch.zeros(len(self.utterances), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The examples of epoch 0 in order; draws themselves have no end."""
        return map(self.__getitem__, range(len(self)))

    @property
    def num_broken(self) -> int:
        """Recordings that could not be read so far, in any worker process."""
        return int(self._broken.sum())

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        """`input_values` float32 `[samples]` and `labels` int64 `[n]`.

        Raises:
            OSError: no recording at all can be read.
        """
        generator = _generator(self.seed, draw)
        index, waveform = self._first_readable(draw % len(self))
        texts = [self.utterances[index].text]
        if self.join_seconds > 0:
            waveform, texts = self._join(index, waveform, generator)
        if self.augmentation is not None:
            waveform = self.augmentation(waveform, self.sampling_rate, generator)
        labels = self.tokenizer(" ".join(texts)).input_ids
        return {"input_values": waveform, "labels": torch.tensor(labels, dtype=torch.int64)}

    def _first_readable(self, index: int) -> tuple[int, Tensor]:
        for candidate in (*range(index, len(self)), *range(index)):
            waveform = self._read(candidate)
            if waveform is not None:
                return candidate, waveform
        raise OSError(f"none of the {len(self)} recordings can be read")

    def _read(self, index: int) -> Tensor | None:
        if self._broken[index]:
            return None
        u = self.utterances[index]
        try:
            return read_audio(u.path, self.sampling_rate, u.offset, u.duration)
        except OSError as error:
            self._broken[index] = True
            logger.warning("%s; another utterance takes its place", error)
            return None

    def _join(
        self, index: int, waveform: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """The utterance and others of its speaker in random order, up to the first that is too long."""
        others = self._of_speaker.get(self.utterances[index].speaker, [])
        parts, texts = [waveform], [self.utterances[index].text]
        samples = len(waveform)
        for i in torch.randperm(len(others), generator=generator).tolist():
            other = self.utterances[others[i]]
            gap = round(_uniform(GAP_SECONDS, generator) * self.sampling_rate)
            longer = samples + gap + round(other.duration * self.sampling_rate)
            if longer >= self.join_seconds * self.sampling_rate:
                break
            waveform = None if others[i] == index else self._read(others[i])
            if waveform is not None:
                parts += [torch.zeros(gap), waveform]
                texts.append(other.text)
                samples += gap + len(waveform)
        return torch.cat(parts), texts


def keep_usable(
    utterances: Sequence[Utterance],
    tokenizer: PreTrainedTokenizer,
    seconds_per_frame: float,
    *,
    min_seconds: float = 0.1,
    max_seconds: float = 30.0,
) -> tuple[list[Utterance], dict[str, int]]:
    """The utterances that can be trained on, and how many are left out for which reason.

    Args:
        utterances: candidates.
        tokenizer: of `lact_kernels.asr.text`.
        seconds_per_frame: of the model's output; times the highest speed if that is changed.
        min_seconds: shorter ones are left out.
        max_seconds: longer ones are left out.

    Returns:
        The kept, and counts that are not 0: of "shorter than ..." and "longer than ..." utterances,
        of those "without text" and with "more labels than frames" (CTC needs a frame for each label
        and one between two equal ones), and of the "unknown tokens (kept)" in utterances that stay.
    """
    kept, counts = [], Counter()
    for utterance in utterances:
        labels = tokenizer(utterance.text).input_ids
        repeats = sum(a == b for a, b in zip(labels, labels[1:]))
        if utterance.duration < min_seconds:
            counts[f"shorter than {min_seconds:g} s"] += 1
        elif utterance.duration > max_seconds:
            counts[f"longer than {max_seconds:g} s"] += 1
        elif not labels:
            counts["without text"] += 1
        elif len(labels) + repeats > int(utterance.duration / seconds_per_frame + 1e-6):
            counts["more labels than frames"] += 1
        else:
            kept.append(utterance)
            counts["unknown tokens (kept)"] += labels.count(tokenizer.unk_token_id)
    return kept, {reason: count for reason, count in counts.items() if count}


class LengthBucketSampler(Sampler[int]):
    """Draws of every utterance once per epoch, those of a batch of similar length.

    Batches are any `batch_size` draws that follow one another, as `DataLoader(batch_size=...)` makes
    them. Utterances are shuffled, sorted by length within pools of 50 batches, and the batches
    are shuffled. If they do not fill the last batch, it is of any lengths.

    Args:
        lengths: of the utterances, in any unit.
        batch_size: at least 1.
        seed: with the epoch it decides the order.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = torch.as_tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(len(self), generator=generator)
        full = len(self) - len(self) % self.batch_size
        pools = order[:full].split(POOL * self.batch_size)
        by_length = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = torch.cat(by_length).view(full // self.batch_size, self.batch_size)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        indices = torch.cat((batches.flatten(), order[full:]))
        return iter((self.epoch * len(self) + indices).tolist())


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples as a batch: `input_values` and `attention_mask` `[B, samples]`, `labels` `[B, n]`."""
    waveforms = [example["input_values"] for example in examples]
    labels = [example["labels"] for example in examples]
    exists = [torch.ones(len(x), dtype=torch.int64) for x in waveforms]
    return {
        "input_values": pad_sequence(waveforms, batch_first=True),
        "attention_mask": pad_sequence(exists, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _generator(*key: int) -> torch.Generator:
    """A generator of its own for each key of whole numbers that are not negative."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)


def _uniform(bounds: Range, generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))
