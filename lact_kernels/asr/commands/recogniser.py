"""Arguments that `transcribe`, `stream` and `evaluate` share, and the recogniser and decoder they choose."""

import argparse
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from lact_kernels.asr.decoding import BeamDecoder, GreedyDecoder
from lact_kernels.asr.pretrained import Recogniser, load_recogniser
from lact_kernels.asr.transcription import Decoder


def add_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of decoder and device."""
    parser.add_argument(
        "--beam",
        type=positive,
        metavar="N",
        help="search for words of the training text with a beam of N hypotheses",
    )
    parser.add_argument(
        "--lexicon", metavar="FILE", help="other words for the search, the first of each line"
    )
    parser.add_argument(
        "--lm", metavar="FILE", help="a KenLM language model of words for the search"
    )
    parser.add_argument("--lm-weight", type=float, default=2.0, metavar="X", help="of --lm (2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of PyTorch on a CPU")


def load(args: argparse.Namespace) -> tuple[Recogniser, Decoder]:
    """The recogniser and the decoder that the arguments choose.

    Raises:
        FileNotFoundError: there is no such model, lexicon or language model.
        ImportError: a package that they need is missing.
        ValueError: arguments contradict each other, or files cannot be read.
    """
    if (args.lexicon or args.lm) and not args.beam:
        raise ValueError("--lexicon and --lm need --beam: a greedy decoder knows no words")
    for file in filter(None, (args.lexicon, args.lm)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}")
    if args.threads:
        torch.set_num_threads(args.threads)
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise ValueError("there is no CUDA device")
    device = "cuda" if available and args.device != "cpu" else "cpu"
    disable_progress_bar()  # of loading the weights, which takes no time
    recogniser = load_recogniser(args.model, device)
    if not args.beam:
        return recogniser, GreedyDecoder(recogniser.tokenizer)
    words = recogniser.words
    if args.lexicon:
        lines = Path(args.lexicon).read_text(encoding="utf-8").splitlines()
        words = [line.split()[0] for line in lines if line.strip()]
    options = {"beam_size": args.beam, "lm": args.lm, "lm_weight": args.lm_weight}
    return recogniser, BeamDecoder(recogniser.tokenizer, words, **options)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
