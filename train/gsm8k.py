"""GSM8K's measure: whether the number that an answer comes to is the right one."""

import re
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The number that an answer comes to.

    Args:
        text: The answer: the first number after the last ``####``, GSM8K's own mark, or where
            there is no such mark the last number of all.

    Returns:
        The number without thousands separators and dollar signs; None if there is none.
    """
    _, mark, after = text.rpartition("####")
    numbers = _NUMBER.findall(after)
    if not numbers:
        return None
    return Decimal(re.sub("[$,]", "", numbers[0] if mark else numbers[-1]))


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The part of answers that come to their reference's number.

    Args:
        answers: Generated answers.
        references: The right ones.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: If a reference holds no number.
    """
    right = 0
    for answer, reference in zip(answers, references, strict=True):
        expected = final_number(reference)
        if expected is None:
            raise ValueError(f"the reference answer {reference[-80:]!r} holds no number")
        right += final_number(answer) == expected
    return right / len(answers)
