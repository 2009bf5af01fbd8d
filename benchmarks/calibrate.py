"""`python -m benchmarks.calibrate FILE…`: rates of the cost model from results of the suites.

Fits `circflax.ops`' model to times of C3A's strategies (suites `layer`, `gpu`, `growth`, `tpu`) by
least squares of the relative errors, and prints the rates with what the choice then loses.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks.layers import product_of
from benchmarks.results import Record
from circflax.ops import Form, Product, Strategy, choose_form, estimate_costs
from circflax.ops._choice import Rates, work

# What the model knows of each platform: this machine's CPU or GPU, and chips compiled for.
_CHIPS = (None, "v5e", "h100")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rates for each platform in the files; returns the exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    records = [r for path in arguments.files for r in json.loads(path.read_text())["records"]]
    timed: dict[str, list[tuple[Product, Strategy, float]]] = {}
    for record in records:
        method, _, strategy = record["name"].partition(" ")
        # Of training steps the name is the method's alone.
        if method == "c3a" and strategy and record["case"].get("chip") in _CHIPS:
            platform = _platform(record)
            seconds = record.get("median") or record["seconds"]
            product = product_of(record["case"], platform)
            timed.setdefault(platform, []).append((product, strategy, seconds))
    for platform, samples in timed.items():
        rates = fit(samples)
        print(f'"{platform}": Rates({", ".join(f"{k}={v:.2g}" for k, v in vars(rates).items())})')
        print(f"  {len(samples)} times; the model's choice takes {loss(samples):.3f} of the best's")
    return 0


def fit(samples: Sequence[tuple[Product, Strategy, float]]) -> Rates:
    """The rates that explain the times best."""
    # Of DFTs those lengths were timed that the present rates choose.
    rows = [_work(product, choose_form(product, strategy)) / s for product, strategy, s in samples]
    with np.errstate(divide="ignore"):
        return Rates(*(1 / nnls(np.array(rows), np.ones(len(rows)))[0]))


def loss(samples: Sequence[tuple[Product, Strategy, float]]) -> float:
    """The geometric mean of how much longer the chosen strategy takes than the fastest one."""
    by_product: dict[Product, dict[Strategy, float]] = {}
    for product, strategy, seconds in samples:
        by_product.setdefault(product, {})[strategy] = seconds
    ratios = []
    for product, times in by_product.items():
        costs = {f: c for f, c in estimate_costs(product).items() if f.strategy in times}
        chosen = min(costs, key=costs.__getitem__).strategy
        ratios.append(times[chosen] / min(times.values()))
    return float(np.exp(np.mean(np.log(ratios))))


def _work(product: Product, form: Form) -> np.ndarray:
    return np.array(astuple(work(product, form)))


def _platform(record: Record) -> str:
    suite, *_ = record["suite"].split()
    return {"tpu": "tpu", "gpu": "cuda"}.get(suite, "cpu")


if __name__ == "__main__":
    sys.exit(main())
