"""Random components of toy size: everything a Wan pipeline needs, built in memory in about a second."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, "a", "the", "red", "blue", "green", "circle", "square", "moves", "left", "right", "up", "down"]
HEIGHT, WIDTH = 32, 48  # pixels: 4 x 6 latents, 2 x 3 tokens a frame
CHANNELS, TEXT_DIM = 4, 32


def tiny_tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def tiny_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    return UMT5EncoderModel(config).eval()


def tiny_vae(channels: int = CHANNELS, base_dim: int = 8) -> AutoencoderKLWan:
    """8x in space, 4x in time, statistics that are not 0 and 1."""
    torch.manual_seed(2)
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * i - 0.1 for i in range(channels)],
        latents_std=[0.7 + 0.3 * i for i in range(channels)],
    ).eval()


def tiny_transformer(layers: int = 2, heads: int = 2, head_dim: int = 24, channels: int = CHANNELS, seed: int = 0):
    """A random Wan whose forward depends on everything it should.

    A fresh Wan has text and time so weak beside its residual stream that a test could not tell them from zero, so
    those projections are scaled up.
    """
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=2 * heads * head_dim,
        num_layers=layers,
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        for block in model.blocks:
            for attention in (block.attn1, block.attn2):
                attention.to_q.weight.mul_(3)
                attention.to_v.weight.mul_(3)
        model.condition_embedder.time_proj.weight.mul_(2)
    return model.eval()


def tiny_components(**transformer) -> dict:
    """Components by their pipeline names: `CausalWanPipeline(**tiny_components())`."""
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(**transformer),
    }


def tiny_pipeline(sampler: str = "multistep", **transformer):
    """A `CausalWanPipeline` of tiny components, without a progress bar."""
    from diffaccel.pipelines import CausalWanPipeline

    pipe = CausalWanPipeline(**tiny_components(**transformer), sampler=sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
