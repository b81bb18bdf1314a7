"""Options of every script: frozen dataclasses from which the command line is made.

The help text of an option is the string below it. `None` means that kiem chooses; the choice is
printed and recorded with the result. Every number has its limits here, which kiem.core.values
checks for the command line and for YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

HUB_DATASET = "BramVanroy/wikipedia_culturax_dutch"
HUB_TOKENIZER = "google/gemma-3-1b-pt"

# The configs of HUB_DATASET. Their "tokens" are white-space words.
DATASET_SIZES = (
    *("10k", "100k", "1M", "10M", "100M", "1B"),
    *(f"{billions}B" for billions in range(5, 60, 5)),
)

# Where an option has no natural limit, this one is never reached and prevents overflow.
_MOST = 10**9
_MOST_TOKENS = 2**20
MIN_CHUNK_SIZE = 16
Count = Annotated[int, Meta(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Meta(ge=0, le=_MOST)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Price = Annotated[float, Meta(ge=0, le=10**6)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(gt=0, le=100)]
Name = Annotated[str, Meta(min_length=1)]  # empty: a shell variable that was not set


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn Dutch text into a folder of token chunks to train on."""

    dataset_size: Name | None = None
    """Hub: config of the dataset (10k, 100k, 1M, 10M, 100M, 1B, 5B, 10B, 15B ... 55B), default 10k.
    Other sources: at most this many white-space words (50000, 10k, 1M), default all."""
    chunk_size: Annotated[int, Meta(ge=MIN_CHUNK_SIZE, le=_MOST_TOKENS)] = 1024
    """Tokens in a chunk, the unit of training."""
    test_split: Annotated[float, Meta(gt=0, lt=1)] = 0.002
    """Share of the documents for testing, chosen by a hash of their text; where documents are few
    and large, the end of one."""
    output_dir: Path = Path("processed_data")
    """Folder in which the chunk directory is made."""
    name: Name | None = None
    """Name of the chunk directory. Default: chunked_ and the dataset size or the source's name."""
    num_proc: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Worker processes. Default: one per processor that the program may use. The result does not
    depend on it."""
    seed: Seed = 42
    """Seed of the split."""
    source: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("hub",)
    """hub (BramVanroy/wikipedia_culturax_dutch), sample (the built-in text), or files, folders and
    globs of .txt, .jsonl, .json, .csv, .parquet and others, see docs/formats.md; - is standard
    input."""
    text_column: Name = "text"
    """Column or key that holds a document's text; a.b is b in the column or object a."""
    document_separator: str | None = None
    """Split text files into documents at lines with this text, such as <|endoftext|>. blank-lines:
    at blank lines. every-line: each line is a document. Default: each file is one."""
    tokenizer: Name = HUB_TOKENIZER
    """A Hub id, a folder with a tokenizer.json, a tokenizer.json, or train:N to train a vocabulary
    of N entries in Gemma's style on the training documents."""
    encoder: Literal["auto", "reference"] = "auto"
    """auto: gigatoken where it is proven exact, compared with the tokenizers library on a sample of
    documents. reference: only the tokenizers library."""
    executor: Literal["local", "ray"] = "local"
    """local: worker processes on this machine. ray: a Ray cluster with shared folders; the result
    is the same."""
    ray_address: Name | None = None
    """Address of a running Ray cluster. Default: one is started on this machine."""
    packing: Literal["concat", "best-fit"] = "concat"
    """concat: join all documents and cut them into chunks. best-fit: cut only documents longer than
    a chunk, place the others where they fit best, and pad the chunks."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """At a line or row that is not a document: stop with an error, or skip and count it."""
    clean: Literal["none", "dutch"] = "none"
    """dutch: normalize characters, apply FineWeb-2's filters for Dutch, and remove duplicates.
    none: for text that is clean already, such as the Hub dataset."""
    near_duplicates: bool = False
    """Remove near duplicates of earlier documents (pip install rensa)."""
    decontaminate: tuple[Path, ...] = ()
    """Remove documents that share 13 consecutive words with these evaluation files."""
    keep_rejected: bool = False
    """Write rejected documents, with place and reason, to rejected.jsonl in the chunk directory."""
    verify: Path | None = None
    """Only check every hash and count of this chunk directory."""
    overwrite: bool = False
    """Replace the chunk directory if it exists, and discard unfinished work on it."""


@dataclass(frozen=True)
class TrainingOptions:
    """Train a Gemma 3 model on a chunk directory."""

    dataset_path: Path
    """Chunk directory that preprocess.py made."""
    model: Literal["gemma3-1b", "gemma3-270m", "gemma3-nano", "gemma3-micro"] = "gemma3-1b"
    """Size of the model. Its vocabulary is that of the chunk directory's tokenizer."""
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
    """Updates between checkpoints. Default: one every half hour. 0: none."""
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
    document_mask: bool = True
    """Let tokens attend only to their own document."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; weights stay fp32. auto: bf16 on GPUs that support it, and on
    CPUs where a measurement shows that it is faster."""
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
    """Only print the memory, time and cost of the training."""
    gpu: (
        Literal["a10g", "l4", "l40s", "rtx3090", "rtx4090", "a100-40gb", "a100", "h100", "h200"]
        | None
    ) = None
    """With --plan: plan for this GPU, from published figures, not for this machine."""
    num_gpus: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """With --gpu: number of GPUs. Default: 1."""


