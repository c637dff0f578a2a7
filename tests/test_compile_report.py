"""Every shipped kernel configuration compiles well for every architecture, without a GPU.

What the report reads from machine code and ptxas is tested in tests/emulated/test_reading_compiled_code.py.
"""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("compile_report")
WITHOUT_PRODUCTS = (
    "ttt_update",
    "ttt_update_bwd",
    "ttt_mean_momentum",
    "ttt_rates_bwd",
    "ttt_start",
    "ttt_start_bwd",
    "ttt_end",
    "window_attn_combine",
    "silu_l2norm_rope_fwd",
    "silu_l2norm_rope_bwd",
    "rms_norm_scale_add_fwd",
    "rms_norm_scale_add_bwd",
)
ATTENTION = {"window_attn_fwd", "window_attn_bwd_dq", "window_attn_bwd_dkv"}
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def run_report(*arguments, **variables):
    """The command in a fresh process: in this one the interpreter has replaced the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "benchmarks.compile_report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One dict per configuration, compiled once for all tests of this module."""
    path = tmp_path_factory.mktemp("report") / "rows.jsonl"
    result = run_report("--demanding", "--json", path)
    assert result.returncode in (0, 1), result.stderr  # 1: a test of this module says of which row
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(row):
    return {k: row[k] for k in ("kernel", "arch", "dtype", "shape", "config", "registers")}


def test_every_configuration_is_compiled(rows):
    """With what demands most; float32 once, as its rows are everybody's; those for small memory twice."""
    from lact_kernels.triton.configs import _TABLE, _TTT_TABLE, ALL, DESCRIBED, SMALL

    def config_of(row):
        return tuple(row["config"].values())

    compiled_for = {ALL: (80,), SMALL: (86, 120), DESCRIBED: (90,)}
    shipped = {
        (name.removesuffix("_softcap"), arch, width, dataclasses.astuple(config))
        for (name, key, width), row in _TABLE.items()
        for arch in compiled_for.get(key, (key,))
        for config in row.values()
    } | {
        (name, arch, width, dataclasses.astuple(config))
        for (name, key, width), config in _TTT_TABLE.items()
        for arch in compiled_for.get(key, (key,))
    }
    widths = {"bfloat16": 16, "float16": 16, "float32": 32}
    compiled = {
        (r["kernel"], r["arch"], widths[r["dtype"]], config_of(r))
        for r in rows
        if r["kernel"] not in WITHOUT_PRODUCTS
    }
    assert compiled == shipped
    for kernel in WITHOUT_PRODUCTS:
        assert {r["arch"] for r in rows if r["kernel"] == kernel} == {80, 90, 100}


def test_fast_weight_kernels_are_compiled_in_every_variant(rows):
    shapes = {}
    for row in rows:
        shapes.setdefault((row["kernel"], row["arch"]), set()).add(row["shape"])
    for arch in (80, 90, 100):
        for kernel in (
            "ttt_hidden",
            "ttt_hidden_grad",
            "ttt_hidden_bwd",
            "ttt_outer",
            "ttt_project",
        ):
            assert "192x192x192 packed" in shapes[kernel, arch]
        for kernel in ("ttt_hidden_given", "ttt_hidden_grad_given", "ttt_project"):
            assert "192x192x192 given" in shapes[kernel, arch]
        for kernel in ("ttt_rates_bwd", "ttt_mean_momentum"):
            assert "1024x1024x1024 packed" in shapes[kernel, arch]
        update = ("", " pre-norm", " to Muon", " from Muon", " without renorm")
        sizes = "1024x1024x1024", "1024x1024x4096", "2048x2048x4096"
        for kernel, *own in (
            ("ttt_update", " from Muon pre-norm", " from Muon to momentum"),
            ("ttt_update_bwd", " to Muon pre-norm", " to momentum to Muon", " w1 alone"),
        ):
            assert shapes[kernel, arch] == {f"{x}{how}" for x in sizes for how in (*update, *own)}


def test_ptxas_warns_of_nothing(rows):
    """Of serialised matrix instructions (C7515, C7511) above all."""
    warned = [describe(row) | {"warnings": row["warnings"]} for row in rows if row["warnings"]]
    assert not warned


def test_no_product_is_computed_twice(rows):
    known = [row for row in rows if row["product_repeats"] is not None]
    assert {row["arch"] for row in known} == {80, 86, 90, 100, 120}
    repeated = [describe(row) for row in known if row["product_repeats"] != 1]
    assert not repeated


def test_products_are_not_waited_for_one_by_one(rows):
    """A product of tiles is several instructions, and takes one wait at most."""
    loops = [(row, x) for row in rows for x in row["matrix_loops"] if x["products"]]
    assert {row["arch"] for row, _ in loops} == {90, 100}
    assert not [describe(row) for row, x in loops if x["waits"] > x["products"]]


