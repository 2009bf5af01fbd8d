"""What trains, in numbers and as a table."""

import jax
import jax.numpy as jnp
import pytest

from circflax.methods import BCA, C3A, CDVFT
from circflax.tree import AdapterConfig, make_plan, summarize
from circflax.tree._summary import human_bytes
from tests.tree.models import abstract, odd_layouts, odd_params, small_params


def roberta(layers: int = 12, width: int = 768, vocabulary: int = 50265):
    """Shapes of RoBERTa's parameters, whose names are long."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(inputs, outputs):
        return {"kernel": leaf(inputs, outputs), "bias": leaf(outputs)}

    def norm():
        return {"scale": leaf(width), "bias": leaf(width)}

    def layer():
        attention = {name: dense(width, width) for name in ("query", "key", "value")}
        output = {"dense": dense(width, width), "LayerNorm": norm()}
        return {
            "attention": {"self": attention, "output": output},
            "intermediate": {"dense": dense(width, 4 * width)},
            "output": {"dense": dense(4 * width, width), "LayerNorm": norm()},
        }

    return {
        "roberta": {
            "embeddings": {
                "word_embeddings": {"embedding": leaf(vocabulary, width)},
                "position_embeddings": {"embedding": leaf(514, width)},
                "token_type_embeddings": {"embedding": leaf(1, width)},
                "LayerNorm": norm(),
            },
            "encoder": {"layer": {str(i): layer() for i in range(layers)}},
        },
        "classifier": {"dense": dense(width, width), "out_proj": dense(width, 2)},
    }


def test_numbers_on_roberta_base() -> None:
    params = roberta()
    config = AdapterConfig(method=CDVFT(), targets=("query", "value"), train=("classifier",))
    summary = summarize(params, make_plan(params, config))
    assert summary.targets == 24
    assert summary.adapter_parameters == 55_296
    assert summary.trained_parameters == 592_130
    assert summary.trainable_parameters == 647_426
    # RoBERTa-base has 124,647,170 parameters with a classifier of two classes.
    assert summary.base_parameters == 124_647_170
    assert summary.base_bytes == 4 * 124_647_170
    assert summary.trainable_bytes == 4 * 647_426
    assert summary.percent == pytest.approx(100 * 647_426 / (124_647_170 + 55_296))
    rows = {row.name: (row.method, row.shape, row.count, row.parameters) for row in summary.rows}
    name = "roberta/encoder/layer/*/attention/self/query"
    assert rows[name] == ("cdvft", "768 x 768", 12, 27_648)
    assert rows["classifier/out_proj/bias"] == ("full", "2", 1, 2)


@pytest.mark.parametrize("train", [("classifier",), ".*(embedding|bias|scale)", ("wide",)], ids=str)
def test_table_fits_into_80_columns(train) -> None:
    params = roberta(layers=48, width=8192, vocabulary=250_000)
    params["wide"] = {"kernel": jax.ShapeDtypeStruct((16, 16, 8192, 8192), jnp.float32)}
    targets = r".*/(query|value|(attention/)?output/dense|intermediate/dense)"
    overrides = {".*/query": BCA(p=64), ".*/value": C3A(b=1)}
    config = AdapterConfig(method=CDVFT(), targets=targets, overrides=overrides, train=train)
    table = str(summarize(params, make_plan(params, config)))
    assert max(map(len, table.splitlines())) <= 80
    assert "self/query" in table and "self/value" in table


def test_arrays_and_their_descriptions_give_the_same_summary() -> None:
    params = small_params()
    plan = make_plan(params, AdapterConfig(method=C3A(), targets=("up",), train=("norm",)))
    assert summarize(params, plan) == summarize(abstract(params), plan)


def test_layers_of_a_stack_count_one_by_one() -> None:
    params = odd_params(jnp.bfloat16)
    config = AdapterConfig(method=C3A(b=2), targets=("stack", "stacks"))
    summary = summarize(params, make_plan(params, config, odd_layouts()))
    assert [(row.name, row.count, row.parameters) for row in summary.rows] == [
        ("stack", 3, 72),
        ("stacks", 6, 144),
    ]
    assert summary.targets == 9
    assert summary.base_bytes == 2 * summary.base_parameters


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (498_589_000, "499 MB"),
     (13_476_000_000, "13.5 GB"), (2_500_000_000_000, "2.5 TB")],
)  # fmt: skip
def test_bytes_have_three_digits(size: int, text: str) -> None:
    assert human_bytes(size) == text
