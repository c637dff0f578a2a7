"""Make a spoken corpus with espeak-ng: training, development and test sets, held-out voices and sentences.

```
python -m examples.synthesize OUT                     # strings of digits
python -m examples.synthesize OUT --task commands     # sentences of a grammar of 70 words
```

An interrupted run goes on where it was. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import hashlib
import io
import itertools
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lact_kernels.asr.audio import SAMPLING_RATE, read_audio, resampler
from lact_kernels.asr.manifest import Utterance, write_manifest
from lact_kernels.ops import checks

logger = logging.getLogger(__name__)

# A sentence comes from "SENTENCE" by replacing every key by one of its alternatives. No sentence comes
# about in two ways, so that sentences can be counted without listing them.
GRAMMARS = {
    "digits": {
        "SENTENCE": tuple(" ".join(["DIGIT"] * n) for n in range(3, 8)),
        "DIGIT": tuple("zero one two three four five six seven eight nine".split()),
    },
    "commands": {
        "SENTENCE": ("ORDER", "please ORDER", "QUESTION"),
        "ORDER": (
            "turn SWITCH the ROOM DEVICE WHEN",
            "turn SWITCH the DEVICE WHEN",
            "turn DIRECTION the volume WHEN",
            "set the ROOM heating to TENS NUMBER degrees",
            "set a ROOM timer for TENS NUMBER minutes",
            "MOVE the ROOM OPENING WHEN",
            "play some GENRE in the ROOM",
            "play some GENRE in the ROOM DAY",
            "play some GENRE WHEN",
            "stop the GENRE and call NAME WHEN",
            "send a message to NAME WHEN",
            "remind PERSON to CHORE WHEN",
        ),
        "QUESTION": (
            "what is the weather WHEN",
            "will it rain WHEN",
            "is the ROOM DEVICE SWITCH",
            "is the ROOM OPENING open",
        ),
        "CHORE": ("call NAME", "buy FOOD", "MOVE the OPENING"),
        "WHEN": ("DAY", "DAY at NUMBER", "at NUMBER TENS"),
        "PERSON": ("me", "NAME"),
        "NAME": ("anna", "peter", "maria"),
        "ROOM": ("kitchen", "bedroom", "office", "garage", "living room"),
        "DEVICE": ("light", "fan", "heating"),
        "SWITCH": ("on", "off"),
        "DIRECTION": ("up", "down"),
        "MOVE": ("open", "close"),
        "OPENING": ("door", "window"),
        "GENRE": ("jazz", "rock", "music"),
        "FOOD": ("bread", "milk", "coffee"),
        "DAY": ("tonight", "tomorrow"),
        "NUMBER": tuple("one two three four five six seven eight nine".split()),
        "TENS": ("twenty", "thirty", "forty", "fifty"),
    },
}
TASKS = tuple(GRAMMARS)


def _words(grammar: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    parts = {word for choices in grammar.values() for choice in choices for word in choice.split()}
    return tuple(sorted(parts - grammar.keys()))


DIGIT_WORDS = _words(GRAMMARS["digits"])
COMMAND_WORDS = _words(GRAMMARS["commands"])


def _voices(accent: str, variants: str) -> tuple[str, ...]:
    return tuple(f"{accent}+{variant}" for variant in variants.split())


# Variants of espeak-ng, women before men. Robots and whisperers are left out, and variants that are
# nearly the same (steph and steph2, m6 and Alex) are never in two of the lists.
TRAINING_VARIANTS = (
    "f1 f2 f4 f5 aunty linda belinda Annie "
    "m1 m2 m3 m4 m6 m7 Alex Andy Gene Mike Michael Mario max miguel robert Nguyen"
)
TRAIN_VOICES = _voices("en-us", TRAINING_VARIANTS)
DEV_VOICES = _voices("en-us", "Andrea grandma paul pedro")
TEST_VOICES = _voices("en-us", "f3 steph anika m5 m8 sandro")
ACCENT_VOICES = _voices("en-gb-scotland", TRAINING_VARIANTS)
FLITE = "flite-"  # what the voices of the second synthesiser begin with
FLITE_VOICES = tuple(FLITE + voice for voice in ("slt", "rms", "awb", "kal16"))
VOICES = {
    "train": TRAIN_VOICES,
    "dev": DEV_VOICES,
    "test_seen": TRAIN_VOICES,
    "test_voice": TEST_VOICES,
    "test_accent": ACCENT_VOICES,
    "test_flite": FLITE_VOICES,
}
# The sets that share all sentences, by the hash of a sentence: whatever the seed and the sizes, no
# sentence is in two of them, and each has sentences of every kind.
SHARES = ("train",) * 11 + ("dev", "test_seen", "test_voice", "test_accent", "test_flite")

SPEEDS = (130, 190)  # words per minute
PITCHES = (30, 70)  # of 0 to 99
NORMAL_SPEED = 160  # words per minute that flite's own speed counts as
AMPLITUDE = 40  # of 0 to 200: at espeak-ng's default, 100, many voices are clipped
MARGIN = 1600  # samples of silence before and after the speech
SNR_DB = 10.0
RECIPE = 1  # a part of file names; another number for any change of how an utterance is made
# Vorbis, since a file that is opened at an offset gives the very samples that it gives when read
# from its beginning; with Opus it gives others. In the last page of the file (4 kB) libsndfile goes
# astray with Vorbis too, so that joined files end with noise that no utterance refers to.
TAIL = 4 * SAMPLING_RATE  # samples, more than a page
FORMATS = {
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS", "compression_level": 1.0},
}


@dataclass(frozen=True)
class Speech:
    """Everything that decides how an utterance sounds."""

    text: str
    voice: str
    speed: int  # words per minute
    pitch: int  # 0 to 99; flite has none
    noise_seed: int | None = None  # of white noise, where there is some

    @property
    def key(self) -> str:
        return _digest(f"{RECIPE} {self}")


def plan(
    task: Literal["digits", "commands"],
    *,
    num_train: int = 2500,
    num_dev: int = 200,
    num_test: int = 200,
    seed: int = 0,
) -> dict[str, list[Speech]]:
    """What `synthesize` makes: the utterances of each set. Nothing is synthesised.

    Raises: as `synthesize` does for these arguments.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in {"num_train": num_train, "num_dev": num_dev, "num_test": num_test}.items():
        checks.check_int(name, value)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    seed = checks.check_int("seed", seed)
    sets = {}
    for name, voices in VOICES.items():
        count = {"train": num_train, "dev": num_dev}.get(name, num_test)
        limit = _count("SENTENCE", GRAMMARS[task]) * SHARES.count(name) // len(SHARES) // 2
        if count > limit:  # the last sentences would be long in coming
            raise ValueError(f"{name} of {task} has {limit} sentences at most, got {count}")
        taken: set[str] = set()
        sets[name] = [_draw_speech(task, name, voices, seed, i, taken) for i in range(count)]
    sets["test_noise"] = [
        replace(speech, noise_seed=random.Random(f"{seed} noise {i}").getrandbits(32))
        for i, speech in enumerate(sets["test_voice"])
    ]
    return sets


