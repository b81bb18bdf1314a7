"""The one source of randomness: every random choice follows from (seed, purpose, numbers)."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a seed for one purpose, independent of all other purposes and numbers.

    Args:
        seed: the run's `--seed`.
        purpose: what the random numbers are for, such as "order" or "init".
        numbers: what else they depend on, such as epoch, step or rank.

    Returns:
        An integer in [0, 2**63), the same on every machine.
    """
    key = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
