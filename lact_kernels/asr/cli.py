"""`lact-asr`: train, evaluate and use speech recognisers from the command line."""

import argparse
import sys
import warnings
from collections.abc import Sequence

try:
    from lact_kernels.asr.commands import evaluate, stream, train, transcribe
except ModuleNotFoundError as error:
    raise ImportError(
        f"lact-asr needs {error.name}: pip install 'lact-kernels[asr]'", name=error.name
    ) from error

COMMANDS = {"train": train, "evaluate": evaluate, "transcribe": transcribe, "stream": stream}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="lact-asr", description="Train, evaluate and use speech recognisers of LaCT layers."
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"lact-asr: {message}\n"
    try:
        return args.run(args)
    except KeyboardInterrupt as interrupt:
        print(
            f"\nlact-asr: interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output is gone: report nothing, at exit neither
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        if args.debug:
            raise
        print(f"lact-asr: {error}", file=sys.stderr)
        return 1