def synthesize(
    out: str | Path,
    task: Literal["digits", "commands"],
    *,
    num_train: int = 2500,
    num_dev: int = 200,
    num_test: int = 200,
    seed: int = 0,
    workers: int | None = None,
    audio_format: Literal["flac", "ogg"] = "flac",
    progress: bool = True,
    one_file_per_set: bool = False,
) -> dict[str, Path]:
    """Makes a corpus of synthetic speech, 16 kHz mono, with a manifest for each set.

    No sentence occurs twice, but for those of test_noise.

        train        24 American voices
        dev          4 other voices, for choosing settings
        test_seen    the voices of train
        test_voice   6 voices that neither train nor dev have
        test_accent  the voices of train with a Scottish accent
        test_noise   the utterances of test_voice in white noise, 10 dB below them
        test_flite   another synthesiser; left out where flite is not installed

    The arguments decide everything: sentences, voices, speeds, pitches and noise. FLAC files of two
    calls are the same bytes; Ogg files are the same samples, with a random number in the header.
    Files that an earlier call with the same arguments has made are used again, also if it was
    interrupted.

    Args:
        out: folder of the manifests `train.jsonl` and so on.
        task: "digits" (three to seven of ten words) or "commands" (4 to 10 of the 70 `COMMAND_WORDS`).
        num_train: utterances of train.
        num_dev: utterances of dev.
        num_test: utterances of each other set.
        seed: another seed draws other utterances.
        workers: utterances that are made at a time; by default one for each processor.
        audio_format: "flac" (16 bits) or "ogg" (Vorbis, about a sixth in size).
        progress: show a progress bar.
        one_file_per_set: join the utterances of a set to one file, of which each has an `offset`.

    Returns:
        The manifest of each set.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown task or format, a negative number, or more sentences than a set can have
            (half of its share of them).
        OSError: espeak-ng or one of its voices is missing (FileNotFoundError), or speech fails.
    """
    sets = plan(task, num_train=num_train, num_dev=num_dev, num_test=num_test, seed=seed)
    if workers is not None:
        workers = checks.check_positive_int("workers", workers)
    if audio_format not in FORMATS:
        raise ValueError(f"audio_format must be one of {', '.join(FORMATS)}, got {audio_format!r}")
    checks.check_flags(progress=progress, one_file_per_set=one_file_per_set)
    _check_espeak()
    if not _has_flite():
        logger.warning("test_flite is left out: flite is not here with %s", ", ".join(FLITE_VOICES))
        del sets["test_flite"]
    out = Path(out)
    manifests = {name: out / f"{name}.jsonl" for name in sets}
    if one_file_per_set:
        joined = {
            name: out / f"{name}-{_digest(' '.join(s.key for s in speeches))}.{audio_format}"
            for name, speeches in sets.items()
        }
        sets = {k: v for k, v in sets.items() if not _is_joined(manifests[k], joined[k])}
        parts = {name: out / f"{name}.parts" for name in sets}
        for name, utterances in _speak(sets, parts, "flac", workers, progress).items():
            write_manifest(manifests[name], _join(utterances, joined[name], audio_format))
            shutil.rmtree(parts[name])
    else:
        folders = {name: out / name for name in sets}
        for name, utterances in _speak(sets, folders, audio_format, workers, progress).items():
            write_manifest(manifests[name], utterances)
    return manifests


