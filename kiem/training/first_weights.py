"""The weights that a training starts from: random ones, or those of another model."""

from __future__ import annotations

from pathlib import Path

import torch

from kiem.config import TrainingOptions
from kiem.data.tokenizer import Tokenizer, load_tokenizer
from kiem.errors import ExitCode, UserError
from kiem.model.files import find_model, read_model
from kiem.model.gemma3 import Gemma3
from kiem.model.initialize import initialize
from kiem.model.presets import preset

_RECOMPUTE_ABOVE_PARAMETERS = 500_000_000


def make_model(options: TrainingOptions, tokenizer: Tokenizer) -> Gemma3:
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
    is_large = model.config.num_parameters() > _RECOMPUTE_ABOVE_PARAMETERS
    asked = options.activation_checkpointing
    model.recompute = asked if asked != "auto" else ("full" if is_large else "none")
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
