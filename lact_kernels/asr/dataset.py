"""Utterances as training examples: reading, augmentation, batches of similar length.

All randomness of an example comes from the seed and the number of its draw, so that it does not depend on
the number of worker processes, nor on whether the training was interrupted.
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

IGNORED = -100  # label of padding, in transformers
GAP_SECONDS = (0.1, 0.5)  # silence between joined utterances
POOL = 50  # number of batches whose utterances are sorted by length together

Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a waveform, drawn uniformly from ranges. None turns a change off.

    Args:
        speeds: the speech is resampled to one of these speeds, which changes its pitch, too.
        gain_db: gain, dB.
        lead_seconds: digital silence added before the speech.
        tail_seconds: digital silence added after it.
        snr_db: white noise is added to speech and silence, with this signal-to-noise ratio in the speech.
    """

    speeds: tuple[float, ...] | None = (0.9, 1.0, 1.1)
    gain_db: Range | None = (-6.0, 6.0)
    lead_seconds: Range | None = (0.0, 0.3)
    tail_seconds: Range | None = (0.0, 0.4)
    snr_db: Range | None = (10.0, 35.0)

    def __call__(self, x: Tensor, sampling_rate: int, generator: torch.Generator) -> Tensor:
        """The augmented waveform, of another number of samples than `x [samples]`."""
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
    """Training examples of utterances, each augmented in its own way in each epoch.

    Item `epoch * len(self) + i`, a "draw", is utterance i with the augmentation of that epoch. A recording
    that cannot be read is logged once, and replaced by the next one that can.

    Args:
        utterances: with normalised texts, which are tokenized as they are.
        tokenizer: of `lact_kernels.asr.text`.
        sampling_rate: of the examples, Hz.
        augmentation: of each example; None for none.
        join_seconds: if above 0, other utterances of the same speaker are appended in random order, with
            silence between them, as long as the result (before augmentation) is shorter than this. To learn
            to adapt to a speaker, a model needs long recordings of one.
        seed: of everything random.

    Raises:
        ValueError: there are no utterances, or `join_seconds` is given and no utterance has a speaker.
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
        """The examples of epoch 0 in order. (Python's default would not end, as any draw is an item.)"""
        return map(self.__getitem__, range(len(self)))

    @property
    def num_broken(self) -> int:
        """How many recordings could not be read so far, in all worker processes."""
        return int(self._broken.sum())

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        """`input_values` float32 `[samples]` and `labels` int64 `[n]`.

        Raises:
            OSError: none of the recordings can be read.
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
        """Append others of its speaker in random order, up to the first with which it would be too long."""
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
    """Select the utterances that can be trained on, and count the others by reason.

    Args:
        utterances: candidates.
        tokenizer: of `lact_kernels.asr.text`.
        seconds_per_frame: of the model's output, multiplied by the highest speed of the augmentation.
        min_seconds: shorter ones are left out.
        max_seconds: longer ones are left out.

    Returns:
        The utterances that are kept, and the counts that are not 0: utterances that are "shorter than ..." or
        "longer than ...", "without text", or have "more labels than frames" (CTC needs a frame for each
        label and another one between two equal labels), and the "unknown tokens (kept)" in those that are
        kept.
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
    """Draw every utterance once per epoch, so that the utterances of a batch have similar lengths.

    A batch is `batch_size` consecutive draws, as `DataLoader(batch_size=...)` takes them. Utterances are
    shuffled and sorted by length within pools of 50 batches; then the batches are shuffled. A last batch that
    is not full has utterances of any length.

    Args:
        lengths: of the utterances, in any unit.
        batch_size: at least 1.
        seed: seed and epoch decide the order.
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
    """Pad examples to a batch: `input_values` and `attention_mask` `[B, samples]`, `labels` `[B, n]`."""
    waveforms = [example["input_values"] for example in examples]
    labels = [example["labels"] for example in examples]
    exists = [torch.ones(len(x), dtype=torch.int64) for x in waveforms]
    return {
        "input_values": pad_sequence(waveforms, batch_first=True),
        "attention_mask": pad_sequence(exists, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _generator(*key: int) -> torch.Generator:
    """The generator of a key, a tuple of integers that are not negative. Other keys give other streams."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)


def _uniform(bounds: Range, generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))
