"""Text written by rule, and the block-diffusion language model trained on it."""
