"""What a plan says of quality: expected bits per byte, and the best size for the same hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from kiem.config import TrainingOptions
from kiem.data.mixture import MOST_EPOCHS
from kiem.model.config import Gemma3Config, name_of, preset, sizes
from kiem.planning.forecast import Forecast, fit_law
from kiem.planning.ladder_runs import (
    RUNS_FILE,
    built_in_runs,
    extent,
    ladder_folder,
    read_runs,
    rungs_of,
    runs_like_the_last,
)
from kiem.planning.recipe import RECIPE_VERSION
from kiem.planning.time_estimate import flops_per_token

# A smaller model may need this much more bits per byte than the best one.
_TOLERANCE = 1.02


class Row(NamedTuple):
    """A size on a number of tokens, and what it is expected to reach."""

    config: Gemma3Config
    tokens: float
    forecast: Forecast


@dataclass(frozen=True)
class Budget:
    """A training, and what other sizes could be trained on in its time.

    Attributes:
        config: its shape.
        tokens: those of the training.
        num_train_tokens: those of the text.
        chunk_size: tokens that attend to each other.
    """

    config: Gemma3Config
    tokens: int
    num_train_tokens: int
    chunk_size: int

    def tokens_of(self, config: Gemma3Config) -> float:
        """Returns the tokens of another size in the same time, as time follows FLOP.

        No more than so often the text as it still teaches, unless the training reads more itself.
        """
        flops = self.tokens * flops_per_token(self.config, self.chunk_size)
        most = max(self.tokens, MOST_EPOCHS * self.num_train_tokens)
        return min(most, flops / flops_per_token(config, self.chunk_size))


def print_forecast(budget: Budget, ladder: Path | None, console: Console) -> None:
    """Prints the expected bits per byte of a training, and of the best size for its time.

    Args:
        budget: the training.
        ladder: runs.jsonl of a ladder; None: kiem's own.
        console: where to print.

    Raises:
        UserError: the ladder's file is not there or damaged.
    """
    runs = runs_like_the_last(built_in_runs() if ladder is None else read_runs(ladder))
    whose = "kiem's own ladder" if ladder is None else str(ladder)
    rungs = rungs_of(runs)
    law = fit_law(rungs)
    if law is None:
        console.print(f"No forecast of bits per byte: {whose} has too few rungs.")
        return

    def row(config: Gemma3Config, tokens: float) -> Row:
        return Row(config, tokens, law.forecast(config.num_layer_parameters(), tokens))

    known = [preset(name, budget.config.vocab_size) for name in sizes()]
    others = [row(config, budget.tokens_of(config)) for config in known]
    best = min(others, key=lambda row: row.forecast.bpb)
    smaller = next(o for o in others if o.forecast.bpb <= _TOLERANCE * best.forecast.bpb)
    rows = {
        f"this training: {name_of(budget.config)}": row(budget.config, budget.tokens),
        f"best size for its time: {name_of(best.config)}": best,
    }
    if smaller is not best:
        rows[f"smaller, nearly as good: {name_of(smaller.config)}"] = smaller
    table = Table(title=f"forecast from {whose}", title_justify="left")
    for head in ("", "tokens", "bits per byte of test text", "inference costs"):
        table.add_column(head, justify="right" if head else "left")
    for what, (config, tokens, forecast) in rows.items():
        share = config.num_parameters() / budget.config.num_parameters()
        table.add_row(what, f"{tokens:,.0f}", f"{forecast}", f"{share:.0%}")
    console.print(table)
    console.print(
        f"95 % intervals, for the text and vocabulary of that ladder ({runs[-1].text}, "
        f"{runs[-1].vocab_size:,} entries); `kiem ladder` measures yours."
    )
    if runs[-1].recipe != RECIPE_VERSION:
        console.print("That ladder is of an earlier recipe.")
    sizes_there = [rung.num_layer_parameters for rung in rungs]
    tokens_there = [rung.tokens for rung in rungs]
    is_within = all(
        min(sizes_there) <= row.config.num_layer_parameters() <= max(sizes_there)
        and min(tokens_there) <= row.tokens <= max(tokens_there)
        for row in rows.values()
    )
    if not is_within:
        console.print(f"Extrapolated beyond {extent(rungs)}.")


def find_ladder(options: TrainingOptions) -> Path | None:
    """Returns the file of the ladder that the options name, or that lies beside their chunks."""
    if options.ladder is not None or len(options.dataset_path) > 1:
        return options.ladder
    beside = ladder_folder(options.dataset_path[0]) / RUNS_FILE
    return beside if beside.exists() else None
