"""Between pixels and latents: exact streaming decode of a causal video VAE, and encode of a condition.

The Wan VAE is causal in time: a convolution reads the current frame and at most two before it. Diffusers keeps those
frames in a list while it decodes a whole video, one latent frame a call, and drops the list at both ends.
`StreamingDecoder` keeps a list of its own, so a video can arrive in blocks, and hands the decoder several latent frames
a call where they are small: the same convolutions, three to four times faster on a CPU.
"""

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from diffaccel.errors import KnobError, UnsupportedError

from . import fast_vae

_AT_ONCE = 2**18  # pixels of the latent frames in one call: small frames are bound by calls, large ones by memory


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of each latent channel, (1, C, 1, 1, 1) each."""
    shape = (1, vae.config["z_dim"], 1, 1, 1)
    mean = torch.tensor(vae.config["latents_mean"]).view(shape).to(like)
    scale = 1.0 / torch.tensor(vae.config["latents_std"]).view(shape).to(like)
    return mean, scale


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """VAE latents (B, C, L, h, w) to the transformer's: zero mean and unit deviation in every channel."""
    mean, scale = _statistics(vae, latents)
    return (latents - mean) * scale


def unnormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The transformer's latents (B, C, L, h, w) to the VAE's, on the VAE's device and in its dtype."""
    latents = latents.to(get_module_execution_device(vae), vae.dtype)
    mean, scale = _statistics(vae, latents)
    return latents / scale + mean  # divided as in WanPipeline, so that both decode to the same bits


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 1+4k, H, W) in [-1, 1] to normalised latents (B, C, 1+k, H/8, W/8).

    The mode of the posterior is taken, not a sample, so a condition has one encoding.
    """
    pixels = pixels.to(get_module_execution_device(vae), vae.dtype)
    return normalise(vae, vae.encode(pixels).latent_dist.mode())


Clock = Callable[[str, torch.device], AbstractContextManager[None]]
"""As `Run.clock`."""


def _no_clock(section: str, device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


def decode(
    vae: AutoencoderKLWan, blocks: Iterable[Tensor], clock: Clock = _no_clock, decoder: "Decoder | None" = None
) -> Tensor:
    """Normalised latents of a whole video, in blocks (B, C, n, h, w), to pixels (B, 3, 1+4(L-1), H, W) in [-1, 1].

    A block is decoded while the next one is being made, by `decoder` if there is one. Else the frames are those of a
    `StreamingDecoder` given the same blocks, bit for bit, and with tiling those of `vae.decode`.
    """
    if decoder is None and vae.use_tiling:
        latents = torch.cat(list(blocks), dim=2)
        with clock("decode", latents.device):
            return vae.decode(unnormalise(vae, latents), return_dict=False)[0]
    decodes = Decodes(decoder or StreamingDecoder(vae), clock)
    return torch.cat([pixels() for pixels in [decodes.submit(block) for block in blocks]], dim=2)


class Decoder(Protocol):
    """Decodes one video block by block."""

    device: torch.device
    moves: bool
    """Whether offload moves its weights."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next block (B, C, n, h, w), normalised, to pixels (B, 3, 4n or 4n-3, H, W) in [-1, 1]."""
        ...


class GivenDecoder:
    """A user's own decoder, such as a small one: a function of a block's normalised latents, called in order.

    Raises:
        KnobError: from `decode`, where what it gives are not a block's frames.
    """

    moves = False

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device, stride: int = 4) -> None:
        self.function, self.device, self.stride, self.frames = function, device, stride, 0

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.function(latents)
        frames = self.stride * latents.shape[2] - (self.stride - 1 if self.frames == 0 else 0)
        wanted = (latents.shape[0], 3, frames)
        if pixels.ndim != 5 or tuple(pixels.shape[:3]) != wanted:
            raise KnobError(
                f"a decoder gives pixels (B, 3, F, H, W) in [-1, 1]: for this block {wanted} and the video's size, got "
                f"{tuple(pixels.shape)}"
            )
        self.frames += frames
        return pixels


class Decodes:
    """Blocks of one video on their way to pixels, beside what the device does next.

    On a GPU a block is decoded on a stream of its own, so that the next one is denoised meanwhile; with the VAE on a
    second GPU (`pipe.vae.to("cuda:1")`) the two share nothing. On the CPU, and where offload would move weights for
    every block, it is decoded when it is asked for.
    """

    def __init__(self, decoder: "Decoder", clock: Clock = _no_clock) -> None:
        self.decoder, self._clock = decoder, clock
        self._device = decoder.device
        beside = self._device.type == "cuda" and not decoder.moves
        self._stream = torch.cuda.Stream(self._device) if beside else None

    def submit(self, latents: Tensor) -> Callable[[], Tensor]:
        """Starts on the next block, normalised latents (B, C, n, h, w); what is returned gives its pixels."""
        if self._stream is None:
            return partial(self._decode, latents)
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._stream):
            pixels = self._decode(latents)
            done = self._stream.record_event()
        if latents.device == self._device:  # to another one they were copied in the order of their own stream
            latents.record_stream(self._stream)

        def wait() -> Tensor:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(done)
            pixels.record_stream(here)
            return pixels

        return wait

    def _decode(self, latents: Tensor) -> Tensor:
        with self._clock("decode", self._device):
            return self.decoder.decode(latents)


