"""Measuring blocks, choosing a plan, judging a graph against another."""
