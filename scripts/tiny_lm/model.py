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
    # Heads that prefer some distance to begin with: looking a word up starts from the token beside it.
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(part.bias)
    return model


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
