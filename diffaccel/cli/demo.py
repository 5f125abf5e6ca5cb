"""`diffaccel demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ..pipelines.loading import BUNDLED_MODELS, BUNDLED_TEXT_MODEL
from .checks import check_parent, one_sentence, require, say


def demo(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help=f"to offer, once for each  [default: {', '.join(BUNDLED_MODELS)}]"),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text-model", help=f"to offer, once for each, or none  [default: {BUNDLED_TEXT_MODEL}]"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="[default: the first free one from 7860 on]")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="folder that keeps the videos")] = None,
    max_frames: Annotated[int, typer.Option(help="most pixel frames of a request")] = 161,
    max_side: Annotated[int, typer.Option(help="most pixels of a side")] = 1280,
    max_steps: Annotated[int, typer.Option(help="most denoising steps")] = 50,
    max_prompt: Annotated[int, typer.Option(help="most characters of a prompt")] = 400,
    max_tokens: Annotated[int, typer.Option(help="most tokens of a text")] = 256,
    max_waiting: Annotated[int, typer.Option(help="most requests that wait for a model")] = 8,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    offload: Annotated[str, typer.Option(help="none, model or sequential")] = "none",
) -> None:
    """Serve a page to try models, presets and knobs in the browser."""
    with one_sentence():
        from ..demo.asked import Limits
        from ..demo.server import listen, load_gradio, serve

        limits = Limits(max_frames, max_side, max_steps, max_prompt, max_tokens, max_waiting)
        if out is not None:
            check_parent(out)
            require(not out.exists() or out.is_dir(), f"--out names a folder, and '{out}' is a file")
        with listen(host, port) as sock:
            load_gradio()
            from ..demo.desk import Desk
            from ..demo.models import Models

            offered = Models(
                models or BUNDLED_MODELS,
                [name for name in texts or [BUNDLED_TEXT_MODEL] if name != "none"],
                limits=limits,
                dtype=dtype,
                device=device,
                offload=offload,
            )
            if host not in ("127.0.0.1", "localhost", "::1"):
                say("note: whoever reaches this machine may generate; there is no password")
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"diffaccel demo: http://{shown}:{sock.getsockname()[1]}/  (Ctrl-C ends it)")
            serve(Desk(offered, out), sock)
