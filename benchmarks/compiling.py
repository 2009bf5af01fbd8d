"""Compiling for chips that are not there, TPUs and a GPU: nothing is executed."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from benchmarks import layers, steps
from benchmarks.results import Record
from circflax import ops
from train.plan import topology

# What TPU programs are compiled for, by kind of chip: one chip alone.
TPUS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1"}
# GPUs as XLA asks for them: https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config
# (h100_sxm). The versions are those of the libraries that `jax[cuda13]` installs.
_GPUS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 10 }
        runtime_version { major: 13 }
        gpu_device_info {
          cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
          clock_rate_ghz: 1.98
          core_count: 132
          fpus_per_core: 128
          memory_bandwidth: 3352320000000
          device_memory_size: 84942979072
          l2_cache_size: 52428800
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }
    """
}
# Without a GPU there is nothing to try algorithms on: matrix products are left to cuBLAS.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compile_for(
    chip: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Compiled, float]:
    """The function compiled for one chip of a kind, from shapes, and the seconds that this took.

    Raises:
        ValueError: if the compiler for that kind is not installed.
    """
    whole = jax.sharding.SingleDeviceSharding(_find_device(chip))
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments
    )
    # A step that is jitted already keeps its donations.
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=_GPU_OPTIONS if chip in _GPUS else None)
    return compiled, time.perf_counter() - start


class Program(NamedTuple):
    """What is compiled of one case.

    Attributes:
        function: of the program.
        arguments: shapes of its arguments.
        chosen: whether the library would choose its strategy; no step has one.
    """

    function: Callable[..., Any]
    arguments: Sequence[Any]
    chosen: bool


def programs(case: Record, platform: str) -> dict[str, Program]:
    """The training steps or layers of one case, by name."""
    if "model" in case:
        made = {name: steps.make_step(case, each) for name, each in steps.adapters().items()}
        return {name: Program(step.run, step.arguments, False) for name, step in made.items()}
    tokens, features = case["tokens"], case["features"]
    x = jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((features, features), jnp.bfloat16)
    chosen = ops.choose_form(layers.product_of(case, platform)).strategy
    return {"frozen": Program(layers.frozen_gradient, (kernel, x, x), False)} | {
        name: Program(partial(layers.gradient, update), (shapes, x, x), name.endswith(f" {chosen}"))
        for name, update, shapes in layers.updates(case, platform)
    }


def _find_device(chip: str) -> jax.Device:
    if chip in TPUS:
        (device,) = topology.find_topology(TPUS[chip]).devices
        return device
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_GPUS[chip], topology="1x1x1"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            "the GPU compiler does not start; `pip install 'circflax[gpu-compiler]'` brings it"
            f" ({str(error).splitlines()[0]})."
        ) from None
    (device,) = found.devices
    return device
