"""`circflax inspect --costs`: its tables and its errors."""

import re

import jax
import jax.numpy as jnp
import pytest

import circflax as cf
from circflax.cli import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import RobertaConfig

    path = tmp_path_factory.mktemp("roberta")
    RobertaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        type_vocab_size=1,
    ).save_pretrained(path)
    return str(path)


def rows(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}


def test_every_method_without_compiling(directory: str, capsys) -> None:
    assert main(["inspect", directory, "--costs", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    found = rows(out)
    assert {"none", "bitfit", "full", *cf.methods.METHODS} <= set(found)
    assert "XLA" not in out and "query, value" in out
    # Parameters, ratio to LoRA's.
    assert found["lora"][:2] == ["2,048", "1"]
    assert found["c3a"][:2] == ["128", "0.0625"]
    assert found["none"][0] == "0" and found["bitfit"][-1] == "–"
    assert "vera" in found and "fit: " not in out


def test_compiled_with_hyperparameters(directory: str, capsys) -> None:
    arguments = ["--batch", "4", "--length", "8", "--targets", "key", "--dtype", "bfloat16"]
    for method in ("none", "lora", "c3a:b=16,init_weights=gaussian"):
        arguments += ["--method", method]
    assert main(["inspect", f"{directory}/config.json", "--costs", *arguments]) == 0
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert "input_ids 4 × 8, bfloat16, adapters on key" in captured.out
    assert found["lora"][0] == "1,024"
    assert found["c3a:b=16,init_weights=gaussian"][0] == "256"
    peaks = {name: float(found[name][-2]) for name in ("none", "lora")}
    assert 0 < peaks["none"] < peaks["lora"]
    assert len(re.findall(r"compiling .+ … [\d.]+ s", captured.err)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lara"], "unknown method 'lara'; did you mean 'lora'? There are none, bit"),
        (["--method", "c3a:b=5"], "b=5 does not divide"),
        (["--method", "c3a:p=4"], "c3a has no hyperparameter 'p'"),
        (["--method", "bitfit:p=4"], "bitfit has no hyperparameters"),
        (["--targets", "qwery"], "did you mean 'query'?"),
        (["--batch", "0"], "0 × 32"),
        (["--length", "64"], "reads 32 tokens at most, not 64"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_errors(directory: str, arguments: list[str], message: str, capsys) -> None:
    assert main(["inspect", directory, "--costs", "--no-compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_methods_that_do_not_fit_are_said_not_to(tmp_path, capsys) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--costs", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "q_proj, v_proj" in out
    for name in ("none", "bitfit", "fourierft", "lamda"):
        assert re.search(rf"^{name} does not fit: ", out, re.MULTILINE)


def test_an_adapter_without_its_models_configuration(tmp_path, capsys) -> None:
    params = {"query": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
    config = cf.AdapterConfig(method=cf.C3A(b=16), targets=("query",), train=("bias",))
    plan = cf.make_plan(params, config)
    adapters = cf.init_adapters(jax.random.key(0), plan, params)
    cf.save_adapters(tmp_path, adapters, plan, params)
    assert main(["inspect", str(tmp_path), "--costs"]) == 0
    out = capsys.readouterr().out
    assert "1 × 4 × 4 blocks of 16" in out and "nothing was compiled" in out
    found = rows(out)
    assert found["adapter"][0] == "320" and found["lora"][0] == "1,088"


def test_an_adapter_beside_its_models_configuration(directory: str, tmp_path, capsys) -> None:
    outline = cf.interop.outline_model(directory)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), outline.params)
    config = cf.AdapterConfig(method=cf.BCA(), targets=("key",), train=("classifier",))
    plan = cf.make_plan(params, config, outline.layouts())
    cf.save_adapters(tmp_path, cf.init_adapters(jax.random.key(0), plan, params), plan, params)
    outline.model.config.architectures = ["RobertaForSequenceClassification"]
    outline.model.config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--costs", "--no-compile"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["adapter"][:2] == ["64", "0.0625"] and found["lora"][0] == "1,024"
