"""Models from configurations alone."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from transformers import BertConfig, GPT2Config, ViTConfig, WhisperConfig, XLNetConfig

import circflax as cf
from benchmarks import papers
from circflax.interop import CheckpointError, outline_model

# Parameters with a classifier of two classes, or LLaMA's own head.
SIZES = {
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "vit-base": 85_800_194,
    "vit-large": 303_303_682,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


@pytest.mark.parametrize("model", SIZES)
def test_the_papers_models(model: str) -> None:
    outline = papers.outline(model)
    leaves = jax.tree.leaves(outline.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == SIZES[model]
    layers = outline.model.config.num_hidden_layers
    widths = {"base": 768, "large": 1024}.get(model.rpartition("-")[2], 4096)
    costs = papers.count(model, cf.CDVFT(p=widths))
    values = 1024 if model == "llama-3-8b" else widths
    expected = 3 * widths + widths + values + widths
    assert costs.adapter_parameters == layers * expected
    assert outline.new_leaves == () if "llama" in model else len(outline.new_leaves) > 0


def test_every_place_of_a_configuration(tmp_path) -> None:
    config = BertConfig(**SMALL)
    config.save_pretrained(tmp_path)
    outlines = [outline_model(place) for place in (config, tmp_path, tmp_path / "config.json")]
    shapes = [jax.tree.map(lambda leaf: leaf.shape, outline.params) for outline in outlines]
    assert shapes[0] == shapes[1] == shapes[2]
    assert type(outlines[0].model).__name__ == "FlaxBertForSequenceClassification"


def test_dtype_and_head() -> None:
    outline = outline_model(BertConfig(**SMALL), "masked-lm", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(outline.params)} == {jnp.dtype("bfloat16")}
    assert type(outline.model).__name__ == "FlaxBertForMaskedLM" and outline.new_leaves == ()
    config = BertConfig(**SMALL, architectures=["BertForTokenClassification"])
    assert outline_model(config, "named").new_leaves
    with pytest.raises(CheckpointError, match="no Flax class for the architectures None"):
        outline_model(BertConfig(**SMALL), "named")


def test_batches_and_layouts() -> None:
    bert = outline_model(BertConfig(**SMALL))
    assert bert.inputs(3)["input_ids"].shape == (3, 24)
    assert bert.inputs(3, 5)["attention_mask"].shape == (3, 5)
    logits = jax.eval_shape(bert.run, bert.params, bert.inputs(3, 5))
    assert logits.shape == (3, 2)
    assert sum(isinstance(layout, cf.tree.Layout) for layout in bert.layouts().values()) == 14
    vit = outline_model(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert vit.inputs(3)["pixel_values"].shape == (3, 3, 224, 224)
    assert jax.eval_shape(vit.run, vit.params, vit.inputs(3)).shape == (3, 2)
    gpt = outline_model(GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=1, n_head=2))
    assert jax.eval_shape(gpt.run, gpt.params, gpt.inputs(2)).shape == (2, 24, 50)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0), (-1, None)])
def test_batches_of_nothing(batch: int, length: int | None) -> None:
    with pytest.raises(CheckpointError, match="at least one example of one token"):
        outline_model(BertConfig(**SMALL)).inputs(batch, length)


def test_what_has_no_outline(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="reads 24 tokens at most, not 25"):
        outline_model(BertConfig(**SMALL)).inputs(1, 25)
    with pytest.raises(CheckpointError, match="no Flax model for `xlnet`; it has none at all"):
        outline_model(XLNetConfig())
    whisper = WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    with pytest.raises(CheckpointError, match="reads input_features, decoder_input_ids"):
        outline_model(whisper).inputs(1)
    with pytest.raises(CheckpointError, match="neither a local file or directory nor"):
        outline_model("nobody/nothing")
    with pytest.raises(CheckpointError, match="lacks the model's configuration"):
        outline_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(CheckpointError, match="names no `model_type`"):
        outline_model(tmp_path)
