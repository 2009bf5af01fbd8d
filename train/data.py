"""Examples: from files or the Hub to tokens to batches of few shapes.

`load_splits` reads text and labels, `tokenize` turns a split into token ids, `epoch_batches`
cuts these into batches. XLA compiles once per shape, so every batch has the full batch size and
is padded to one of a few bucket lengths. A batch is a pure function of the examples, the seed,
the epoch and its number, so that a resumed run goes on with exactly the batches that were left.
"""

import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from train import docstrings, glue
from train.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, np.ndarray]


class DataError(ValueError):
    """Data that does not fit; the message is one sentence for the person who provided it."""


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


@dataclass(frozen=True)
class Splits:
    """The examples of a run.

    Attributes:
        train: Examples to train on.
        validation: Examples that choose the best epoch.
        test: Examples to report on, if there are any.
        label_names: Class names in the order of their indices; empty for regression.
        notes: Sentences on how the splits came about, for the log and the report.
    """

    train: Split
    validation: Split
    test: Split | None
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether the labels are numbers to predict."""
        return not self.label_names


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


@dataclass(frozen=True)
class PlannedBatch:
    """Which examples a batch holds, at most as many as its rows, and the length of its rows."""

    indices: np.ndarray
    length: int


@dataclass(frozen=True)
class Batches:
    """The batches of one pass, each made when it is asked for.

    Indexing gives a batch; slicing gives the `Batches` of a part, so that ``batches[k:]`` goes on
    after k batches without making them.

    Attributes:
        encoded: The examples.
        batch_size: Rows of every batch.
        plan: What each batch holds.
    """

    encoded: Encoded
    batch_size: int
    plan: tuple[PlannedBatch, ...]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, key: int | slice) -> "Batch | Batches":
        if isinstance(key, slice):
            return replace(self, plan=self.plan[key])
        return collate(self.encoded, self.plan[key], self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (collate(self.encoded, planned, self.batch_size) for planned in self.plan)

    def in_order(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Puts the rows computed from these batches into the order of the examples.

        Args:
            outputs: One array of `batch_size` rows for each batch; filling rows are left out.

        Returns:
            One row for each example.
        """
        rows = [out[: len(p.indices)] for out, p in zip(outputs, self.plan, strict=True)]
        order = np.concatenate([planned.indices for planned in self.plan])
        return np.concatenate(rows)[np.argsort(order)]


def load_splits(config: DataConfig) -> Splits:
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
        train, validation, test, names, notes = _load_docstrings()
    elif config.task is not None:
        train, validation, test, names, notes = _load_glue(config.task)
    else:
        train, validation, test, names, notes = _load_files(config)

    def hold_out(name: str, fraction: float) -> tuple[Split, Split]:
        kept, held = _hold_out(train, names, name, fraction, config.split_seed)
        notes.append(
            f"{name}: {len(held)} of {len(train)} training examples held out "
            f"(split seed {config.split_seed})"
        )
        return kept, held

    if config.test_fraction is not None:
        train, test = hold_out("test", config.test_fraction)
    if validation is None:
        train, validation = hold_out("validation", config.validation_fraction)

    def part(name: str, split: Split, most: int | None) -> Split:
        if most is None or most >= len(split):
            return split
        notes.append(f"{name}: {most} of {len(split)} examples, at random")
        rng = np.random.default_rng(config.split_seed)
        return split.take(np.sort(rng.choice(len(split), most, replace=False)))

    train = part("training", train, config.max_train_examples)
    validation = part("validation", validation, config.max_eval_examples)
    if test is None:
        notes.append("test: no test split given, so no test result is reported")
    else:
        test = part("test", test, config.max_eval_examples)
    return Splits(train, validation, test, names, tuple(notes))


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
    return Batches(encoded, batch_size, plan(encoded.lengths, batch_size, buckets, rng))


def plan(
    lengths: np.ndarray,
    batch_size: int,
    buckets: Sequence[int],
    rng: np.random.Generator | None = None,
) -> tuple[PlannedBatch, ...]:
    """Groups examples by bucket, so that a batch pads to little more than it needs.

    What does not fill a batch moves up to the next bucket in use, so that only the last batch
    can be partial.

    Args:
        lengths: Tokens of each example.
        batch_size: Rows of a batch.
        buckets: Increasing sequence lengths.
        rng: Shuffles the examples and the order of the batches; None keeps both.

    Returns:
        The batches, each with at most `batch_size` examples.

    Raises:
        DataError: If an example is longer than the last bucket.
    """
    if len(lengths) and lengths.max() > buckets[-1]:
        raise DataError(
            f"an example has {lengths.max()} tokens, but the longest bucket is {buckets[-1]}"
        )
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths[order])
    full: list[PlannedBatch] = []
    rest = np.empty(0, order.dtype)
    length = 0
    for bucket in np.unique(bucket_of):
        members = np.concatenate([rest, order[bucket_of == bucket]])
        length = int(buckets[bucket])
        end = len(members) - len(members) % batch_size
        full += [
            PlannedBatch(members[start : start + batch_size], length)
            for start in range(0, end, batch_size)
        ]
        rest = members[end:]
    if rng is not None:
        full = [full[i] for i in rng.permutation(len(full))]
    last = [PlannedBatch(rest, length)] if len(rest) else []
    return (*full, *last)


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
    count = len(planned.indices)
    # Filling rows repeat an example: unlike empty rows they cannot make a model divide by zero.
    rows = np.concatenate([planned.indices, np.repeat(planned.indices[:1], batch_size - count)])
    starts, lengths = encoded.offsets[rows], encoded.lengths[rows]
    columns = np.arange(planned.length)
    mask = columns < lengths[:, None]
    places = np.where(mask, starts[:, None] + columns, 0)
    batch = {
        "input_ids": np.where(mask, encoded.input_ids[places], np.int32(encoded.pad_id)),
        "attention_mask": mask.astype(np.int32),
        "labels": encoded.labels[rows],
        "weights": (np.arange(batch_size) < count).astype(np.float32),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = np.where(mask, encoded.token_type_ids[places], np.int32(0))
    return batch


_Loaded = tuple[Split, Split | None, Split | None, tuple[str, ...], list[str]]


def _load_glue(task: str) -> _Loaded:
    import datasets

    spec = glue.TASKS[task]
    try:
        dataset = datasets.load_dataset(glue.DATASET, task)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load GLUE task `{task}` from the Hub: {' '.join(str(error).split())}"
        ) from error

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
    return split("train"), None, split(spec.validation), spec.labels, [note]


