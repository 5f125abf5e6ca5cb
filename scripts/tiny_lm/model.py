"""The model, its tokenizer and what a run is told."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_world.checkpoint import TrainingError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tasks import BOS, EOS, IDS, PAD, VOCABULARY

CONFIGS = Path(__file__).parent / "configs"
DISTANCES = (1, 2, -1, 3)
"""How many tokens back the heads of the first layer look to begin with."""


@dataclass(frozen=True)
class Config:
    """A run. `lr` is the peak rate of Muon, for the matrices; AdamW trains everything else at `adam_lr`."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    window: int
    longest: int
    blocks: tuple[int, ...]
    block: int
    threshold: float
    tokens: int
    minutes: float
    lr: float
    adam_lr: float
    target: float
    check_seconds: float
    compiled: bool

    def sizes(self) -> dict[str, int]:
        """What a checkpoint must agree with."""
        return {
            "hidden": self.hidden,
            "layers": self.layers,
            "heads": self.heads,
            "feed_forward": self.feed_forward,
            "vocabulary": len(VOCABULARY),
        }


def load_config(name: str, **changes: Any) -> Config:
    """A config by the name of its file, or its path; `changes` that are not None replace what it says."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {key: value for key, value in changes.items() if value is not None}
        return Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise TrainingError(f"there is no config '{name}'; take one of {known}, or the path of a .json file") from error
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"the config '{path}' cannot be used: {error}") from error


def build_model(config: Config) -> LlamaForCausalLM:
    """A freshly initialised model."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=config.hidden,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=1024,
            # Slow rotations leave more of a head for what a token is: the tasks look tokens up.
            rope_theta=100_000.0,
            attention_bias=True,
            initializer_range=0.5 * config.hidden**-0.5,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, match: float = 4.0, peak: float = 30.0) -> None:
    """Attention that copies what it finds and finds equal tokens, after heads that look a few tokens back.

    Without it a small model takes very long to begin to look words up. Queries and keys start as one matrix (a token
    scores `match` with itself), outputs as the transpose of values (after Trockman and Kolter, arXiv 2305.09828); the
    biases of the first layer score `peak` at one distance a head.
    """
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    size = hidden // heads
    model.model.embed_tokens.weight.normal_(std=hidden**-0.5)
    for layer in model.model.layers:
        attention = layer.self_attn
        values = torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(values.T * hidden**-0.5)
        attention.k_proj.weight.normal_(std=(match / (hidden * size**0.5)) ** 0.5)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
    first = model.model.layers[0].self_attn
    speed = model.model.rotary_emb.inv_freq
    # Slower rotations than these hardly tell neighbours apart.
    scale = torch.where(speed > 0.05, (peak * size**0.5 / (speed > 0.05).sum()) ** 0.5, 0.0)
    for part in (first.q_proj, first.k_proj):
        part.weight.mul_(0.1)
    for head, distance in zip(range(heads), DISTANCES * heads, strict=False):
        angle = distance * speed
        rows = slice(head * size, (head + 1) * size)
        first.q_proj.bias[rows] = torch.cat([scale * angle.cos(), -scale * angle.sin()])
        first.k_proj.bias[rows] = torch.cat([scale, torch.zeros_like(scale)])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `<bos>` is put in front, padding too."""
    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        mask_token="<mask>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
