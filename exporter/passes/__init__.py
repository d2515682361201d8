"""Passes: one file each, a function from ModelGraph to ModelGraph that reads no tensor byte.

Layers are always the source model's numbers, as plans write them; `find_blocks` maps them to the graph's blocks.
"""
