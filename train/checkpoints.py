"""Checkpoints of a run: the small tree, the optimizer and where the run stands; never the base."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_leaves_with_path

import circflax as cf
from circflax.tree import check_room
from train.steps import TrainState

# What a checkpoint takes besides its arrays, generously.
_ROOM = 1 << 20


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: Pass that the next batch belongs to, counted from 0.
        batch: Number of that batch in its pass.
        best_epoch: Epoch with the best validation metric so far, counted from 1; 0 before the
            first.
        validation: Validation metrics of that epoch.
        seconds: Time spent so far.
    """

    epoch: int = 0
    batch: int = 0
    best_epoch: int = 0
    validation: dict[str, float] | None = None
    seconds: float = 0.0


class Checkpoints:
    """Saves and restores whole states of a run. Use as a context manager.

    A checkpoint appears under its name when it is complete, so that a run killed at any moment
    finds the last complete one. With several processes each writes what it holds, into a directory
    that all of them see, and any number of processes and devices can go on from it.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the checkpoints of a run.

        Args:
            directory: Where they are; made if it is missing.
        """
        # Small trees are written at once, so that what goes wrong is known before the next step.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        # Known in advance, they can say what a checkpoint holds before it is read.
        handlers = {
            "arrays": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.resolve(), options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, best: Any, rng: jax.Array, progress: Progress) -> None:
        """Saves a state; the checkpoint before it goes when this one is whole.

        Args:
            state: The state.
            best: The small tree of the best epoch so far.
            rng: Key that dropout's keys are made from.
            progress: Where the run stands.

        Raises:
            OSError: If the disk has no room for it; the checkpoint before it stays.
        """
        arrays = {"state": state._asdict(), "best": best, "rng": jax.random.key_data(rng)}
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(asdict(progress))
        )
        step = int(state.step)
        needed = _ROOM + 2 * sum(array.nbytes for array in jax.tree.leaves(arrays))
        check_room(self._directory, needed, f"the checkpoint of step {step}")
        self._manager.save(step, args=items)

    def restore(
        self, state: TrainState, rng: jax.Array
    ) -> tuple[TrainState, Any, jax.Array, Progress]:
        """Restores the last checkpoint.

        Args:
            state: A state of the same shapes, which lies as the restored one is to.
            rng: A key of the same kind.

        Returns:
            State, small tree of the best epoch, key and standing of the run.

        Raises:
            CheckpointError: If the checkpoint is of another model or other adapters.
        """
        like = {"state": state._asdict(), "best": state.small, "rng": jax.random.key_data(rng)}
        self._check(like)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore()
            ),
        )
        arrays = restored.arrays
        return (
            TrainState(**arrays["state"]),
            arrays["best"],
            jax.random.wrap_key_data(arrays["rng"]),
            Progress(**restored.progress),
        )

    def _check(self, like: Any) -> None:
        """Compares names and shapes with those of the last checkpoint."""
        there = _shapes(self._manager.item_metadata(self.latest).arrays.tree)
        here = _shapes(like)
        for name in (*here, *there):
            if there.get(name) != here.get(name):
                was, now = (_describe(shapes.get(name)) for shapes in (there, here))
                raise cf.interop.CheckpointError(
                    f"the checkpoint of step {self.latest} in `{self._directory}` is of another"
                    f" model or other adapters: `{name}` {was} there, but {now} here; choose"
                    " another `run.output`, or set `run.resume` to false to begin again"
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _describe(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"
