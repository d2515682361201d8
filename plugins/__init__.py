"""Kernels that runtimes load: one folder per custom op."""
