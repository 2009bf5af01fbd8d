"""Reading kernels, inputs and outputs as matrices, and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circflax.tree import Layout


@st.composite
def layouts_and_shapes(draw):
    layers = draw(st.integers(0, 2))
    roles = draw(st.permutations(draw(st.sampled_from([["in", "out"], ["in", "in", "out"],
                                                       ["in", "out", "out"],
                                                       ["in", "in", "out", "out"]]))))  # fmt: skip
    batch = draw(st.integers(0, 2))
    axes = []
    for role in ("in", "out"):
        rank = batch + roles.count(role)
        chosen = draw(st.permutations(range(-rank, 0)))[: roles.count(role)]
        axes.append(tuple(chosen))
    layout = Layout(("layer",) * layers + tuple(roles), *axes)
    # Sizes all different, so that a mixed-up axis cannot pass for another.
    shape = draw(st.permutations(range(2, 2 + len(layout.roles))))
    return layout, tuple(shape), (7, 9)[:batch]


def numbered(shape):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def with_axes(batch, axes, sizes):
    """The shape with the given sizes at the given axes and the batch's elsewhere."""
    shape = [None] * (len(batch) + len(axes))
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    rest = iter(batch)
    return tuple(next(rest) if size is None else size for size in shape)


@given(layouts_and_shapes())
def test_kernel_is_the_inverse_of_matrix(case) -> None:
    layout, shape, _ = case
    kernel = numbered(shape)
    matrix = layout.matrix(kernel)
    inputs = np.prod(layout.sizes(shape, "in"))
    assert matrix.shape[-2:] == (inputs, np.prod(layout.sizes(shape, "out")))
    assert matrix.shape[:-2] == layout.sizes(shape, "layer")
    np.testing.assert_array_equal(layout.kernel(matrix, shape), kernel)


@given(layouts_and_shapes())
def test_output_is_the_inverse_of_flat_output(case) -> None:
    layout, shape, batch = case
    y = numbered(with_axes(batch, layout.y_axes, layout.sizes(shape, "out")))
    flat = layout.flat_output(y)
    assert flat.shape == (*batch, np.prod(layout.sizes(shape, "out")))
    np.testing.assert_array_equal(layout.output(flat, y.shape), y)


@given(layouts_and_shapes())
def test_flat_product_is_the_contraction(case) -> None:
    layout, shape, batch = case
    shape = shape[layout.roles.count("layer") :]
    layout = Layout(layout.roles[layout.roles.count("layer") :], layout.x_axes, layout.y_axes)
    kernel = numbered(shape)
    x = numbered(with_axes(batch, layout.x_axes, layout.sizes(shape, "in")))
    axes = [axis for axis, role in enumerate(layout.roles) if role == "in"]
    free = [axis for axis in range(-x.ndim, 0) if axis not in layout.x_axes]
    # tensordot leaves the batch in front and the kernel's outputs behind it.
    y = np.tensordot(x.transpose(*free, *layout.x_axes), kernel,
                     (range(len(free), x.ndim), axes))  # fmt: skip
    flat = layout.flat_input(x) @ layout.matrix(kernel)
    np.testing.assert_array_equal(flat.reshape(y.shape), y)


@given(layouts_and_shapes())
def test_json_keeps_the_layout(case) -> None:
    layout, _, _ = case
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("roles", "x_axes", "y_axes"),
    [
        (("in", "in"), (-2, -1), ()),
        (("out",), (), (-1,)),
        (("in", "layer", "out"), (-1,), (-1,)),
        (("in", "put"), (-1,), (-1,)),
        (("in", "out"), (-2, -1), (-1,)),
        (("in", "out"), (-1,), (-2, -1)),
    ],
)
def test_roles_that_make_no_layer(roles, x_axes, y_axes) -> None:
    with pytest.raises(ValueError, match="names each axis of the kernel"):
        Layout(roles, x_axes, y_axes)


def test_parse_reads_trailing_axes() -> None:
    assert Layout.parse("layer, in,in,out") == Layout(("layer", "in", "in", "out"), (-2, -1), (-1,))
    assert jnp.asarray(Layout.parse("out,in").matrix(numbered((2, 3)))).shape == (3, 2)
