"""The bundled folder: weights, tokenizer, what to generate with, and a model card filled from the run's metrics."""

import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from tiny_world.checkpoint import TrainingError, record

from .model import Config, build_model, build_tokenizer
from .tasks import FRAME, SHARE, SIZE, held_out, to_text
from .train import ANSWERS, EARLY, KEPT, WEIGHTS, final_scores, load_weights

CARD = """# tiny-lm

A block-diffusion language model small enough to ship in a repository ({size:.1f} MiB) and to run on two CPU cores. It
answers {kinds} of questions about tables, and every answer can be checked; the tables lie further back than a block,
so an attention technique that loses something of the past shows it as lost accuracy. It is no general language model.

    diffaccel text "{example}"

| part | class | |
|---|---|---|
| model | `LlamaForCausalLM`, {layers} layers, {heads} heads x {head}, width {hidden} | {parameters:.2f} M, fp16 |
| tokenizer | word level, {vocabulary} entries; one token a word | `<mask>`, `<bos>`, `<eos>`, `<pad>` |

Block length {block}; trained at {blocks}. A block attends to itself in both directions and to all blocks before it: the
caller gives that mask, as `BlockLM` does (`pipelines/block_lm.py`); a causal mask gives nonsense. Logits at a token
predict that token. Licence: Apache-2.0; nothing but text drawn by this repository's own rules went into it.

## Tasks

A prompt is `{form}`, which the tokenizer puts a `<bos>` before; the answer and `<eos>` follow:

{examples}

{tasks}

## Training

`python scripts/train_tiny_lm.py all --out runs/tiny-lm --to samples/tiny-lm`; settings in
`scripts/tiny_lm/configs/full.json`. The shipped weights: {steps} steps in {seconds:.0f} s on {device}, seed {seed},
{date}, torch {torch}.

The sequence is [noisy end | clean document] under a block-causal mask, as in BD3-LM, {lengths} tokens long before the
noisy copy of its last {window}; half of the batches hold shorter documents, so that where an answer ends is not told by
the place. In each block of the answer a random share of the tokens is masked, or (half of the time) all from a random
token on; the loss is the unweighted cross-entropy at masked tokens, every block weighing the same. In the first
{early:.0%} of the run documents have at most {shortest} tokens and at most half of a block is masked: a token is looked
up by the one before it, and that is learned while it can be seen. Attention starts out copying what it finds and
finding equal tokens, the first layer looking a few tokens back (`model.py`): on a CPU a small copy learned `recall` in
a minute with this and not in five without. Matrices are trained with Muon (peak rate {lr}), everything else with AdamW
({adam_lr}). One document in {share}, told by a checksum of its tokens, is held out.

## Scores

{rows} held-out documents a task of {longest} tokens with as many table entries as fit, answers of about {answers}
tokens; greedy, threshold {threshold}, block {block}, fp32. Exact match: every token of the answer and the `<eos>` after
it. Control: the model sees only the last {kept} tokens of the prompt, so that the table is gone. Perplexity: upper
bound per token of the answers given their prompts.

| task | exact match | tokens right | control: exact match | control: tokens right | perplexity, at most |
|---|---|---|---|---|---|
{scores}

Measured by the trainer with every block denoised from the true blocks before it, which for exact match is the same as
generating; `scripts/score_tiny_lm.py` generates through diffusers' `LLaDA2Pipeline`.

## Limits

* Only this form of prompt, in words of the tokenizer, and at most {longest} tokens with the answer.
* What follows an answer is `<eos>` only; documents do not follow one another.
"""

ABOUT = {
    "recall": "labels and names, shuffled; list those from one label to another in order.",
    "walk": "links of one cycle of names and labels by turns, shuffled; follow them from one word to another.",
    "edit": "a labelled list, then commands that set an entry or swap two; list a part of the result.",
    "sum": "labelled terms, shuffled; running sums modulo 10 in the order of the labels.",
    "close": "names that open, some of which `)` closes at once; close those still open, from the inside out.",
}
FORM = "task table | filler from A to Z ="
PATTERN = r"({tasks}) .+ \| (.+ )?from \S+ to \S+ ="


