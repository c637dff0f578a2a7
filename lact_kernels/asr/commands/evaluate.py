"""Error rates of a recogniser on sets of recordings with their texts, with 95% intervals."""

import argparse
import json
import sys
from pathlib import Path

import torch

from lact_kernels.asr.commands.recogniser import add_decoder_arguments, load, positive
from lact_kernels.asr.evaluation import evaluate_set, table
from lact_kernels.asr.files import written_whole
from lact_kernels.asr.manifest import Utterance, read_utterances
from lact_kernels.asr.text import normalize_text
from lact_kernels.core.version import __version__

HELP = "measure word and character error rates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the recogniser")
    parser.add_argument(
        "sets",
        nargs="+",
        metavar="SET",
        help="a manifest (JSON lines) or a folder in the layout of LibriSpeech; NAME=PATH names it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--hypotheses", metavar="FILE", help="write references and hypotheses, as JSON lines"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="utterances of a batch (16)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="take N utterances of each set, spread over it"
    )
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _check_files(args)
    sets = _read_sets(args.sets, args.limit)
    recogniser, decoder = load(args)
    results, lines = {}, []
    for name, utterances in sets.items():
        result, hypotheses = evaluate_set(
            recogniser, utterances, decoder, batch_size=args.batch_size
        )
        results[name] = result
        wer, cer = (100 * result[kind]["rate"] for kind in ("wer", "cer"))
        print(f"{name}: WER {wer:.1f}%, CER {cer:.1f}%", file=sys.stderr, flush=True)
        lines += map(_line, [name] * len(utterances), utterances, hypotheses)
        # Written after each set, so that its results survive a failure in the next one.
        if args.json:
            _write(args.json, _report(args, recogniser.model.device, results))
        if args.hypotheses:
            _write(args.hypotheses, "".join(lines))
    print(table(results))
    return 0


def _report(args: argparse.Namespace, device: torch.device, results: dict) -> str:
    report = {
        "model": args.model,
        "beam": args.beam,
        "lexicon": args.lexicon,
        "lm": args.lm,
        "limit": args.limit,
        "device": str(device),
        "lact_kernels": __version__,
        "torch": torch.__version__,
        "sets": results,
    }
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _check_files(args: argparse.Namespace) -> None:
    """Find wrong paths now, and not after an hour of computing."""
    if not Path(args.model, "config.json").is_file():
        raise FileNotFoundError(f"{args.model} is not the folder of a recogniser")
    for out in filter(None, (args.json, args.hypotheses)):
        if Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
            raise FileNotFoundError(f"{out} cannot be written: it is a folder, or in none")


def _read_sets(arguments: list[str], limit: int | None) -> dict[str, list[Utterance]]:
    """The utterances of each set, by its name. All are read before any is recognised."""
    paths = {}
    for argument in arguments:
        name, path = _name_and_path(argument)
        if name in paths:
            raise ValueError(f"two sets are called {name}: give them names, as in other={path}")
        if not path.exists():
            raise FileNotFoundError(f"there is no set {path}")
        paths[name] = path
    sets = {}
    for name, path in paths.items():
        utterances = read_utterances(path)
        n = min(limit or len(utterances), len(utterances))
        # Neighbours often have the same speaker: the first n would be of few speakers.
        sets[name] = [utterances[i * len(utterances) // n] for i in range(n)]
    return sets


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, Path(path)
    path = Path(argument)
    return path.stem if path.is_file() else path.resolve().name, path


def _line(name: str, utterance: Utterance, hypothesis: str | None) -> str:
    entry = {
        "set": name,
        "audio_filepath": utterance.path,
        "offset": utterance.offset,
        "reference": normalize_text(utterance.text),
        "hypothesis": hypothesis,
    }
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _write(path: str, text: str) -> None:
    with written_whole(path) as file:
        file.write(text)
