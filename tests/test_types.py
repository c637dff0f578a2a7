"""The types that a user's checker sees: results follow the flags, and options have names."""

import inspect
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lact_kernels
from lact_kernels import asr, compat, distributed

TESTS = Path(__file__).parent
SELF = ("self", "cls")

# Of torch only what tensors, modules and parameters are: with all of it mypy takes five times as long.
MYPY = """
[mypy]
strict = true
follow_imports = skip
[mypy-lact_kernels.*,torch,torch._C,torch._tensor,torch.nn.*]
follow_imports = silent
"""


def test_mypy_accepts_right_calls_and_refuses_wrong_ones(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(MYPY)
    options = ["--config-file", config, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, TESTS / "typed_calls.py"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def public_functions() -> Iterator[Callable]:
    """What is exported, and the methods of it that have a name of ours."""
    for module in (lact_kernels, compat, distributed, asr):
        for exported in (getattr(module, name) for name in module.__all__):
            if not inspect.isclass(exported):
                yield exported
                continue
            for name, member in vars(exported).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                own = name == "__init__" or not name.startswith("_")
                if own and inspect.isfunction(member) and member.__module__.startswith("lact_"):
                    yield member


FUNCTIONS = {f"{f.__module__}.{f.__qualname__}": f for f in public_functions()}


def test_public_functions_are_annotated():
    def missing(function: Callable) -> list[str]:
        signature = inspect.signature(function)
        names = {n: p.annotation for n, p in signature.parameters.items() if n not in SELF}
        if function.__name__ != "__init__" or not names:  # one annotation makes `__init__` typed
            names["return"] = signature.return_annotation
        return [name for name, x in names.items() if x is inspect.Parameter.empty]

    assert len(FUNCTIONS) > 50
    assert {name: missing(f) for name, f in FUNCTIONS.items() if missing(f)} == {}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in 3.11")
def test_overloads_differ_from_their_function_in_one_flag():
    flagged = {}
    for name, function in FUNCTIONS.items():
        flags = [p for p in inspect.signature(function).parameters if p.startswith("return_")]
        if flags:
            (flagged[name],) = flags
    assert len(flagged) >= 10

    def rest(function: Callable, flag: str) -> dict:
        parameters = inspect.signature(function).parameters
        return {n: (p.default, p.annotation) for n, p in parameters.items() if n != flag}

    for name, flag in flagged.items():
        function = FUNCTIONS[name]
        overloads = typing.get_overloads(function)
        assert len(overloads) == 3, name
        for overload in overloads:
            assert rest(overload, flag) == rest(function, flag), name
        either = [inspect.signature(overload).return_annotation for overload in overloads]
        assert either[2] == either[0] | either[1] == inspect.signature(function).return_annotation
