"""`python -m kiem`, for launchers that take a module."""

from kiem.commands import main
from kiem.parallel.launch import leave

if __name__ == "__main__":
    leave(main())
