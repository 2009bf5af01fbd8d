"""Texts with labels: from files or the Hub to tokens to batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from train import docstrings, glue, metrics
from train.config import Config, DataConfig
from train.tasks import classification
from train.tasks.batches import Batch, Batches, PlannedBatch, filled, plan, weights
from train.tasks.hub import load_dataset
from train.tasks.records import DataError, field_of, read_records
from train.tasks.splits import Given, Splits, complete, listed, sorted_names

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PreTrainedTokenizerFast

_FORMATS = (".tsv", ".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Split:
    """Examples as columns.

    Attributes:
        text: First sentences.
        text_pair: Second sentences, if the task has them.
        labels: Class indices (int32) or numbers to predict (float32).
    """

    text: tuple[str, ...]
    text_pair: tuple[str, ...] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at these positions."""

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in indices)

        pair = None if self.text_pair is None else pick(self.text_pair)
        return Split(pick(self.text), pair, self.labels[indices])


class TextClassification:
    """Texts with labels, read from files or the Hub; see `train.tasks.task.Task`."""

    head = "sequence-classification"

    def __init__(self, config: Config) -> None:
        """Reads the examples.

        Args:
            config: The settings of the run.

        Raises:
            DataError: If examples cannot be read, or do not fit.
            ValueError: If the metric that is asked for is not computed for them.
        """
        self._config = config
        self.splits = load_splits(config.data)
        classes = len(self.splits.label_names)
        self.metric = metrics.choose(config.run.metric, config.data.task, classes)
        self.name = _name(config.data)
        self.head_config = classification.head_config(self.splits.label_names)

    def encode(self, directory: Path, model: "FlaxPreTrainedModel | None" = None) -> "Texts":
        """Tokenizes the examples.

        Args:
            directory: The base model's, with its tokenizer.
            model: Has no part in it.

        Returns:
            The tokens.

        Raises:
            DataError: If tokenizer, settings and examples do not fit.
        """
        del model
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        length = self._config.data.max_length
        encoded = {
            name: tokenize(part, tokenizer, length) for name, part in self.splits.parts().items()
        }
        cut = (
            f"{name}: {part.truncated} of {len(part)} examples were cut to {length} tokens"
            for name, part in encoded.items()
            if part.truncated
        )
        names = self.splits.label_names
        return Texts(self._config, encoded, names, (*self.splits.notes, *cut))


@dataclass(frozen=True)
class Texts(classification.Labelled):
    """Tokenized texts with labels; see `train.tasks.task.Workload`.

    Attributes:
        config: The settings of the run.
        encoded: The tokens of each split.
        label_names: The classes; none for regression.
        notes: Sentences on the splits and on what was cut.
    """

    config: Config
    encoded: Mapping[str, "Encoded"]
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    unit = "tokens"

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that there are."""
        return tuple(self.encoded)

    def train_batches(self, seed: int, epoch: int) -> Batches:
        """The batches of one pass, shuffled by seed and epoch."""
        return epoch_batches(
            self.encoded["train"],
            batch_size=self.config.optim.batch_size,
            buckets=self.config.data.bucket_lengths,
            seed=seed,
            epoch=epoch,
        )

    def eval_batches(self, split: str) -> Batches:
        """The batches of a split, to be predicted."""
        return epoch_batches(
            self.encoded[split],
            batch_size=self.config.optim.eval_batch_size,
            buckets=self.config.data.bucket_lengths,
            shuffle=False,
        )

    def size(self, batch: Batch) -> int:
        """The tokens of a batch."""
        return int(batch["attention_mask"].sum())

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch as it is."""
        return dict(batch)

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split's examples."""
        return self.encoded[split].labels


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples of different lengths, end to end in flat arrays.

    Attributes:
        input_ids: Token ids of all examples (int32).
        token_type_ids: Segment ids of all examples (int32), if the tokenizer gives them.
        offsets: Where each example begins, and the end of the last one.
        labels: Class indices (int32) or numbers to predict (float32).
        pad_id: Token id to pad with.
        truncated: How many examples lost tokens to the length limit.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)


