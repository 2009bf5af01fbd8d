"""`circflax inspect --costs`: its tables and its errors."""

import re

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
