"""From texts to tokens, and which of these are learnt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from train.tasks.language.chat import ASSISTANT, render
from train.tasks.language.formats import Conversation, Examples, Question
from train.tasks.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Exchange:
    """What the model is asked to answer, and the right answer.

    Attributes:
        prompt: The text to answer.
        prompt_ids: Its tokens (int32), with those that begin a text.
        answer: The reference.
    """

    prompt: str
    prompt_ids: np.ndarray
    answer: str


@dataclass(frozen=True)
class Encoded:
    """Tokens of examples of different lengths, end to end in flat arrays.

    Attributes:
        input_ids: Token ids of all examples (int32).
        learnt: Which of them are to be predicted from those before in their example (bool); each
            example has one at least.
        offsets: Where each example begins, and the end of the last one.
        exchanges: Prompt and answer of each example; none of a running text.
    """

    input_ids: np.ndarray
    learnt: np.ndarray
    offsets: np.ndarray
    exchanges: tuple[Exchange, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one example, and which of them are learnt."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], self.learnt[part]

    def take(self, indices: np.ndarray) -> "Encoded":
        """The examples at these positions."""
        exchanges = tuple(self.exchanges[i] for i in indices) if self.exchanges else ()
        return _join([self.row(i) for i in indices], exchanges)


@dataclass(frozen=True)
class _Row:
    """One example, before it is cut."""

    input_ids: np.ndarray
    learnt: np.ndarray
    exchange: Exchange


def encode_examples(
    examples: Examples, tokenizer: "PreTrainedTokenizerFast", max_length: int, name: str
) -> tuple[Encoded, tuple[str, ...]]:
    """Tokenizes prompts and answers, or conversations.

    A prompt and its answer are tokenized apart, so that the prompt's tokens are those that
    generation begins with, and EOS follows the answer. A conversation is tokenized as a whole, as
    its template writes it; a token of which a part lies before an assistant's turn is not learnt.
    EOS is added only where the template ends the last answer without it.

    Args:
        examples: The examples.
        tokenizer: A fast tokenizer of transformers.
        max_length: Longest example in tokens; what is longer loses its end.
        name: The split's name, for sentences.

    Returns:
        The tokens, and sentences on the examples that were cut and those that were left out.

    Raises:
        DataError: If the tokenizer has no EOS token, a conversation does not fit its template, or
            no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token (`eos_token`), which ends every answer")
    kept: list[_Row] = []
    cut = unanswered = crowded = 0
    for row in _rows(examples, tokenizer):
        if not row.learnt.any():
            unanswered += 1
        elif not row.learnt[1:max_length].any():
            crowded += 1
        else:
            cut += len(row.input_ids) > max_length
            kept.append(row)
    counted = {
        f"cut to {max_length} tokens": cut,
        "left out, as an answer is empty or missing": unanswered,
        f"left out, as their prompt alone fills {max_length} tokens": crowded,
    }
    notes = tuple(
        f"{name}: {count} of {len(examples)} examples were {what}"
        for what, count in counted.items()
        if count
    )
    if not kept:
        raise DataError(f"no example is left to use; {'; '.join(notes)}")
    rows = [(row.input_ids[:max_length], row.learnt[:max_length]) for row in kept]
    return _join(rows, tuple(row.exchange for row in kept)), notes


