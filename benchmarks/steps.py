"""The whole training step of a model by method: time, peak memory and time to compile."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.progress import track

import circflax as cf
from benchmarks.results import Record, Results, by_case, markdown_table, milliseconds
from circflax.costs import peak_memory
from train.config import OptimConfig
from train.optimizer import make_optimizer
from train.plan.step import first_state
from train.steps import TrainState, make_forward, make_train_step
from train.tasks import classification
from train.timing import time_interleaved

# What RoBERTa's configurations share.
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
# Widths of the models by name; the rest follows from RoBERTa's and BERT's base configurations.
MODELS = {
    "roberta-base": {},
    "minilm-l6": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "roberta-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
HEAD, BIASES = "frozen + head", "biases"


def grid(quick: bool, dtype: str = "float32") -> list[Record]:
    """The cases of the suite `step`."""
    if quick:
        return [{"model": "minilm-l6", "batch": 2, "length": 16, "dtype": dtype}]
    models = ("roberta-base", "minilm-l6")
    return [{"model": name, "batch": 16, "length": 128, "dtype": dtype} for name in models]


class Step(NamedTuple):
    """A training step and shapes of what it runs on.

    Attributes:
        run: the jitted step, `(state, base, batch, rng) -> (state, loss)`.
        arguments: shapes of its arguments.
        plan: what it trains.
    """

    run: Callable[..., Any]
    arguments: tuple[TrainState, Any, dict[str, Any], Any]
    plan: cf.Plan

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return cf.summarize(self.arguments[1], self.plan).trainable_parameters


def adapters() -> dict[str, cf.AdapterConfig]:
    """What to measure: no adapter, biases only, and each registered method on query and value."""
    head = ("classifier",)
    return {
        HEAD: cf.AdapterConfig(train=head),
        BIASES: cf.AdapterConfig(train=("classifier", "bias")),
    } | {
        name: cf.AdapterConfig(method=method(), targets=("query", "value"), train=head)
        for name, method in cf.methods.METHODS.items()
    }


def make_step(case: Record, adapter: cf.AdapterConfig) -> Step:
    """The training step of one case with one kind of adapter, from shapes alone.

    There is no dropout: its random numbers would cost the same in all methods and hide what they
    differ by.
    """
    from transformers import FlaxRobertaForSequenceClassification, RobertaConfig

    config = RobertaConfig(
        **ROBERTA | MODELS[case["model"]],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    dtype = jnp.dtype(case["dtype"])
    model = FlaxRobertaForSequenceClassification(config, dtype=dtype, _do_init=False)
    key, ids = jax.random.key(0), (case["batch"], case["length"])
    base = jax.eval_shape(lambda key: model.init_weights(key, ids), key)
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), base)
    tokens = jnp.zeros((1, 8), jnp.int32)
    layouts = cf.linen.find_layouts(lambda params: model(tokens, params=params), base)
    plan = cf.make_plan(base, adapter, layouts)
    optimizer = make_optimizer(OptimConfig(), 0.1, plan, steps=100)
    state = first_state(plan, optimizer, base)
    integers = jax.ShapeDtypeStruct(ids, jnp.int32)
    batch = {
        "input_ids": integers,
        "attention_mask": integers,
        "labels": jax.ShapeDtypeStruct(ids[:1], jnp.int32),
        "weights": jax.ShapeDtypeStruct(ids[:1], jnp.float32),
    }
    forward = make_forward(model, plan)
    run = make_train_step(forward, classification.losses, optimizer, accumulation_steps=1)
    return Step(run, (state, base, batch, jax.eval_shape(jax.random.key, 0)), plan)


def run(results: Results, suite: str, cases: Sequence[Record], rounds: int) -> None:
    """Measures what is missing of a suite of training steps."""
    for case in results.missing(suite, cases):
        measured, functions, base = {}, {}, None
        for name, adapter in track(adapters().items(), f"{case['model']}: compiling"):
            step = make_step(case, adapter)
            start = time.perf_counter()
            compiled = step.run.lower(*step.arguments).compile()
            measured[name] = {
                "compile": time.perf_counter() - start,
                "peak": peak_memory(compiled),
                "trainable": step.trainable,
            }
            state, shapes, batch, _ = step.arguments
            base = random_arrays(shapes) if base is None else base
            functions[name] = runner(compiled, random_arrays(state), base, random_arrays(batch))
        print("timing …")
        timings = time_interleaved(functions, rounds=rounds, budget=60.0)
        for name, timing in timings.items():
            measured[name] |= timing._asdict()
        results.add(suite, case, measured)


def random_arrays(shapes: Any) -> Any:
    """Arrays of some shapes: small numbers, ones where they are whole."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.ones(leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def runner(compiled: Any, state: TrainState, base: Any, batch: Any) -> Callable[[], None]:
    """A function that makes one compiled step, each on the state that the last one left."""
    rng = jax.random.key(0)

    def run() -> None:
        nonlocal state
        state, loss = compiled(state, base, batch, rng)
        jax.block_until_ready((state, loss))

    return run


def table(records: Sequence[Record]) -> str:
    """Step time, peak memory and time to compile, with ratios to LoRA's and to biases only."""
    sections = []
    for case, of in by_case(records):
        lora, biases = of["lora"], of[BIASES]
        rows = [
            [
                name,
                f"{record['trainable']:,}",
                milliseconds(record["median"]),
                f"{record['median'] / lora['median']:.3f}",
                f"{record['peak'] / 2**20:,.1f}",
                f"{record['peak'] / lora['peak']:.4f}",
                f"{record['peak'] / biases['peak']:.4f}",
                f"{record['compile']:.1f}",
            ]
            for name, record in of.items()
        ]
        header = ["method", "trainable", "ms", "/ lora", "peak MiB", "/ lora", "/ biases"]
        title = ", ".join(f"{key} {value}" for key, value in case.items())
        sections.append(f"{title}\n\n{markdown_table([*header, 'compile s'], rows)}")
    return "\n\n".join(sections)
