"""`python -m circflax`, for where the `circflax` command is not on the path."""

import sys

from circflax.cli import main

if __name__ == "__main__":
    sys.exit(main())