@dataclass(frozen=True)
class InferenceOptions:
    """Continue text with a trained model; without a prompt, five Dutch ones."""

    model_path: Name
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    prompt: str | None = None
    """Text to continue."""
    prompts_file: Path | None = None
    """File with one prompt per line (.txt), or with a column or key "prompt" (.jsonl, .csv and
    others, see docs/formats.md)."""
    interactive: bool = False
    """Read prompts from the keyboard."""
    serve: bool = False
    """Start a server with OpenAI's API (/v1/completions) and a web page (/)."""
    benchmark: bool = False
    """Measure the speed."""
    json: Path | None = None
    """With --benchmark: write the figures to this file."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=_MOST_TOKENS)] = 128
    """Most tokens to generate. With --serve this and the sampling options, from --temperature to
    --stop, are the defaults of requests."""
    temperature: Temperature = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: Annotated[int, Meta(ge=0, le=_MOST)] = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: TopP = 0.9
    """Sample from the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Sample from tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: Penalty = 1.1
    """Above 1: tokens that occurred before are less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are not part of it."""
    num_return_sequences: Annotated[int, Meta(ge=1, le=2**16)] = 1
    """Continuations per prompt."""
    seed: Seed = 42
    """Seed of the sampling; the same seed gives the same text."""
    output_file: Path | None = None
    """Write prompts and continuations to this JSON Lines file, in batches, and over all processes
    of accelerate launch or torchrun. After an interruption the same command resumes."""
    max_requests: Annotated[int, Meta(ge=1, le=4096)] = 8
    """With --output-file and --serve: continuations in a batch."""
    max_context: Annotated[int, Meta(ge=2, le=_MOST_TOKENS)] = 4096
    """With --interactive and --serve: most tokens of prompt and continuation."""
    host: Name = "127.0.0.1"
    """With --serve: address to listen on. Any but the local one needs --api-key."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """With --serve: port to listen on; 0: any that is free."""
    api_key: Name | None = None
    """With --serve: key that every request must have as bearer token, or a browser as password."""
    max_waiting: Annotated[int, Meta(ge=0, le=10**6)] = 32
    """With --serve: most continuations in the queue; more are refused."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of what is computed. auto: bf16 on GPUs that support it; on CPUs as the weights are
    stored, or fp32 if bf16 is slow. Weights in bf16 take no more memory for fp32 on a CPU with a
    C++ compiler."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """On CPUs: quantize the matrices and the embedding; --precision then applies to the rest (auto:
    bf16 where it is faster)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluate a language model: bits per byte of text, and minimal pairs; without --data and
    --suite, the built-in minimal pairs."""

    model_path: Name
    """Model directory (final_model/ of a run), or a Hub id; with transformers installed, any causal
    language model."""
    data: tuple[Name, ...] = ()
    """Text for bits per byte: files, folders and globs as for preprocess.py, sample (the built-in
    text), or a chunk directory (its test split)."""
    suite: tuple[Name, ...] = ()
    """minimal-pairs (the built-in Dutch ones), or files in BLiMP's shape, see docs/formats.md."""
    context: Annotated[int, Meta(ge=8, le=_MOST_TOKENS)] | None = None
    """Most tokens of context; longer documents are read in overlapping windows. Default: the chunk
    size of the training for kiem's models, the longest context of others."""
    text_column: Name = "text"
    """Column or key of --data that holds a document's text."""
    document_separator: str | None = None
    """Split text files of --data into documents, as in preprocess.py."""
    max_documents: Count | None = None
    """Use only the first documents of --data."""
    json: Path | None = None
    """Write the results to this file."""
    seed: Seed = 42
    """Seed of the bootstrap intervals."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the weights. auto: bf16 on GPUs that support it; on CPUs as stored, or fp32 if
    bf16 is slow."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained model in a format for other programs, or publish it."""

    model_path: Name
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    output: Path
    """What to write: a file (gguf) or a folder (safetensors)."""
    format: Literal["gguf", "safetensors"] = "gguf"
    """gguf: one file for llama.cpp, Ollama, LM Studio and others. safetensors: a model directory
    for transformers and vLLM, such as this one but in another precision."""
    dtype: Literal["f32", "bf16", "f16", "q8_0"] = "bf16"
    """Precision of the matrices. q8_0 (gguf only): 8 bits and a scale for every 32 values."""
    overwrite: bool = False
    """Replace the output if it exists."""
    push_to_hub: Name | None = None
    """Upload the result to this repository (OWNER/NAME) on the Hub; it is made if missing."""
    private: bool = True
    """With --push-to-hub: make a missing repository private."""
    dry_run: bool = False
    """With --push-to-hub: list what would be uploaded, but upload nothing."""


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of a run again, or one page that compares several runs."""

    runs: Annotated[tuple[Path, ...], Meta(min_length=1)]
    """Run directories, such as trained_models/gemma3-1b-dutch-latest."""
    output: Path | None = None
    """The page. Default: report.html in the run directory, or comparison.html for several runs."""
    price: Price | None = None
    """Cost of the hardware per hour. Default: that of the run."""
