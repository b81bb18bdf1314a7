"""Checks of training's options that need little more than the options."""

from __future__ import annotations

from functools import partial

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, no_effect
from kiem.model.config import Gemma3Config
from kiem.parallel.distributed import Distributed
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training.accessories import try_before
from kiem.training.trackers import tracker_names

# Tokens that the model adds to a `--sample-prompt`.
SAMPLE_TOKENS = 40


def check_options(options: TrainingOptions) -> None:
    """Checks combinations; kiem.core.values has checked each value.

    Raises:
        UserError: two options contradict each other, or one cannot have an effect.
    """
    if options.save_total_limit == 0 and options.save_steps != 0:
        raise UserError(
            "every checkpoint would be removed at once",
            where="--save-total-limit 0",
            fix="Give 1 or more, or turn checkpoints off with --save-steps 0.",
            exit_code=ExitCode.BAD_OPTION,
        )
    if options.save_steps == 0 and options.on_save_failure == "stop":
        raise no_effect("--on-save-failure stop", "with --save-steps 0, which saves nothing")
    has_budget = options.max_steps is not None or options.max_minutes is not None
    if has_budget and options.epochs != 1.0:
        raise no_effect("--epochs", "together with --max-steps or --max-minutes")
    if options.gpu is not None and not options.plan:
        raise no_effect("--gpu", "without --plan")
    if options.num_gpus is not None and options.gpu is None:
        raise no_effect("--num-gpus", "without --gpu")
    if options.wandb_project is not None and not {"wandb", "trackio"} & {*tracker_names(options)}:
        raise no_effect("--wandb-project", "without --use-wandb or --trackers trackio")
    if options.shard == "parameters" and options.optimizer == "muon":
        raise UserError(
            "Muon needs whole matrices, and no device has them",
            where="--shard parameters",
            fix="Add --optimizer adamw, or use --shard optimizer.",
            exit_code=ExitCode.BAD_OPTION,
        )
    if options.init_from is not None and options.model != "gemma3-1b":
        raise no_effect("--model", "with --init-from, which brings its own shape")


def check_devices(options: TrainingOptions, distributed: Distributed) -> None:
    """Checks what depends on the devices that are there, or that are planned for.

    Raises:
        UserError: an option cannot have an effect.
    """
    if options.shard != "none" and distributed.world_size == 1:
        raise no_effect("--shard", "with one device")


def check_sample_prompts(
    options: TrainingOptions, tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    """Checks that the model can continue every `--sample-prompt`.

    Raises:
        UserError: a prompt is no text, too long, or has tokens that the model does not know.
    """
    most = config.max_position_embeddings - SAMPLE_TOKENS - 1  # <bos> stands before it
    for number, prompt in enumerate(options.sample_prompt, start=1):
        where = f"--sample-prompt, text {number}"
        ids = try_before(where, partial(tokenizer.encode, prompt))
        if len(ids) > most:
            what = f"{len(ids):,} tokens; the model reads at most {most:,} before its own"
        elif max(ids, default=0) >= config.vocab_size:
            what = f"token {max(ids)} is not among the model's {config.vocab_size:,}"
        else:
            continue
        raise UserError(what, where=where, fix="Give another text.", exit_code=ExitCode.BAD_OPTION)