def test_a_third_stage_is_a_tile_on_its_way(rows):
    loops = [
        (row, x) for row in rows if row["config"]["num_stages"] >= 3 for x in row["matrix_loops"]
    ]
    assert len(loops) > 50
    assert not [describe(row) for row, x in loops if not x["copies_in_flight"]]


def test_attention_on_hopper_waits_for_nothing_at_once(rows):
    """At a loop's beginning a tile is on its way. Half of the exponentials run beside a product, where
    there is another product to run beside: not with dv alone, nor where pointers take the registers. With a
    soft cap there are three times as many special functions, and a quarter of them does.
    """
    loops = [
        (row, x)
        for row in rows
        if (row["arch"], row["dtype"]) == (90, "bfloat16") and row["kernel"] in ATTENTION
        for x in row["matrix_loops"]
    ]
    assert {row["kernel"] for row, _ in loops} == ATTENTION
    assert not [describe(row) for row, x in loops if not x["copies_in_flight"]]
    beside = [(row, x) for row, x in loops if x["products"] >= 3 or row["config"]["descriptors"]]
    assert {row["kernel"] for row, _ in beside} == ATTENTION
    parts = {True: 4, False: 2}  # by whether there is a soft cap
    assert {"capped" in row["shape"] for row, _ in beside} == set(parts)
    few = [
        describe(row)
        for row, x in beside
        if parts["capped" in row["shape"]] * x["overlapped"] < x["special_functions"]
    ]
    assert not few


def test_the_products_of_an_update_share_a_loop(rows):
    """Those of its activations, and on Hopper by descriptors those of its backward, each waited for once."""
    loops = {}
    for row in rows:
        if row["dtype"] != "bfloat16":
            continue
        by_descriptors = row["config"].get("descriptors", False)
        if row["kernel"].startswith("ttt_hidden_grad") or (
            row["kernel"] == "ttt_hidden_bwd" and by_descriptors
        ):
            loops.setdefault((row["kernel"], row["arch"], by_descriptors), []).append(
                [(x["products"], x["waits"]) for x in row["matrix_loops"]]
            )
    assert all(len(in_row) == 1 for in_rows in loops.values() for in_row in in_rows), loops
    # w0 and w2, and their gradients, are one factor each.
    assert {tuple(x) for x in loops["ttt_hidden_grad", 90, True]} == {((2, 1),)}
    assert {tuple(x) for x in loops["ttt_hidden_grad", 90, False]} == {((3, 1),)}
    assert {tuple(x) for x in loops["ttt_hidden_bwd", 90, True]} == {((4, 1),)}


def test_nothing_spills(rows):
    spilling = [describe(row) for row in rows if row["spilled_bytes"]]
    assert not spilling


def test_shared_memory_is_within_limits(rows):
    """Those of the smallest architecture that takes the row: sm_80's rows serve sm_86, sm_89 and sm_120."""
    assert {row["shared_limit"] for row in rows} == {x * 1024 for x in (99, 163, 227)}
    oversized = [describe(row) for row in rows if row["shared_bytes"] > row["shared_limit"]]
    assert not oversized
    assert all(row["programs_per_multiprocessor"] >= 1 for row in rows)


def test_sixteen_bit_products_use_matrix_instructions(rows):
    for row in rows:
        if row["dtype"] != "float32" and row["kernel"] not in WITHOUT_PRODUCTS:
            # Tiles of 16 rows are too small for the larger instructions.
            narrow = row["kernel"] == "window_attn_with_kvcache"
            expected = "HMMA" if narrow else MATRIX_INSTRUCTION[row["arch"]]
            assert list(row["matrix_instructions"]) == [expected], describe(row)


def test_interior_tiles_carry_no_mask(rows):
    """With pointers the forward has two loops: the one over the edges masks each element, the other none.

    Other kernels have one loop with a branch around the mask. On the way around it they compare only what
    the loop over the interior does, and whether the rows that they load exist.
    """
    rows = [r for r in rows if r["kernel"] in ATTENTION and r["dtype"] == "bfloat16"]
    assert {(r["kernel"], r["arch"]) for r in rows} == set(product(ATTENTION, MATRIX_INSTRUCTION))
    for row in rows:
        tile = row["config"]["block_m"] * row["config"]["block_n"]
        elements = tile // (32 * row["config"]["num_warps"])  # of each thread
        if row["kernel"] == "window_attn_fwd" and not row["config"]["descriptors"]:
            edges, interior = row["matrix_loops"]
            assert interior["selects"] == 0 and interior["compares"] <= 16, describe(row)
            interior_compares = interior["compares"]
        else:
            (edges,) = row["matrix_loops"]
            interior_compares = edges["least_compares"]
            assert edges["least_selects"] == 0 and interior_compares <= 32, describe(row)
        assert edges["selects"] >= elements, describe(row)
        assert edges["compares"] - interior_compares >= elements, describe(row)


def test_interpreter_is_refused_with_a_reason():
    result = run_report("--arch", 90, TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr and "fresh process" in result.stderr
