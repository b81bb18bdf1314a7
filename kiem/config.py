"""The options of every script: frozen dataclasses from which the command line is made.

The help text of an option is the comment-like string below it. `None` stands for "choose for me";
the choice is printed and written down where the option's result is kept. Every number has its
limits here, to which kiem.core.values holds both the command line and YAML.
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

# Limits are those of sense or of arithmetic; where neither sets one, a number that is never reached
# keeps the arithmetic that follows from overflow.
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
Name = Annotated[str, Meta(min_length=1)]  # an empty one is a variable that was not set


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn Dutch text into a folder of token chunks to train on."""

    dataset_size: Name | None = None
    """Hub: config of the dataset (10k, 100k, 1M, 10M, 100M, 1B, 5B, 10B, 15B ... 55B), default 10k.
    Other sources: at most this many white-space words (50000, 10k, 1M), default all."""
    chunk_size: Annotated[int, Meta(ge=MIN_CHUNK_SIZE, le=_MOST_TOKENS)] = 1024
    """Tokens in a chunk, the unit of training."""
    test_split: Annotated[float, Meta(gt=0, lt=1)] = 0.002
    """Share of the documents kept apart for testing, chosen by a hash of their text; of few large
    ones, the end of one."""
    output_dir: Path = Path("processed_data")
    """Folder that the chunk directory is made in."""
    name: Name | None = None
    """Name of the chunk directory. Default: chunked_ and the dataset size or the source's name."""
    num_proc: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Worker processes. Default: one per processor. The result does not depend on it."""
    seed: Seed = 42
    """Seed of the split."""
    source: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("hub",)
    """hub (BramVanroy/wikipedia_culturax_dutch), sample (the built-in text), or files, folders and
    globs of .txt, .jsonl, .json, .csv, .parquet and others, see docs/formats.md; - is standard
    input."""
    text_column: Name = "text"
    """Column or key that holds a document's text; a.b is b in the column or object a."""
    document_separator: str | None = None
    """Cut text files into documents at lines with this text, such as <|endoftext|>. blank-lines: at
    blank lines. every-line: each line is a document. Default: each file is one."""
    tokenizer: Name = HUB_TOKENIZER
    """A Hub id, a folder with a tokenizer.json, a tokenizer.json, or train:N to train a vocabulary
    of N entries in Gemma's style on the training documents."""
    encoder: Literal["auto", "reference"] = "auto"
    """auto: gigatoken where it is proven exact, checked against the tokenizers library on a sample
    of documents. reference: the tokenizers library alone."""
    executor: Literal["local", "ray"] = "local"
    """local: worker processes on this machine. ray: on a Ray cluster whose nodes share the folders;
    the result is the same."""
    ray_address: Name | None = None
    """Address of a running Ray cluster. Default: one is started on this machine."""
    packing: Literal["concat", "best-fit"] = "concat"
    """concat: one document after the other, cut into chunks. best-fit: cut only documents that are
    longer than a chunk, put the others where they fit best and fill the ends with padding."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do at a line or row that is no document: stop and name it, or skip and count it."""
    clean: Literal["none", "dutch"] = "none"
    """dutch: mend characters, leave out what FineWeb-2's filters for Dutch reject, and keep only
    the first of equal documents. none: the Hub dataset is filtered already."""
    near_duplicates: bool = False
    """Leave out documents that are nearly equal to an earlier one (pip install rensa)."""
    decontaminate: tuple[Path, ...] = ()
    """Leave out documents that share 13 consecutive words with these evaluation files."""
    keep_rejected: bool = False
    """Keep every rejected document with its place and reason in the chunk directory's
    rejected.jsonl."""
    verify: Path | None = None
    """Make nothing; check every hash and count of this chunk directory instead."""
    overwrite: bool = False
    """Replace the chunk directory if it exists, and start again if one is unfinished."""


