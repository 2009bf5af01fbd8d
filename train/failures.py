"""What goes wrong in a command, as one line and an exit code."""

import sys
from collections.abc import Callable

import jax

# What a shell reports of a process that SIGTERM ended: 128 and the signal's number.
STOPPED = 143


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


class StoppedError(Exception):
    """A run that was asked to stop, and has saved where it stands; the message is one sentence."""


def exit_code(command: Callable[[], int], interrupted: str) -> int:
    """Runs a command; what was to be expected to go wrong becomes a line on standard error.

    Args:
        command: The command; it returns its exit code.
        interrupted: What to say to a person who interrupted it.

    Returns:
        The command's exit code; 1 if training failed or a file cannot be written, 2 if settings,
        data or model do not fit, 130 if interrupted, 143 if SIGTERM asked it to stop and it saved
        where it stands.
    """
    try:
        return command()
    except TrainingError as error:
        return _fail(error, 1)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {interrupted}.", 130)
    except StoppedError as stopped:
        if jax.process_index() == 0:
            print(f"stopped: {stopped}; {interrupted}.", file=sys.stderr)
        return STOPPED


def _fail(message: object, code: int) -> int:
    several = jax.distributed.is_initialized()
    which = f"process {jax.process_index()}: " if several else ""
    print(f"error: {which}{message}", file=sys.stderr)
    return code
