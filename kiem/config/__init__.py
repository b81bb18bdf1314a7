"""Options of every script: frozen dataclasses from which the command line is made.

The help text of an option is the string below it. `None` means that kiem chooses; the choice is
printed and recorded with the result. Every number has its limits here, which kiem.core.values
checks for the command line and for YAML. Each command has a file of its name.
"""

from kiem.config.audit import AuditOptions
from kiem.config.evaluate import EvaluationOptions
from kiem.config.export import ExportOptions
from kiem.config.inference import InferenceOptions
from kiem.config.ladder import LadderOptions
from kiem.config.limits import Penalty, Share, Temperature, TopP
from kiem.config.look import LookOptions
from kiem.config.preprocess import (
    DATASET_SIZES,
    HUB_DATASET,
    HUB_TOKENIZER,
    MIN_CHUNK_SIZE,
    PreprocessOptions,
)
from kiem.config.report import ReportOptions
from kiem.config.training import TrainingOptions

__all__ = [
    "DATASET_SIZES",
    "HUB_DATASET",
    "HUB_TOKENIZER",
    "MIN_CHUNK_SIZE",
    "AuditOptions",
    "EvaluationOptions",
    "ExportOptions",
    "InferenceOptions",
    "LadderOptions",
    "LookOptions",
    "Penalty",
    "PreprocessOptions",
    "ReportOptions",
    "Share",
    "Temperature",
    "TopP",
    "TrainingOptions",
]
