"""`python -m train --config FILE`: fine-tune a model and report on it."""

import os
import sys

# The application is JAX alone; without this transformers would import PyTorch where it is there.
os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
# transformers announces the end of its Flax classes with every import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from train import processes, settings
from train.failures import exit_code
from train.run import run


def main(argv: list[str]) -> int:
    """Runs the application.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code; see `train.failures.exit_code`.
    """

    def command() -> int:
        config = settings.load(argv)
        processes.join()
        with processes.naming_losses():
            run(config)
        return 0

    again = "the same command goes on from the last checkpoint"
    return processes.leave(lambda: exit_code(command, again))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