@dataclass(frozen=True)
class TrainingOptions:
    """Train a Gemma 3 model on a chunk directory."""

    dataset_path: Path
    """Chunk directory that preprocess.py made."""
    model: Literal["gemma3-1b", "gemma3-270m", "gemma3-nano", "gemma3-micro"] = "gemma3-1b"
    """Shape of the model. Its vocabulary is that of the chunk directory's tokenizer."""
    output_dir: Path = Path("trained_models")
    """Folder that the run directory is made in."""
    run_name: Name | None = None
    """Name of the run directory. Default: the model's name, -dutch- and the UTC time."""
    epochs: Annotated[float, Meta(gt=0, le=10**6)] = 1.0
    """How often every chunk is seen."""
    max_steps: Count | None = None
    """Instead of --epochs: end after this many updates."""
    max_minutes: Annotated[float, Meta(gt=0, le=10**7)] | None = None
    """Instead of --epochs: end after this many minutes of updates; the learning rate follows."""
    batch_size: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """Chunks per device in one forward pass. Default: by model."""
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    """Forward passes per update. Default: what the model's usual tokens per update need, fewer when
    the data is small."""
    learning_rate: Annotated[float, Meta(gt=0, le=10)] | None = None
    """Highest learning rate. Default: by model."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the hidden matrices, AdamW for the rest. adamw: AdamW for all parameters."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """How the learning rate falls after the warm-up: to zero, along a cosine to a tenth, or (wsd)
    only in the last fifth, to zero."""
    warmup_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Share of the training in which the learning rate rises."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.1
    """Decay of the weight matrices; embeddings and norms do not decay."""
    max_grad_norm: Annotated[float, Meta(gt=0, le=10**6)] = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    z_loss: Annotated[float, Meta(ge=0, le=1)] = 1e-5
    """Weight of the squared log-normalizer in the loss, which keeps logits small. 0: off."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When loss or gradient of an update is not finite: stop before the update, or go back to the
    newest checkpoint and from there on without that update."""
    spike_sigmas: Annotated[float, Meta(ge=0, le=10**6)] = 6.0
    """Leave out updates whose loss is so many standard deviations above the mean of the 128 before.
    0: do all."""
    eval_steps: CountOrZero | None = None
    """Evaluate every so many updates. Default: five times a run. 0: only at the end."""
    eval_chunks: Count = 64
    """Test chunks in an evaluation during training; the one at the end takes all."""
    save_steps: CountOrZero | None = None
    """Save a checkpoint every so many updates. Default: every half hour. 0: never."""
    save_total_limit: CountOrZero = 2
    """Newest checkpoints that are kept, beside the one of the lowest test loss; others are removed
    when a new one is committed."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """When the disk refuses a checkpoint or a line of the log: continue with a warning and try
    again at the next one, or stop. A run that has no checkpoint yet stops in any case."""
    resume: Name = "auto"
    """auto: go on from the newest checkpoint in the run directory, if there is one. none: do not.
    Or the path of a checkpoint."""
    seed: Seed = 42
    """Seed of the weights, the order of the chunks and the samples of text."""
    init_from: Name | None = None
    """Continue the pretraining of this Gemma 3 model (a folder or Hub id)."""
    document_mask: bool = True
    """Tokens attend only to their own document."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; weights stay fp32. auto: bf16 where it is faster: on GPUs
    that have it, and on CPUs by a measurement."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Let torch.compile make faster kernels for the layers, which takes up to a minute at the
    start. auto: when the training is long enough to gain from it."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass computes again to save memory. selective: all but matrix products and
    attention. full: all but each layer's input, for a third more time. auto: full above 500 million
    parameters, else none."""
    shard: Literal["none", "optimizer", "parameters"] = "none"
    """With several devices. none: each holds everything. optimizer: each holds the optimizer's
    moments of its share of the parameters only. parameters: each holds a share of weights,
    gradients and moments, for models that do not fit otherwise; with --optimizer adamw."""
    minimal_pairs: Literal["auto", "always", "never"] = "auto"
    """At the end measure how often the model prefers correct Dutch to a mistake (430 pairs). auto:
    when the run trained on so many tokens that this is a small part of it."""
    language: Name = "nl"
    """ISO 639 code of the text's language, for the model card."""
    sample_prompt: tuple[str, ...] = ("Nederland is", "Er was eens")
    """Texts that the model continues at every evaluation."""
    log_steps: Count = 1
    """Write metrics every so many updates."""
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Send metrics and samples there as well; tensorboard writes into the run directory."""
    use_wandb: bool = False
    """The same as --trackers wandb."""
    wandb_project: Name | None = None
    """Project in Weights & Biases or trackio. Default: kiem."""
    price: Price | None = None
    """What an hour on this hardware costs, for the plan and the report."""
    plan: bool = False
    """Train nothing; print the memory, time and cost that the training would take."""
    gpu: Literal["a10g", "l4", "l40s", "rtx3090", "rtx4090", "a100-40gb", "a100", "h100"] | None = (
        None
    )
    """With --plan: plan for this GPU, from published figures, instead of this machine."""
    num_gpus: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """With --gpu: so many of them. Default: 1."""


@dataclass(frozen=True)
class InferenceOptions:
    """Let a trained model continue text. Without any prompt it continues five Dutch ones."""

    model_path: Name
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    prompt: str | None = None
    """Text to continue."""
    prompts_file: Path | None = None
    """File with a prompt a line (.txt), or with a column or key "prompt" (.jsonl, .csv and others,
    see docs/formats.md)."""
    interactive: bool = False
    """Type prompts at the keyboard."""
    serve: bool = False
    """Let programs (OpenAI's API, /v1/completions) and browsers (a page at /) use the model."""
    benchmark: bool = False
    """Measure the speed and print a table."""
    json: Path | None = None
    """With --benchmark: write the figures to this file."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=_MOST_TOKENS)] = 128
    """Most tokens to add to a prompt. With --serve: where a request does not say; so are the
    options of the choice of tokens, from --temperature to --stop."""
    temperature: Temperature = 0.8
    """How adventurous the choice of tokens is; 0 always takes the likeliest."""
    top_k: Annotated[int, Meta(ge=0, le=_MOST)] = 0
    """Choose from the k likeliest tokens; 0: from all."""
    top_p: TopP = 0.9
    """Choose from the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Choose from tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: Penalty = 1.1
    """Above 1: tokens that occurred before become less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, and are left out of it."""
    num_return_sequences: Annotated[int, Meta(ge=1, le=2**16)] = 1
    """Continuations per prompt."""
    seed: Seed = 42
    """Seed of the choices; the same seed gives the same text."""
    output_file: Path | None = None
    """Write prompts and continuations to this JSON Lines file; several at a time, and over all
    processes of accelerate launch or torchrun. Stopped, the same command goes on."""
    max_requests: Annotated[int, Meta(ge=1, le=4096)] = 8
    """With --output-file and --serve: continuations that are written at the same time."""
    max_context: Annotated[int, Meta(ge=2, le=_MOST_TOKENS)] = 4096
    """With --interactive and --serve: most tokens of a text, the new ones included."""
    host: Name = "127.0.0.1"
    """With --serve: address to listen on. Any but this machine's own needs --api-key."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """With --serve: port to listen on; 0: any that is free."""
    api_key: Name | None = None
    """With --serve: what every request must carry as bearer token, or a browser as password."""
    max_waiting: Annotated[int, Meta(ge=0, le=10**6)] = 32
    """With --serve: continuations that may wait beside --max-requests; more are refused."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the weights. auto: bf16 on GPUs that have it; on CPUs as stored, or fp32
    where they are slow at bf16."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """On CPUs: keep the matrices and the embedding in 8 or 4 bits, for speed and memory;
    --precision is then that of the rest (auto: bf16 where the processor multiplies it faster)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Measure a language model: bits per byte of text, and minimal pairs. Without --data and
    --suite it takes the built-in minimal pairs."""

    model_path: Name
    """Model directory (final_model/ of a run), or a Hub id. Any causal model that transformers can
    load is measured alike, if transformers is installed."""
    data: tuple[Name, ...] = ()
    """Text to measure bits per byte on: files, folders and globs as for preprocess.py, sample (the
    built-in text), or a chunk directory, whose test split is taken."""
    suite: tuple[Name, ...] = ()
    """minimal-pairs (the built-in Dutch ones), or files in BLiMP's shape, see docs/formats.md."""
    context: Annotated[int, Meta(ge=8, le=_MOST_TOKENS)] | None = None
    """Most tokens the model reads at once; longer documents are read in overlapping windows.
    Default: the chunk size that a kiem model was trained with, the longest of other models."""
    text_column: Name = "text"
    """Column or key of --data that holds a document's text."""
    document_separator: str | None = None
    """Cut text files of --data into documents, as preprocess.py does with this option."""
    max_documents: Count | None = None
    """Take only so many documents of --data, the first ones."""
    json: Path | None = None
    """Write the results to this file."""
    seed: Seed = 42
    """Seed of the resampling that gives the intervals."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the weights. auto: bf16 on GPUs that have it; on CPUs as stored, or fp32
    where they are slow at bf16."""


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
    """Upload the result to this repository (OWNER/NAME) on the Hub, which is made if need be."""
    private: bool = True
    """With --push-to-hub: a repository that is made is private; you can publish it on its page."""
    dry_run: bool = False
    """With --push-to-hub: write the output and say what would be uploaded, but upload nothing."""


@dataclass(frozen=True)
class ReportOptions:
    """Draw the report of a run again, or one page that compares several runs."""

    runs: Annotated[tuple[Path, ...], Meta(min_length=1)]
    """Run directories, such as trained_models/gemma3-1b-dutch-latest."""
    output: Path | None = None
    """The page. Default: report.html in the run directory, or comparison.html for several runs."""
    price: Price | None = None
    """What an hour on the hardware costs. Default: what the run was told."""
