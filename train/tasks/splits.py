"""The splits of a run, and how what is not given is held out from the training split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from train.config import ExamplesConfig
from train.tasks.records import DataError


class Items(Protocol):
    """What parts can be taken of."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, indices: np.ndarray) -> Self:
        """Those at these positions."""


class Examples(Items, Protocol):
    """Examples of a split."""

    @property
    def labels(self) -> np.ndarray:
        """Class indices, numbers to predict, or nothing."""


E = TypeVar("E", bound=Examples)
T = TypeVar("T", bound=Items)


@dataclass(frozen=True)
class Splits(Generic[E]):
    """The examples of a run.

    Attributes:
        train: Examples to train on.
        validation: Examples that choose the best epoch.
        test: Examples to report on, if there are any.
        label_names: Class names in the order of their indices; empty where there are no classes.
        notes: Sentences on how the splits came about, for the log and the report.
    """

    train: E
    validation: E
    test: E | None
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    def parts(self) -> dict[str, E]:
        """The splits that there are, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}


@dataclass(frozen=True)
class Given(Generic[E]):
    """The splits that files or a dataset have; see `Splits`."""

    train: E
    validation: E | None
    test: E | None
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def complete(given: Given[E], config: ExamplesConfig) -> Splits[E]:
    """Holds out the splits that are asked for and not given, and takes the parts asked for.

    Args:
        given: The splits that there are.
        config: What to hold out and how many examples to use.

    Returns:
        The splits.

    Raises:
        DataError: If the training split is too small to hold out from.
    """
    train, validation, test, notes = given.train, given.validation, given.test, [*given.notes]

    def hold_out(name: str, fraction: float) -> tuple[E, E]:
        kept, held = _hold_out(train, given.label_names, name, fraction, config)
        notes.append(
            f"{name}: {len(held)} of {len(train)} training examples held out "
            f"(split seed {config.split_seed})"
        )
        return kept, held

    def part(name: str, split: E, most: int | None) -> E:
        taken, note = sample(split, most, name, config.split_seed)
        notes.extend(note)
        return taken

    if config.test_fraction is not None:
        train, test = hold_out("test", config.test_fraction)
    if validation is None:
        train, validation = hold_out("validation", config.validation_fraction)
    train = part("training", train, config.max_train_examples)
    validation = part("validation", validation, config.max_eval_examples)
    if test is None:
        notes.append("test: no test split given, so no test result is reported")
    else:
        test = part("test", test, config.max_eval_examples)
    return Splits(train, validation, test, given.label_names, tuple(notes))


def sample(split: T, most: int | None, name: str, seed: int) -> tuple[T, tuple[str, ...]]:
    """A random part of a split, in its order.

    Args:
        split: The split.
        most: How many to take at most; None takes all.
        name: The split's name.
        seed: Seed of the choice.

    Returns:
        The part, and a sentence if it is not the whole.
    """
    if most is None or most >= len(split):
        return split, ()
    chosen = np.random.default_rng(seed).choice(len(split), most, replace=False)
    note = f"{name}: {most} of {len(split)} examples, at random"
    return split.take(np.sort(chosen)), (note,)


def sorted_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The names of classes, sorted, numbers in their own order: "10" after "9".

    Args:
        labels: The label of each example.

    Returns:
        Each name once.
    """
    return tuple(
        sorted(set(labels), key=lambda name: (int(name), "") if name.isdecimal() else (0, name))
    )


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a message.

    Args:
        names: The names.
        most: How many to write out.

    Returns:
        The names with commas, and how many more there are.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _hold_out(
    split: E, names: Sequence[str], name: str, fraction: float, config: ExamplesConfig
) -> tuple[E, E]:
    from sklearn.model_selection import train_test_split

    what = f"cannot hold out {fraction} of {len(split)} training examples"
    if names:
        counts = np.bincount(split.labels, minlength=len(names))
        for label in (names[i] for i in np.flatnonzero(counts == 1)):
            raise DataError(
                f"{what}: class {label!r} has one example; give `{config.SECTION}.{name}`"
            )
    try:
        kept, held = train_test_split(
            np.arange(len(split)),
            test_size=fraction,
            random_state=config.split_seed,
            stratify=split.labels if names else None,
        )
    except ValueError as error:
        raise DataError(f"{what}: {error}") from None
    return split.take(np.sort(kept)), split.take(np.sort(held))
