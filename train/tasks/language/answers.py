"""Generated answers beside the right ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from train import gsm8k
from train.generation import answer
from train.tasks.language.objective import EXACT_MATCH
from train.tasks.language.tokens import Exchange
from train.tasks.task import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE_NAME = "answers.jsonl"


@dataclass(frozen=True)
class Answered:
    """What a model answered.

    Attributes:
        exchanges: What it was asked, with the right answers.
        texts: What it answered to each.
    """

    exchanges: tuple[Exchange, ...]
    texts: tuple[str, ...]

    def metrics(self, numbers: bool) -> dict[str, float]:
        """How many answers are right.

        Args:
            numbers: Whether answers come to numbers, as GSM8K's do; others have no right answer.

        Returns:
            The part of them, by the metric's name.
        """
        if not numbers:
            return {}
        return {EXACT_MATCH: gsm8k.exact_match(self.texts, [e.answer for e in self.exchanges])}

    def save(self, directory: Path) -> tuple[str, ...]:
        """Writes prompts, answers and right answers.

        Args:
            directory: Where to.

        Returns:
            The file's name.
        """
        records = (
            {"prompt": exchange.prompt, "answer": text, "reference": exchange.answer}
            for exchange, text in zip(self.exchanges, self.texts, strict=True)
        )
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (directory / FILE_NAME).write_text(lines, encoding="utf-8")
        return (FILE_NAME,)


def choose_exchanges(
    exchanges: Sequence[Exchange], most: int, longest: int
) -> tuple[tuple[Exchange, ...], int]:
    """Chooses what to ask: the first examples whose prompts leave room for the longest answer.

    Args:
        exchanges: The examples of a split.
        most: How many to ask.
        longest: Tokens that a prompt can have; see `train.generation.longest_prompt`.

    Returns:
        The examples, and how many were passed over.

    Raises:
        ValueError: If no prompt fits.
    """
    fitting = [exchange for exchange in exchanges if len(exchange.prompt_ids) <= longest]
    if not fitting:
        raise ValueError(
            f"no prompt has {longest} tokens or fewer, as many as `language.max_new_tokens` leaves "
            "of the model's positions"
        )
    return tuple(fitting[:most]), len(exchanges) - len(fitting)


def answer_all(
    exchanges: tuple[Exchange, ...],
    runner: Runner,
    tokenizer: "PreTrainedTokenizerFast",
    batch_size: int,
    longest: int,
    seed: int,
) -> Answered:
    """Has a model answer.

    Args:
        exchanges: What it is asked.
        runner: The model.
        tokenizer: Turns its tokens into text.
        batch_size: Prompts at once.
        longest: Tokens that a prompt can have.
        seed: For sampling.

    Returns:
        The answers.
    """
    prompts = [exchange.prompt_ids for exchange in exchanges]
    key = jax.random.key(seed)
    texts = answer(
        prompts,
        runner.generate,
        tokenizer,
        batch_size=batch_size,
        longest=longest,
        key=key,
        track=runner.track,
    )
    return Answered(exchanges, tuple(texts))
