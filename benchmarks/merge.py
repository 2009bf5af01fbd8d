"""Merging adapters into a model's kernels, against copying them and writing them to a file."""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import circflax as cf
from benchmarks.results import Record, Results, by_case, markdown_table, milliseconds
from train.timing import time_interleaved

FILE = "write to a file and read it"


def run(results: Results, suite: str, quick: bool, rounds: int) -> None:
    """Measures merging layers of LLaMA-2-7B, in bfloat16, one after the other."""
    shapes = [(512, 512)] if quick else [(4096, 4096), (4096, 11008)]
    cases = [{"in": shape[0], "out": shape[1], "dtype": "bfloat16"} for shape in shapes]
    for case in results.missing(suite, cases):
        kernel = jnp.ones((case["in"], case["out"]), jnp.dtype(case["dtype"]))
        functions: dict[str, Callable[[], None]] = {
            "copy": partial(_copy, kernel),
            FILE: partial(_write_and_read, np.asarray(kernel)),
        }
        for method in (cf.LoRA(r=8), cf.CDVFT(), cf.C3A(b=256), cf.BCA(p=256)):
            params = method.init(jax.random.key(0), *kernel.shape)
            functions[str(method)] = partial(_merge, method, params, kernel)
        timings = time_interleaved(functions, rounds=rounds, budget=20.0)
        results.add(suite, case, {name: t._asdict() for name, t in timings.items()})


def _copy(kernel: jax.Array) -> None:
    jax.block_until_ready(jnp.copy(kernel))


def _write_and_read(kernel: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        file.write(kernel.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.read()


def _merge(method: cf.methods.Method, params: cf.methods.Params, kernel: jax.Array) -> None:
    jax.block_until_ready(_merged(method, params, kernel))


@partial(jax.jit, static_argnums=0)
def _merged(method: cf.methods.Method, params: cf.methods.Params, kernel: jax.Array) -> jax.Array:
    return method.merge(params, kernel.astype(jnp.float32)).astype(kernel.dtype)


def table(records: Sequence[Record]) -> str:
    """Times of one kernel, and how they compare with copying it and with a file of it."""
    sections, header = [], ["merge", "ms", "/ copy", "/ file"]
    for case, of in by_case(records):
        rows = [
            [
                name,
                milliseconds(r["median"]),
                f"{r['median'] / of['copy']['median']:.2f}",
                f"{r['median'] / of[FILE]['median']:.2f}",
            ]
            for name, r in of.items()
        ]
        title = f"{case['in']} × {case['out']}, {case['dtype']}"
        sections.append(f"{title}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(sections)
