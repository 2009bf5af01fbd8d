"""What holds for every method: its update, its dense form, its size and its start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import BCA, C3A, CDVFT, METHODS, LoRA, make_method
from tests.methods.cases import CASES, COUNTS, REFERENCES, Case

over_cases = pytest.mark.parametrize("case", CASES, ids=str)
# One of each method, where blocks are cut off if the method has that.
ONE_EACH = (
    Case(CDVFT(p=4, factors=5), 7, 5),
    Case(C3A(b=3), 6, 9),
    Case(BCA(p=4), 7, 5),
    Case(LoRA(r=2, alpha=3.0), 7, 5),
)
over_methods = pytest.mark.parametrize("case", ONE_EACH, ids=str)
FRESH = tuple(case for case in CASES if getattr(case.method, "init_weights", "zeros") == "zeros")


def init(case: Case):
    kernel = jnp.asarray(np.random.default_rng(2).standard_normal(case_shape(case)), jnp.float32)
    return case.method.init(jax.random.key(0), case.in_features, case.out_features, kernel)


def case_shape(case: Case) -> tuple[int, int]:
    return case.in_features, case.out_features


def test_every_method_is_tested() -> None:
    assert set(METHODS) == set(REFERENCES) == set(COUNTS) == {case.method.name for case in CASES}


@over_cases
@pytest.mark.usefixtures("x64")
def test_delta_is_the_definition(case: Case) -> None:
    params = case.params()
    delta = case.method.delta(params, *case_shape(case))
    np.testing.assert_allclose(delta, case.reference_delta(params), atol=1e-12)


def check_update(case: Case, dtype) -> None:
    params, x = case.params(dtype), case.x((2, 3), dtype)
    update = case.method.update(params, x, case.out_features)
    expected = x.astype(np.float64) @ case.reference_delta(case.params())
    assert update.dtype == dtype and update.shape == expected.shape
    tolerance = 20 * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(update, expected, atol=tolerance)


@over_cases
@pytest.mark.usefixtures("x64")
def test_update_is_the_product_with_delta(case: Case) -> None:
    check_update(case, np.float64)


@over_methods
def test_update_in_float32_is_the_product_with_delta(case: Case) -> None:
    check_update(case, np.float32)


@over_methods
def test_merge_adds_delta_and_unmerge_takes_it_out(case: Case) -> None:
    params = case.params(np.float32)
    kernel = np.random.default_rng(3).standard_normal(case_shape(case)).astype(np.float32)
    merged = case.method.merge(params, kernel)
    np.testing.assert_allclose(merged, kernel + case.reference_delta(params), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(case.method.unmerge(params, merged), kernel, atol=1e-4)


@over_cases
def test_count_is_the_papers_formula_and_the_size_of_the_arrays(case: Case) -> None:
    count = case.method.parameter_count(*case_shape(case))
    assert count == case.reference_count()
    assert count == sum(array.size for array in init(case).values())


@over_methods
@pytest.mark.parametrize("x64", [False, True])
def test_arrays_are_float32_and_have_the_promised_shapes(case: Case, x64: bool) -> None:
    with jax.enable_x64(x64):
        params, shapes = init(case), case.method.shapes(*case_shape(case))
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        k: (v.shape, jnp.float32) for k, v in shapes.items()
    }


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_fresh_adapter_adds_exactly_zero(case: Case) -> None:
    params = init(case)
    assert not np.any(case.method.update(params, case.x(dtype=np.float32), case.out_features))
    assert not np.any(case.method.delta(params, *case_shape(case)))


@over_methods
def test_fresh_adapter_has_a_gradient(case: Case) -> None:
    # A start with two factors at zero would never move.
    x, g = case.x(dtype=np.float32), np.random.default_rng(4).standard_normal(case.out_features)
    _, vjp = jax.vjp(lambda params: case.method.update(params, x, case.out_features), init(case))
    (grads,) = vjp(jnp.asarray(np.broadcast_to(g, (3, g.size)), jnp.float32))
    (first,) = [grad for name, grad in grads.items() if name in ("c", "c2", "w", "b")]
    # Only what blocks that are cut off never reach may stay without one.
    assert np.mean(np.abs(first) > 0) > 0.5


@over_methods
def test_gradients_are_independent_of_how_tokens_are_batched(case: Case) -> None:
    params, x = case.params(np.float32), case.x((4, 3), np.float32)

    def loss(params, x):
        return jnp.sum(jnp.sin(case.method.update(params, x, case.out_features)))

    together = jax.grad(loss)(params, x)
    alone = jax.jit(jax.grad(loss))
    one_by_one = [alone(params, row) for row in x.reshape(12, -1)]
    summed = jax.tree.map(lambda *grads: np.sum(grads, axis=0), *one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), together, summed)


@over_methods
def test_apply_keeps_the_dtype_of_the_layer(case: Case) -> None:
    params, x = case.params(np.float32), jnp.asarray(case.x(), jnp.bfloat16)
    y = jnp.ones((3, case.out_features), jnp.bfloat16)
    out = case.method.apply(params, x, y)
    assert out.dtype == jnp.bfloat16
    # The update is computed in the adapter's float32 and rounded to the layer's dtype once, or in
    # the layer's dtype throughout.
    update = np.asarray(x, np.float64) @ case.reference_delta(params)
    np.testing.assert_allclose(np.asarray(out - y, float), update, rtol=0.02, atol=0.02)


@over_cases
def test_method_survives_its_fields(case: Case) -> None:
    assert make_method(case.method.name, dataclasses.asdict(case.method)) == case.method


@over_cases
def test_learning_rates_and_decay_name_the_arrays(case: Case) -> None:
    names = set(case.method.shapes(*case_shape(case)))
    assert set(case.method.learning_rates(*case_shape(case))) == names
    assert set(case.method.decayed()) <= names


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        (C3A(b=4), {"w": 1.0}),
        (LoRA(r=2), {"a": 1.0, "b": 1.0}),
        (BCA(), {"c": 1 / 8}),
        (BCA(p=4), {"c": 1 / 4}),
        (BCA(p=5), {"c": 1 / 5}),
        (CDVFT(), {"a1": 0.02, "c2": 1 / 8, "a3": 0.02}),
        (CDVFT(p=4, diagonal_rate=0.5), {"a1": 0.5, "c2": 1 / 4, "a3": 0.5}),
        # Later circulants are whole, whatever the block size of the first.
        (CDVFT(p=4, factors=5), {"a1": 0.02, "c2": 1 / 4, "a3": 0.02, "c4": 1 / 12, "a5": 0.02}),
    ],
    ids=str,
)
def test_learning_rate_rules(method, rates) -> None:
    assert method.learning_rates(8, 12) == rates


def test_decay_spares_the_diagonals() -> None:
    assert CDVFT(factors=5).decayed() == {"a1": False, "a3": False, "a5": False}
    assert not BCA().decayed() and not C3A().decayed() and not LoRA().decayed()


D, F = 4096, 11008  # LLaMA-2-7B
QV, ALL = [(D, D)] * 2, [(D, D)] * 4 + [(D, F)] * 2 + [(F, D)]
BASE, LARGE = [(768, 768)] * 24, [(1024, 1024)] * 48


def total(method, layers: list[tuple[int, int]]) -> int:
    counts = {layer: method.parameter_count(*layer) for layer in set(layers)}
    return sum(counts[layer] for layer in layers)


@pytest.mark.parametrize(
    ("method", "layers", "published"),
    [
        (CDVFT(), BASE, 55_296),
        (BCA(p=768), BASE, 18_432),
        (BCA(p=256), BASE, 55_296),
        (BCA(p=1024), LARGE, 49_152),
        (C3A(b=768), BASE, 18_432),
        (C3A(b=128), BASE, 110_592),
        (C3A(b=64), BASE, 221_184),
        (C3A(b=1024), LARGE, 49_152),
        (C3A(b=128), LARGE, 393_216),
        (C3A(b=64), LARGE, 786_432),
        (LoRA(r=8), BASE, 294_912),
        (LoRA(r=8), LARGE, 786_432),
        (LoRA(r=64), QV * 32, 33_554_432),
    ],
    ids=str,
)
def test_published_counts(method, layers, published: int) -> None:
    assert total(method, layers) == published


@pytest.mark.parametrize(
    ("projections", "published"),
    [
        ([(D, D)] * 3 + [(D, F), (F, D)], "23.86"),
        ([(D, D), (D, 1024), (D, 1024), (D, 14336), (14336, D)], "20.97"),
    ],
    ids=["llama2-7b", "llama3-8b"],
)
def test_published_counts_of_two_block_sizes(projections, published: str) -> None:
    attention, mlp = projections[:3] * 32, projections[3:] * 32
    count = total(C3A(b=128), attention) + total(C3A(b=256), mlp)
    assert f"{count / 1e6:.2f}" == published


@pytest.mark.parametrize(
    ("p", "bca", "cdvft"),
    [
        (4096, ("0.262", "1.70"), ("0.786", "4.20")),
        (2048, ("0.524", "3.41"), ("1.05", "5.91")),
        (1024, ("1.05", "6.42"), ("1.57", "8.92")),
        (512, ("2.10", "12.8"), ("2.62", "15.3")),
        (256, ("4.19", "25.3"), ("4.72", "27.8")),
        (128, ("8.39", "50.6"), ("8.91", "53.1")),
    ],
)
def test_counts_on_llama_2_7b_in_millions(p: int, bca, cdvft) -> None:
    for method, published in ((BCA(p=p), bca), (CDVFT(p=p), cdvft)):
        for layers, text in zip((QV * 32, ALL * 32), published, strict=True):
            digits = len(text.split(".")[1])
            assert f"{total(method, layers) / 1e6:.{digits}f}" == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_method("cdvt"), "unknown method 'cdvt'; did you mean 'cdvft'"),
        (lambda: make_method("zzz"), "'zzz'; There are cdvft, c3a, bca, lora"),
        (lambda: make_method("cdvft", {"factor": 3}), "cdvft has no .*'factor'; .*'factors'"),
        (lambda: make_method("c3a", {"zzz": 3}), "'zzz'; There are b, init_weights"),
        (lambda: make_method("bca", {"p": -1}), "`p` must be a positive whole number, but is -1"),
        (lambda: CDVFT(p=0), "`p` must be a positive whole number, but is 0"),
        (lambda: CDVFT(p=2.5), "`p` must be a positive whole number, but is 2.5"),
        (lambda: CDVFT(diagonal_rate="x"), "`diagonal_rate` must be a finite number"),
        (lambda: CDVFT(factors=None), "`factors` must be a positive whole number, but is None"),
        (lambda: CDVFT(factors=1), "odd and at least 3, but it is 1"),
        (lambda: CDVFT(factors=4), "odd and at least 3, but it is 4"),
        (lambda: C3A(b=0), "`b` must be a positive whole number, but is 0"),
        (lambda: C3A(init_weights="xavier"), "one of zeros, xavier_uniform.* but is 'xavier'"),
        (lambda: BCA(p=-2), "`p` must be a positive whole number, but is -2"),
        (lambda: BCA(init_weights="random"), "one of zeros, projection, but is 'random'"),
        (lambda: LoRA(r=0), "`r` must be a positive whole number, but is 0"),
        (lambda: LoRA(r=None), "`r` must be a positive whole number, but is None"),
        (lambda: LoRA(alpha="x"), "`alpha` must be a finite number, but is 'x'"),
        (lambda: LoRA(alpha=float("inf")), "`alpha` must be a finite number, but is inf"),
        (lambda: LoRA(rank_stabilized="no"), "`rank_stabilized` must be true or false, .* 'no'"),
        (lambda: C3A(b=4).shapes(8, 6), "b=4 does not .*in_features=8.*out_features=6.* are 1, 2"),
        (
            lambda: BCA(init_weights="projection").init(jax.random.key(0), 4, 4),
            "starts from the layer's own weights",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
