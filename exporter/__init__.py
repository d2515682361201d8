"""Hugging Face checkpoints in, transformed checkpoints and network definitions out."""
