"""The small tree: made, combined, merged, taken out, switched off, reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import BCA, BOFT, C3A, CDVFT, IA3, FourierFT, LaMDA, LoRA, VeRA
from circflax.tree import (
    AdapterConfig,
    combine,
    dense_delta,
    init_adapters,
    make_plan,
    merge,
    report_adapters,
    switch_off,
    unmerge,
)
from tests.tree.models import abstract, drawn, odd_layouts, odd_params, small_params

METHODS = [
    CDVFT(p=4),
    CDVFT(factors=5),
    C3A(b=2),
    BCA(p=4),
    BCA(p=3, init_weights="projection"),
    LoRA(r=2, alpha=3.0),
    VeRA(r=3),
    FourierFT(n=12),
    IA3(),
    IA3(feedforward=True),
    BOFT(b=2),
    LaMDA(r=2),
]
over_methods = pytest.mark.parametrize("method", METHODS, ids=str)


def small(method=None, dtype=jnp.float32, targets=("query", "up"), **options):
    """Parameters, plan and small tree of the model of two layers."""
    params = small_params(dtype)
    config = AdapterConfig(method=method or CDVFT(p=4), targets=targets, **options)
    plan = make_plan(params, config)
    return params, plan, init_adapters(jax.random.key(0), plan, params)


def odd(method, dtype=jnp.float32, targets=".*"):
    """The same for kernels stored otherwise than `nn.Dense` does."""
    params = odd_params(dtype)
    plan = make_plan(params, AdapterConfig(method=method, targets=targets), odd_layouts())
    return params, plan, init_adapters(jax.random.key(0), plan, params)


def reference_merge(params, adapters, plan) -> dict:
    """Merged kernels in float64, each layer of a stack by itself."""
    merged = {}
    with jax.enable_x64(True):
        for target in plan.targets:
            kernel = np.asarray(params[target.path[0]][target.parameter], np.float64)
            adapter = adapters[target.path[0]]["adapter"]
            matrix = np.array(target.layout.matrix(kernel))
            for index in np.ndindex(*target.layers):
                one = {name: np.asarray(array, float)[index] for name, array in adapter.items()}
                matrix[index] = target.method.merge(one, matrix[index])
            merged[target.path[0]] = target.layout.kernel(matrix, target.shape)
    return merged


@over_methods
def test_small_tree_has_the_shapes_of_the_plan_in_float32(method) -> None:
    for make in (small, odd):
        params, plan, adapters = make(method, jnp.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
        for target in plan.targets:
            adapter = adapters
            for name in target.path:
                adapter = adapter[name]
            shapes = {name: array.shape for name, array in adapter["adapter"].items()}
            assert shapes == {name: shape.shape for name, shape in target.shapes.items()}
        described = init_adapters(jax.random.key(0), plan, abstract(params))
        assert jax.tree.map(jnp.shape, described) == jax.tree.map(jnp.shape, adapters)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(described))


def test_draw_depends_on_the_key_and_the_layers_name_alone() -> None:
    method = C3A(b=2, init_weights="gaussian")
    params, plan, adapters = small(method)
    _, _, more = small(method, targets=("query", "value"))
    query, again = (
        tree["layers"]["1"]["attention"]["query"]["adapter"]["w"] for tree in (adapters, more)
    )
    assert np.array_equal(query, again)
    other = init_adapters(jax.random.key(1), plan, params)
    jax.tree.map(lambda a, b: np.testing.assert_array_less(0, np.abs(a - b)), adapters, other)
    zeroth = adapters["layers"]["0"]["attention"]["query"]["adapter"]["w"]
    assert not np.array_equal(query, zeroth)


def test_layers_of_a_stack_draw_for_themselves() -> None:
    _, _, adapters = odd(C3A(b=2, init_weights="gaussian"), targets=("stack",))
    w = adapters["stack"]["adapter"]["w"]
    assert len(np.unique(w)) == w.size


def test_projection_starts_every_layer_of_a_stack_from_its_own_weights() -> None:
    params, _, adapters = odd(BCA(p=2, init_weights="projection"), targets=("stack",))
    means = np.asarray(params["stack"]["kernel"])[:, [0, 1], [0, 1]].mean(axis=1)
    np.testing.assert_allclose(adapters["stack"]["adapter"]["c"][:, 0, 0, 0], means, atol=1e-6)


def test_leaves_trained_in_full_are_copies_in_float32() -> None:
    params, _, adapters = small(train=("classifier",), dtype=jnp.float32)
    theirs, ours = params["classifier"]["kernel"], adapters["classifier"]["kernel"]
    assert np.array_equal(ours, theirs)
    # Training donates the small tree's buffers, which must not be the base's.
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    _, _, adapters = small(train=("classifier",), dtype=jnp.bfloat16)
    assert adapters["classifier"]["kernel"].dtype == jnp.float32


def test_plan_of_another_model_is_refused() -> None:
    params, plan, _ = small()
    wide = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), params)
    with pytest.raises(ValueError, match=r"0/attention/query/kernel' has shape \(16, 8\), .*8, 8"):
        init_adapters(jax.random.key(0), plan, wide)
    with pytest.raises(ValueError, match="has no 'layers/0/attention/query/kernel'"):
        merge({"classifier": params["classifier"]}, {}, plan)


def test_combined_tree_has_adapters_beside_kernels_and_trained_leaves_in_the_bases_dtype() -> None:
    params, _, adapters = small(train=("classifier",), dtype=jnp.bfloat16)
    adapters = drawn(adapters)
    combined = combine(params, adapters)
    query = combined["layers"]["0"]["attention"]["query"]
    assert query["kernel"] is params["layers"]["0"]["attention"]["query"]["kernel"]
    assert query["adapter"]["c2"] is adapters["layers"]["0"]["attention"]["query"]["adapter"]["c2"]
    assert combined["classifier"]["kernel"].dtype == jnp.bfloat16
    assert np.array_equal(
        combined["classifier"]["kernel"], adapters["classifier"]["kernel"].astype(jnp.bfloat16)
    )
    assert "adapter" not in params["layers"]["0"]["attention"]["query"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"layers": {"0": {"key": {"adapter": {"w": jnp.ones(2)}}}}}, "'layers/0/key/adapter/w'"),
        ({"classifier": {"scale": jnp.ones(3)}}, "'classifier/scale', for which"),
        ({"classifier": {"bias": jnp.ones(4)}}, r"'classifier/bias' has shape \(4,\).* \(3,\)"),
    ],
)
def test_foreign_leaves_are_not_combined(adapters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(small_params(), adapters)


@over_methods
def test_merged_kernels_are_the_definition(method) -> None:
    params, plan, adapters = odd(method)
    adapters = drawn(adapters)
    merged = merge(params, adapters, plan)
    for name, exact in reference_merge(params, adapters, plan).items():
        (kernel,) = merged[name].values()
        assert kernel.dtype == jnp.float32
        np.testing.assert_allclose(kernel, exact, atol=1e-5)


@over_methods
def test_unmerge_restores_the_base(method) -> None:
    for params, plan, adapters in (small(method), odd(method)):
        adapters = drawn(adapters)
        restored = unmerge(merge(params, adapters, plan), adapters, plan)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), restored, params)


def test_bias_is_merged_where_the_method_changes_it() -> None:
    params, plan, adapters = small(IA3(), train=("query/bias",))
    adapters = drawn(adapters)
    merged = merge(params, adapters, plan)
    query = adapters["layers"]["0"]["attention"]["query"]
    # The trained bias takes the base's place before the adapter scales it.
    np.testing.assert_allclose(
        merged["layers"]["0"]["attention"]["query"]["bias"],
        query["bias"] * query["adapter"]["l"],
        rtol=1e-6,
    )
    _, plan, _ = small(IA3(feedforward=True))
    assert {target.bias for target in plan.targets} == {"bias"}
    assert not plan.targets[0].method.changes_bias


def test_float64_merges_more_exactly() -> None:
    # Five factors round often in float32; in float64 only the final rounding is left.
    params, plan, adapters = odd(CDVFT(factors=5), targets=("heads",))
    adapters = drawn(adapters, 3.0)
    exact = reference_merge(params, adapters, plan)["heads"]
    single, double = (
        np.asarray(merge(params, adapters, plan, dtype=dtype)["heads"]["kernel"])
        for dtype in (jnp.float32, jnp.float64)
    )
    assert single.dtype == double.dtype == np.float32
    assert np.array_equal(double, exact.astype(np.float32))
    assert not np.array_equal(single, double)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_kernels_are_rounded_once(dtype) -> None:
    params, plan, adapters = odd(CDVFT(factors=5), dtype)
    adapters = drawn(adapters)
    merged = merge(params, adapters, plan)
    for name, exact in reference_merge(params, adapters, plan).items():
        (kernel,) = merged[name].values()
        assert kernel.dtype == dtype
        error = np.abs(np.asarray(kernel, np.float64) - exact)
        # Half a unit in the last place is what one rounding costs, and float32 adds next to none.
        assert np.all(error <= 0.5001 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-6)


def test_untouched_leaves_are_the_same_arrays() -> None:
    params, plan, adapters = small(train=("classifier/bias",))
    merged = merge(params, drawn(adapters), plan)
    changed = {target.kernel_path for target in plan.targets} | set(plan.trained)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        other = merged
        for name in names:
            other = other[name]
        assert (other is leaf) == (names not in changed)
    assert not np.array_equal(merged["classifier"]["bias"], params["classifier"]["bias"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_merge_refuses_what_is_not_finite(bad: float) -> None:
    params, plan, adapters = small(train=("classifier",))
    adapters["layers"]["1"]["mlp"]["up"]["adapter"]["a1"] = jnp.full(8, bad)
    with pytest.raises(ValueError, match="'layers/1/mlp/up' is not finite"):
        merge(params, adapters, plan)
    _, _, adapters = small(train=("classifier",))
    adapters["classifier"]["bias"] = jnp.full(3, bad)
    with pytest.raises(ValueError, match="'classifier/bias' is not finite"):
        merge(params, adapters, plan)


def test_merge_refuses_what_the_kernels_dtype_cannot_hold() -> None:
    params, plan, adapters = small(C3A(), jnp.float16, ("classifier",))
    adapters["classifier"]["adapter"]["w"] += 1e6
    with pytest.raises(ValueError, match="'classifier' is not finite"):
        merge(params, adapters, plan)


def test_adapters_that_do_not_fit_the_plan_are_not_merged() -> None:
    params, plan, adapters = small()
    _, _, others = small(targets=("query", "value"))
    with pytest.raises(ValueError, match="no target 'layers/0/attention/value'"):
        merge(params, others, plan)
    _, _, others = small(CDVFT(p=2))
    with pytest.raises(ValueError, match=r"0/attention/query' has arrays .* but CDVFT\(p=4"):
        merge(params, others, plan)
    with pytest.raises(ValueError, match="'classifier/bias' that the plan lacks"):
        merge(params, {**adapters, "classifier": {"bias": jnp.ones(3)}}, plan)


@pytest.mark.parametrize(
    ("off", "left"),
    [
        (".*", set()),
        (("query",), {"up"}),
        (("0/mlp/up", "1/attention/query"), {"query", "up"}),
        (r"layers/\d/mlp/.*", {"query"}),
    ],
    ids=["all", "by name", "by longer names", "by expression"],
)
def test_layers_switched_off_are_the_bases(off, left) -> None:
    params, plan, adapters = small(train=("classifier/bias",))
    some = switch_off(drawn(adapters), off)
    names = {path[3].key for path, _ in jax.tree_util.tree_leaves_with_path(some) if len(path) > 3}
    assert names == left and "bias" in some["classifier"]
    merged = merge(params, some, plan)
    same = [
        merged["layers"][i][part][name]["kernel"] is params["layers"][i][part][name]["kernel"]
        for i in "01"
        for part, name in (("attention", "query"), ("mlp", "up"))
    ]
    assert sum(same) == {".*": 4}.get(str(off), 2)


def test_switching_off_nothing_is_an_error() -> None:
    _, _, adapters = small()
    with pytest.raises(ValueError, match=r"no adapter .* matches \('value',\)"):
        switch_off(adapters, ("value",))


@pytest.mark.parametrize("bins", [(0,), (1,), (0, 2, 4), (1, 2, 3, 4)])
def test_rank_of_a_circulant_is_the_number_of_its_nonzero_bins(bins) -> None:
    _, plan, adapters = small(BCA(), targets=("0/attention/query",))
    spectrum = np.zeros(5)
    spectrum[list(bins)] = 1.0
    c = jnp.asarray(np.fft.irfft(spectrum, 8), jnp.float32)
    adapters["layers"]["0"]["attention"]["query"]["adapter"]["c"] = c[None, None]
    (report,) = report_adapters(adapters, plan)
    # The inner bins of a real spectrum stand for two each.
    assert report.rank == sum(1 if bin in (0, 4) else 2 for bin in bins)
    assert report.norm == pytest.approx(np.sqrt(8) * np.linalg.norm(c), rel=1e-5)


def test_report_of_a_method_that_multiplies_has_no_norm() -> None:
    _, plan, adapters = small(IA3())
    report = report_adapters(adapters, plan)[0]
    assert (report.norm, report.rank, report.parameter_count) == (None, None, 8)
    with pytest.raises(ValueError, match="ia3 adds nothing to the kernel of 'layers/0/attention"):
        dense_delta(plan.targets[0], adapters["layers"]["0"]["attention"]["query"]["adapter"])


def test_report_names_every_layer_of_a_stack() -> None:
    _, plan, adapters = odd(C3A(b=2))
    reports = {report.name: report for report in report_adapters(adapters, plan)}
    assert {"stack[0]", "stack[2]", "stacks[1][2]", "heads"} <= set(reports)
    assert len(reports) == 4 + 3 + 6
    assert {report.parameter_count for report in reports.values()} == {24}
    assert {(report.norm, report.rank, report.method) for report in reports.values()} == {
        (0.0, 0, "c3a")
    }
