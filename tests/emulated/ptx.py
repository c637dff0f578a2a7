"""Kernels written in PTX by hand, for what no Triton kernel does on its own."""

import textwrap


def kernel(body: str, num_parameters: int = 1, num_threads: int = 32) -> str:
    """A kernel `k` with parameters `k_param_0`, ... of 64 bits, and registers %p, %rs, %r and %rd."""
    parameters = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(num_parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{parameters}
)
.reqntid {num_threads}
{{
\t.reg .pred %p<20>;
\t.reg .b16 %rs<20>;
\t.reg .b32 %r<80>;
\t.reg .b64 %rd<40>;
{textwrap.dedent(body)}
\tret;
}}
"""
