"""What is read from GPU programs, and what compiling for a GPU says where it cannot."""

import importlib.util

import jax
import pytest

from benchmarks import compiling, gpu
from benchmarks.__main__ import main

PROGRAM = """HloModule f, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8] get-tuple-element(%p), index=1
  %y = bf16[4,8] fusion(%x), kind=kLoop, calls=%negated
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %y)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  ROOT %c = pred[] constant(true)
}

%negated (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8] parameter(0)
  ROOT %n = bf16[4,8] negate(%p)
}

%looked_up (table: f32[1000,8], ids: s32[4]) -> bf16[4,8] {
  %table = f32[1000,8] parameter(0)
  %ids = s32[4] parameter(1)
  %g = f32[4,8] gather(%table, %ids), offset_dims={1}
  ROOT %c = bf16[4,8] convert(%g)
}

ENTRY %main (table: f32[1000,8], ids: s32[4], w: bf16[8,16]) -> bf16[4,16] {
  %table = f32[1000,8] parameter(0)
  %ids = s32[4] parameter(1)
  %w = bf16[8,16] parameter(2)
  %rows = bf16[4,8] fusion(%table, %ids), kind=kLoop, calls=%looked_up
  %zero = s32[] constant(0)
  %t = (s32[], bf16[4,8]) tuple(%zero, %rows)
  %l = (s32[], bf16[4,8]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %x = bf16[4,8] get-tuple-element(%l), index=1
  %m = (bf16[4,16], s8[1000]) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %r = bf16[4,16] get-tuple-element(%m), index=0
}
"""


def test_kernels_of_a_program() -> None:
    looked_up, product, negated = gpu.read_kernels(PROGRAM)
    # Of a table that is looked up, four rows alone are read.
    assert looked_up == gpu.Kernel(bytes=4 * 4 + 4 * 8 * 4 + 4 * 8 * 2, flops=0, dtype="", times=1)
    # What cuBLAS has for itself is not counted.
    assert product.bytes == 2 * (4 * 8 + 8 * 16 + 4 * 16)
    assert (product.flops, product.dtype, product.times) == (2 * 4 * 8 * 16, "bf16", 1)
    assert negated == gpu.Kernel(bytes=2 * 4 * 8 * 2, flops=0, dtype="", times=3)


def test_chips_that_a_suite_is_not_for(capsys) -> None:
    assert main(["--suite", "gpu", "--quick", "--chip", "v5e"]) == 2
    assert "the suite `gpu` is compiled for h100." in capsys.readouterr().err
    assert main(["--suite", "layer", "--quick", "--chip", "h100"]) == 2
    assert "the suite `layer` is run on this machine alone." in capsys.readouterr().err


installed = importlib.util.find_spec("jax_cuda13_plugin") is not None


@pytest.mark.skipif(installed, reason="the GPU compiler is installed")
def test_without_the_gpu_compiler() -> None:
    with pytest.raises(ValueError, match=r"circflax\[gpu-compiler\]"):
        compiling.compile_for("h100", lambda x: x, [jax.ShapeDtypeStruct((8,), float)])


@pytest.mark.skipif(not installed, reason="the GPU compiler is not installed")
def test_layers_are_compiled(capsys, monkeypatch) -> None:
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    assert main(["--suite", "gpu", "--quick", "--chip", "h100"]) == 0
    assert "| c3a dense* " in capsys.readouterr().out
