"""`diffaccel text`."""

from pathlib import Path
from typing import Annotated

import typer

from ..pipelines.loading import BUNDLED_TEXT_MODEL
from .checks import check_parent, fail, one_sentence, require, say


def text(
    prompt: Annotated[str, typer.Argument(help="what to go on from; quote it")],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"folder or hub name of a block-diffusion language model  [default: the bundled {BUNDLED_TEXT_MODEL}]"
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="exact, auto or fast")] = "exact",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SLOT[.KNOB]=VALUE", help="reuse.tau=3  kernel=sdpa")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="tokens to write  [default: the model's, or 128]")] = None,
    block: Annotated[int | None, typer.Option(help="tokens of a block  [default: the model's]")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps of a block, at most")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="confidence that unmasks a token; above 1: evenly over the steps")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="of the sampling; 0 takes the likeliest token")] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    comparing: Annotated[bool, typer.Option("--compare", help="also write densely, and compare")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    report: Annotated[Path | None, typer.Option(help="write what happened as JSON")] = None,
) -> None:
    """Write text with a block-diffusion language model."""
    with one_sentence():
        import transformers.utils.logging as transformers_logging

        from ..report import write_json
        from ..text import build_reuse, check_prompt, compare, load, to_report, unread, write

        require(bool(prompt.strip()), "the prompt is empty; say what the text should go on from")
        if report is not None:
            check_parent(report)
        build_reuse(preset, changes or [])
        transformers_logging.disable_progress_bar()
        opened = load(model, dtype, device)
        writer = opened.writer(
            max_tokens=max_tokens,
            block_length=block,
            num_inference_steps=steps,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
        )
        check_prompt(opened, prompt)
        for sentence in unread(opened, prompt, writer):
            say(f"warning: {sentence}")
        tokens = len(opened.tokenizer(prompt)["input_ids"]) + writer.max_tokens
        how = build_reuse(preset, changes or [], tokens)
        if preset == "auto" and how[0] is None:
            say(f"note: exact, because a text of at most {tokens} tokens is too short for reuse to be sure to pay")
        comparison = compare(opened, prompt, writer, *how) if comparing else None
        written = write(opened, prompt, writer, *how) if comparison is None else comparison.arms["asked"]
        typer.echo(written.text)
        typer.echo("\n".join(comparison.lines()) if comparison else written.about())
        if report is not None:
            write_json(report, to_report(opened, prompt, writer, written, comparison))
        if written.idle:
            fail(written.idle, 1)
