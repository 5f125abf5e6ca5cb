"""The one legend of axis letters. A suffix on a tensor's name gives its shape: `q_BSHD`, `lse_BSH`.

B   batch (prompts; cond and uncond are separate calls, never batch rows)
S   query tokens of the call, in grid order: frame-major, then rows, then columns
N   key tokens
H   heads
D   channels of a head
T   tokens of one latent frame
"""
