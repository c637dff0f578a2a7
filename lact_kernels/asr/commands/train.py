"""Train a recogniser on recordings with their texts. After an interruption the same command continues."""

import argparse
import ast
import sys

import torch
from transformers.utils.logging import disable_progress_bar

from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.pretrained import load_recogniser
from lact_kernels.asr.text import build_tokenizer, tokenizer_from_vocabulary
from lact_kernels.asr.training import (
    TrainingOptions,
    new_model,
    processes,
    read_training_set,
    train,
    usable,
)

HELP = "train a recogniser"
OPTIONS = {
    "epochs": (int, "passes over the utterances"),
    "batch_size": (int, "utterances of a step on one device"),
    "gradient_accumulation_steps": (int, "steps whose gradients are added up for an update"),
    "learning_rate": (float, "peak learning rate of AdamW"),
    "warmup_steps": (int, "updates until the learning rate reaches its peak"),
    "weight_decay": (float, "of AdamW"),
    "save_steps": (int, "updates between two checkpoints and evaluations of --dev"),
    "logging_steps": (int, "updates between two lines of the log"),
    "join_seconds": (float, "join utterances of a speaker up to this length"),
    "seed": (int, "of weights, order, augmentation and dropout"),
    "workers": (int, "processes that read and augment"),
    "sequence_parallel": (int, "devices that share each recording, and a batch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of the recogniser and its checkpoints")
    data = "manifests (JSON lines) or folders in the layout of LibriSpeech"
    parser.add_argument("--train", nargs="+", required=True, metavar="PATH", help=data)
    parser.add_argument(
        "--dev",
        nargs="+",
        default=[],
        metavar="PATH",
        help="the same, to choose the best checkpoint",
    )
    parser.add_argument(
        "--config",
        default="tiny",
        help="tiny (default), stream, base, improved, regularized or large",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="options of LaCTASRConfig, such as lact_chunk_size=64",
    )
    parser.add_argument("--unit", choices=("char", "word"), default="char", help="what a token is")
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="a vocab.json, instead of that of the texts"
    )
    parser.add_argument(
        "--init", metavar="MODEL", help="start from a recogniser and its vocabulary"
    )
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--bf16", action="store_true", help="mixed precision with bfloat16")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="shard weights and optimizer state over GPUs (FSDP2)"
    )
    parser.add_argument(
        "--no-augmentation", action="store_true", help="train on the recordings as they are"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU")


def run(args: argparse.Namespace) -> int:
    disable_progress_bar()  # of writing checkpoints, which takes no time
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.no_augmentation:
        given["augmentation"] = None
    for name in ("bf16", "gradient_checkpointing", "fsdp"):
        given[name] = getattr(args, name)
    options = TrainingOptions(**given)
    say = processes(options).print
    train_set, dev_set = (read_training_set(paths) for paths in (args.train, args.dev))
    if args.init:
        model, tokenizer, _ = load_recogniser(args.init)
    else:
        if args.vocabulary:
            tokenizer = tokenizer_from_vocabulary(args.vocabulary)
        else:
            tokenizer = build_tokenizer((u.text for u in train_set), args.unit)
        settings = dict(args.set) | {"vocab_size": len(tokenizer)}
        model = new_model(LaCTASRConfig.named(args.config, **settings), options.seed)

    config = model.config
    for name, utterances in (("training", train_set), ("development", dev_set)):
        utterances[:], counts = usable(utterances, tokenizer, config, options)
        hours = sum(u.duration for u in utterances) / 3600
        say(f"{name}: {len(utterances)} utterances, {hours:.2f} h", file=sys.stderr)
        for reason, count in counts.items():
            say(f"  {count} {reason}", file=sys.stderr)
    if train_set:
        seconds = config.seconds_per_update
        reach = sum(max(u.duration, options.join_seconds) > seconds for u in train_set)
        say(
            f"fast weights learn every {seconds:.2f} s: at least once in"
            f" {100 * reach / len(train_set):.0f}% of the utterances",
            file=sys.stderr,
        )
    train(args.out, model, tokenizer, train_set, dev_set, options)
    say(f"saved {args.out}", file=sys.stderr)
    return 0


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"{value!r} is no value of Python") from None
