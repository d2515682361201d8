"""Hugging Face checkpoints in, transformed checkpoints and network definitions out."""

__version__ = "0.1.0"
