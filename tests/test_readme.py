"""Every code block of the README runs, with local copies in place of what the Hub has."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.tasks.language import write_llama

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "sentence", "its", "paraphrase", "."]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout beside a model and a dataset laid out as on the Hub, found by the same names."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("train", "configs"):
        shutil.copytree(ROOT / name, directory / name)
    for path in (directory / "configs").glob("*/*.yaml"):
        # Of a preset's many passes over its batches a few show as much.
        text = re.sub(r"epochs: \d+", "epochs: 2", path.read_text())
        text = re.sub(r" batch_size: \d+", " batch_size: 8", text)
        path.write_text(
            text.replace("dataset: digits", "dataset: digits\n  max_train_examples: 40")
        )
    _write_roberta(directory / "FacebookAI" / "roberta-base")
    rows = [f"{WORDS[i % 2]} {WORDS[2 + i % 2]} {WORDS[4 + i // 2 % 2]}" for i in range(40)]
    pairs = {"sentence1": rows, "sentence2": rows[::-1], "label": [0, 1] * 20}
    splits = ("train", "validation", "test")
    _write_dataset(directory / "nyu-mll" / "glue", "mrpc", pairs, splits)
    _write_vit(directory / "google" / "vit-base-patch16-224-in21k")
    # Its output layer is its embedding, as that of the real model.
    llama = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    write_llama(directory / "HuggingFaceTB" / "SmolLM-135M", **llama)
    questions, answers = zip(*((f"{i}+{i}?", f"#### {2 * i}") for i in range(40)), strict=True)
    sums = {"question": questions, "answer": answers}
    _write_dataset(directory / "openai" / "gsm8k", "main", sums, ("train", "test"))
    return directory


def _write_roberta(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import FlaxRobertaForMaskedLM, PreTrainedTokenizerFast, RobertaConfig

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(directory)
    # The width of the real model, so that its preset's block size fits.
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    FlaxRobertaForMaskedLM(config).save_pretrained(directory)


def _write_vit(directory: Path) -> None:
    from transformers import FlaxViTModel, ViTConfig, ViTImageProcessor

    config = ViTConfig(
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
    )
    FlaxViTModel(config).save_pretrained(directory)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)


def _write_dataset(
    directory: Path, subset: str, columns: dict[str, Sequence], splits: tuple[str, ...]
) -> None:
    """The same rows as every split of a subset."""
    import datasets

    for split in splits:
        file = directory / subset / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns).to_parquet(file)
    (directory / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in splits)
        + "---\n"
    )


def run(command: list[str], directory: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


# Runs each argument as a program of its own.
EACH = "import sys\nfor code in sys.argv[1:]:\n    exec(code, {'__name__': '__main__'})"


@pytest.mark.slow
def test_every_block_in_order(checkout: Path) -> None:
    kinds, codes = zip(*BLOCKS, strict=True)
    assert kinds == ("", *["sh"] * 3, *["python"] * 5)
    for code in codes[1:4]:
        run(["sh", "-euc", code], checkout)
    run([sys.executable, "-c", EACH, *codes[4:]], checkout)


def test_the_make_targets_exist() -> None:
    (commands,) = [code for kind, code in BLOCKS if not kind]
    makefile = (ROOT / "Makefile").read_text()
    for line in commands.splitlines():
        assert f"\n{line.removeprefix('make ')}:" in makefile
