"""The weights that a training starts from: random ones, or those of another model."""

from __future__ import annotations

from pathlib import Path

import torch

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.model.io import find_model, read_model
from kiem.planning.recipe import what_to_recompute
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer


def make_model(options: TrainingOptions, tokenizer: Tokenizer, world_size: int) -> Gemma3:
    """Returns a new model for the tokenizer's vocabulary, or the one to continue.

    Raises:
        UserError: that is no Gemma 3 text model, or has another tokenizer.
    """
    if options.init_from is None:
        model = Gemma3(preset(options.model, tokenizer.num_rows))
        initialize(model, options.seed)
    else:
        folder = find_model(options.init_from)
        model = read_model(folder, dtype=torch.float32)
        _check_same_tokenizer(folder, tokenizer, options)
    model.recompute = what_to_recompute(options, model.config)
    model.model.embed_tokens.adds_to_gradient = world_size == 1
    return model


def _check_same_tokenizer(folder: Path, tokenizer: Tokenizer, options: TrainingOptions) -> None:
    # Equal vocabularies suffice: Gemma's -it and -pt files, and transformers' own saves, differ in
    # bytes but give every piece of text the same id.
    own = load_tokenizer(str(folder)).implementation.get_vocab(with_added_tokens=False)
    if own != tokenizer.implementation.get_vocab(with_added_tokens=False):
        raise UserError(
            f"the chunks in {options.dataset_path} were made with another tokenizer",
            where=f"--init-from {options.init_from}",
            fix=f"Make them again with preprocess.py --tokenizer {options.init_from}.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )
