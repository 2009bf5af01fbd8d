"""What goes wrong in a command, as one line and an exit code."""

import sys
from collections.abc import Callable


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


def exit_code(command: Callable[[], int], interrupted: str) -> int:
    """Runs a command; what was to be expected to go wrong becomes a line on standard error.

    Args:
        command: The command; it returns its exit code.
        interrupted: What to say to a person who interrupted it.

    Returns:
        The command's exit code; 1 if training failed or a file cannot be written, 2 if settings,
        data or model do not fit, 130 if interrupted.
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


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
