"""`python -m benchmarks --suite NAME [--quick] --json FILE`: time and memory, side by side."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = ("layer", "step", "throughput", "growth", "memory", "presets", "tpu", "gpu", "merge")
# What suites can be compiled for instead of being run here.
CHIPS = {"memory": ("v5e", "v5p", "h100"), "gpu": ("h100",)}

# Memory that a program has used stays with the process, as within one long program; otherwise the
# kernel hands out zeroed pages again in each call, which costs more than the smaller programs do.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one suite and prints its table.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0, or 2 if the arguments do not fit the machine.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--quick", action="store_true", help="small cases: a look, no claim")
    parser.add_argument("--json", type=Path, help="file for the results; goes on where it ended")
    parser.add_argument("--plots", type=Path, help="directory for the plots of `growth`")
    parser.add_argument(
        "--chip",
        choices=CHIPS["memory"],
        help="compile `memory` or `gpu` for a chip that is not there, instead of running here",
    )
    arguments = parser.parse_args(argv)
    chips = CHIPS.get(arguments.suite, ())
    if arguments.chip not in (None, *chips):
        there = f"compiled for {', '.join(chips)}" if chips else "run on this machine alone"
        print(f"error: the suite `{arguments.suite}` is {there}.", file=sys.stderr)
        return 2
    if arguments.suite in ("tpu", "presets") or arguments.chip:
        from train.plan.topology import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        # JAX's CUDA plugin starts without a driver then.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    elif arguments.suite != "gpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    import jax

    from benchmarks import growth, layers, memory, merge, steps, throughput
    from benchmarks.results import Results

    results = Results(arguments.json)
    suite, quick = arguments.suite, arguments.quick
    rounds = 3 if quick else 7
    print("; ".join(f"{key} {value}" for key, value in results.machine.items()), "\n")
    match suite:
        case "layer":
            layers.run(results, suite, layers.grid(quick), rounds)
            print(layers.table(results.of(suite)))
        case "step":
            steps.run(results, suite, steps.grid(quick), rounds)
            print(steps.table(results.of(suite)))
        case "throughput":
            throughput.run(results, suite, quick, rounds)
            print(throughput.table(results.of(suite)))
        case "growth":
            growth.run(results, suite, quick, rounds)
            print(growth.table(results.of(suite)))
            if arguments.plots:
                for path in growth.plot(results.of(suite), arguments.plots):
                    print(path)
        case "merge":
            merge.run(results, suite, quick, rounds)
            print(merge.table(results.of(suite)))
        case "memory":
            memory.run(results, suite, arguments.chip, quick)
            print(memory.table(results.of(suite)))
        case "presets":
            from benchmarks import presets

            presets.run(results, suite, quick)
            print(presets.table(results.of(suite)))
        case "tpu":
            from benchmarks import tpu

            tpu.run(results, suite, quick)
            print(tpu.table(results.of(suite)))
        case "gpu" if arguments.chip:
            from benchmarks import gpu

            gpu.run(results, f"{suite} compiled", arguments.chip, quick)
            print(gpu.table(results.of(f"{suite} compiled")))
        case "gpu":
            if jax.default_backend() != "gpu":
                raise ValueError(
                    "the suite `gpu` needs a GPU that JAX can use (`pip install jax[cuda12]`)."
                )
            layers.run(results, suite, layers.gpu_grid(quick), rounds)
            print(layers.table(results.of(suite)), "\n")
            steps.run(results, f"{suite} step", steps.grid(quick, "bfloat16"), rounds)
            print(steps.table(results.of(f"{suite} step")))


if __name__ == "__main__":
    if _ALLOCATOR.items() - os.environ.items():
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks", *sys.argv[1:]],
            {**os.environ, **_ALLOCATOR},
        )
    sys.exit(main())