def _count(symbol: str, grammar: dict[str, tuple[str, ...]]) -> int:
    """How many sentences come from a symbol."""
    return sum(
        math.prod(_count(word, grammar) for word in choice.split() if word in grammar)
        for choice in grammar[symbol]
    )


def _draw_sentence(symbol: str, grammar: dict[str, tuple[str, ...]], rng: random.Random) -> str:
    words = rng.choice(grammar[symbol]).split()
    return " ".join(_draw_sentence(w, grammar, rng) if w in grammar else w for w in words)


def _draw_speech(
    task: str, name: str, voices: tuple[str, ...], seed: int, index: int, taken: set[str]
) -> Speech:
    """An utterance of a set, whose sentence is not `taken`, and is from now on."""
    rng = random.Random(f"{seed} {task} {name} {index}")
    voice, speed, pitch = rng.choice(voices), rng.randint(*SPEEDS), rng.randint(*PITCHES)
    while True:
        text = _draw_sentence("SENTENCE", GRAMMARS[task], rng)
        if text not in taken and SHARES[int(_digest(text), 16) % len(SHARES)] == name:
            taken.add(text)
            return Speech(text, voice, speed, pitch)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_espeak() -> None:
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError(
            "espeak-ng is not installed: `apt install espeak-ng` on Debian and Ubuntu, "
            "`brew install espeak-ng` on macOS"
        )
    # For a variant that it does not have, espeak-ng speaks without one and does not complain.
    known = re.findall(r"!v/(\S+)", _run(["espeak-ng", "--voices=variant"]).decode())
    voices = itertools.chain.from_iterable(VOICES.values())
    needed = {voice.split("+")[1] for voice in voices if not voice.startswith(FLITE)}
    if missing := sorted(needed - set(known)):
        raise FileNotFoundError(f"espeak-ng is installed without the voices {', '.join(missing)}")


def _has_flite() -> bool:
    """For a voice that it does not have, flite takes another, so that they are looked up."""
    if shutil.which("flite") is None:
        return False
    known = _run(["flite", "-lv"]).decode().split()
    return all(voice.removeprefix(FLITE) in known for voice in FLITE_VOICES)


