"""The kernels of fast weights, as they ship."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.compile_report.case import CompileCase, others, shipped_ttt_configs
from benchmarks.compile_report.compiling import descriptor_type
from lact_kernels.core.newton_schulz import LACT, groups
from lact_kernels.triton.configs import ARCHITECTURES, TRITON, TTTConfig, kernel_of
from lact_kernels.triton.fast_weights import (
    activations,
    activations_bwd,
    end,
    newton_schulz,
    newton_schulz_kernels,
    products,
    start,
    update,
    update_bwd,
)
from lact_kernels.triton.fast_weights import newton_schulz_schedule as schedule
from lact_kernels.triton.fast_weights.layout import ALL_MATRICES, Dims

# Sizes that the tiles exceed, sizes of whole tiles, and the largest.
LONGEST = Dims(2048, 2048, 4096)
COMPILED_DIMS = (Dims(192, 192, 192), Dims(768, 768, 768), LONGEST)
ELONGATED = (Dims(192, 192, 320), LONGEST)  # for the Gram form of Newton-Schulz
MAX_TRITON_DIM = 1024  # of the kernels that have no rows in the table
LARGEST = Dims(MAX_TRITON_DIM, MAX_TRITON_DIM, MAX_TRITON_DIM)
# Kernels over rows keep whole rows in registers: the longest there are, of a common shape and of the largest.
ROW_DIMS = (LARGEST, Dims(1024, 1024, 4096), LONGEST)
W1_ALONE = (False, True, False)  # the only matrix that is trained


def compile_cases(arch: int) -> Iterator[CompileCase]:
    for cases in (_activations, _products, _start, _update, _update_bwd, _newton_schulz):
        yield from cases(arch)


def _activations(arch: int) -> Iterator[CompileCase]:
    packed = ("w1", "w2", "weight_strides")
    for name, cases, absent in (
        ("ttt_hidden", _cases, packed),
        ("ttt_hidden_given", _given_weights_cases, ()),
    ):
        yield from cases(
            name, activations.HIDDEN_KERNELS, arch, activations.activation_constexprs,
            tokens=("x", "w0", "acts"), described=_described_hidden,
            absent=("y", "y_strides", "lr_ptr", "table_ptr", *absent),
        )  # fmt: skip
    for name, cases, absent in (
        ("ttt_hidden_grad", _cases, packed),
        ("ttt_hidden_grad_given", _given_weights_cases, ()),
    ):
        yield from cases(
            name, activations.HIDDEN_KERNELS, arch, activations.activation_constexprs,
            tokens=("x", "y", "w0", "acts"), absent=("table_ptr", *absent), described=_described_hidden,
        )  # fmt: skip
    yield from _cases(
        "ttt_hidden_bwd", activations_bwd.HIDDEN_BWD_KERNELS, arch, activations.activation_constexprs,
        tokens=("k", "v", "w0", "dg0", "acts", "dacts"),
        absent=("w1", "w2", "dg1", "dg2", "table_ptr"), described=_described_hidden,
    )  # fmt: skip


def _described_hidden(dtype: torch.dtype, config: TTTConfig) -> dict[str, str]:
    """The types of what the kernels of activations take by descriptors."""
    rows, columns = config.rows_block, config.columns_block
    pair, middle = (
        descriptor_type(dtype, *columns, pair=True),
        descriptor_type(dtype, *columns[::-1]),
    )
    out = descriptor_type(dtype, config.block_m, config.block_n)
    return {
        **dict.fromkeys(("x", "y", "k", "v"), descriptor_type(dtype, *rows)),
        **{"w0": pair, "dg0": pair, "w1": middle, "dg1": middle, "acts": out, "dacts": out},
    }


def _products(arch: int) -> Iterator[CompileCase]:
    for name in ("ttt_outer", "ttt_outer_wide"):
        yield from _cases(
            name, products.OUTER_KERNELS, arch, products.outer_constexprs,
            tokens=("x", "y", "acts"), absent=("acts_right", "table_ptr"), described=_described_outer,
        )  # fmt: skip
    absent = ("w1", "w2", "second_w1", "second_w2", "table_ptr", "weight_strides")
    for name, to_values in itertools.product(("ttt_project", "ttt_project_wide"), (False, True)):
        for cases in (_cases, _given_weights_cases):
            yield from cases(
                name, products.PROJECT_KERNELS, arch,
                functools.partial(products.project_constexprs, to_values=to_values),
                tokens=("acts", "w0", "acts2", "second_w0", "out_ptr"),
                absent=absent if to_values else (*absent, "lr_ptr"), described=_described_project,
            )  # fmt: skip


def _described_outer(dtype: torch.dtype, config: TTTConfig) -> dict[str, str]:
    left = descriptor_type(dtype, config.block_k, config.block_m)
    right = descriptor_type(dtype, config.block_k, config.block_n)
    return {"x": right, "y": left, "acts": left, "acts_right": right}


def _described_project(dtype: torch.dtype, config: TTTConfig) -> dict[str, str]:
    """Of both directions: to keys blocks of w0 and w2, to values of w1."""
    rows, columns = config.rows_block, config.columns_block
    acts, middle = descriptor_type(dtype, *rows), descriptor_type(dtype, *columns)
    outer = descriptor_type(dtype, *columns[::-1])
    return {
        **{"acts": acts, "acts2": acts, "w0": outer, "w1": middle, "w2": outer},
        **{"second_w0": outer, "second_w1": middle, "second_w2": outer},
    }


def _start(arch: int) -> Iterator[CompileCase]:
    """Of new weights alone, and of all that a state has."""
    triples = ("given_ptr", "given_norms_ptr", "given_masters_ptr", "given_buffers_ptr")
    triples += ("out_ptr", "out_norms_ptr", "out_masters_ptr", "out_buffers_ptr")
    given = [f"given_{x}_ptr" for x in ("norms", "masters", "buffers")]
    given += [f"{x}_given_strides" for x in ("norms", "masters", "buffers")]
    out = ("out_norms_ptr", "out_masters_ptr", "out_buffers_ptr", "kept_ptr", "dbuffers_ptr")
    for name, kernel, of_states, more in (
        ("ttt_start", start._ttt_start_kernel, given, {}),
        ("ttt_start_bwd", start._ttt_start_bwd_kernel, out, {"PRENORM": True}),
    ):
        for variant, absent in (("", of_states), ("state", ())):
            for case in _row_cases(name, kernel, arch, ("order_ptr", *absent), variant, **more):
                pointers = {k: (v,) * 3 if k in triples else v for k, v in case.pointers.items()}
                yield replace(case, pointers=pointers)


def _update(arch: int) -> Iterator[CompileCase]:
    gradients = ("parts_ptr", "steps_ptr", "next_steps_ptr", "betas_ptr")
    orthogonal, squares = ("orthogonal_ptr",), ("squares_ptr",)
    for variant, absent in (
        ("", orthogonal + squares),
        ("to Muon", orthogonal),
        ("from Muon", gradients + squares),
        ("from Muon to momentum", ("parts_ptr", *squares)),
        ("without renorm", ("norms_ptr", *orthogonal, *squares)),
    ):
        for prenorm in (False, True) if variant in ("", "from Muon") else (False,):
            yield from _row_cases(
                "ttt_update", update._ttt_update_kernel, arch, absent,
                " ".join(filter(None, [variant, "pre-norm" * prenorm])), PRENORM=prenorm,
            )  # fmt: skip
    yield from _row_cases("ttt_end", end._ttt_end_kernel, arch, ("order_ptr",))
    yield from _cases(
        "ttt_mean_momentum", {TRITON: update._ttt_mean_momentum_kernel}, arch,
        lambda *_: {"BLOCK": update.TOKEN_BLOCK},
        absent=("table_ptr",),
        fixed=(torch.float32, TTTConfig(1, update.TOKEN_BLOCK, 1, update.NUM_WARPS, 3)),
    )  # fmt: skip


def _update_bwd(arch: int) -> Iterator[CompileCase]:
    apply, muon = ("apply_ptr",), ("next_steps_ptr", "dsquares_ptr", "squares_ptr")
    kept, late = ("kept_ptr",), ("dnext_steps_ptr",)
    momentum = ("betas_ptr", "steps_ptr", "dbuffers_ptr", "dbetas_ptr", "dbuffers_squares_ptr")
    iteration = (
        "dx_ptr", "inner_ptr", "dx_squares_ptr", "dbuffers_squares_ptr", "units_ptr",
    )  # fmt: skip
    to_muon = (*iteration, "dsteps_ptr")
    for variant, absent in (
        ("", muon + iteration + kept + late),
        ("to Muon", (*to_muon, *kept, *late, *momentum)),
        ("from Muon", apply + kept + late),
        ("to momentum to Muon", to_muon + kept),
        ("without renorm", (*muon, *iteration, *kept, *late, "norms_ptr")),
        ("w1 alone", muon + iteration + late),
    ):
        for prenorm in (False, True) if variant in ("", "to Muon") else (False,):
            yield from _row_cases(
                "ttt_update_bwd", update_bwd._ttt_update_bwd_kernel, arch, absent,
                " ".join(filter(None, [variant, "pre-norm" * prenorm])),
                PRENORM=prenorm,
            )  # fmt: skip
    yield from _cases(
        "ttt_rates_bwd", {TRITON: update_bwd._ttt_rates_bwd_kernel}, arch,
        lambda dims, _: update_bwd.rates_constexprs(dims), absent=("table_ptr",),
        fixed=(torch.float32, TTTConfig(1, update_bwd.TOKEN_BLOCK, 1, update_bwd.NUM_WARPS, 3)),
        dims=(LARGEST, LONGEST),
    )  # fmt: skip


def _newton_schulz(arch: int) -> Iterator[CompileCase]:
    sizes = ("dbuffers_ptr", "result_squares_ptr", "dbuffers_squares_ptr")
    gradient = ("dx_ptr", "dsquares_ptr", "inner_ptr", *sizes)
    integers = dict.fromkeys(("entries_ptr", "counters_ptr"), torch.int32)
    for variant, absent in (
        ("forward", (*gradient, "exact_ptr")),
        ("backward", ("exact_ptr",)),
        ("forward Gram", gradient),
        ("backward Gram", ()),
    ):
        for case in _cases(
            "newton_schulz_gram" if "Gram" in variant else "newton_schulz",
            newton_schulz_kernels.KERNELS, arch,
            functools.partial(_iteration_constexprs, "backward" in variant),
            tokens=("arrays_ptr",), absent=absent, variant=variant,
            dims=ELONGATED if "Gram" in variant else COMPILED_DIMS,
        ):  # fmt: skip
            yield replace(case, pointers=case.pointers | integers)


def _iteration_constexprs(backward: bool, dims: Dims, config: TTTConfig) -> dict[str, Any]:
    runs = groups(LACT.coefficients, dims.shapes, torch.float16)
    operations = (schedule.backward if backward else schedule.forward)(runs)
    entries = newton_schulz.Tables(operations, dims, config.block_m).entries
    return newton_schulz.iteration_constexprs(dims, config, len(entries))


def _given_weights_cases(*arguments: Any, **keywords: Any) -> Iterator[CompileCase]:
    """Of `_cases` those of the first sizes, with weights where they lie and without what only a scan has."""
    of_scans = (
        "table_ptr", "lr_ptr", "acts2", "second_w0", "second_w1", "second_w2", "units_ptr",
    )  # fmt: skip
    for case in _cases(*arguments, **keywords):
        if case.shape == "x".join(map(str, COMPILED_DIMS[0].sizes)):
            pointers = {k: v for k, v in case.pointers.items() if k not in of_scans}
            constants = case.constexprs | {k: None for k in of_scans if k in case.kernel.arg_names}
            weight = pointers["w0"]
            if case.config.descriptors:
                weight = weight.replace("[1, 1, 2, ", "[1, 1, ")
                pointers |= {"w0": weight, "w2": weight}
            else:
                pointers |= dict.fromkeys(("w0", "w1", "w2"), weight)
                constants.pop("weight_strides", None)
            constants = {k: v for k, v in constants.items() if k not in ("w1", "w2")}
            yield replace(
                case, shape=f"{case.shape} given", constexprs=constants, demanding=True,
                pointers=pointers,
            )  # fmt: skip


def _row_cases(
    name: str,
    kernel: Any,
    arch: int,
    absent: tuple[str, ...],
    variant: str = "",
    **more: int,
) -> Iterator[CompileCase]:
    """One specialisation of a kernel over rows, at the longest rows."""
    matrices = W1_ALONE if variant == "w1 alone" else ALL_MATRICES

    def constexprs(dims: Dims, config: TTTConfig) -> dict:
        total = {"BLOCK_TOTAL": update_bwd.total_block(dims)}
        total = total if "BLOCK_TOTAL" in kernel.arg_names else {}
        programs = update.row_programs(dims.having(*matrices), dims)
        return programs[1] | total | more

    for sizes in ROW_DIMS:
        config = TTTConfig(*update.row_block(sizes), 1, update.row_warps(sizes), 3)
        yield from _cases(
            name, {TRITON: kernel}, arch, constexprs, ("weights_ptr", "dsteps_ptr"), absent,
            (torch.bfloat16, config), variant, (sizes,),
        )  # fmt: skip


def _cases(
    name: str,
    kernels: Mapping[str, Any],
    arch: int,
    constexprs: Callable[[Dims, TTTConfig], dict],
    tokens: tuple[str, ...] = (),  # pointers in the tokens' dtype
    absent: tuple[str, ...] = (),  # arguments that are None
    fixed: tuple[torch.dtype, TTTConfig] | None = None,  # of a kernel that has no rows in the table
    variant: str = "",
    dims: tuple[
        Dims, ...
    ] = (),  # instead of COMPILED_DIMS, or with a fixed configuration of LARGEST
    described: Callable[[torch.dtype, TTTConfig], dict[str, str]]
    | None = None,  # types of descriptors
) -> Iterator[CompileCase]:
    """One specialisation of one kernel, with every configuration of its, for the compile report.

    Pointers are to float32, but for `tokens`. A kernel with a fixed configuration is compiled at the
    largest. One that reads packed sequences from a table is compiled with one as well, at the first.
    """
    configs, sizes = shipped_ttt_configs(name, arch), dims or COMPILED_DIMS
    if fixed is not None:
        configs = [fixed] if arch in ARCHITECTURES else []
        sizes = dims or (LARGEST,)
    for dtype, config in configs:
        kernel = kernel_of(kernels, config)
        pointers = {
            argument: dtype if argument in tokens else torch.float32
            for argument in kernel.arg_names
            if (argument in tokens or argument.endswith("_ptr"))
            and argument not in (*absent, "table_ptr")
        }
        missing = absent
        if config.descriptors:
            types = {k: v for k, v in described(dtype, config).items() if k in kernel.arg_names}
            missing = _absent_where_described(kernel, absent, types)
            pointers |= {k: v for k, v in types.items() if k not in missing}
        for size in sizes:
            case = CompileCase(
                name=name,
                kernel=kernel,
                arch=arch,
                dtype=dtype,
                shape=" ".join(filter(None, ["x".join(map(str, size.sizes)), variant])),
                config=config,
                pointers=pointers,
                constexprs={**constexprs(size, config), **dict.fromkeys(missing)},
                also=others(arch),
                demanding=size == sizes[0] and (config.descriptors or "table_ptr" not in absent),
            )
            yield case
            if "table_ptr" in absent and size == sizes[0] and not config.descriptors:
                constants = {k: v for k, v in case.constexprs.items() if k != "table_ptr"}
                packed = pointers | {"table_ptr": torch.int32}
                yield replace(
                    case, shape=f"{case.shape} packed", pointers=packed, constexprs=constants,
                    demanding=True,
                )  # fmt: skip


def _absent_where_described(
    kernel: Any, absent: tuple[str, ...], types: Mapping[str, str]
) -> tuple[str, ...]:
    """Tensors that are there by descriptors have those of all matrices, and no strides."""
    weights = ("w1", "w2", "dg1", "dg2", "acts_right", "second_w0", "second_w1", "second_w2")
    by_pairs = ("w2", "dg2") if "w2" not in types else ()
    kept = (x for x in absent if x not in weights or x in by_pairs)
    strides = (x for x in kernel.arg_names if x.endswith("_strides") and x != "out_strides")
    return tuple(dict.fromkeys((*kept, *strides)))
