"""How a conversation is put to a model that was trained on one of the formats."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from train.config import LanguageConfig
from train.tasks.language.formats import question_template
from train.tasks.language.tokens import leading_ids, tokenize
from train.tasks.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# From what the user said and what was answered, one less, to the tokens of the next prompt.
Ask = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def make_ask(config: LanguageConfig, tokenizer: "PreTrainedTokenizerFast") -> Ask:
    """How a conversation is put to the model.

    In the format "chat" by the tokenizer's template; in the formats with a prompt as their examples
    one after the other, each answer ended by EOS as in training.

    Args:
        config: The format that the model was trained on, and its prompt.
        tokenizer: The model's.

    Returns:
        The function.

    Raises:
        DataError: If the format has no questions, its prompt needs more than a question, or the
            tokenizer lacks what the format needs.
    """
    if config.format == "chat":
        return _chat(tokenizer)
    template = question_template(config)

    def ask(questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        pieces = [leading_ids(tokenizer)]
        for number, question in enumerate(questions):
            pieces += tokenize(tokenizer, [template.fill(lambda _, text=question: text)])
            if number < len(answers):
                pieces += tokenize(tokenizer, [answers[number]])
                pieces.append(np.asarray([tokenizer.eos_token_id], np.int32))
        return np.concatenate(pieces)

    return ask


def _chat(tokenizer: "PreTrainedTokenizerFast") -> Ask:
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template, which the format chat needs")

    def ask(questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        messages = []
        for number, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            if number < len(answers):
                messages.append({"role": "assistant", "content": answers[number]})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from None
        return tokenize(tokenizer, [text])[0]

    return ask
