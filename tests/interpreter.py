"""Triton's interpreter without work that it does over and over, which is more than half of its time.

Nothing changes of what a kernel computes, nor of what is checked.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    with faster_interpreter():
        yield


@contextlib.contextmanager
def faster_interpreter():
    """In a process that interprets kernels; in others nothing changes."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
            _replace_once(patch)
            _compute_no_overflow(patch)
            _describe_once(patch)
        yield


def _replace_once(patch):
    """Functions of `triton.language`, which the interpreter puts its own in place of.

    It goes through all of them again where a kernel calls a function. What a launch has replaced stays so
    until it ends, and what is replaced follows from the globals of a function: once for each module and
    launch is enough.
    """
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

    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _compute_no_overflow(patch):
    """Each sum and product of integers is computed again in 64 bits, to see whether 32 were enough.

    The answer is dropped, as an assertion of the device is one only with the option `debug`.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    assert not builder.options.debug
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", options)


def _describe_once(patch):
    """Shape and dtype, of which every tensor has objects of its own, by the name of its type."""
    from triton.language import core
    from triton.runtime import interpreter

    types, tensors, dtypes = {}, {}, {}
    init_type, init_tensor = core.block_type.__init__, core.tensor.__init__
    numpy_dtype = interpreter._get_np_dtype

    def describe_type(self, element_ty, shape):
        key = element_ty.name, *(getattr(x, "value", x) for x in shape)
        if key not in types:
            init_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def describe_tensor(self, handle, type):
        if type.name not in tensors:
            init_tensor(self, handle, type)
            own = ("handle", "type")
            tensors[type.name] = {k: v for k, v in vars(self).items() if k not in own}
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def describe_dtype(type):
        if type.name not in dtypes:
            dtypes[type.name] = numpy_dtype(type)
        return dtypes[type.name]

    patch.setattr(core.block_type, "__init__", describe_type)
    patch.setattr(core.tensor, "__init__", describe_tensor)
    patch.setattr(interpreter, "_get_np_dtype", describe_dtype)
