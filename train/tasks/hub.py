"""Datasets of the Hugging Face Hub."""

from typing import TYPE_CHECKING

from train.tasks.records import DataError

if TYPE_CHECKING:
    import datasets


def load_dataset(what: str, *name: str | None) -> "datasets.DatasetDict":
    """Loads a dataset.

    Args:
        what: What to call it in messages.
        *name: Its name on the Hub, and that of a part of it if it has several.

    Returns:
        Its splits.

    Raises:
        DataError: If it cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(*name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {what} from the Hub: {' '.join(str(error).split())}"
        ) from error
