"""The number of an answer, and when it counts as right."""

from decimal import Decimal

import pytest

from train.gsm8k import exact_match, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 left.\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### $18.50 in all, not 20", "18.5"),
        ("#### -3", -3),
        ("It is 5, so the answer is 12.", 12),
        ("The answer is $1,000.", 1000),
        ("#### 4\nThen again: #### 6", 6),
        ("half of it is .5", "0.5"),
        ("nothing at all", None),
        ("3 apples ####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_counts_equal_numbers():
    references = ["so #### 7", "#### 1,000", "#### 2", "#### 3"]
    answers = ["7.0", "it costs $1000", "two", "#### 4, not 3"]
    assert exact_match(answers, references) == 0.5


def test_a_reference_must_hold_a_number():
    with pytest.raises(ValueError, match="holds no number"):
        exact_match(["1"], ["none"])
