"""Triton's interpreter without work that it does over and over.

Where a kernel calls a function, the interpreter goes through all of `triton.language` again to put its own
functions in place of what it finds, which is a third of the time of a kernel of many functions. What a
launch has replaced stays so until it ends, and what is replaced follows from the globals of a function: once
for each module and launch is enough.
"""

import functools
import importlib.util
import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def replacing_once():
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set()  # in this launch: the globals of functions, by id

    def replace_once(fn):
        if id(fn.__globals__) in replaced:
            return None  # what undoes it, which only the first one of a launch is asked for
        replaced.add(id(fn.__globals__))
        return replace(fn)

    @functools.wraps(launch)
    def launched(*args, **kwargs):
        replaced.clear()
        try:
            return launch(*args, **kwargs)
        finally:
            replaced.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
