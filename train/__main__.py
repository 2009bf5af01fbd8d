"""`python -m train --config FILE`: fine-tune a model and report on it."""

import os
import sys

# The application is JAX alone; without this transformers would import PyTorch where it is there.
os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
# transformers announces the end of its Flax classes with every import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from train import settings
from train.run import run
from train.trainer import TrainingError


def main(argv: list[str]) -> int:
    """Runs the application.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code: 0, 1 if training failed, 2 if settings, data or model do not fit.
    """
    try:
        run(settings.load(argv))
    except TrainingError as error:
        return _fail(error, 1)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint.", 130)
    return 0


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