def encode_text(
    text: str, tokenizer: "PreTrainedTokenizerFast", max_length: int, name: str
) -> Encoded:
    """Tokenizes a running text and cuts it into rows, in which every token is learnt once.

    A row begins with the tokens that the tokenizer begins a text with, such as BOS, or if there
    are none with the last token of the row before. The very first token is not learnt then.

    Args:
        text: The text.
        tokenizer: A fast tokenizer of transformers.
        max_length: Tokens of a row.
        name: The split's name, for messages.

    Returns:
        The rows.

    Raises:
        DataError: If the text has too few tokens to learn one, or rows are too short to hold one.
    """
    begin = leading_ids(tokenizer)
    (ids,) = tokenize(tokenizer, [text])
    step = max_length - max(len(begin), 1)
    if step < 1:
        raise DataError(
            f"`language.max_length` {max_length} leaves no room beside the {len(begin)} tokens "
            "that begin a text"
        )
    first = 0 if len(begin) else 1
    starts = range(first, len(ids), step)
    if not starts:
        raise DataError(f"{name}: the text has {len(ids)} tokens, which leaves none to learn")
    rows = []
    for start in starts:
        context = begin if len(begin) else ids[start - 1 : start]
        row = np.concatenate([context, ids[start : start + step]])
        rows.append((row, np.arange(len(row)) >= len(context)))
    return _join(rows, ())


def leading_ids(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """The special tokens that a tokenizer begins a text with, such as BOS.

    Args:
        tokenizer: A fast tokenizer of transformers.

    Returns:
        Their ids (int32), perhaps none.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    # Only the tokenizer's post-processor knows them, and it is applied to whole texts.
    count = int(np.argmin([*encoded["special_tokens_mask"], 0]))
    return np.asarray(encoded["input_ids"][:count], np.int32)


def tokenize(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[np.ndarray]:
    """Tokenizes texts as they are, without special tokens.

    Args:
        tokenizer: A fast tokenizer of transformers.
        texts: The texts.

    Returns:
        The token ids of each (int32).
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]


def _rows(examples: Examples, tokenizer: "PreTrainedTokenizerFast") -> Iterator[_Row]:
    make = {Question: _question_rows, Conversation: _conversation_rows}
    # Tokenizing in parts bounds the memory of the tokenizer's own, much larger records.
    for start in range(0, len(examples), 1024):
        part = examples.items[start : start + 1024]
        yield from make[type(part[0])](part, tokenizer)


def _question_rows(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[_Row]:
    begin, end = leading_ids(tokenizer), np.asarray([tokenizer.eos_token_id], np.int32)
    prompts = tokenize(tokenizer, [question.prompt for question in questions])
    answers = tokenize(tokenizer, [question.answer for question in questions])
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        prompt = np.concatenate([begin, prompt])
        ids = np.concatenate([prompt, answer, end])
        answered = bool(question.answer.strip())
        learnt = (np.arange(len(ids)) >= len(prompt)) & answered
        yield _Row(ids, learnt, Exchange(question.prompt, prompt, question.answer))


def _conversation_rows(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[_Row]:
    written = [render(conversation, tokenizer) for conversation in conversations]
    # Where the model is asked for its last answer; without an answer there is nothing to ask.
    asked = [text[: turns[-1][0]] if turns else text for text, turns in written]
    # The template has written the special tokens itself.
    encoded = tokenizer(
        [text for text, _ in written],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    columns = (encoded["input_ids"], encoded["offset_mapping"], tokenize(tokenizer, asked))
    end = tokenizer.eos_token_id
    for i, (ids, spans, prompt) in enumerate(zip(*columns, strict=True)):
        (text, turns), conversation = written[i], conversations[i]
        answers = [m["content"] for m in conversation.messages if m["role"] == ASSISTANT]
        starts = np.asarray([start for start, _ in spans], np.int64)
        learnt = np.zeros(len(ids), bool)
        if all(answer.strip() for answer in answers):
            for begin, stop in turns:
                learnt |= (begin <= starts) & (starts < stop)
        if turns and turns[-1][1] == len(text) and end not in ids[len(prompt) :]:
            ids, learnt = [*ids, end], np.append(learnt, learnt.any())
        exchange = Exchange(asked[i], prompt, answers[-1] if answers else "")
        yield _Row(np.asarray(ids, np.int32), learnt, exchange)


def _join(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], exchanges: tuple[Exchange, ...]
) -> Encoded:
    ids, learnt = zip(*rows, strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return Encoded(np.concatenate(ids), np.concatenate(learnt), offsets, exchanges)
