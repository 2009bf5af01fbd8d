"""A rematerialised model computes the same and keeps less for its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from circflax import C3A, CDVFT, combine
from circflax.linen import attach, rematerialize
from tests.architectures import architecture
from tests.linen.models import ADAPTED, Block, Transformer, adapted, init, inputs, randomly

transformers = pytest.importorskip("transformers", "4.57")

DEPTH = 2
MODELS = ("llama", "gpt2", "bert", "vit", "linen")


@functools.cache
def tiny(id: str):
    """A function of parameters that runs a model of DEPTH blocks, and parameters for it.

    It takes what to make of the model first, `rematerialize` or nothing.
    """
    if id == "linen":
        model, x = Transformer(depth=DEPTH), inputs()
        return lambda wrap, p: wrap(model.apply)({"params": p}, x), init(model, x)
    entry = architecture(id)
    config = entry.config()
    config.num_hidden_layers = DEPTH
    model = getattr(transformers, entry.flax_class)(config, _do_init=False)
    data = {key: jnp.asarray(value) for key, value in entry.inputs().items()}

    def run(wrap, params):
        return wrap(model)(**data, params=params, train=True, dropout_rng=jax.random.key(0))[0]

    return run, randomly(model.params_shape_tree, 0.2)


def as_it_is(run):
    return run


def loss(y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sin(y))


def assert_same_gradients(ours, theirs) -> None:
    # Where the true gradient is zero, as that of a key's bias, there is rounding alone.
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), ours, theirs)


def kept(run, params) -> int:
    """How many numbers the forward pass keeps for the gradient."""
    pullback = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))


def recomputed(run, params) -> int:
    """How many parts, one beside another, the gradient's program recomputes."""

    def count(jaxpr: Any) -> int:
        own, inner = 0, []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "remat2":
                # Forward it only computes.
                own += equation.params["differentiated"]
            else:
                # An equation's programs are among its parameters, some of them closed.
                inner += [getattr(value, "jaxpr", value) for value in equation.params.values()]
        return own + sum(count(program) for program in inner if hasattr(program, "eqns"))

    return count(jax.make_jaxpr(jax.grad(run))(params).jaxpr)


over_models = pytest.mark.parametrize("id", MODELS)


@over_models
def test_values_are_the_same_bit_for_bit_and_gradients_the_same(id: str) -> None:
    run, params = tiny(id)

    def computed(wrap):
        value = jax.jit(lambda p: run(wrap, p))(params)
        return value, jax.jit(jax.grad(lambda p: loss(run(wrap, p))))(params)

    value, gradient = computed(rematerialize)
    expected, expected_gradient = computed(as_it_is)
    np.testing.assert_array_equal(value, expected)
    assert_same_gradients(gradient, expected_gradient)


@over_models
def test_each_block_is_recomputed_and_little_kept(id: str) -> None:
    run, params = tiny(id)

    def ours(params):
        return loss(run(rematerialize, params))

    def plain(params):
        return loss(run(as_it_is, params))

    assert recomputed(plain, params) == 0
    assert recomputed(ours, params) == DEPTH
    assert kept(ours, params) < 0.75 * kept(plain, params)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda run, plan: attach(rematerialize(run), plan),
        lambda run, plan: rematerialize(attach(run, plan)),
    ],
    ids=["attach(rematerialize)", "rematerialize(attach)"],
)
@pytest.mark.parametrize("method", [CDVFT(p=3), C3A(b=2)], ids=lambda method: method.name)
def test_adapters_train_as_without(method, wrap) -> None:
    model, x = Transformer(depth=DEPTH, dropout=0.5), inputs()
    # The head is outside the blocks, and a method may recompute by itself.
    params, plan, adapters = adapted(model, method, x, targets=ADAPTED[:-1])

    def of(run):
        def value(adapters):
            rngs = {"dropout": jax.random.key(3)}
            return loss(run({"params": combine(params, adapters)}, x, rngs=rngs))

        return value

    ours, plain = of(wrap(model.apply, plan)), of(attach(model.apply, plan))
    value, gradient = jax.value_and_grad(ours)(adapters)
    expected, expected_gradient = jax.value_and_grad(plain)(adapters)
    np.testing.assert_array_equal(value, expected)
    assert_same_gradients(gradient, expected_gradient)
    assert recomputed(ours, adapters) == DEPTH and kept(ours, adapters) < kept(plain, adapters)


