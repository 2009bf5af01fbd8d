"""How layers use their kernels, read off what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from circflax import C3A, combine
from circflax.linen import attach, find_layouts
from circflax.tree import Layout, merge
from tests.linen.models import adapted, init, layouts

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
HEADS = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), jnp.float32)
NO_PRODUCT = "its output is not its input times its kernel"


class Custom(nn.Module):
    """A module with a kernel of its own, used in one way or another."""

    use: str

    @nn.compact
    def __call__(self, x, scale=2.0):
        def weights(name, *shape):
            return self.param(name, nn.initializers.normal(), shape)

        k = weights("kernel", 4, 4)
        match self.use:
            case "output first":  # as in Hugging Face's FlaxConv1D
                bias = self.param("bias", nn.initializers.normal(), (4,))
                return jax.lax.dot_general(x, k.T, (((x.ndim - 1,), (0,)), ((), ()))) + bias
            case "kernel first":
                return jnp.einsum("oi,bti->bto", k, x)
            case "residual":
                return x @ k + jnp.tanh(x)
            case "scaled":
                return scale * (x @ k)
            case "kernel scaled":
                return x @ (scale * k)
            case "activation":
                return nn.relu(x @ k)
            case "activation before":
                return nn.relu(x) @ k
            case "two kernels":
                return x @ k @ weights("other", 4, 4)
            case "two products":
                return x @ k + x @ weights("other", 4, 4)
            case "twice":
                return x @ k @ k
            case "twice in sum":
                return x @ k + x @ jnp.tanh(k)
            case "kernel in bias":
                return x @ k + jnp.sum(jnp.tanh(k), axis=0)
            case "squared":
                return jnp.einsum("bti,ij,bti->btj", x, k, x)
            case "axes moved":
                return jnp.swapaxes(x @ k, 0, 1)
            case "two outputs":
                return x @ k, x
            case "bilinear":
                return jnp.einsum("bti,ij,btj->bt", x, k, x)
            case "dropout":
                return nn.Dropout(0.5, deterministic=False)(x @ k)
            case "no input":
                return k[: x.shape[-1]]


def only_layout(model, *arguments, name="kernel"):
    found = layouts(model, init(model, *arguments), *arguments)
    (layout,) = [layout for path, layout in found.items() if path[-1] == name]
    return layout


@pytest.mark.parametrize(
    ("model", "x", "layout"),
    [
        (nn.Dense(6), X, Layout.parse("in,out")),
        (nn.Dense(4, use_bias=False), X[0, 0], Layout.parse("in,out")),
        (nn.Dense(6, dtype=jnp.bfloat16), X, Layout.parse("in,out")),
        (nn.remat(nn.Dense)(6), X, Layout.parse("in,out")),
        (nn.DenseGeneral((2, 3)), X, Layout.parse("in,out,out")),
        (nn.DenseGeneral(6, axis=(-2, -1)), HEADS, Layout.parse("in,in,out")),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), HEADS, Layout.parse("in,in,out,out")),
        (nn.DenseGeneral(6, axis=-2), HEADS, Layout(("in", "out"), (-2,), (-1,))),
        (nn.DenseGeneral(6, axis=(-1, -3)), HEADS, Layout(("in", "in", "out"), (-3, -1), (-1,))),
        (nn.Einsum((4, 6), "btd,df->btf"), X, Layout.parse("in,out")),
        (nn.Einsum((6, 4), "btd,fd->btf"), X, Layout.parse("out,in")),
        (
            nn.Einsum((2, 4, 3), "btd,ndh->btnh"),
            X,
            Layout(("out", "in", "out"), (-1,), (-2, -1)),
        ),
        (
            nn.Einsum((2, 4, 3), "btd,ndh->bnth"),
            X,
            Layout(("out", "in", "out"), (-1,), (-3, -1)),
        ),
        (nn.Einsum((4, 5, 6), "btnh,nhd->btd"), HEADS, Layout.parse("in,in,out")),
        (
            nn.Einsum((5, 6, 4), "btnh,hdn->btd", use_bias=False),
            HEADS,
            Layout(("in", "out", "in"), (-1, -2), (-1,)),
        ),
        (Custom("output first"), X, Layout.parse("out,in")),
        (Custom("kernel first"), X, Layout.parse("out,in")),
    ],
    ids=lambda value: None if isinstance(value, jax.Array) else str(value)[:60].replace("\n", ""),
)
def test_layers_that_multiply_by_their_kernel(model, x, layout) -> None:
    assert only_layout(model, x) == layout
    # The layout says what the layer does: its output changes as its merged kernel's does.
    params, plan, adapters = adapted(model, C3A(b=1), x, targets=".*")
    ours = attach(model.apply, plan)({"params": combine(params, adapters)}, x)
    plain = model.apply({"params": merge(params, adapters, plan)}, x)
    tolerance = 0.05 if ours.dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(ours.astype(float), plain.astype(float), atol=tolerance)
    assert np.abs(ours - model.apply({"params": params}, x)).max() > tolerance


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Conv(6, (3,)), X, NO_PRODUCT),
        (nn.Embed(7, 4), jnp.zeros((2, 3), int), NO_PRODUCT),
        (nn.DenseGeneral((5,), axis=-1, batch_dims=(0,)), X, "in batches"),
        (nn.Einsum((3, 4, 6), "btd,tdf->btf"), X, "in batches"),
        (Custom("scaled"), X, NO_PRODUCT),
        (Custom("kernel scaled"), X, NO_PRODUCT),
        (Custom("activation"), X, NO_PRODUCT),
        (Custom("activation before"), X, NO_PRODUCT),
        (Custom("two kernels"), X, NO_PRODUCT),
        (Custom("twice"), X, NO_PRODUCT),
        (Custom("twice in sum"), X, NO_PRODUCT),
        (Custom("kernel in bias"), X, NO_PRODUCT),
        (Custom("residual"), X, NO_PRODUCT),
        (Custom("squared"), X, NO_PRODUCT),
        (Custom("bilinear"), X, NO_PRODUCT),
        (Custom("no input"), X, NO_PRODUCT),
        (Custom("axes moved"), X, "axes in another order"),
        (Custom("two outputs"), X, "several arrays"),
        (Custom("dropout"), X, "cannot be called by itself"),
    ],
    ids=lambda value: value.use if isinstance(value, Custom) else type(value).__name__,
)
def test_other_modules_are_refused_with_a_reason(model, x, reason: str) -> None:
    name = "embedding" if isinstance(model, nn.Embed) else "kernel"
    found = only_layout(model, x, name=name)
    assert isinstance(found, str) and reason in found


def test_two_products_make_no_layer_of_one_kernel() -> None:
    model = Custom("two products")
    with pytest.raises(ValueError, match=r"cannot be adapted: (it has several kernels|its output)"):
        adapted(model, C3A(), X, targets=".*")


def test_vectors_are_no_kernels() -> None:
    model = nn.Sequential([nn.LayerNorm(), nn.Dense(6)])
    assert set(layouts(model, init(model, X), X)) == {("layers_1", "kernel")}


def test_descriptions_give_the_same_layouts() -> None:
    model = nn.DenseGeneral((2, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    assert layouts(model, shapes, X) == layouts(model, init(model, X), X)


def test_head_applied_by_hand_is_skipped() -> None:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 4, name="embed")
            x = nn.Dense(4, name="inner")(embed(tokens))
            kernel = embed.variables["params"]["embedding"].T
            return nn.Dense(7, use_bias=False, parent=None).apply({"params": {"kernel": kernel}}, x)

    tokens = jnp.zeros((2, 3), int)
    found = layouts(Tied(), init(Tied(), tokens), tokens)
    assert set(found) == {("embed", "embedding"), ("inner", "kernel")}
    assert found[("inner", "kernel")] == Layout.parse("in,out")


def test_layer_called_in_two_ways_is_refused() -> None:
    class TwoWays(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((4, 4), name="layer", use_bias=False)
            return layer(x, "btd,df->btf") + layer(x, "btd,fd->btf")

    found = layouts(TwoWays(), init(TwoWays(), X), X)
    assert "two ways" in found[("layer", "kernel")]


def test_layer_called_twice_alike_is_one_layer() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            return layer(layer(x)[0])

    assert layouts(Twice(), init(Twice(), X), X) == {("layer", "kernel"): Layout.parse("in,out")}


def stacked(axis: int, lift):
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(nn.Dense, variable_axes={"params": axis}, split_rngs={"params": True})(
                6, name="layers"
            )(x)

    return Stacked()


def over_first_axis(*args, **kwargs):
    return nn.vmap(*args, in_axes=0, out_axes=0, **kwargs)


def test_stacked_layers_have_an_axis_in_front() -> None:
    found = layouts(stacked(0, over_first_axis), init(stacked(0, over_first_axis), X), X)
    assert found == {("layers", "kernel"): Layout.parse("layer,in,out")}


def test_layers_stacked_elsewhere_are_refused() -> None:
    found = layouts(stacked(1, over_first_axis), init(stacked(1, over_first_axis), X), X)
    assert "along another axis" in found[("layers", "kernel")]


def test_a_function_that_calls_no_module_is_refused() -> None:
    params = {**init(nn.Dense(6), X), "other": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="`run` called no linen module"):
        find_layouts(lambda p: X @ jnp.ones((4, 4)), params)
