"""Trees of parameters to choose layers in, and adapters with something in them."""

import jax
import jax.numpy as jnp
import numpy as np

from circflax.tree import Layout, Tree

WIDTH, HIDDEN, STACKED = 8, 12, 3


def small_params(dtype=jnp.float32, seed: int = 0) -> Tree:
    """Two layers like a transformer's, an embedding and a classifier."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def dense(inputs, outputs):
        return {"kernel": array(inputs, outputs), "bias": array(outputs)}

    def layer():
        return {
            "attention": {"query": dense(WIDTH, WIDTH), "value": dense(WIDTH, WIDTH)},
            "mlp": {"up": dense(WIDTH, HIDDEN), "down": dense(HIDDEN, WIDTH)},
            "norm": {"scale": array(WIDTH)},
        }

    return {
        "embed": {"embedding": array(11, WIDTH)},
        "layers": {"0": layer(), "1": layer()},
        "classifier": dense(WIDTH, 3),
    }


# Kernels of one layer each, as other modules than `nn.Dense` store them.
ODD_LAYOUTS = {
    ("heads", "kernel"): (Layout.parse("in,out,out"), (WIDTH, 2, 3)),
    ("unite", "kernel"): (Layout.parse("in,in,out"), (2, 4, 6)),
    ("flipped", "kernel"): (Layout.parse("out,in"), (6, WIDTH)),
    ("woven", "weights"): (Layout(("out", "in", "out"), (-1,), (-3, -1)), (2, WIDTH, 3)),
    ("stack", "kernel"): (Layout.parse("layer,in,out"), (STACKED, WIDTH, 6)),
    ("stacks", "kernel"): (Layout.parse("layer,layer,out,in"), (2, STACKED, 6, WIDTH)),
}


def odd_params(dtype=jnp.float32) -> Tree:
    rng = np.random.default_rng(1)
    return {
        module: {name: jnp.asarray(rng.standard_normal(shape), dtype)}
        for (module, name), (_, shape) in ODD_LAYOUTS.items()
    }


def odd_layouts() -> dict:
    return {path: layout for path, (layout, _) in ODD_LAYOUTS.items()}


def abstract(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def drawn(adapters: Tree, scale: float = 0.3) -> Tree:
    """The small tree after some steps of training, as it were."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype),
        adapters,
    )
