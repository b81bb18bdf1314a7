"""A training run: what it is made of (`RunSpec`), how far it is (`TrainState`), what it works with.

`RunSpec` and `Run` never change; the training loop alone changes the `TrainState`.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kiem
from kiem.config import TrainingOptions
from kiem.data.chunks import Chunks
from kiem.data.mixture import Mixture
from kiem.data.order import ChunkOrder
from kiem.model.config import Gemma3Config, name_of
from kiem.optim.batch import Collator
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel
from kiem.planning.recipe import Recipe
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training.log import RunLog
from kiem.training.signals import StopSignals

# Options that may change when a run is resumed, with another result.
_CHANGEABLE = (
    *("max_steps", "max_minutes", "epochs"),
    *("learning_rate", "schedule", "warmup_ratio"),
    *("weight_decay", "max_grad_norm", "z_loss", "spike_sigmas"),
)


@dataclass(frozen=True)
class TrainingData:
    """The chunk directories of a run.

    Attributes:
        mixture: their manifests.
        train: their chunks, numbered as in a `ChunkOrder`.
        test: their test chunks.
        test_sources: the source of every test token, where the directories have them.
    """

    mixture: Mixture
    train: Chunks
    test: Chunks
    test_sources: Chunks | None

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifests of --dataset-path say together."""
        return self.mixture.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the chunks."""
        return self.mixture.tokenizer


@dataclass(frozen=True)
class RunSpec:
    """What a run is made of: the source of its fingerprint and of run.json.

    Attributes:
        recipe: the numbers that open options were resolved to.
        config: the model's shape.
        is_compiled: whether torch.compile made the layers' kernels.
        directory: the run directory.
        branched_from: of a branch: run, step and checkpoint, and in what it differs from there on.
        first_weights: of --init-from: `resume.find_first_weights`.
    """

    options: TrainingOptions
    recipe: Recipe
    config: Gemma3Config
    data: TrainingData
    distributed: Distributed
    is_compiled: bool
    directory: Path
    branched_from: dict[str, Any] | None = None
    first_weights: dict[str, Any] | None = None

    @property
    def model_name(self) -> str:
        """The name of the model's shape."""
        return name_of(self.config)

    @property
    def final_model(self) -> Path:
        """The model directory of the trained model."""
        return self.directory / "final_model"

    @property
    def collate(self) -> Collator:
        """What makes batches of chunks."""
        ids, device = self.data.tokenizer.special_ids, self.distributed.device
        return Collator(ids["bos"], ids["pad"], self.options.document_mask, device)

    @property
    def order(self) -> ChunkOrder:
        """Which chunks each update reads."""
        recipe = self.recipe
        return self.data.mixture.order(
            self.options, recipe.chunks_per_step, recipe.max_steps, recipe.batch_warmup_steps
        )

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must be the same when the run is resumed."""
        return {
            "model": self.model_name,
            **vars(self.config),
            **self.data.mixture.identity(),
            "seed": self.options.seed,
            "optimizer": self.options.optimizer,
            "chunks_per_step": self.recipe.chunks_per_step,
            "batch_warmup_steps": self.recipe.batch_warmup_steps,
            "document_mask": self.options.document_mask,
        }

    def changeable(self) -> dict[str, Any]:
        """Returns what may differ when the run is resumed, but changes the result."""
        return {
            **{name: getattr(self.options, name) for name in _CHANGEABLE},
            "anneal_share": self.options.anneal_share if self.options.anneal else None,
            "precision": self.distributed.precision,
            "devices": self.distributed.world_size,
            "compiled": self.is_compiled,
        }

    def metadata(self) -> dict[str, Any]:
        """Returns the content of run.json: the summary's part that is known before the start."""
        train, test = (self.data.manifest["splits"][split] for split in ("train", "test"))
        return {
            "model": self.model_name,
            "parameters": self.config.num_parameters(),
            "initialized_from": self.options.init_from or "random weights",
            "first_weights": self.first_weights,
            "branched_from": self.branched_from,
            "data": {
                "source": self.data.manifest["source"],
                "options": self.data.manifest["options"],
                **self.data.mixture.describe(),
                "train_tokens": train["tokens"],
                "train_documents": train["documents"],
                "test_documents": test["documents"],
                "bytes_per_source": train["bytes_per_source"],
            },
            "tokenizer": self.data.manifest["tokenizer"],
            "recipe": dataclasses.asdict(self.recipe),
            "hardware": {
                "device": self.distributed.name,
                "devices": self.distributed.world_size,
                "precision": self.distributed.precision,
                "compiled": self.is_compiled,
                "matrix_flops": self.distributed.matrix_flops,
            },
            "versions": {
                "kiem": kiem.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step, tokens: updates and tokens so far.
        seconds: time of the updates so far, without evaluations.
        test_loss: of the latest evaluation.
        awaits_evaluation: whether an evaluation after this update is due and not yet complete.
        recent_losses: of the latest updates; see `anomalies.spike_limit`.
        num_skipped: updates that were skipped because of their loss.
        saved_step: the step of the newest checkpoint; the only value that is not saved.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    test_loss: float | None = None
    awaits_evaluation: bool = False
    recent_losses: list[float] = field(default_factory=list)
    num_skipped: int = 0
    saved_step: int | None = None

    def to_save(self) -> dict[str, Any]:
        """Returns the values that a checkpoint holds."""
        values = dataclasses.asdict(self)
        del values["saved_step"]
        return values

    def progress(self, recipe: Recipe) -> float:
        """Returns the finished share of the training: of its updates or its time."""
        return _share(recipe, self.step, self.seconds)

    def progress_within_step(self, recipe: Recipe) -> float:
        """Returns the progress in the middle of the next update, for the schedule; below 1."""
        seconds_per_step = self.seconds / self.step if self.step else 0.0
        share = _share(recipe, self.step + 0.5, self.seconds + seconds_per_step / 2)
        return min(share, 1 - 1e-6)


def _share(recipe: Recipe, step: float, seconds: float) -> float:
    of_steps = step / recipe.max_steps if recipe.max_steps else 0.0
    of_seconds = seconds / recipe.max_seconds if recipe.max_seconds else 0.0
    return max(of_steps, of_seconds)


@dataclass(frozen=True)
class Run:
    """What the training loop works with; `resumed_from` is a checkpoint."""

    spec: RunSpec
    model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    log: RunLog
    signals: StopSignals
    resumed_from: Path | None
