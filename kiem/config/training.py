"""Options of training.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kiem.config.limits import Count, CountOrZero, Name, Price, Seed, Weight


@dataclass(frozen=True)
class TrainingOptions:
    """Train a Gemma 3 model on a chunk directory."""

    dataset_path: Annotated[tuple[Path, ...], Meta(min_length=1)]
    """Chunk directories that preprocess.py made, of one tokenizer and size of chunks."""
    weights: tuple[Weight, ...] = ()
    """Share of each chunk directory in what is read, in proportion: 7 3 is the same as 0.7 0.3. For
    one directory that was made with --weights: share of each of its sources. Default: the weights
    it was made with; of several directories by their sizes, as if they were one."""
    anneal: tuple[Path, ...] = ()
    """Chunk directories, such as of better text, that the last part of the training reads instead.
    The evaluations stay those of --dataset-path."""
    anneal_share: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """With --anneal: share of the updates that read it, the last ones."""
    anneal_weights: tuple[Weight, ...] = ()
    """With --anneal: as --weights."""
    model: Name = "gemma3-1b"
    """Size of the model: gemma3-1b, gemma3-270m, gemma3-nano, gemma3-micro, or gemma3-<N>m such as
    gemma3-20m, with about N million parameters beside those of the vocabulary, which is that of the
    chunk directory's tokenizer."""
    output_dir: Path = Path("trained_models")
    """Folder in which the run directory is made."""
    run_name: Name | None = None
    """Name of the run directory. Default: the model's name, -dutch- and the UTC time."""
    epochs: Annotated[float, Meta(gt=0, le=10**6)] = 1.0
    """Passes over the training chunks."""
    max_steps: Count | None = None
    """Instead of --epochs: end after this many updates."""
    max_minutes: Annotated[float, Meta(gt=0, le=10**7)] | None = None
    """Instead of --epochs: end after this many minutes of updates; the schedule adapts to it."""
    batch_size: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """Chunks per device in one forward pass. Default: by model."""
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    """Forward passes per update. Default: by model, fewer for little data."""
    batch_warmup_steps: CountOrZero | None = None
    """Smaller updates at the start: the first half of these updates reads a quarter of the chunks
    of a later one, the second half of them half. Default: by model; 0 unless --max-minutes alone
    limits the training and the batch is left open."""
    learning_rate: Annotated[float, Meta(gt=0, le=10)] | None = None
    """Highest learning rate. Default: by model."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the hidden matrices, AdamW for the rest. adamw: AdamW for all parameters."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """How the learning rate falls after the warm-up: to zero, along a cosine to a tenth, or (wsd)
    only in the last fifth, to zero."""
    warmup_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Share of the training in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.1
    """Weight decay of the matrices; embeddings and norms have none."""
    max_grad_norm: Annotated[float, Meta(gt=0, le=10**6)] = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    z_loss: Annotated[float, Meta(ge=0, le=1)] = 1e-5
    """Weight of the squared log-normalizer in the loss, which keeps logits small. 0: off."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When the loss or gradient is not finite: stop before the update, or return to the newest
    checkpoint and leave that update out."""
    spike_sigmas: Annotated[float, Meta(ge=0, le=10**6)] = 6.0
    """Skip an update if its loss is this many standard deviations above the mean of the 128 before.
    0: never."""
    eval_steps: CountOrZero | None = None
    """Updates between evaluations. Default: five evaluations per run. 0: only at the end."""
    eval_chunks: Count = 64
    """Test chunks in an evaluation during training; the last evaluation uses all."""
    save_steps: CountOrZero | None = None
    """Updates between checkpoints. Default: one every half hour, and one before a long evaluation
    at the end. 0: none."""
    save_total_limit: CountOrZero = 2
    """Number of newest checkpoints to keep, in addition to the one with the lowest test loss."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint or a line of the log cannot be written: continue with a warning, or stop.
    A run without any checkpoint always stops."""
    resume: Name = "auto"
    """auto: resume from the newest checkpoint in the run directory, if there is one. none: start
    anew. Or the path of a checkpoint."""
    seed: Seed = 42
    """Seed of the weights, the order of the chunks and the text samples."""
    init_from: Name | None = None
    """Continue pretraining from this Gemma 3 model (a folder or Hub id)."""
    branch_from: Name | None = None
    """RUN@STEP: start from this checkpoint of another run directory, with its order of the chunks
    and its log so far, but with other options."""
    document_mask: bool = True
    """Let tokens attend only to their own document."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; weights stay fp32. auto: bf16 on GPUs that support it, and on
    x86 processors with AVX512_BF16 (as all with AMX); a resumed run keeps what it had."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Use torch.compile, which takes up to a minute at the start. auto: on GPUs, and on CPUs when
    the training is long enough to gain from it."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass recomputes to save memory. selective: all but matrix products and
    attention. full: all but each layer's input, in a fifth to a third more time. auto: on a GPU the
    least that fits; on a CPU full above 500 million parameters, else none."""
    shard: Literal["none", "optimizer", "parameters"] = "none"
    """What is sharded over several devices. none: nothing (DDP). optimizer: the optimizer states
    (ZeRO-1). parameters: weights, gradients and optimizer states (FSDP), for models that do not fit
    otherwise."""
    minimal_pairs: Literal["auto", "always", "never"] = "auto"
    """Measure at the end how often the model prefers correct Dutch to a mistake (430 pairs). auto:
    if this takes a small part of the training time."""
    language: Name = "nl"
    """ISO 639 code of the text's language, for the model card."""
    sample_prompt: tuple[str, ...] = ("Nederland is", "Er was eens")
    """Prompts that the model continues at every evaluation."""
    log_steps: Count = 1
    """Updates between lines of metrics."""
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Also send metrics and samples there; tensorboard writes into the run directory."""
    use_wandb: bool = False
    """The same as --trackers wandb."""
    wandb_project: Name | None = None
    """Project in Weights & Biases or trackio. Default: kiem."""
    price: Price | None = None
    """Cost of this hardware per hour, for the plan and the report."""
    plan: bool = False
    """Only print the memory, time, cost and expected quality of the training."""
    ladder: Path | None = None
    """With --plan: forecast by this runs.jsonl of a ladder. Default: that of `kiem ladder` on the
    same chunk directory, else kiem's own."""
    gpu: (
        Literal["a10g", "l4", "l40s", "rtx3090", "rtx4090", "a100-40gb", "a100", "h100", "h200"]
        | None
    ) = None
    """With --plan: plan for this GPU, from published figures, not for this machine."""
    num_gpus: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """With --gpu: number of GPUs. Default: 1."""