def load_splits(config: DataConfig) -> Splits[Split]:
    """Reads the examples of a run.

    Args:
        config: Where they are and what their columns mean.

    Returns:
        The splits. Without a validation file, or with a GLUE task from the Hub, the validation
        split is held out from the training split.

    Raises:
        DataError: If a file or dataset is missing, empty or unreadable, or a row does not fit.
    """
    if config.task == docstrings.NAME:
        given = _load_docstrings()
    elif config.task is not None:
        given = _load_glue(config.task)
    else:
        given = _load_files(config)
    return complete(given, config)


def tokenize(split: Split, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> Encoded:
    """Turns sentences into token ids, without padding.

    Args:
        split: The examples.
        tokenizer: A fast tokenizer of transformers.
        max_length: Longest sequence, special tokens included; of two sentences the longer one
            is cut first.

    Returns:
        The token ids and how many examples were truncated.

    Raises:
        DataError: If the tokenizer is not a fast one, allows less than `max_length` tokens, or
            makes no token of an example.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"`{type(tokenizer).__name__}` is not a fast tokenizer; a tokenizer.json is needed"
        )
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"`data.max_length` {max_length} exceeds the {tokenizer.model_max_length} tokens "
            "that the tokenizer allows"
        )
    ids, types, truncated = [], [], 0
    # Tokenizing in parts bounds the memory of the tokenizer's own, much larger records.
    for start in range(0, len(split), 1024):
        part = slice(start, start + 1024)
        pair = None if split.text_pair is None else list(split.text_pair[part])
        encodings = tokenizer(
            list(split.text[part]), pair, truncation="longest_first", max_length=max_length
        )
        ids += [np.asarray(row, np.int32) for row in encodings["input_ids"]]
        types += [np.asarray(row, np.int32) for row in encodings.get("token_type_ids", ())]
        truncated += sum(bool(encoding.overflowing) for encoding in encodings.encodings)
    lengths = np.asarray([len(row) for row in ids])
    if not lengths.all():
        raise DataError(f"example {int(np.argmin(lengths)) + 1} has no tokens: its text is empty")
    return Encoded(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types) if types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=split.labels,
        # Padding is masked, so any id serves a tokenizer that has none for it.
        pad_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        truncated=truncated,
    )


def epoch_batches(
    encoded: Encoded,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> Batches:
    """Cuts examples into batches for one pass.

    Args:
        encoded: The examples.
        batch_size: Rows of every batch.
        buckets: Increasing sequence lengths; the last one must hold the longest example.
        seed: Seed of the run.
        epoch: Number of the pass; each has an order of its own.
        shuffle: Whether to shuffle examples and batches, for training.

    Returns:
        The batches: every example once, and as many batches in every epoch.

    Raises:
        DataError: If an example is longer than the last bucket.
    """
    rng = np.random.default_rng([seed, epoch]) if shuffle else None
    planned = plan(encoded.lengths, batch_size, buckets, rng)
    return Batches(lambda batch: collate(encoded, batch, batch_size), planned)


def collate(encoded: Encoded, planned: PlannedBatch, batch_size: int) -> Batch:
    """Makes the arrays of one batch.

    Args:
        encoded: The examples.
        planned: Which of them, and the length to pad to.
        batch_size: Rows of the batch.

    Returns:
        ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer gives them (int32),
        ``labels`` (int32 or float32) and ``weights`` (float32): 1 for examples, 0 for the rows
        that fill up a partial batch.
    """
    rows = filled(planned, batch_size)
    starts, lengths = encoded.offsets[rows], encoded.lengths[rows]
    columns = np.arange(planned.length)
    mask = columns < lengths[:, None]
    places = np.where(mask, starts[:, None] + columns, 0)
    batch = {
        "input_ids": np.where(mask, encoded.input_ids[places], np.int32(encoded.pad_id)),
        "attention_mask": mask.astype(np.int32),
        "labels": encoded.labels[rows],
        "weights": weights(planned, batch_size),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = np.where(mask, encoded.token_type_ids[places], np.int32(0))
    return batch


def _load_glue(task: str) -> Given[Split]:
    spec = glue.TASKS[task]
    dataset = load_dataset(f"GLUE task `{task}`", glue.DATASET, task)

    def split(name: str) -> Split:
        part = dataset[name]
        if not len(part):
            raise DataError(f"split `{name}` of GLUE task `{task}` is empty")
        labels = np.asarray(part["label"], np.int32 if spec.labels else np.float32)
        if spec.labels and not (0 <= labels.min() and labels.max() < len(spec.labels)):
            raise DataError(
                f"split `{name}` of GLUE task `{task}` has labels from {labels.min()} to "
                f"{labels.max()}, but there are {len(spec.labels)} classes"
            )
        pair = None if spec.text_pair is None else tuple(part[spec.text_pair])
        return Split(tuple(part[spec.text]), pair, labels)

    note = f"test: the official {spec.validation} split, as the official test labels are hidden"
    return Given(split("train"), None, split(spec.validation), spec.labels, (note,))


def _load_docstrings() -> Given[Split]:
    names = tuple(docstrings.collect())

    def split(part: str) -> Split:
        texts, modules = zip(*docstrings.examples(part), strict=True)
        return Split(texts, None, np.asarray([names.index(m) for m in modules], np.int32))

    return Given(split("train"), split("validation"), split("test"), names)


def _load_files(config: DataConfig) -> Given[Split]:
    root = Path(config.root or ".")

    def read(name: str | None) -> _Table | None:
        return None if name is None else _read_table(root / name, config)

    tables = [read(name) for name in (config.train, config.validation, config.test)]
    names = () if config.regression else config.labels or _class_names(tables[0])
    return Given(*(table and _to_split(table, names) for table in tables), names)


@dataclass(frozen=True)
class _Table:
    """The columns of a file that are used, with the line of each row for messages."""

    path: Path
    text: tuple[str, ...]
    text_pair: tuple[str, ...] | None
    labels: tuple[str, ...]
    lines: tuple[int, ...]


def _read_table(path: Path, config: DataConfig) -> _Table:
    records = read_records(path, _FORMATS, columns=config.columns, quoting=config.quoting)
    wanted = [name for name in (config.text, config.text_pair, config.label) if name is not None]
    rows = [[_field(record, name, path, line) for name in wanted] for line, record in records]
    text, *pair, labels = zip(*rows, strict=True)
    return _Table(path, text, pair[0] if pair else None, labels, tuple(line for line, _ in records))


def _field(record: dict[str, Any], name: str, path: Path, line: int) -> str:
    value = field_of(record, name, path, line)
    if not isinstance(value, str | int | float):
        raise DataError(f"`{path}`, line {line}: `{name}` must be text or a number, not {value}")
    return str(value)


def _class_names(table: _Table) -> tuple[str, ...]:
    names = sorted_names(table.labels)
    if len(names) < 2:
        raise DataError(f"`{table.path}` holds only the label {table.labels[0]!r}")
    return names


def _to_split(table: _Table, names: tuple[str, ...]) -> Split:
    convert = _class_index(names) if names else _number
    labels = []
    for line, label in zip(table.lines, table.labels, strict=True):
        try:
            labels.append(convert(label))
        except ValueError as error:
            raise DataError(f"`{table.path}`, line {line}: {error}") from None
    dtype = np.int32 if names else np.float32
    return Split(table.text, table.text_pair, np.asarray(labels, dtype))


def _class_index(names: tuple[str, ...]) -> Callable[[str], int]:
    index = {name: i for i, name in enumerate(names)}

    def convert(label: str) -> int:
        if label not in index:
            raise ValueError(f"label {label!r} is none of the classes {listed(names)}")
        return index[label]

    return convert


def _number(label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"label {label!r} is not a number")
    return value


def _name(data: DataConfig) -> str:
    """The GLUE task, or the name of the local files' directory, or of the file."""
    path = Path(data.root or ".", data.train or "")
    return data.task or path.parent.name or path.stem
