"""The loss and its gradients are PyTorch's, on a padded batch of sentence pairs."""

import jax
import numpy as np
import pytest

import circflax as cf
from tests.train.conftest import WORDS
from train.steps import make_forward
from train.tasks import classification
from train.tasks.text import Split, epoch_batches, tokenize

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_loss_and_gradients_are_pytorchs(tiny_model, tmp_path, kind) -> None:
    import transformers

    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 9, 12)]
    numbers = kind == "numbers"
    labels = np.asarray(rng.integers(0, 2, 6), np.float32 if numbers else np.int32)
    split = Split(tuple(sentences[:6]), tuple(sentences[6:]), labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    encoded = tokenize(split, tokenizer, 24)
    (batch,) = epoch_batches(encoded, batch_size=8, buckets=[24], shuffle=False)
    assert batch["token_type_ids"].any()

    config = {"num_labels": 1 if numbers else 2}
    model, base, report = cf.interop.load_model(
        tiny_model, "sequence-classification", config=config
    )
    added = {path: np.asarray(base["classifier"][path[-1]]) for path in report.initialised}
    cf.interop.export_merged(tiny_model, tmp_path / "merged", model, {}, added)
    oracle = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = {
        name: torch.tensor(batch[name][:6].astype(np.int64))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    expected = oracle(**inputs, labels=torch.tensor(batch["labels"][:6]).to(_dtype(numbers))).loss
    expected.backward()

    plan = cf.make_plan(base, cf.AdapterConfig(train=".*"))
    forward = make_forward(model, plan)

    def loss(small):
        total, count = classification.losses(forward(small, base, batch), batch)
        return total / count

    value, gradients = jax.value_and_grad(loss)(base)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    query = gradients["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
    weight = oracle.bert.encoder.layer[0].attention.self.query.weight
    np.testing.assert_allclose(query, weight.grad.numpy().T, rtol=1e-4, atol=1e-7)


def _dtype(numbers: bool):
    return torch.float32 if numbers else torch.int64


def test_gradient_checkpointing_changes_no_gradient(tiny_model) -> None:
    model, base, _ = cf.interop.load_model(tiny_model, "sequence-classification")
    plan = cf.make_plan(base, cf.AdapterConfig(train=".*"))
    ids = np.random.default_rng(0).integers(5, 15, (3, 7)).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.asarray([0, 1, 1], np.int32), "weights": np.ones(3)}

    def gradients(rematerialize: bool):
        forward = make_forward(model, plan, rematerialize=rematerialize)
        loss = jax.grad(lambda small: classification.losses(forward(small, base, batch), batch)[0])
        return str(jax.make_jaxpr(loss)(base)), jax.jit(loss)(base)

    (plain, expected), (recomputed, found) = gradients(False), gradients(True)
    assert "remat" in recomputed and recomputed.count("remat") > plain.count("remat")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
