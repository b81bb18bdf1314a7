"""kiem: train Gemma 3 language models from scratch on Dutch text."""

__version__ = "0.1.0"
