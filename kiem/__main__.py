"""`python -m kiem`, for launchers that take a module."""

import sys

from kiem.commands import main

if __name__ == "__main__":
    sys.exit(main())
