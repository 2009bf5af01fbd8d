"""Answers of a causal language model to prompts of different lengths."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from train.progress import Track, untracked
from train.tasks.batches import PlannedBatch, filled, plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# Continues (batch, length) token ids, padded on the left, given their mask and a key.
Generate = Callable[[np.ndarray, np.ndarray, jax.Array], jax.Array]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Draws among the likeliest tokens that have this probability together.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def settings(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
        """The same for `generate` of transformers.

        Args:
            tokenizer: Has the token that ends an answer.

        Returns:
            Keyword arguments.
        """
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        common = {"max_new_tokens": self.max_new_tokens, "eos_token_id": end, "pad_token_id": pad}
        if self.temperature == 0:
            return {**common, "do_sample": False}
        # top_k is 50 unless switched off.
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**common, "do_sample": True, **drawn}


def longest_prompt(config: "PretrainedConfig", sampling: Sampling) -> int:
    """How many tokens a prompt can have, so that the longest answer fits behind it.

    Args:
        config: The model's configuration.
        sampling: The length of answers.

    Returns:
        The number of tokens.

    Raises:
        ValueError: If the answers alone do not fit.
    """
    # Models that weigh distances, such as Bloom, have no last position.
    positions = getattr(config, "max_position_embeddings", sys.maxsize)
    room = positions - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"answers of {sampling.max_new_tokens} tokens leave no room for a prompt: the model "
            f"has {positions} positions"
        )
    return room


def answer(
    prompts: Sequence[np.ndarray],
    generate: Generate,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    batch_size: int,
    longest: int,
    key: jax.Array,
    track: Track = untracked,
) -> list[str]:
    """Generates an answer to each prompt.

    Prompts are batched with others of about their length and padded on the left to a power of
    two, or to the longest there may be, so that few programs are compiled.

    Args:
        prompts: Token ids, each (length,).
        generate: The compiled model.
        tokenizer: Turns ids into text.
        batch_size: Prompts of a batch.
        longest: Tokens that a prompt can have; see `longest_prompt`.
        key: For sampling; each batch gets one of its own.
        track: Shows how far it has come.

    Returns:
        The answers' texts, without special tokens, in the order of the prompts.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts])
    powers = tuple(2**i for i in range((longest - 1).bit_length()))
    answers: list[str] = [""] * len(prompts)
    batches = plan(lengths, batch_size, (*powers, longest))
    for number, planned in enumerate(track(batches, len(batches), "generating answers, batch")):
        ids, mask = _pad(prompts, planned, batch_size)
        sequences = np.asarray(generate(ids, mask, jax.random.fold_in(key, number)))
        for place, row in zip(planned.indices, sequences, strict=False):
            new = row[planned.length :]
            ended = np.flatnonzero(new == tokenizer.eos_token_id)
            new = new[: ended[0]] if len(ended) else new
            answers[place] = tokenizer.decode(new, skip_special_tokens=True).strip()
    return answers


def _pad(
    prompts: Sequence[np.ndarray], planned: PlannedBatch, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, (batch_size, length) int32, prompts at the right end."""
    ids = np.zeros((batch_size, planned.length), np.int32)
    mask = np.zeros_like(ids)
    for row, place in enumerate(filled(planned, batch_size)):
        prompt = prompts[place]
        ids[row, planned.length - len(prompt) :] = prompt
        mask[row, planned.length - len(prompt) :] = 1
    return ids, mask
