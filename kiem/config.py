"""The options of every script: frozen dataclasses from which the command line is made.

The help text of an option is the comment-like string below it. `None` stands for "choose for me";
the choice is printed and written down where the option's result is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HUB_DATASET = "BramVanroy/wikipedia_culturax_dutch"
HUB_TOKENIZER = "google/gemma-3-1b-pt"

# The configs of HUB_DATASET. Their "tokens" are white-space words.
DATASET_SIZES = ("10k", "100k", "1M", "10M", "100M", "1B") + tuple(
    f"{billions}B" for billions in range(5, 60, 5)
)


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn Dutch text into a folder of token chunks to train on."""

    dataset_size: str | None = None
    """For the Hub: which config of the dataset (10k, 100k, 1M, 10M, 100M, 1B, 5B, 10B ... 55B;
    default 10k). For other sources: at most this many white-space words (such as 50000, 10k, 1M;
    default all)."""
    chunk_size: int = 1024
    """Tokens in a chunk, the unit of training."""
    test_split: float = 0.002
    """Share of the documents kept apart for testing, chosen by a hash of their text."""
    output_dir: Path = Path("processed_data")
    """Folder that the chunk directory is made in."""
    name: str | None = None
    """Name of the chunk directory; default chunked_<dataset size, or name of the source>."""
    num_proc: int | None = None
    """Processor threads for tokenization; default all."""
    seed: int = 42
    """Seed of the split."""
    source: tuple[str, ...] = ("hub",)
    """Where the text is: hub (BramVanroy/wikipedia_culturax_dutch), sample (the built-in text), or
    files, folders and globs of .txt (one document each), .jsonl, .jsonl.gz and .parquet."""
    text_column: str = "text"
    """Column (Parquet) or key (JSON Lines) that holds a document's text."""
    tokenizer: str = HUB_TOKENIZER
    """A Hub id, a folder with a tokenizer.json, a tokenizer.json, or train:N to train a vocabulary
    of N entries in Gemma's style on the training documents."""
    overwrite: bool = False
    """Replace the chunk directory if it exists."""


@dataclass(frozen=True)
class TrainingOptions:
    """Train a Gemma 3 model on a chunk directory."""

    dataset_path: Path
    """Chunk directory that preprocess.py made."""
    model: Literal["gemma3-1b", "gemma3-270m", "gemma3-nano", "gemma3-micro"] = "gemma3-1b"
    """Shape of the model. The vocabulary follows the chunk directory's tokenizer."""
    output_dir: Path = Path("trained_models")
    """Folder that the run directory is made in."""
    run_name: str | None = None
    """Name of the run directory; default gemma3-1b-dutch-<UTC time>."""
    epochs: float = 1.0
    """How often every chunk is seen. Ignored when --max-steps or --max-minutes is given."""
    max_steps: int | None = None
    """Stop after this many updates; the schedule ends there."""
    max_minutes: float | None = None
    """Stop after this many minutes of training; the schedule ends there."""
    batch_size: int | None = None
    """Chunks per device in one forward pass; default by model."""
    gradient_accumulation_steps: int | None = None
    """Forward passes per update; default: as many as the model's usual tokens per step need, fewer
    when the data is small."""
    learning_rate: float | None = None
    """Highest learning rate; default by model."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up: to zero, or along a cosine to a tenth."""
    warmup_ratio: float = 0.05
    """Share of the training in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decay of the weight matrices; embeddings and norms do not decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger."""
    z_loss: float = 1e-5
    """Weight of the squared log-normalizer in the loss, which keeps logits small. 0 turns it off."""
    eval_steps: int | None = None
    """Evaluate every so many updates; default ten times a run. 0 only at the end."""
    eval_chunks: int = 256
    """Test chunks in one evaluation during training; the last evaluation takes all."""
    save_steps: int | None = None
    """Save a checkpoint every so many updates; default four times a run. 0 never."""
    save_total_limit: int = 2
    """Checkpoints that are kept; older ones are removed."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of the run directory if there is one; none: do not; or
    the path of a checkpoint."""
    seed: int = 42
    """Seed of the weights, the order of the chunks and the samples of text."""
    init_from: str | None = None
    """Continue the pretraining of this Gemma 3 model (a folder or Hub id), not of random weights."""
    document_mask: bool = True
    """Tokens attend to their own document only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; weights stay fp32. auto: bf16 on GPUs that have it."""
    activation_checkpointing: Literal["auto", "none", "full"] = "auto"
    """full: keep only each layer's input and compute the rest again in the backward pass: less
    memory, about a third more time. auto: full for models above 500 million parameters."""
    sample_prompt: str = "Nederland is"
    """Text that the model continues at every evaluation."""
    log_steps: int = 1
    """Write metrics every so many updates."""
    use_wandb: bool = False
    """Send metrics to Weights & Biases as well."""
    wandb_project: str | None = None
    """Project in Weights & Biases; default kiem."""


@dataclass(frozen=True)
class InferenceOptions:
    """Let a trained model continue text."""

    model_path: str
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    prompt: str | None = None
    """Text to continue. Without any prompt, five Dutch ones are used."""
    prompts_file: Path | None = None
    """File with one prompt a line (.txt), or JSON Lines with a key "prompt" (.jsonl)."""
    interactive: bool = False
    """Type prompts at the keyboard."""
    benchmark: bool = False
    """Measure the speed and print a table."""
    json: Path | None = None
    """With --benchmark: write the figures to this file."""
    max_new_tokens: int = 128
    """Most tokens to add to a prompt."""
    temperature: float = 0.8
    """How adventurous: 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose from the k likeliest tokens; 0 from all."""
    top_p: float = 0.9
    """Choose from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.1
    """Above 1: makes tokens that occurred before less likely."""
    num_return_sequences: int = 1
    """Continuations per prompt."""
    seed: int = 42
    """Seed of the choices; the same seed gives the same text."""
    output_file: Path | None = None
    """Write prompts and continuations to this JSON Lines file."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the weights. auto: bf16 on GPUs that have it, as stored on CPUs."""
