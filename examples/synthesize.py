"""Make a spoken corpus with espeak-ng: training, development and test sets, held-out voices and sentences.

```
python -m examples.synthesize OUT                     # strings of digits
python -m examples.synthesize OUT --task commands     # sentences of a grammar of 70 words
```

The same command continues an interrupted run. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import io
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from examples.asr_corpus import FLITE, FLITE_VOICES, TASKS, VOICES, Speech, digest, plan
from lact_kernels.asr.audio import SAMPLING_RATE, read_audio, resampler
from lact_kernels.asr.manifest import Utterance, write_manifest
from lact_kernels.ops import checks

logger = logging.getLogger(__name__)

NORMAL_SPEED = 160  # words per minute of flite without a `duration_stretch`
AMPLITUDE = 40  # of 0 to 200: at espeak-ng's default, 100, many voices are clipped
MARGIN = 1600  # samples of silence before and after the speech
SNR_DB = 10.0
# Ogg files are Vorbis, not Opus: read from an offset, libsndfile decodes Vorbis to the same samples as from
# the beginning of the file, but not Opus. In the last page of a file (4 kB) it fails with Vorbis too, so that
# files of several utterances end with noise that belongs to none of them.
TAIL = 4 * SAMPLING_RATE  # samples of that noise, more than a page
FORMATS = {
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS", "compression_level": 1.0},
}


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
    """Make a corpus of synthetic speech, 16 kHz mono, with a manifest for each set.

    No sentence occurs twice, except that test_noise repeats those of test_voice.

        train        24 American voices
        dev          4 other voices, for choosing settings
        test_seen    the voices of train
        test_voice   6 voices that neither train nor dev have
        test_accent  the voices of train with a Scottish accent
        test_noise   the utterances of test_voice in white noise, 10 dB below them
        test_flite   another synthesiser; left out where flite is not installed

    The same arguments give the same corpus: sentences, voices, speeds, pitches and noise. FLAC files are
    identical to the byte; Ogg files have identical samples, but a random serial number. Files of an earlier
    call with the same arguments are reused, even if that call was interrupted.

    Args:
        out: folder of the manifests `train.jsonl` and so on.
        task: "digits" (three to seven of ten words) or "commands" (4 to 10 of the 70 `COMMAND_WORDS`).
        num_train: utterances of train.
        num_dev: utterances of dev.
        num_test: utterances of each other set.
        seed: another seed draws other utterances.
        workers: threads that synthesise; by default one for each processor.
        audio_format: "flac" (16 bits) or "ogg" (Vorbis, about a sixth in size).
        progress: show a progress bar.
        one_file_per_set: join the utterances of a set into one file; the manifest has their `offset` in it.

    Returns:
        The manifest of each set.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown task or format, a negative number, or more sentences than a set can have
            (half of its share of them).
        OSError: espeak-ng or one of its voices is missing (FileNotFoundError), or synthesis fails.
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
            name: out / f"{name}-{digest(' '.join(s.key for s in speeches))}.{audio_format}"
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


def _check_espeak() -> None:
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError(
            "espeak-ng is not installed: `apt install espeak-ng` on Debian and Ubuntu, "
            "`brew install espeak-ng` on macOS"
        )
    # Asked for a variant that it does not have, espeak-ng speaks without one, and reports no error.
    known = re.findall(r"!v/(\S+)", _run(["espeak-ng", "--voices=variant"]).decode())
    voices = itertools.chain.from_iterable(VOICES.values())
    needed = {voice.split("+")[1] for voice in voices if not voice.startswith(FLITE)}
    if missing := sorted(needed - set(known)):
        raise FileNotFoundError(f"espeak-ng is installed without the voices {', '.join(missing)}")


def _has_flite() -> bool:
    """Whether flite is installed with all voices. It would replace a missing one without an error."""
    if shutil.which("flite") is None:
        return False
    known = _run(["flite", "-lv"]).decode().split()
    return all(voice.removeprefix(FLITE) in known for voice in FLITE_VOICES)


def _run(command: list[str]) -> bytes:
    """What a command prints. If it fails or prints nothing: OSError with its standard error."""
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
    """A file for each utterance in the folder of its set. Files that exist are kept."""
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


def _write(path: Path, waveforms: Iterable[Tensor], audio_format: str) -> None:
    """Write waveforms `[samples]` one after another to a file, which gets its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with soundfile.SoundFile(partial, "w", SAMPLING_RATE, 1, **FORMATS[audio_format]) as file:
        for x in waveforms:
            file.write(x.numpy())
    os.replace(partial, path)


def _is_joined(manifest: Path, path: Path) -> bool:
    """Whether a set is complete: its manifest is written last."""
    return path.exists() and manifest.exists() and path.name in manifest.read_text("utf-8")


def _join(utterances: list[Utterance], path: Path, audio_format: str) -> list[Utterance]:
    """Write utterances, each from a file of its own, into one file; return them with their offsets in it."""
    tail = 0.1 * torch.randn(TAIL, generator=torch.Generator().manual_seed(0))
    waveforms = itertools.chain((read_audio(u.path) for u in utterances), [tail])
    _write(path, waveforms, audio_format)
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
    parser.add_argument(
        "--test", type=int, default=200, metavar="N", help="utterances of each test set"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="flac", help="of the sound files"
    )
    parser.add_argument(
        "--one-file-per-set", action="store_true", help="join the utterances of a set into one file"
    )
    parser.add_argument("--workers", type=int, help="threads (one for each processor)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
