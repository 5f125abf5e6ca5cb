"""Random components of toy size: all that a pipeline needs, built in memory in about a second."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

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


def tiny_hunyuan_video(layers: int = 2, single_layers: int = 2, guidance_embeds: bool = True, **changes):
    """A random HunyuanVideo transformer of so many dual-stream and single-stream blocks, its text scaled up."""
    torch.manual_seed(4)
    settings = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": layers,
        "num_single_layers": single_layers,
        "num_refiner_layers": 1,
        "guidance_embeds": guidance_embeds,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (8, 8, 8),
    }
    model = HunyuanVideoTransformer3DModel(**(settings | changes))
    with torch.no_grad():
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.norm_q.weight.mul_(3)  # attention that tells keys apart
        model.context_embedder.proj_in.weight.mul_(3)
    return model.eval()


def tiny_hunyuan_pipeline(**transformer):
    """A `HunyuanVideoPipeline` of tiny components, without a progress bar."""
    torch.manual_seed(5)
    small = {"vocab_size": len(WORDS), "intermediate_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    llama = LlamaConfig(hidden_size=TEXT_DIM, num_hidden_layers=2, max_position_embeddings=512, **small)
    clip = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, bos_token_id=1, eos_token_id=2, **small)
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=tiny_tokenizer(512),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tiny_tokenizer(77),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=tiny_hunyuan_video(**transformer),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_of(lengths: tuple[int, ...], seed: int = 0, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Prompt embeddings of a `HunyuanVideoPipeline`, of so many tokens in each row before padding that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    return {
        "prompt_embeds": torch.randn(rows, tokens, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(rows, 16, generator=generator),
        "prompt_attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float(),
    }
