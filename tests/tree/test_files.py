"""Adapter files: what is saved comes back whole, and what is not whole is not read."""

import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import BCA, C3A, CDVFT
from circflax.tree import AdapterConfig, init_adapters, load_adapters, make_plan, save_adapters
from tests.tree.models import drawn, odd_layouts, odd_params, small_params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(method=None, train=("classifier",), seed: int = 0):
    params = small_params(seed=seed)
    config = AdapterConfig(
        method=method or CDVFT(p=4, alpha=0.5),
        targets=("query", "up"),
        overrides={".*0/.*query": C3A(b=2), ".*1/.*up": BCA(p=3, scale=0.1)},
        train=train,
    )
    plan = make_plan(params, config)
    return params, plan, drawn(init_adapters(jax.random.key(0), plan, params))


def assert_same(tree, other) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    params, plan, adapters = adapted()
    save_adapters(tmp_path, adapters, plan, params, base="some/base")
    return tmp_path


def test_tree_and_plan_come_back(tmp_path: Path) -> None:
    params, plan, adapters = adapted()
    save_adapters(tmp_path / "new" / "directory", adapters, plan, params, base="some/base")
    file = load_adapters(tmp_path / "new" / "directory")
    assert (file.plan, file.base) == (plan, "some/base")
    assert_same(file.adapters, adapters)
    file.check_base(params)


def test_layouts_and_stacks_come_back(tmp_path: Path) -> None:
    params = odd_params()
    plan = make_plan(params, AdapterConfig(method=CDVFT(p=3), targets=".*"), odd_layouts())
    adapters = drawn(init_adapters(jax.random.key(0), plan, params))
    save_adapters(tmp_path, adapters, plan, params)
    file = load_adapters(tmp_path)
    assert (file.plan, file.base) == (plan, None)
    assert_same(file.adapters, adapters)
    file.check_base(params)


def test_model_of_one_layer_comes_back(tmp_path: Path) -> None:
    # Its kernel's module is the root, whose name is empty.
    params = {"kernel": jnp.ones((4, 4))}
    plan = make_plan(params, AdapterConfig(method=C3A(), targets=".*"))
    adapters = init_adapters(jax.random.key(0), plan, params)
    save_adapters(tmp_path, adapters, plan, params)
    file = load_adapters(tmp_path)
    assert file.plan == plan
    assert_same(file.adapters, adapters)


def test_base_is_recognised_in_another_dtype(saved: Path) -> None:
    load_adapters(saved).check_base(small_params(jnp.bfloat16))


def test_another_base_is_refused(saved: Path) -> None:
    file, params = load_adapters(saved), small_params()
    with pytest.raises(ValueError, match=r"another base model \(some/base\).* but the weights"):
        file.check_base(small_params(seed=1))
    wide = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), params)
    with pytest.raises(ValueError, match=r"query/kernel' has shape \(16, 8\)"):
        file.check_base(wide)
    del params["layers"]["1"]
    with pytest.raises(ValueError, match="no 'layers/1/attention/query/kernel'"):
        file.check_base(params)
    file.check_base({**small_params(), "extra": {"kernel": jnp.ones((2, 2))}})


def test_what_a_new_adapter_replaces_is_gone(saved: Path) -> None:
    params, plan, adapters = adapted(CDVFT(p=2), train=("norm",))
    save_adapters(saved, adapters, plan, params)
    file = load_adapters(saved)
    assert file.plan == plan and file.base is None
    assert_same(file.adapters, adapters)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_weights_cut_short_are_refused(saved: Path, part: float) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or corrupt"):
        load_adapters(saved)


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b"\xff" * 8 + b[8:], lambda b: b[:20] + b"\0\0" + b[22:], lambda b: b + b"x"],
)
def test_corrupt_weights_are_refused(saved: Path, spoil) -> None:
    (saved / WEIGHTS).write_bytes(spoil((saved / WEIGHTS).read_bytes()))
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or corrupt"):
        load_adapters(saved)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_configuration_cut_short_is_refused(saved: Path, part: float) -> None:
    content = (saved / CONFIG).read_bytes()
    (saved / CONFIG).write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f"{CONFIG} is not a whole adapter configuration"):
        load_adapters(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"format": "circflax-1"}',
        b'{"format": "circflax-1", "targets": 3}',
    ],
)
def test_corrupt_configuration_is_refused(saved: Path, content: bytes) -> None:
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole adapter configuration"):
        load_adapters(saved)


@pytest.mark.parametrize(
    ("fields", "found"),
    [({"format": "circflax-9"}, "'circflax-9'"), ({"peft_type": "C3A", "r": 8}, "None")],
)
def test_foreign_formats_are_refused(saved: Path, fields, found: str) -> None:
    # The file says what it is before anything else in it is read.
    (saved / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"has format {found}; this version reads 'circflax-1'"):
        load_adapters(saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_adapters(saved)


def test_files_of_two_adapters_do_not_mix(saved: Path, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    params, plan, adapters = adapted(CDVFT(p=2, alpha=0.5), ("classifier",))
    save_adapters(other, adapters, plan, params)
    (other / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    with pytest.raises(ValueError, match="a file was changed or replaced"):
        load_adapters(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": ["classifier/bias"]}, "'classifier/kernel' that the plan lacks"),
        ({"trained": ["classifier/bias", "classifier/kernel", "norm/bias"]}, "lacks 'norm/bias'"),
        ({"targets": []}, "the plan has no target"),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights(change, message, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_adapters(saved)


def test_bad_hyperparameters_in_a_file_are_named(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    config["targets"][0]["hyperparameters"]["bb"] = 3
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="c3a has no hyperparameter 'bb'"):
        load_adapters(saved)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved_and_what_was_saved_stays(saved: Path, bad) -> None:
    before = load_adapters(saved).adapters
    params, plan, adapters = adapted()
    adapters["layers"]["1"]["mlp"]["up"]["adapter"]["c"] += bad
    with pytest.raises(ValueError, match="'layers/1/mlp/up/adapter/c' is not finite"):
        save_adapters(saved, adapters, plan, params)
    assert_same(load_adapters(saved).adapters, before)


@pytest.mark.parametrize("full_after", [0, 1])
def test_full_disk_leaves_the_earlier_adapter(saved: Path, monkeypatch, full_after: int) -> None:
    before = load_adapters(saved)
    write, written = Path.write_bytes, []

    def write_until_full(path: Path, content: bytes) -> int:
        if len(written) == full_after:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, content)

    params, plan, adapters = adapted(CDVFT(p=2))
    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        save_adapters(saved, adapters, plan, params)
    monkeypatch.undo()
    after = load_adapters(saved)
    assert after.plan == before.plan
    assert_same(after.adapters, before.adapters)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_adapters_that_do_not_fit_the_plan_are_not_saved(tmp_path: Path) -> None:
    params, _, adapters = adapted()
    _, plan, _ = adapted(CDVFT(p=2))
    with pytest.raises(ValueError, match="has arrays"):
        save_adapters(tmp_path, adapters, plan, params)
    assert not list(tmp_path.iterdir())
