"""The plan of a synthetic speech corpus: which voice reads which sentence, in which set."""

import hashlib
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

from lact_kernels.ops import checks

# Context-free grammars. A sentence is derived from "SENTENCE" by replacing every key with one of its
# alternatives. They are unambiguous (each sentence has one derivation), so that sentences can be counted
# without listing them.
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


# Voice variants of espeak-ng, female ones first. Robotic and whispering ones are left out. Variants that
# sound nearly the same (steph and steph2, m6 and Alex) are never in two of these lists.
TRAINING_VARIANTS = (
    "f1 f2 f4 f5 aunty linda belinda Annie "
    "m1 m2 m3 m4 m6 m7 Alex Andy Gene Mike Michael Mario max miguel robert Nguyen"
)
TRAIN_VOICES = _voices("en-us", TRAINING_VARIANTS)
DEV_VOICES = _voices("en-us", "Andrea grandma paul pedro")
TEST_VOICES = _voices("en-us", "f3 steph anika m5 m8 sandro")
ACCENT_VOICES = _voices("en-gb-scotland", TRAINING_VARIANTS)
FLITE = "flite-"  # prefix of the voices that flite speaks, not espeak-ng
FLITE_VOICES = tuple(FLITE + voice for voice in ("slt", "rms", "awb", "kal16"))
VOICES = {
    "train": TRAIN_VOICES,
    "dev": DEV_VOICES,
    "test_seen": TRAIN_VOICES,
    "test_voice": TEST_VOICES,
    "test_accent": ACCENT_VOICES,
    "test_flite": FLITE_VOICES,
}
# The hash of a sentence chooses one of these sixteen shares, and with it the set that may use the sentence.
# So no sentence is in two sets, whatever the seed and the sizes, and each set has sentences of every kind.
SHARES = ("train",) * 11 + ("dev", "test_seen", "test_voice", "test_accent", "test_flite")

SPEEDS = (130, 190)  # words per minute
PITCHES = (30, 70)  # of 0 to 99
RECIPE = 1  # version of the synthesis, part of file names: increase it when utterances would sound different


@dataclass(frozen=True)
class Speech:
    """Everything that decides how an utterance sounds."""

    text: str
    voice: str
    speed: int  # words per minute
    pitch: int  # 0 to 99; flite has none
    noise_seed: int | None = None  # of white noise; None for no noise

    @property
    def key(self) -> str:
        return digest(f"{RECIPE} {self}")


def plan(
    task: Literal["digits", "commands"],
    *,
    num_train: int = 2500,
    num_dev: int = 200,
    num_test: int = 200,
    seed: int = 0,
) -> dict[str, list[Speech]]:
    """The utterances of each set. Nothing is synthesised. Arguments and errors are those of `synthesize`."""
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
        if count > limit:  # beyond it, drawing until a sentence is new would take very long
            raise ValueError(f"{name} of {task} has {limit} sentences at most, got {count}")
        taken: set[str] = set()
        sets[name] = [_draw_speech(task, name, voices, seed, i, taken) for i in range(count)]
    sets["test_noise"] = [
        replace(speech, noise_seed=random.Random(f"{seed} noise {i}").getrandbits(32))
        for i, speech in enumerate(sets["test_voice"])
    ]
    return sets


def _count(symbol: str, grammar: dict[str, tuple[str, ...]]) -> int:
    """The number of sentences that a symbol derives."""
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
    """A random utterance of a set. Its sentence is not in `taken`, and is added to it."""
    rng = random.Random(f"{seed} {task} {name} {index}")
    voice, speed, pitch = rng.choice(voices), rng.randint(*SPEEDS), rng.randint(*PITCHES)
    while True:
        text = _draw_sentence("SENTENCE", GRAMMARS[task], rng)
        if text not in taken and SHARES[int(digest(text), 16) % len(SHARES)] == name:
            taken.add(text)
            return Speech(text, voice, speed, pitch)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
