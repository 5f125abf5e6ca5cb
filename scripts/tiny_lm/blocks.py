"""Block-causal masked diffusion: masks, noise, loss and a sampler that denoises all blocks of known documents at once.

Following BD3-LM (arXiv 2503.09573) a sequence is [noisy window | clean document]: a noisy block sees itself and the
clean blocks before it. The window is the end of the document, which holds the answer. Logits are not shifted: the
logits at a token predict that token.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from .tasks import EOS, MASK, Documents

BINS = ("below 1/3", "1/3 to 2/3", "above 2/3")
"""Shares of a block's answer that are masked; the loss is recorded in these."""


@lru_cache(maxsize=64)
def layout(length: int, window: int, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mask (1, 1, S, S), True where seen, and positions (1, S) of [noisy window | clean document].

    Raises `ValueError` unless block borders fall on both ends of the window.
    """
    if length % block or window % block:
        raise ValueError(f"blocks of {block} tokens do not divide a window of {window} in {length}")
    position = torch.cat([torch.arange(length - window, length), torch.arange(length)]).to(device)
    index = position // block
    noisy = torch.arange(window + length, device=device) < window
    own = noisy[:, None] & noisy[None] & (index[:, None] == index[None])
    # A noisy query sees clean blocks before its own, a clean query its own as well.
    past = ~noisy[None] & (index[None] < index[:, None] + (~noisy[:, None]).long())
    return (own | past)[None, None], position[None]


def draw_masked(answer: torch.Tensor, block: int, generator: torch.Generator, most: float = 1.0) -> torch.Tensor:
    """Which tokens of `answer` (rows, window) are masked: in each block at random, a share of up to `most`.

    Where `most` is 1, in half of the blocks all from some token on instead. The sampler mostly sees that, because the
    answers of most tasks build on the token before.
    """
    rows, window = answer.shape
    blocks = window // block

    def uniform(last: int) -> torch.Tensor:
        return torch.rand(rows, blocks, last, generator=generator, device=answer.device)

    masked = uniform(block) < most * uniform(1)
    if most == 1:
        onward = torch.arange(block, device=answer.device) >= (uniform(1) * block).long()
        masked = torch.where(uniform(1) < 0.5, masked, onward)
    return masked.view(rows, window) & answer


def window_logits(
    model: LlamaForCausalLM,
    noisy: torch.Tensor,
    ids: torch.Tensor,
    block: int,
    dtype: torch.dtype | None = None,
    padding: int = 0,
) -> torch.Tensor:
    """Logits (rows, window, vocabulary) at the noisy window (rows, window) of documents `ids` (rows, length).

    Nothing sees the first `padding` tokens, whole blocks, but these themselves.
    """
    mask, positions = layout(ids.shape[1], noisy.shape[1], block, ids.device)
    if padding:
        real = torch.arange(mask.shape[-1], device=ids.device) - noisy.shape[1]
        real = (real < 0) | (real >= padding)
        mask = mask & (real[None] | ~real[:, None])
    with torch.autocast(ids.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = model.model(
            input_ids=torch.cat([noisy, ids], 1), attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, : noisy.shape[1]]
        return model.lm_head(hidden)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per token, (rows, window), in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def per_block(cells: torch.Tensor, block: int) -> torch.Tensor:
    """For each token how many cells (rows, window) of its block are set."""
    return cells.view(len(cells), -1, block).sum(2).float().repeat_interleave(block, 1)


@torch.no_grad()
def denoise(
    model: LlamaForCausalLM, documents: Documents, block: int, threshold: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int]:
    """The answers (rows, length - start) and the steps taken, each block denoised from the true blocks before it.

    In every step a block commits its tokens surer than `threshold`, or else its surest one, as diffusers'
    `BlockRefinementScheduler` does. An answer is right as a whole exactly where one generated block by block is.
    """
    ids, start = documents.ids, documents.start
    window = ids.shape[1] - start // block * block
    noisy = ids[:, -window:].clone()
    head = start % block
    noisy[:, head:] = MASK
    for step in range(block):
        todo = noisy == MASK
        if not todo.any():
            return noisy[:, head:], step
        logits = window_logits(model, noisy, ids, block, dtype).float()
        sure, token = logits.softmax(2).max(2)
        sure = sure.masked_fill(~todo, -1).view(len(ids), -1, block)
        best = F.one_hot(sure.argmax(2), block).bool()
        commit = ((sure > threshold) | (best & ~(sure > threshold).any(2, keepdim=True))).view_as(todo) & todo
        noisy = torch.where(commit, token, noisy)
    return noisy[:, head:], block


def exact(documents: Documents, answers: torch.Tensor) -> torch.Tensor:
    """Whether each of the answers (rows, n) is right up to its first <eos>, (rows,)."""
    count = documents.stop - documents.start + 1
    return (answers[:, :count] == documents.ids[:, documents.start : documents.start + count]).all(1)


def without_table(documents: Documents, keep: int, block: int) -> Documents:
    """The same with only `<bos>` and the end of the prompt, `keep` tokens or a quarter: the control, all guesswork."""
    keep = min(keep, documents.start // 4)
    cut = documents.start - keep
    ids = torch.cat([documents.ids[:, :1], documents.ids[:, cut:]], 1)
    ends = ids.new_full((len(ids), -ids.shape[1] % block), EOS)
    return Documents(documents.task, torch.cat([ids, ends], 1), keep + 1, keep + 1 + documents.stop - documents.start)


@torch.no_grad()
def bound(
    model: LlamaForCausalLM, documents: Documents, block: int, draws: int, seed: int, dtype: torch.dtype | None = None
) -> float:
    """Upper bound, in nats a token, on the answers' negative log-likelihood given their prompts (BD3-LM, section 3)."""
    ids, start = documents.ids, documents.start
    window = ids.shape[1] - start // block * block
    clean = ids[:, -window:]
    place = torch.arange(window, device=ids.device) + ids.shape[1] - window
    answer = ((place >= start) & (place <= documents.stop)).expand(len(ids), -1)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for draw in range(draws):
        # One ratio in each of `draws` equal parts of 0..1: the variance of 1/t is large.
        ratio = (draw + torch.rand(len(ids), window // block, generator=generator)).to(ids.device) / draws
        ratio = ratio.clamp(min=1e-3).repeat_interleave(block, 1)
        masked = answer & (torch.rand(answer.shape, generator=generator).to(ids.device) < ratio)
        logits = window_logits(model, clean.masked_fill(masked, MASK), ids, block, dtype)
        total += float((cross_entropy(logits, clean) * masked / ratio).sum())
    return total / draws / int(answer.sum())
