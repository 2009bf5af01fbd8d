"""`python -m train.quickstart`: the whole way from a pretrained model to a merged export.

The task needs no download: which module of Python's standard library does a docstring belong to?
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
from rich.console import Console

import circflax as cf
from train import docstrings, settings
from train.config import Config
from train.run import run
from train.tasks.text import TextClassification, Texts

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Collects the data, trains, merges, exports, and checks the export.

    Args:
        argv: Settings that differ from ``configs/quickstart.yaml``, as for ``python -m train``.

    Returns:
        The exit code: 0 if the exported model's logits agree with the adapted model's.
    """
    console = Console()
    config = settings.load(["--config", str(CONFIG), "--run.resume", "false", *argv])
    directory = Path(config.run.output)
    _heading(console, "1. Data: which module does a docstring belong to?")
    texts = docstrings.collect()
    _say(console, f"{sum(map(len, texts.values()))} docstrings of {', '.join(texts)}")

    _heading(console, "2. Baseline: logistic regression on the frozen model's features")
    baseline = frozen_accuracy(config)
    _say(console, f"test accuracy {baseline:.4f}")

    adapter = config.adapter
    _heading(console, f"3. Training: {adapter.method} on {', '.join(adapter.targets)}")
    summary = run(config, console)

    _heading(console, "4. Merge and export to Hugging Face's layout")
    exported = directory / "merged"
    shutil.rmtree(exported, ignore_errors=True)
    cf.interop.export_adapted(directory, exported)
    difference = export_difference(directory, exported, config)
    _say(console, f"{exported}: logits within {difference:.1e} of the adapted model's")

    adapted = cf.load_adapters(directory / "adapter")
    lora = sum(
        cf.LoRA(r=8).parameter_count(target.in_features, target.out_features)
        for target in adapted.plan.targets
    )
    count = summary.trainable["adapters"]
    _heading(console, "Result")
    _say(
        console,
        f"test accuracy {summary.test['accuracy']:.4f}, frozen features {baseline:.4f}\n"
        f"{count:,} adapter parameters, {lora / count:.2f} times fewer than LoRA r=8 on the same"
        f" layers ({lora:,})\n"
        f"report: {directory / 'report.md'}, curves: {directory / 'curves.png'}",
    )
    if difference > 1e-4:
        _say(console, "error: the exported model does not compute what the adapted one does.")
        return 1
    return 0


def frozen_accuracy(config: Config) -> float:
    """Test accuracy of logistic regression on what the pretrained model gives a head to read.

    Args:
        config: The settings of the run to compare with.

    Returns:
        The accuracy, with the regularisation that is best on the validation split.
    """
    from sklearn.linear_model import LogisticRegression

    model, params, report = cf.interop.load_model(config.model.name, "base")
    texts = TextClassification(config).encode(report.directory)

    @jax.jit
    def pooled(params, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, params=params).pooler_output

    labels = {name: part.labels for name, part in texts.encoded.items()}
    features = {name: _outputs(pooled, params, texts, name) for name in texts.splits}
    classifiers = [
        LogisticRegression(C=c, max_iter=1000).fit(features["train"], labels["train"])
        for c in (0.1, 1.0, 10.0)
    ]
    best = max(
        classifiers,
        key=lambda each: each.score(features["validation"], labels["validation"]),
    )
    return best.score(features["test"], labels["test"])


def export_difference(directory: Path, exported: Path, config: Config) -> float:
    """The largest difference between the exported model's logits and the adapted model's.

    Args:
        directory: The run's directory.
        exported: The merged model's.
        config: The settings of the run.

    Returns:
        The difference over the test split.
    """
    adapted = cf.interop.load_adapted(directory)
    run_adapted = cf.linen.attach(adapted.model, adapted.file.plan)
    both = cf.combine(adapted.params, adapted.file.adapters)
    plain, params, _ = cf.interop.load_model(exported, "sequence-classification")
    texts = TextClassification(config).encode(exported)

    def logits(model, params):
        def predict(params, batch):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return model(**inputs, params=params).logits

        return _outputs(jax.jit(predict), params, texts, "test")

    return float(np.abs(logits(run_adapted, both) - logits(plain, params)).max())


def _outputs(predict, params, texts: Texts, split: str) -> np.ndarray:
    batches = texts.eval_batches(split)
    return batches.in_order([np.asarray(predict(params, batch)) for batch in batches])


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
