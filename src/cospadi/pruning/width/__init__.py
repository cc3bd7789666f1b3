"""Methods that remove part of the width of every block, one file per paper.

`residual` describes what reads and writes the residual stream (SliceGPT), `units` the attention heads and MLP channels
of a block (LLM-Pruner), `linear` replaces linear layers.
"""