def _run(command: list[str]) -> bytes:
    """What a command prints. OSError with its complaint if it fails or prints nothing."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode or not done.stdout:
        complaint = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{' '.join(command)} failed: {complaint or 'no output'}")
    return done.stdout


def _sound(speech: Speech) -> Tensor:
    """An utterance, float32 `[samples]`."""
    if speech.voice.startswith(FLITE):
        voice, stretch = speech.voice.removeprefix(FLITE), NORMAL_SPEED / speech.speed
        command = f"flite -voice {voice} --setf duration_stretch={stretch:.3f} -o /dev/stdout -t"
    else:
        command = f"espeak-ng -v {speech.voice} -s {speech.speed} -p {speech.pitch}"
        command += f" -a {AMPLITUDE} -z --stdout"
    x, rate = soundfile.read(io.BytesIO(_run([*command.split(), speech.text])), dtype="float32")
    x = F.pad(resampler(rate, SAMPLING_RATE)(torch.from_numpy(x)), (MARGIN, MARGIN))
    if speech.noise_seed is None:
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(speech.noise_seed))
    return x + noise * (x.square().mean() / noise.square().mean() / 10 ** (SNR_DB / 10)).sqrt()


def _speak(
    sets: dict[str, list[Speech]],
    folders: dict[str, Path],
    audio_format: str,
    workers: int | None,
    progress: bool,
) -> dict[str, list[Utterance]]:
    """A file for each utterance in the folder of its set; those that are there are kept."""
    jobs = [
        (folders[name] / f"{i:05d}-{speech.key}.{audio_format}", speech)
        for name, speeches in sets.items()
        for i, speech in enumerate(speeches)
    ]
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)

    def make(job: tuple[Path, Speech]) -> Utterance:
        path, speech = job
        if not path.exists():
            _write(path, [_sound(speech)], audio_format)
        duration = soundfile.info(path).duration
        return Utterance(str(path), speech.text, duration, speaker=speech.voice)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers share the processors
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            bar = tqdm(pool.map(make, jobs), "synthesis", len(jobs), disable=not progress)
            made = iter(list(bar))
    finally:
        torch.set_num_threads(threads)
    return {name: list(itertools.islice(made, len(sets[name]))) for name in sets}


def _write(path: Path, pieces: Iterable[Tensor], audio_format: str) -> None:
    """Writes waveforms `[samples]` one after another to a file, all of them or nothing."""
    partial = path.with_name(path.name + ".partial")
    with soundfile.SoundFile(partial, "w", SAMPLING_RATE, 1, **FORMATS[audio_format]) as file:
        for x in pieces:
            file.write(x.numpy())
    os.replace(partial, path)


def _is_joined(manifest: Path, path: Path) -> bool:
    """Whether a set is finished: its manifest is the last that is written."""
    return path.exists() and manifest.exists() and path.name in manifest.read_text("utf-8")


def _join(utterances: list[Utterance], path: Path, audio_format: str) -> list[Utterance]:
    """Writes utterances that have files of their own to one file; returns them as its parts."""
    tail = 0.1 * torch.randn(TAIL, generator=torch.Generator().manual_seed(0))
    pieces = itertools.chain((read_audio(u.path) for u in utterances), [tail])
    _write(path, pieces, audio_format)
    samples = (round(u.duration * SAMPLING_RATE) for u in utterances)
    starts = itertools.accumulate(samples, initial=0)
    return [
        replace(u, path=str(path), offset=start / SAMPLING_RATE)
        for u, start in zip(utterances, starts)
    ]


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    try:
        manifests = synthesize(
            args.out,
            args.task,
            num_train=args.train,
            num_dev=args.dev,
            num_test=args.test,
            seed=args.seed,
            workers=args.workers,
            audio_format=args.format,
            one_file_per_set=args.one_file_per_set,
        )
    except KeyboardInterrupt:
        print("\nsynthesize: interrupted", file=sys.stderr)
        return 130
    except (OSError, TypeError, ValueError) as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 1
    for manifest in manifests.values():
        print(manifest)
    print(f"{len(manifests)} sets", file=sys.stderr)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="folder of the corpus")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="digits",
        help="strings of digits, or sentences of a grammar of 70 words",
    )
    parser.add_argument("--train", type=int, default=2500, metavar="N", help="training utterances")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="development utterances")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="of each test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="flac", help="of the recordings"
    )
    parser.add_argument(
        "--one-file-per-set", action="store_true", help="with offsets in the manifest"
    )
    parser.add_argument("--workers", type=int, help="threads (as many as cores)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