class Stream(Iterator[Any]):
    """The chunks of one video, as they are generated; between two of them the prompt may change."""

    def __init__(self, chunks: Generator[Any, None, None], change: Callable[[dict[str, Any]], None]) -> None:
        self._chunks, self._change = chunks, change

    def __next__(self) -> Any:
        return next(self._chunks)

    def close(self) -> None:
        """End the video here and restore the pipeline."""
        self._chunks.close()

    def change_prompt(self, prompt: str | list[str], negative_prompt: str | list[str] | None = None) -> None:
        """Go on with another prompt from the next block on; the cache becomes what `on_prompt_change` says.

        Raises `ValueError` for a prompt the pipeline would refuse, or another number of them, and `UnsupportedError`
        once the video has ended.
        """
        if inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED:
            raise UnsupportedError("the video of this stream has ended, so no block would follow another prompt")
        self._change({"prompt": prompt} | ({} if negative_prompt is None else {"negative_prompt": negative_prompt}))


class StreamingDecoder:
    """Decodes one video block by block; the blocks' frames, put together, are `vae.decode` of the whole.

        decoder = StreamingDecoder(pipe.vae)
        for block in blocks:                # normalised latents (B, C, n, h, w), any n >= 1
            frames = decoder.decode(block)  # (B, 3, 4n, H, W) in [-1, 1]; the first block gives 4n - 3 frames

    One object decodes one video, from its first latent frame on. All state lies in the object, none in the VAE.
    `at_once` is how many latent frames one call of the decoder takes: 1, as diffusers does it, gives its bits; more
    give them up to rounding (2e-6). By default as many as 2**18 pixels allow: 16 at 128x128, 1 from 512x512 on, where
    memory is what is short.

    On a GPU the decoder runs the short way (`fast_vae`), up to rounding the same; `fast=False` leaves it as diffusers
    has it. By default it does where the decoder's layers allow that.

    Raises:
        UnsupportedError: the VAE has tiling switched on. Tiles are blended over the whole video at once, so there is
            no streamed result to be equal to.
    """

    def __init__(self, vae: AutoencoderKLWan, at_once: int | None = None, fast: bool | None = None) -> None:
        if fast and (why := fast_vae.unfit(vae.decoder)) is not None:
            raise UnsupportedError(f"fast=True replaces layers of the decoder, and {why}; leave it out")
        if at_once is not None and at_once < 1:
            raise KnobError(f"at_once is a number of latent frames >= 1, got {at_once}")
        if vae.use_tiling:
            raise UnsupportedError(
                "streaming decode and VAE tiling exclude each other, since tiles are blended after the whole video is"
                " decoded; call vae.disable_tiling(), or generate without streaming"
            )
        self.vae, self.at_once, self.fast = vae, at_once, fast
        self.device, self.moves = get_module_execution_device(vae), hasattr(vae, "_hf_hook")
        self.frames = 0
        self._shape: tuple[int, ...] | None = None
        self._past: list[list[Tensor | None]] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next block (B, C, n, h, w), normalised, to pixels (B, 3, 4n or 4n-3, H, W) in [-1, 1]."""
        shape = (*latents.shape[:2], *latents.shape[3:])
        if self._shape is not None and shape != self._shape:
            raise ValueError(
                f"every block of a stream has the same batch, channels, height and width: the first had {self._shape},"
                f" this one has {shape}; use a new StreamingDecoder for another video"
            )
        self._shape = shape
        self._bring_to_device()
        z = unnormalise(self.vae, latents)
        parts = z.split(1) if self.vae.use_slicing else (z,)
        if not self._past:
            convolutions = sum(isinstance(m, WanCausalConv3d) for m in self.vae.decoder.modules())
            self._past = [[None] * convolutions for _ in parts]
        pixels = torch.cat([self._decode(part, past) for part, past in zip(parts, self._past, strict=True)])
        self.frames += latents.shape[2]
        return pixels

    def _decode(self, z: Tensor, past: list[Tensor | None]) -> Tensor:
        fast = z.is_cuda and fast_vae.unfit(self.vae.decoder) is None if self.fast is None else self.fast
        with fast_vae.fused(self.vae.decoder) if fast else nullcontext():
            return self._pixels(z, past)

    def _pixels(self, z: Tensor, past: list[Tensor | None]) -> Tensor:
        z = self.vae.post_quant_conv(z)
        scale = self.vae.config["scale_factor_spatial"]
        at_once = self.at_once or max(1, _AT_ONCE // (z.shape[3] * z.shape[4] * scale**2))
        first = 1 if self.frames == 0 else 0  # the video's first latent frame is one pixel frame and goes alone
        parts = [z[:, :, :first], *z[:, :, first:].split(at_once, dim=2)]
        pixels = torch.cat(
            [
                self.vae.decoder(part, feat_cache=past, feat_idx=[0], first_chunk=bool(first) and i == 0)
                for i, part in enumerate(parts)
                if part.shape[2]
            ],
            dim=2,
        )
        if self.vae.config["patch_size"] is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config["patch_size"])
        return pixels.clamp(-1.0, 1.0)

    def _bring_to_device(self) -> None:
        # vae.decode would do this itself; offload hooks only see calls of the VAE, not of its decoder
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self.vae)
