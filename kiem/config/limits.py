"""Types of option values that several scripts share, with their limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

# Where an option has no natural limit, this one is never reached and prevents overflow.
MOST = 10**9
MOST_TOKENS = 2**20
Count = Annotated[int, Meta(ge=1, le=MOST)]
CountOrZero = Annotated[int, Meta(ge=0, le=MOST)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Price = Annotated[float, Meta(ge=0, le=10**6)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Weight = Annotated[float, Meta(gt=0, le=MOST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(gt=0, le=100)]
Name = Annotated[str, Meta(min_length=1)]  # empty: a shell variable that was not set
