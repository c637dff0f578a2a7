"""Every shipped kernel configuration compiles well for every architecture, without a GPU."""

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
    "newton_schulz_inner",
    "newton_schulz_normalize",
    "branch_qkv_fwd",
    "branch_qkv_bwd",
    "branch_sum_fwd",
    "branch_sum_bwd",
)
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def run_report(*arguments, **variables):
    """The command in a fresh process: in this one the interpreter has replaced the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "benchmarks.compile_report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One dict per configuration, compiled once for all tests of this module."""
    path = tmp_path_factory.mktemp("report") / "rows.jsonl"
    result = run_report("--json", path)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(row):
    return {k: row[k] for k in ("kernel", "arch", "dtype", "shape", "registers")}


def test_every_configuration_is_compiled(rows):
    from lact_kernels.triton.configs import _TABLE, _TTT_TABLE

    attention = {
        (*key, f"D{size}{packed}")
        for key, row in _TABLE.items()
        for size in row
        for packed in ("", " packed")
        if not (packed and "kvcache" in key[0])
    }
    widths = {"bfloat16": 16, "float16": 16, "float32": 32}
    compiled = {(r["kernel"], r["arch"], widths[r["dtype"]], r["shape"]) for r in rows}
    assert {x for x in compiled if x[0].startswith("window_attn")} == attention
    fast_weights = {x[:3] for x in compiled if not x[0].startswith("window_attn")}
    assert {x for x in fast_weights if x[0] not in WITHOUT_PRODUCTS} == set(_TTT_TABLE)
    for kernel in WITHOUT_PRODUCTS:
        assert {arch for name, arch, _ in fast_weights if name == kernel} == {80, 90, 100}


def test_nothing_spills(rows):
    spilling = [describe(row) for row in rows if row["spilled_bytes"]]
    assert not spilling


def test_shared_memory_is_within_limits(rows):
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
    """Of the two loops the one over the edges masks each element, the one over the interior none."""
    names = {"window_attn_fwd", "window_attn_bwd_dq", "window_attn_bwd_dkv"}
    rows = [r for r in rows if r["kernel"] in names and r["dtype"] == "bfloat16"]
    assert {(r["kernel"], r["arch"]) for r in rows} == set(product(names, MATRIX_INSTRUCTION))
    for row in rows:
        edges, interior = row["matrix_loops"]
        tile = row["config"]["block_m"] * row["config"]["block_n"]
        elements = tile // (32 * row["config"]["num_warps"])  # of each thread
        assert edges["selects"] >= elements and interior["selects"] == 0, describe(row)
        assert edges["compares"] - interior["compares"] >= elements, describe(row)
        assert interior["compares"] <= 16, describe(row)


def test_interpreter_is_refused_with_a_reason():
    result = run_report("--arch", 90, TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr and "fresh process" in result.stderr
