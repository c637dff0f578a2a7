"""Make a spoken corpus with espeak-ng: training, development and test sets, held-out voices and sentences."""

import argparse
import sys

HELP = "make a spoken corpus with espeak-ng"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of the corpus")
    parser.add_argument(
        "--task",
        choices=("digits", "commands"),
        default="digits",
        help="strings of digits, or sentences of a grammar of 70 words",
    )
    parser.add_argument("--train", type=int, default=2500, metavar="N", help="training utterances")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="development utterances")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="of each test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--format", choices=("flac", "ogg"), default="flac", help="of the recordings"
    )
    parser.add_argument(
        "--one-file-per-set", action="store_true", help="with offsets in the manifest"
    )
    parser.add_argument("--workers", type=int, help="threads (as many as cores)")


def run(args: argparse.Namespace) -> int:
    from lact_kernels.asr.synthesis import synthesize

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
    for manifest in manifests.values():
        print(manifest)
    print(f"{len(manifests)} sets", file=sys.stderr)
    return 0
