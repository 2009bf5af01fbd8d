"""What the records of each format say: a prompt with its answer, or a conversation."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config import LanguageConfig
from train.tasks.records import DataError, Record, field_of

# The field of a running text in datasets of the Hub, whose texts are in rows.
TEXT = "text"
# The field that is learnt, in the formats that have prompts.
_ANSWERS = {"alpaca": "output", "gsm8k": "answer"}
_PROMPTS = {
    "alpaca": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "gsm8k": "Question: {question}\nAnswer:\n",
}
_ALPACA_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is learnt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages, of which those of the assistant are learnt.

    Attributes:
        messages: The role and the content of each.
        place: The file and the line, for messages of errors.
    """

    messages: tuple[Mapping[str, str], ...]
    place: str


@dataclass(frozen=True)
class Examples:
    """The examples of a split."""

    items: tuple[Question | Conversation, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> np.ndarray:
        """Nothing: texts have no labels to balance splits by."""
        return np.empty(0)

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at these positions."""
        return Examples(tuple(self.items[i] for i in indices))


@dataclass(frozen=True)
class Template:
    """A text with places for a record's fields.

    Attributes:
        parts: Pieces of text, each with the field that follows it; None after the last.
    """

    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that have a place."""
        return tuple(name for _, name in self.parts if name is not None)

    def fill(self, value: Callable[[str], str]) -> str:
        """The text with the fields' values in their places."""
        return "".join(text + ("" if name is None else value(name)) for text, name in self.parts)


def parse_template(text: str) -> Template:
    """Reads a template: fields in braces, and braces themselves doubled.

    Args:
        text: Such as "Question: {question}".

    Returns:
        The template.

    Raises:
        DataError: If braces do not match, or hold anything but the name of a field.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"`language.prompt` cannot be read: {error}") from None
    for _, name, form, conversion in parts:
        # A format string could also reach into values, which has no use with texts.
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            raise DataError(
                f"`language.prompt` must have the name of a field between braces, not {name!r}"
                f"{' with a format' if form or conversion else ''}; double braces that are text"
            )
    template = Template(tuple((text, name) for text, name, _, _ in parts))
    if not template.fields:
        raise DataError("`language.prompt` names no field; it needs one in braces")
    return template


def read_examples(
    records: Sequence[tuple[int, Record]], source: Path | str, config: LanguageConfig
) -> Examples:
    """Makes examples of records.

    In the format "alpaca" the field ``input`` may be empty or missing. The usual prompt has no
    section for it then; a prompt of one's own takes it as empty, and must name it if a record has
    one.

    Args:
        records: The records with their lines.
        source: Where they are from, for messages.
        config: The format, and the prompt if it is not the usual one.

    Returns:
        The examples.

    Raises:
        DataError: If a record lacks a field or has one that is no text, or the prompt is none.
    """
    if config.format == "chat":
        return Examples(tuple(_conversation(record, source, line) for line, record in records))
    read = _question_reader(config, source)
    return Examples(tuple(read(record, line) for line, record in records))


def question_template(config: LanguageConfig) -> Template:
    """The prompt that a question alone is put in.

    Args:
        config: The format, and the prompt if it is not the usual one.

    Returns:
        A template with one field.

    Raises:
        DataError: If the format has no questions, or its prompt needs more than one text.
    """
    if config.format not in _ANSWERS:
        raise DataError(f"the format {config.format} has no questions to answer")
    usual = _ALPACA_WITHOUT_INPUT if config.format == "alpaca" else _PROMPTS[config.format]
    template = parse_template(config.prompt or usual)
    if len(set(template.fields)) > 1:
        raise DataError(
            f"`language.prompt` has {', '.join(sorted(set(template.fields)))}, and so cannot be "
            "put a question alone"
        )
    return template


def text_of(record: Record, name: str, source: Path | str, line: int) -> str:
    """A field of a record that must be text.

    Args:
        record: The record.
        name: The field's name.
        source: Where it is from, for the message.
        line: The record's line, for the message.

    Returns:
        The text.

    Raises:
        DataError: If the record has no such field, or another kind of value in it.
    """
    value = field_of(record, name, source, line)
    if not isinstance(value, str):
        raise DataError(f"`{source}`, line {line}: `{name}` must be text, not {value!r}")
    return value


def _question_reader(
    config: LanguageConfig, source: Path | str
) -> Callable[[Record, int], Question]:
    answer = _ANSWERS[config.format]
    template = parse_template(config.prompt or _PROMPTS[config.format])
    plain = template if config.prompt else parse_template(_ALPACA_WITHOUT_INPUT)
    if answer in template.fields:
        raise DataError(f"`language.prompt` names `{answer}`, which is the answer to learn")

    def read(record: Record, line: int) -> Question:
        chosen = template
        if config.format == "alpaca":
            record = {**record, "input": record.get("input") or ""}
            chosen = template if record["input"] else plain
            if record["input"] and "input" not in template.fields:
                raise DataError(
                    f"`{source}`, line {line}: there is an `input`, which `language.prompt` does "
                    "not name"
                )
        prompt = chosen.fill(lambda name: text_of(record, name, source, line))
        return Question(prompt, text_of(record, answer, source, line))

    return read


def _conversation(record: Record, source: Path | str, line: int) -> Conversation:
    place = f"`{source}`, line {line}"
    messages = field_of(record, "messages", source, line)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: `messages` must be a list of messages")
    for number, message in enumerate(messages, start=1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise DataError(f"{place}: message {number} must have a `{name}` that is text")
    return Conversation(tuple(messages), place)
