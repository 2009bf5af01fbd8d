"""Conversations by a tokenizer's chat template."""

from typing import TYPE_CHECKING

from train.tasks.language.formats import Conversation
from train.tasks.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ASSISTANT = "assistant"


def render(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[str, list[tuple[int, int]]]:
    """Writes a conversation by the chat template, and finds the assistant's turns in it.

    A turn begins where the template ends when it asks for an answer, and ends where it ends with
    the answer: what marks the end of a turn belongs to it.

    Args:
        conversation: The messages.
        tokenizer: Has the template.

    Returns:
        The text, and where each of the assistant's turns begins and ends in it.

    Raises:
        DataError: If there is no template, it refuses the conversation, or what it writes of the
            first messages changes with those that follow, so that turns cannot be told apart.
    """
    import jinja2

    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template, which the format chat needs")
    messages = list(conversation.messages)

    def write(count: int, ask: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=ask
        )

    try:
        text = write(len(messages))
        turns = [
            (write(number, ask=True), write(number + 1))
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]
    except jinja2.TemplateError as error:
        raise DataError(
            f"{conversation.place}: the chat template refuses the messages: {error}"
        ) from None
    for before, after in turns:
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{conversation.place}: the chat template writes the first messages otherwise when "
                "more follow, so that the assistant's turns cannot be told apart; the tokenizer "
                "needs another `chat_template`"
            )
    return text, [(len(before), len(after)) for before, after in turns]
