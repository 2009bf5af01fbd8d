"""A request to stop, by SIGTERM, as schedulers send it before they take a machine away."""

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Notices SIGTERM, so that a run can save and end at a step. Use as a context manager.

    Of several processes each may get the signal; all are told of it at the same step.
    """

    def __init__(self, made: int) -> None:
        """Prepares to notice; nothing is changed yet.

        Args:
            made: Steps made before, by a run that this one resumes.
        """
        self._made, self._asked = made, False

    def __enter__(self) -> "StopRequest":
        # With several processes JAX has a handler of its own since they joined.
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        # JAX agrees on the step after the last that it was asked about, or on 0 before the first:
        # it must be asked about every step, so that none is agreed on and passed over.
        for step in range(self._made + 1):
            self.heard(step)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._before)

    def heard(self, step: int) -> bool:
        """Whether the run is to stop; it costs no message between processes or with a device.

        Args:
            step: The number of the step that was made; call this after each.

        Returns:
            True from the step on at which all processes are to stop.
        """
        if jax.distributed.is_initialized():
            self._asked |= multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
