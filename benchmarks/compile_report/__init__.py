"""What the compiler makes of every shipped kernel configuration, without a GPU.

```
python -m benchmarks.compile_report [--arch 80 86 90 100 120] [--pass NAME ...] [--demanding] [--json FILE]
```

What ships is in `window_attn_cases`, `fast_weight_cases` and `layer_cases`. Triton compiles a case for its
architecture, and what counts is read from what it leaves behind: registers per thread and warnings from
ptxas' log, shared memory from its metadata, and from the machine code, by the `nvdisasm` in Triton's
package, spilled bytes (the widths of all loads from and stores to local memory), matrix instructions and
the loops around them (`loops`). Programs per multiprocessor are those that registers and memory allow;
`products` says whether matrix products are computed more than once.

Needs a process in which `TRITON_INTERPRET` is not set, because the interpreter replaces the compiler when
Triton is imported. Rows are kept in .compile-report/, and compiled again when a kernel, a configuration,
Triton or this package changes.

Exit status: 0, 1 when a kernel spills, exceeds its shared memory, computes products more than once or is
warned of, 2 for bad arguments and where nothing can be compiled.
"""
