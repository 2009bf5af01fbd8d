"""Where texts and examples are from: local files or the Hub."""

from collections.abc import Mapping
from pathlib import Path

from train.config import LanguageConfig
from train.tasks.hub import load_dataset
from train.tasks.language.formats import TEXT, Examples, read_examples, text_of
from train.tasks.records import DataError, Record, read_records, read_text
from train.tasks.splits import Given, complete, sample

_FORMATS = (".json", ".jsonl")
# A split is a list of examples, or one running text.
Part = Examples | str


def load_parts(config: LanguageConfig) -> tuple[Mapping[str, Part], tuple[str, ...]]:
    """Reads the splits of a run.

    Of a running text the last part is held out, since a random one would be known from its
    neighbours. A text of the Hub is the column ``text``, with a newline at the end of each row.

    Args:
        config: Where they are and in which format.

    Returns:
        The splits by name, `config.others` included, and sentences on how they came about. Of
        texts they are whole; of examples, the parts that are asked for.

    Raises:
        DataError: If a file or dataset is missing, empty or unreadable, or a record does not fit.
    """
    given = _load_hub(config) if config.dataset is not None else _load_files(config)
    root = Path(config.root or ".")
    others = {name: _read_file(root / file, config) for name, file in config.others.items()}
    if config.format == "text":
        texts, notes = _complete_texts(given, config)
        return {**texts, **others}, notes
    splits = complete(Given(given["train"], given.get("validation"), given.get("test")), config)
    notes = [*splits.notes]
    for name in others:
        others[name], note = sample(others[name], config.max_eval_examples, name, config.split_seed)
        notes += note
    return {**splits.parts(), **others}, tuple(notes)


def _load_files(config: LanguageConfig) -> dict[str, Part]:
    root = Path(config.root or ".")
    files = {"train": config.train, "validation": config.validation, "test": config.test}
    return {name: _read_file(root / file, config) for name, file in files.items() if file}


def _read_file(path: Path, config: LanguageConfig) -> Part:
    if config.format == "text":
        return read_text(path)
    return read_examples(read_records(path, _FORMATS), path, config)


def _load_hub(config: LanguageConfig) -> dict[str, Part]:
    what = f"`{config.dataset}`" + (f", `{config.subset}`," if config.subset else "")
    dataset = load_dataset(what, config.dataset, config.subset)
    if "train" not in dataset:
        raise DataError(f"{what} has no split `train`; there are {', '.join(dataset)}")
    names = ("train", "validation", "test")
    return {
        name: _read_rows(list(dataset[name]), name, config) for name in names if name in dataset
    }


def _read_rows(rows: list[Record], split: str, config: LanguageConfig) -> Part:
    source = f"{config.dataset}, {split}"
    if not rows:
        raise DataError(f"`{source}` holds no examples")
    records = list(enumerate(rows, start=1))
    if config.format != "text":
        return read_examples(records, source, config)
    lines = [text_of(record, TEXT, source, number) for number, record in records]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _complete_texts(
    given: Mapping[str, str], config: LanguageConfig
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Holds out the splits that are asked for and not given."""
    texts, notes = dict(given), []

    def hold_out(name: str, fraction: float) -> None:
        text = texts["train"]
        begin = round(len(text) * (1 - fraction))
        texts["train"], texts[name] = text[:begin], text[begin:]
        notes.append(
            f"{name}: the last {len(text) - begin:,} of {len(text):,} characters of the training "
            "text held out"
        )

    if config.test_fraction is not None:
        hold_out("test", config.test_fraction)
    if "validation" not in texts:
        hold_out("validation", config.validation_fraction)
    if "test" not in texts:
        notes.append("test: no test split given, so no test result is reported")
    return texts, tuple(notes)
