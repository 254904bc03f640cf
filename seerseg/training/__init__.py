"""Training of the reasoner: supervised on traces (sft), then by reward with the frozen segmenter (grpo).

Importing this package loads no torch, transformers or trl; its modules `sft`, `grpo` and `callbacks` do.
"""
