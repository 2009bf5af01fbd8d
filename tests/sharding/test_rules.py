"""Where arrays lie: by rules, by what divides, and after their kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import circflax as cf
from circflax import sharding
from circflax.sharding import ShardingError
from tests.architectures import architecture
from tests.methods.cases import CASES, Case

# Some leaves of every family, and which of their axes are used in parts.
SPLIT = {
    "bert": {
        "self/query/kernel": (None, "tensor"),
        "self/query/bias": ("tensor",),
        "attention/output/dense/kernel": ("tensor", None),
        "attention/output/dense/bias": (None,),
        "intermediate/dense/kernel": (None, "tensor"),
        "0/output/dense/kernel": ("tensor", None),
        "classifier/kernel": (None, None),
    },
    "roberta": {"self/key/kernel": (None, "tensor"), "classifier/out_proj/kernel": (None, None)},
    "vit": {"attention/value/kernel": (None, "tensor"), "0/output/dense/kernel": ("tensor", None)},
    "gpt2": {
        "attn/c_attn/kernel": ("tensor", None),
        "attn/c_proj/kernel": (None, "tensor"),
        "mlp/c_fc/bias": ("tensor",),
        "mlp/c_proj/bias": (None,),
    },
    "llama": {
        "self_attn/q_proj/kernel": (None, "tensor"),
        "self_attn/o_proj/kernel": ("tensor", None),
        "mlp/gate_proj/kernel": (None, "tensor"),
        "mlp/down_proj/kernel": ("tensor", None),
        "input_layernorm/weight": (None,),
    },
    "mistral": {"self_attn/v_proj/kernel": (None, "tensor")},
    "gemma": {"mlp/up_proj/kernel": (None, "tensor")},
    "bart": {
        "encoder_attn/k_proj/kernel": (None, "tensor"),
        "self_attn/out_proj/kernel": ("tensor", None),
        "layers/0/fc1/bias": ("tensor",),
        "layers/0/fc2/kernel": ("tensor", None),
    },
}


def _shapes(id: str) -> dict:
    entry = architecture(id)
    return cf.interop.outline_model(entry.config(), entry.head).params


def _spec(tree: dict, ending: str) -> tuple:
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
    return next(tuple(leaf.spec) for name, leaf in flat.items() if name.endswith(ending))


@pytest.mark.parametrize("id", SPLIT)
def test_every_family_is_used_in_parts(id: str) -> None:
    tree = sharding.shard_params(_shapes(id), sharding.make_mesh(tensor=4))
    # One device on the axis `fsdp` divides everything, which says nothing here.
    for ending, parts in SPLIT[id].items():
        found = tuple(None if entry == "fsdp" else entry for entry in _spec(tree, ending))
        assert found == parts, ending


@pytest.mark.parametrize("id", ["bert", "vit", "gpt2", "gemma", "bart"])
def test_every_family_computes_the_same_in_parts(id: str) -> None:
    entry = architecture(id)
    outline, inputs = cf.interop.outline_model(entry.config(), entry.head), entry.inputs()
    params, mesh = outline.init(0), sharding.make_mesh(fsdp=2, tensor=4)
    rows = sharding.shard_batch(mesh)
    shardings = sharding.shard_params(params, mesh)
    run = jax.jit(cf.linen.shard_rows(outline.run, rows), in_shardings=(shardings, rows))
    expected = jax.jit(outline.run)(params, inputs)
    np.testing.assert_allclose(run(params, inputs), expected, atol=1e-5)


def test_fsdp_cuts_the_longest_axis_that_is_left() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    tree = sharding.shard_params(_shapes("llama"), mesh)
    assert _spec(tree, "mlp/down_proj/kernel") == ("tensor", "fsdp")
    assert _spec(tree, "mlp/up_proj/kernel") == ("fsdp", "tensor")
    assert _spec(tree, "input_layernorm/weight") == (None,)
    alone = sharding.shard_params({"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}, mesh)
    assert tuple(alone["kernel"].spec) == (None, "fsdp")


def test_what_an_axis_does_not_divide_is_whole_and_named(caplog: pytest.LogCaptureFixture) -> None:
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    odd = jax.ShapeDtypeStruct((7, 9), jnp.float32)
    params = {f"layers_{i}": {"fc1": {"kernel": odd}} for i in range(3)}
    tree = sharding.shard_params(params, mesh)
    assert _spec(tree, "fc1/kernel") == (None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "`layers_*/fc1/kernel` of shape (7, 9) (3 of them) is not cut up over `tensor`, whose 4"
        " devices do not divide it.",
        "`layers_*/fc1/kernel` of shape (7, 9) (3 of them) is not cut up over `fsdp`, whose 2"
        " devices do not divide it.",
    ]


def test_stacked_layers_keep_their_axis_unless_a_rule_names_it() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = {"layers": {"fc1": {"kernel": jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)}}}
    tree = sharding.shard_params(params, mesh)
    assert _spec(tree, "kernel") == (None, "fsdp", "tensor")
    own = (r"layers/.*/kernel", ("fsdp", None, "tensor"))
    tree = sharding.shard_params(params, mesh, (own, *sharding.RULES))
    assert _spec(tree, "kernel") == ("fsdp", None, "tensor")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("fc(", (None,)), "the rule 'fc(' is not a regular expression"),
        ((".*", ("model",)), "the rule '.*' names the axis 'model', but the mesh has data, fsdp"),
        ((".*", ("fsdp", "fsdp")), "the rule '.*' names an axis of the mesh twice"),
        ((".*", (None, None, None)), "is for arrays with 3 axes, but `kernel` has 2"),
    ],
)
def test_rules_that_make_no_sense(rule: sharding.Rule, message: str) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(ShardingError) as error:
        sharding.shard_params(params, sharding.make_mesh(), [rule])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "a mesh with `data` 3 × `fsdp` 1 × `tensor` 1 needs 3 devices, but there are 8",
        ),
        ({"fsdp": 3}, "`fsdp` 3 × `tensor` 1 needs a multiple of 3 devices, but there are 8"),
        ({"tensor": 0}, "the mesh's `tensor` must be at least 1, but is 0"),
    ],
)
def test_meshes_that_do_not_fit(sizes: dict, message: str) -> None:
    with pytest.raises(ShardingError) as error:
        sharding.make_mesh(**sizes)
    assert message in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_part_of_an_adapters_axis_reaches_the_same_part_of_the_layer(case: Case) -> None:
    """Changing half of an axis changes half of the inputs or outputs, so that it can lie there."""
    params = case.params()
    for name, roles in case.method.axes().items():
        assert len(roles) == params[name].ndim
        for axis, role in enumerate(roles):
            size = params[name].shape[axis]
            features = case.in_features if role == "in" else case.out_features
            if role is None or size % 2 or features % 2:
                continue
            half = np.ones(size)
            half[: size // 2] = 1.5
            factor = np.expand_dims(half, [a for a in range(len(roles)) if a != axis])
            changed = _merged(case, params | {name: params[name] * factor})
            changed = np.abs(changed - _merged(case, params)).sum(axis=1 if role == "in" else 0)
            # The last of several blocks may reach beyond the layer.
            if params[name].ndim < 3 or size * params[name].shape[-1] == features:
                np.testing.assert_allclose(changed[features // 2 :], 0, atol=1e-6)
            assert changed[: features // 2].any()


def _merged(case: Case, params: dict) -> np.ndarray:
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    return np.asarray(case.method.merge(arrays, jnp.asarray(case.kernel(), jnp.float32)))


@pytest.mark.parametrize("method", [cf.CDVFT(), cf.C3A(b=4), cf.LoRA(r=2), cf.IA3()], ids=str)
def test_adapters_and_their_moments_follow_their_kernels(method: cf.Method) -> None:
    params = _shapes("llama")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    targets = ("v_proj", "o_proj")
    config = cf.AdapterConfig(method=method, targets=targets, train=("norm", "lm_head"))
    plan = cf.make_plan(params, config)
    base = sharding.shard_params(params, mesh)
    small = cf.init_adapters(jax.random.key(0), plan, params)
    tree = sharding.shard_adapters(plan, base)
    assert jax.tree.structure(tree) == jax.tree.structure(small)
    assert tree["lm_head"]["kernel"] == base["lm_head"]["kernel"]
    layer = tree["model"]["layers"]["0"]["self_attn"]
    for target in plan.targets[:2]:
        role = "in" if target.path[-1] == "o_proj" else "out"
        for name, at in layer[target.path[-1]]["adapter"].items():
            roles = method.axes()[name]
            expected = tuple("tensor" if each == role else None for each in roles)
            divides = all(
                size % 2 == 0
                for size, each in zip(target.shapes[name].shape, roles, strict=True)
                if each == role
            )
            assert tuple(at.spec) == (expected if divides else (None,) * len(roles))
    state = jax.eval_shape(optax.adam(0.1).init, small)
    moments = sharding.shard_like(state, small, tree, mesh)[0]
    assert moments.mu == moments.nu == tree
    assert moments.count == sharding.replicated(mesh)


def test_the_table_counts_what_each_device_holds() -> None:
    mesh = sharding.make_mesh(fsdp=8)
    params = _shapes("bert")
    shardings = sharding.shard_params(params, mesh)
    table = sharding.tabulate(params, shardings)
    held = sum(
        np.prod(at.shard_shape(leaf.shape)) * 4
        for leaf, at in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    )
    assert max(map(len, table.splitlines())) <= 90
    assert f"per device {held / 1000:.3g} kB" in table.splitlines()[-1]
    assert "layer/*/intermediate/dense/kernel " in table
