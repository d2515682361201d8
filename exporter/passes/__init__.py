"""Passes: one file each, a function from ModelGraph to ModelGraph that reads no tensor byte.

Layers are the source model's numbers, as plans write them; `find_blocks` maps them to the graph's blocks. Linears and
sites, as quantization recipes name them ("blocks.3.ffn.down_proj"), count the graph's own.
"""