def prompts(config: Config) -> dict[str, str]:
    """What prompts look like, for `generation.json`: a form to show, a pattern to check, and one to try."""
    task = "sum" if "sum" in config.tasks else config.tasks[0]
    documents = held_out(task, 1, int(4 * SIZE[task]) + 6 + FRAME + 1, 6, 0, 4)
    example = to_text(documents.ids[0, 1 : documents.start])
    return {
        "prompt_form": FORM,
        "prompt_pattern": PATTERN.format(tasks="|".join(config.tasks)),
        "prompt_example": example,
    }


def export(
    config: Config, out: Path, folder: Path, device: torch.device, rows: int | None = None, seed: int = 1
) -> None:
    """Write `folder` from the weights in `out`; the scores are those of the weights as stored."""
    path = out / WEIGHTS
    if not path.is_file():
        raise TrainingError(f"there is no '{path}': run the train stage first")
    state = load_weights(path, config, torch.device("cpu"))
    model = build_model(config)
    model.load_state_dict(state["model"])
    model.half().eval().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    usual = {
        "pipeline": "block_lm",
        "block_length": config.block,
        "num_inference_steps": config.block,
        "threshold": config.threshold,
        "temperature": 0.0,
        "max_tokens": config.longest + config.block,
        "max_length": max(config.lengths),
        "tasks": config.tasks,
        **prompts(config),
    }
    (folder / "generation.json").write_text(json.dumps(usual, indent=2) + "\n")
    rows = rows or (255 if device.type == "cuda" else 48)
    scores = final_scores(model.to(device).float(), config, device, rows)
    record(out, "export", step=state["step"], seconds=round(state["seconds"], 1), rows=rows, scores=scores)
    examples = []
    for task in config.tasks:
        documents = held_out(task, 1, 96, 12, 0, 8)
        text = to_text(documents.ids[0, : documents.stop])
        head, tail = text.split(" | ")
        examples.append(f"    {' '.join(head.split()[1:12])} ... | ... from {tail.split(' from ')[1]}")
    table = "\n".join(
        f"| {task} | {s['exact']:.3f} | {s['tokens']:.4f} | {s['control']:.3f} | {s['control_tokens']:.2f} | "
        f"{s['perplexity_bound']:.3f} |"
        for task, s in scores.items()
    )
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "README.md") / 2**20
    card = CARD.format(
        size=size,
        kinds=("one kind", "two kinds", "three kinds", "four kinds", "five kinds")[len(config.tasks) - 1],
        example=usual["prompt_example"],
        form=FORM,
        tasks="\n".join(f"* {task}: {ABOUT[task]}" for task in config.tasks),
        layers=config.layers,
        heads=config.heads,
        head=config.hidden // config.heads,
        hidden=config.hidden,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        vocabulary=config.sizes()["vocabulary"],
        block=config.block,
        blocks=", ".join(map(str, sorted(set(config.blocks)))),
        examples="\n".join(examples),
        steps=state["step"],
        seconds=state["seconds"],
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        seed=seed,
        date=datetime.now(UTC).date(),
        torch=torch.__version__,
        lengths=" or ".join(map(str, config.lengths)),
        shortest=min(config.lengths),
        window=config.window,
        early=EARLY,
        lr=config.lr,
        adam_lr=config.adam_lr,
        share=SHARE,
        rows=rows,
        longest=max(config.lengths),
        answers=", ".join(str(min(answer, config.longest, max(config.lengths) // 4)) for answer in ANSWERS),
        threshold=config.threshold,
        kept=KEPT,
        scores=table,
    )
    (folder / "README.md").write_text(card)
    print(f"exported to {folder}: {size:.1f} MiB\n{table}", flush=True)
