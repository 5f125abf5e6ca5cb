"""Text by a block-diffusion language model: what `diffaccel text` does.

A model is a folder that transformers opens, with a mask token in its tokenizer. Its `generation.json` may say what to
generate with where nothing is said: block_length, num_inference_steps (a block), threshold, temperature, max_tokens,
and max_length, the most tokens of prompt and answer that it was trained for. A model that reads prompts of one form
alone says so in prompt_form, prompt_pattern (a regular expression of the whole prompt) and prompt_example.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import KnobError, NotEngagedError
from .report import environment
from .reuse.token_count import TokenCount
from .settings import UsageError, parse_knob
from .suggest import choose

if TYPE_CHECKING:
    from .pipelines.block_lm import BlockLM

PRESETS: dict[str, TokenCount | None] = {"exact": None, "auto": TokenCount(tau=2), "fast": TokenCount(tau=2)}
"""Reuse between denoising steps, by the name of a preset; finished blocks are cached in all, which is exact. "auto" is
for texts of `WORTH` tokens and more: shorter ones have too little past for reuse to be sure to pay (measured on an H200
at the shape of an 8B model, samples/RESULTS.md)."""

WORTH = 4096

OnStep = Callable[[list[int]], None]

_NUMBERS = ("block_length", "num_inference_steps", "threshold", "temperature", "max_tokens", "max_length")
_TEXTS = ("prompt_form", "prompt_pattern", "prompt_example")


@dataclass(frozen=True)
class Writer:
    """How to write: tokens, tokens of a block, steps of a block at most, the confidence that unmasks a token (above 1:
    unmask evenly over the steps), sampling temperature (0: the likeliest token), and the seed of the sampling."""

    max_tokens: int = 128
    block_length: int = 32
    num_inference_steps: int = 32
    threshold: float = 0.9
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("block_length", 1), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise KnobError(f"{name} is at least {least}, got {getattr(self, name)}")
        for name in ("threshold", "temperature"):
            if not getattr(self, name) >= 0:
                raise KnobError(f"{name} is 0 or more, got {getattr(self, name)}")


@dataclass
class Model:
    """A language model with its tokenizer and what its `generation.json` says."""

    lm: Any
    tokenizer: Any
    usual: dict[str, Any]

    def writer(self, **given: Any) -> Writer:
        """What was asked for, else what the model says; raises `UsageError` where neither names the block length."""
        asked = {name: value for name, value in given.items() if value is not None}
        names = {item.name for item in dataclasses.fields(Writer)}
        settings = {name: value for name, value in self.usual.items() if name in names} | asked
        if "block_length" not in settings:
            raise UsageError("the model does not say how long its blocks are; pass --block with what it was trained on")
        return Writer(**{"num_inference_steps": settings["block_length"], **settings})


@dataclass
class Text:
    """What was written: the text, its token ids up to the end-of-text token, wall-clock seconds, what it took
    (`BlockLM.report`), and why a technique that was asked for did not engage."""

    text: str
    tokens: list[int]
    seconds: float
    report: dict[str, Any]
    idle: str | None = None

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return len(self.tokens) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.speed}

    def about(self) -> str:
        """Tokens, seconds and work as a line."""
        r = self.report
        share = r["tokens_forwarded"] / r["tokens_uncached"]
        line = f"{len(self.tokens)} tokens in {self.seconds:.2f} s, {self.speed:.1f} tokens/s; {r['passes']} passes, "
        line += f"{r['tokens_forwarded']} tokens forwarded ({share:.1%} of what there are without a cache)"
        if r["graphs_replayed"]:
            line += f"; {r['graphs_replayed']} passes replayed as CUDA graphs"
        if r["external_share"] is None:
            return line
        calls = r["external_computed"] + r["external_reused"]
        reused = f"{r['external_reused']} of {calls} calls reused"
        return f"{line}; attention outside the block: {r['external_share']:.1%} computed, {reused}"


@dataclass
class Comparison:
    """The text densely (the whole of it forwarded at every step), with the cache alone, and as asked."""

    arms: dict[str, Text] = field(default_factory=dict)

    def agreement(self) -> tuple[float, int | None]:
        """Share of the tokens that dense and asked have in common by place, and the first place that differs."""
        dense, asked = self.arms["dense"].tokens, self.arms["asked"].tokens
        longest = max(len(dense), len(asked))
        pad = [dense + [-1] * (longest - len(dense)), asked + [-1] * (longest - len(asked))]
        equal = [a == b for a, b in zip(*pad, strict=True)]
        return sum(equal) / max(longest, 1), equal.index(False) if False in equal else None

    def lines(self) -> Iterator[str]:
        """A line an arm, and how far the texts agree."""
        dense = self.arms["dense"]
        for name, text in self.arms.items():
            yield f"{name + ':':<7} {text.about()}, {dense.seconds / text.seconds:.2f}x"
        share, first = self.agreement()
        where = "" if first is None else f", the first difference is at token {first}"
        yield f"tokens equal to dense: {share:.1%}{where}"


def build_reuse(preset: str, changes: Sequence[str] = (), tokens: int | None = None) -> tuple[TokenCount | None, str]:
    """Reuse and kernel of a preset for a text of so many `tokens`, with `--set` changes: `reuse=TokenCount`,
    `reuse=none`, `reuse.knob=value`, `kernel=name`. Raises `UsageError` or `KnobError` with the choices."""
    from .kernel import CHOICES

    reuse, kernel = PRESETS[choose(preset, PRESETS, "preset")], "auto"
    if preset == "auto" and tokens is not None and tokens < WORTH:
        reuse = None
    knobs: dict[str, Any] = {}
    for change in changes:
        target, equals, text = (part.strip() for part in change.partition("="))
        slot, _, name = target.partition(".")
        if not (equals and text) or (target not in ("kernel", "reuse") and not name):
            raise UsageError(f"--set takes reuse=TokenCount, reuse.knob=value or kernel=name here, got '{change}'")
        choose(slot, ("reuse", "kernel"), "slot of a language model")
        if target == "kernel":
            kernel = choose(text, CHOICES, "kernel")
        elif target == "reuse":
            known = {"TokenCount": TokenCount(), "none": None}
            text = next((name for name in known if name.lower() == text.lower()), text)
            reuse, knobs = known[choose(text, known, "method for the slot reuse")], {}
        else:
            choose(name, TokenCount.knobs(), "knob of TokenCount (slot reuse)")
            reuse = reuse or TokenCount()
            knobs[name] = parse_knob(TokenCount, name, text)
    return (None if reuse is None else dataclasses.replace(reuse, **knobs)), kernel


def load(model: str | None, dtype: str | None = None, device: str | None = None) -> Model:
    """The model of a folder or a hub name, else the bundled one, on its device. Raises `LoadError`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .pipelines.loading import (
        BUNDLED_MODELS,
        BUNDLED_TEXT_MODEL,
        LoadError,
        bundled_text_model,
        resolve_device,
        resolve_dtype,
    )

    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    named = model is None or (model == BUNDLED_TEXT_MODEL and not Path(model).is_dir())
    source = str(bundled_text_model()) if named else str(model)
    if source in BUNDLED_MODELS or (Path(source) / "model_index.json").is_file():
        raise LoadError(
            f"'{source}' is a video model, and this writes text; use diffaccel generate PROMPT --model {source}, or "
            f"a language model (bundled: {BUNDLED_TEXT_MODEL})"
        )
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise LoadError(
            f"there is no folder '{source}'; pass the folder of a block-diffusion language model, or the bundled one "
            f"({BUNDLED_TEXT_MODEL})"
        )
    usual = _usual(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(f"'{source}' cannot be opened as a language model: {first}") from error
    if tokenizer.mask_token_id is None:
        raise LoadError(
            f"the tokenizer of '{source}' has no mask token, so there is nothing to denoise from; "
            "pass a block-diffusion language model"
        )
    return Model(lm.to(where).eval(), tokenizer, usual)


def _usual(folder: Path) -> dict[str, Any]:
    from .pipelines.loading import DEFAULTS_FILE, LoadError

    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"'{file}' cannot be read as JSON ({error}); correct or remove it") from error
    if not isinstance(content, dict):
        raise LoadError(f"'{file}' must hold a JSON object; correct or remove it")
    for name in _NUMBERS:
        if name in content and (isinstance(content[name], bool) or not isinstance(content[name], (int, float))):
            raise LoadError(f"'{file}' must hold a number as {name!r}, got {content[name]!r}")
    texts = [content[name] for name in _TEXTS if name in content]
    if texts and (len(texts) < len(_TEXTS) or not all(isinstance(text, str) and text for text in texts)):
        raise LoadError(f"'{file}' must hold a text for each of {', '.join(_TEXTS)}, or none of them")
    try:
        re.compile(content.get("prompt_pattern", ""))
    except re.error as error:
        raise LoadError(f"'{file}' must hold a regular expression as 'prompt_pattern' ({error}); correct it") from error
    return content