def _load_docstrings() -> _Loaded:
    names = tuple(docstrings.collect())

    def split(part: str) -> Split:
        texts, modules = zip(*docstrings.examples(part), strict=True)
        return Split(texts, None, np.asarray([names.index(m) for m in modules], np.int32))

    return split("train"), split("validation"), split("test"), names, []


def _load_files(config: DataConfig) -> _Loaded:
    root = Path(config.root or ".")

    def read(name: str | None) -> _Table | None:
        return None if name is None else _read_table(root / name, config)

    tables = [read(name) for name in (config.train, config.validation, config.test)]
    names = () if config.regression else config.labels or _class_names(tables[0])
    train, validation, test = (table and _to_split(table, names) for table in tables)
    return train, validation, test, names, []


@dataclass(frozen=True)
class _Table:
    """The columns of a file that are used, with the line of each row for messages."""

    path: Path
    text: tuple[str, ...]
    text_pair: tuple[str, ...] | None
    labels: tuple[str, ...]
    lines: tuple[int, ...]


_OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".tsv", ".txt", ".csv", ".jsonl")


def _read_table(path: Path, config: DataConfig) -> _Table:
    compression = path.suffix if path.suffix in _OPENERS else ""
    suffix = Path(path.name.removesuffix(compression)).suffix
    if suffix not in _FORMATS:
        raise DataError(
            f"`{path}` must end in {', '.join(_FORMATS)}, and may add {' or '.join(_OPENERS)}"
        )
    records = _json_records if suffix == ".jsonl" else _delimited_records
    wanted = [name for name in (config.text, config.text_pair, config.label) if name is not None]
    lines, rows = [], []
    try:
        # utf-8-sig drops the byte order mark that some tools write; newlines are the parsers'.
        with _OPENERS.get(compression, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            for line, record in records(file, path, suffix, config):
                lines.append(line)
                rows.append([_field(record, name, path, line) for name in wanted])
    except UnicodeDecodeError:
        raise DataError(f"`{path}` is not UTF-8 text") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"cannot read `{path}`: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not rows:
        raise DataError(f"`{path}` holds no examples")
    text, *pair, labels = zip(*rows, strict=True)
    return _Table(path, text, pair[0] if pair else None, labels, tuple(lines))


_Records = Iterator[tuple[int, dict[str, Any]]]


def _delimited_records(file: TextIO, path: Path, suffix: str, config: DataConfig) -> _Records:
    quoted = suffix == ".csv" if config.quoting is None else config.quoting
    reader = csv.reader(
        file,
        delimiter="," if suffix == ".csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    columns = config.columns
    try:
        for row in reader:
            if not row:  # a blank line, as often at the end of a file
                continue
            if columns is None:
                columns = row
                continue
            if len(row) != len(columns):
                raise DataError(
                    f"`{path}`, line {reader.line_num}: {len(row)} fields, but there are "
                    f"{len(columns)} columns ({', '.join(columns)})"
                )
            yield reader.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise DataError(f"`{path}`, line {reader.line_num}: {error}") from None


def _json_records(file: TextIO, path: Path, suffix: str, config: DataConfig) -> _Records:
    del suffix, config  # the keys of the objects are the columns
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"`{path}`, line {number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise DataError(f"`{path}`, line {number}: must be a JSON object")
        yield number, record


def _field(record: dict[str, Any], name: str, path: Path, line: int) -> str:
    if name not in record:
        raise DataError(f"`{path}`, line {line}: no column `{name}`; there are {', '.join(record)}")
    value = record[name]
    if not isinstance(value, str | int | float):
        raise DataError(f"`{path}`, line {line}: `{name}` must be text or a number, not {value}")
    return str(value)


def _class_names(table: _Table) -> tuple[str, ...]:
    names = set(table.labels)
    if len(names) < 2:
        raise DataError(f"`{table.path}` holds only the label {table.labels[0]!r}")
    # Numbers in their own order: "10" after "9".
    return tuple(sorted(names, key=lambda name: (int(name), "") if name.isdecimal() else (0, name)))


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
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

    def convert(label: str) -> int:
        if label not in index:
            raise ValueError(f"label {label!r} is none of the classes {listed}")
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


def _hold_out(
    split: Split, names: tuple[str, ...], name: str, fraction: float, seed: int
) -> tuple[Split, Split]:
    from sklearn.model_selection import train_test_split

    what = f"cannot hold out {fraction} of {len(split)} training examples"
    if names:
        counts = np.bincount(split.labels, minlength=len(names))
        for label in (names[i] for i in np.flatnonzero(counts == 1)):
            raise DataError(f"{what}: class {label!r} has one example; give `data.{name}`")
    try:
        kept, held = train_test_split(
            np.arange(len(split)),
            test_size=fraction,
            random_state=seed,
            stratify=split.labels if names else None,
        )
    except ValueError as error:
        raise DataError(f"{what}: {error}") from None
    return split.take(np.sort(kept)), split.take(np.sort(held))