class Flagged(nn.Module):
    """A block that branches on its arguments, counts its calls and keeps a statistic."""

    @nn.compact
    def __call__(self, x, scale, train, *, mode, mask=None, table=None):
        assert train is True and mode == "sum" and mask is None
        # Python has to know these entries.
        assert type(table) is np.ndarray and list(table) == [1, 2]
        self.sow("intermediates", "input", x)
        y = nn.BatchNorm(use_running_average=not train)(nn.Dense(x.shape[-1])(x))
        return {"y": x + scale["by"] * jnp.sin(y), "nothing": None}


class Flags(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            table = np.array([1, 2])
            x = Flagged()(x, {"by": jnp.float32(2)}, True, mode="sum", table=table)["y"]
        return x


def test_arguments_and_collections_are_the_block_s_own() -> None:
    model, x = Flags(), inputs()
    variables = model.init(jax.random.key(0), x)
    variables = {name: variables[name] for name in ("params", "batch_stats")}

    def of(wrap):
        def value(params):
            y, changed = wrap(model.apply)(
                {**variables, "params": params}, x, mutable=["batch_stats", "intermediates"]
            )
            return loss(y), changed

        return jax.value_and_grad(value, has_aux=True)(variables["params"])

    (value, changed), gradient = of(rematerialize)
    (expected, expected_changed), expected_gradient = of(as_it_is)
    np.testing.assert_array_equal(value, expected)
    jax.tree.map(np.testing.assert_array_equal, changed, expected_changed)
    assert_same_gradients(gradient, expected_gradient)
    assert len(jax.tree.leaves(changed["intermediates"])) == DEPTH


class Wrapped(nn.Module):
    """A model whose one encoder linen names `Transformer_0`."""

    @nn.compact
    def __call__(self, x):
        return Transformer(depth=DEPTH)(x)


class Nested(nn.Module):
    """Two stages of blocks each."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(x.shape[-1])(Transformer(depth=DEPTH, name=f"stage_{i}")(x))
        return x


class Listed(nn.Module):
    """A list of one block, called twice, whose name is a number alone."""

    def setup(self):
        self.block = Block(name="0")

    def __call__(self, x):
        return self.block(self.block(x)[0])[0]


@pytest.mark.parametrize(
    ("model", "times"),
    [
        pytest.param(Wrapped(), DEPTH, id="inside a wrapper that has a number"),
        pytest.param(Nested(), 2, id="the outermost blocks alone"),
        pytest.param(Listed(), 2, id="each call of a shared block"),
        pytest.param(Transformer("remat", depth=DEPTH), DEPTH, id="around the model's own"),
    ],
)
def test_what_is_recomputed(model: nn.Module, times: int) -> None:
    x = inputs()
    params = init(model, x)

    def of(wrap):
        return lambda params: loss(wrap(model.apply)({"params": params}, x))

    assert recomputed(of(rematerialize), params) == times
    assert_same_gradients(*(jax.grad(of(wrap))(params) for wrap in (rematerialize, as_it_is)))


@pytest.mark.parametrize(
    "model",
    [Transformer("scan"), nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(4)])],
    ids=["scanned blocks", "layers that are no modules of modules"],
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    x = inputs()
    variables = {"params": init(model, x)}
    with pytest.raises(ValueError, match="no numbered layer made of modules, such as `layers/0`"):
        rematerialize(model.apply)(variables, x)


def test_a_function_compiled_before_is_refused() -> None:
    model, x = Transformer(), inputs()
    compiled, variables = jax.jit(model.apply), {"params": init(model, x)}
    compiled(variables, x)
    with pytest.raises(ValueError, match=r"not one that `jax\.jit` has compiled before"):
        rematerialize(compiled)(variables, x)