def check_prompt(model: Model, prompt: str) -> None:
    """Raise `UsageError` for a prompt that a model with a form of its own cannot mean anything by."""
    usual = model.usual
    if "prompt_pattern" not in usual:
        return
    unknown = _unknown_tokens(model)
    known = {
        word: not unknown & set(model.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in prompt.split()
    }
    strange = [f"'{word}'" for word in known if not known[word]]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        met = f"it does not know {', '.join(strange[:3])}{more}"
    elif re.fullmatch(usual["prompt_pattern"], " ".join(prompt.split())) is None:
        met = "this prompt has another"
    else:
        return
    raise UsageError(
        f"the model reads prompts of the form '{usual['prompt_form']}' in words of its own, and {met}; "
        f'try "{usual["prompt_example"]}"'
    )


def _unknown_tokens(model: Model) -> set[int]:
    return {model.tokenizer.unk_token_id, model.tokenizer.pad_token_id} - {None, model.tokenizer.eos_token_id}


def unread(model: Model, prompt: str, writer: Writer) -> Iterator[str]:
    """What the model cannot do justice to, a sentence each."""
    ids = model.tokenizer(prompt)["input_ids"]
    unknown = _unknown_tokens(model)
    count = sum(token in unknown for token in ids)
    if count:
        yield f"{count} of the prompt's {len(ids)} tokens are not in the model's vocabulary"
    most = model.usual.get("max_length") or getattr(model.lm.config, "max_position_embeddings", None)
    if most and len(ids) + writer.max_tokens > most:
        yield (
            f"{len(ids)} tokens of the prompt and {writer.max_tokens} to write are more than the {most} that the model "
            "was made for"
        )


def write(
    model: Model,
    prompt: str,
    writer: Writer,
    reuse: TokenCount | None = None,
    kernel: str = "auto",
    on_step: OnStep | None = None,
) -> Text:
    """The text that `LLaDA2Pipeline` makes of the prompt, finished blocks cached. `on_step` is called after every
    denoising step with the tokens so far, prompt and masks included. Raises what `check_prompt` and `BlockLM` raise,
    but says in `idle` that `reuse` did not engage."""
    from .pipelines.block_lm import BlockLM

    lm = BlockLM(model.lm, writer.block_length, reuse=reuse, kernel=kernel)
    return _write(lm, model, prompt, writer, on_step)


def compare(
    model: Model,
    prompt: str,
    writer: Writer,
    reuse: TokenCount | None = None,
    kernel: str = "auto",
    on_step: OnStep | None = None,
) -> Comparison:
    """`write` beside the same without reuse and without a cache, each after a block to warm up."""
    from .pipelines.block_lm import BlockLM

    block = writer.block_length
    arms = {"dense": BlockLM(model.lm, block, cache=False), "cached": BlockLM(model.lm, block, kernel=kernel)}
    arms["asked"] = BlockLM(model.lm, block, reuse=reuse, kernel=kernel)
    if reuse is None:
        del arms["cached"]  # is what was asked for
    for lm in arms.values():
        _write(lm, model, prompt, dataclasses.replace(writer, max_tokens=min(2 * block, writer.max_tokens)), on_step)
        lm.reset()
    return Comparison({name: _write(lm, model, prompt, writer, on_step) for name, lm in arms.items()})


def _write(lm: "BlockLM", model: Model, prompt: str, writer: Writer, on_step: OnStep | None) -> Text:
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    check_prompt(model, prompt)
    scheduler = BlockRefinementScheduler(block_length=writer.block_length)
    pipe = LLaDA2Pipeline(model=lm, scheduler=scheduler, tokenizer=model.tokenizer)
    pipe.set_progress_bar_config(disable=True)

    def stepped(_pipe: Any, _step: int, _of_block: int, tensors: dict[str, Any]) -> dict[str, Any]:
        assert on_step is not None
        on_step(tensors["block_x"][0].tolist())
        return {}

    lm.check()  # not part of the time
    wait = torch.cuda.synchronize if lm.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    found = pipe(
        prompt=prompt,
        gen_length=writer.max_tokens,
        block_length=writer.block_length,
        num_inference_steps=writer.num_inference_steps,
        threshold=writer.threshold,
        temperature=writer.temperature,
        editing_threshold=None,
        generator=torch.Generator(lm.device).manual_seed(writer.seed),
        output_type="seq",
        callback_on_step_end=None if on_step is None else stepped,
    )
    wait()
    seconds = time.perf_counter() - start
    tokens = found.sequences[0].tolist()
    end = model.tokenizer.eos_token_id
    if end in tokens:
        tokens = tokens[: tokens.index(end) + 1]
    idle = None
    try:
        lm.require_engaged()
    except NotEngagedError as error:
        idle = str(error)
    return Text(model.tokenizer.decode(tokens, skip_special_tokens=True), tokens, seconds, lm.report(), idle)


def to_report(
    model: Model, prompt: str, writer: Writer, written: Text, comparison: Comparison | None
) -> dict[str, Any]:
    """What `--report` writes."""
    import transformers

    content = {"prompt": prompt, **written.to_dict(), "settings": asdict(writer), "comparison": None}
    if comparison is not None:
        share, first = comparison.agreement()
        arms = {name: text.to_dict() for name, text in comparison.arms.items()}
        content["comparison"] = {"arms": arms, "equal_tokens": share, "first_difference": first}
    parameter = next(model.lm.parameters())
    versions = environment(parameter.device, parameter.dtype)
    return {**content, "environment": {**versions, "transformers": transformers.__version__}}
