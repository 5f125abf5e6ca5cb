"""The findings as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .check import BLOCK, BUDGET, DENSITY, SAMPLE, Check

if TYPE_CHECKING:
    from . import Findings
    from .check import Checks
    from .machine import Machine
    from .shape import Shape


def lines(found: "Findings") -> list[str]:
    """Versions, extras, the shape, a row a kernel, what auto uses, and what is wrong."""
    text = [*_installation(found.machine), "", "extras", *_extras(found.machine), ""]
    if found.shape is not None and found.kernels is not None:
        text += [*_shape(found.shape, found), "", *_kernels(found.kernels), ""]
    if not found.problems:
        return [*text, "no problems were found"]
    text.append("problems")
    for problem in found.problems:
        text += [f"  {problem.what}", f"    {problem.fix}"]
    return text


def _installation(machine: "Machine") -> list[str]:
    versions = dict(machine.versions)
    ours, python, torch = (versions.pop(name) for name in ("diffaccel", "python", "torch"))
    threads = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    cudnn = "" if machine.cudnn is None else f", cuDNN {machine.cudnn}"
    text = [
        f"diffaccel {ours}, Python {python}, {machine.platform}, {threads}",
        f"torch {torch}, built for {machine.torch_built_for}{cudnn}",
    ]
    for number, gpu in enumerate(machine.gpus):
        memory = f"{gpu.memory / 2**30:.1f} GiB, {gpu.free / 2**30:.1f} of them free"
        text.append(f"cuda:{number} {gpu.name}, compute capability {gpu.capability}, {memory}")
    if not machine.gpus:
        text.append("no GPU that torch can use")
    text.append(", ".join(f"{name} {found}" for name, found in versions.items() if found is not None))
    absent = [name for name, found in versions.items() if found is None]
    return [*text, f"not installed: {', '.join(absent)}"] if absent else text


def _extras(machine: "Machine") -> list[str]:
    rows = []
    for extra in machine.extras:
        lacks = "" if len(extra.missing) in (0, len(extra.requirements)) else f" (lacks {', '.join(extra.missing)})"
        rows.append((extra.name, ("installed" if extra.installed else extra.command) + lacks, extra.brings))
    return _aligned(rows)


def _shape(shape: "Shape", found: "Findings") -> list[str]:
    reads = f"a block of {shape.block} tokens reads itself and {shape.past} before it"
    if not shape.causal:
        reads = f"all {shape.block} tokens read each other"
    return [
        f"{shape.model} at {shape.width}x{shape.height}, {shape.frames} frames, {found.dtype} on {found.device}",
        f"  {shape.pipeline}, {shape.layers} layers, {shape.heads} heads of {shape.head_dim} channels; {reads}",
    ]


def _kernels(kernels: "Checks") -> list[str]:
    size = f"{kernels.queries} queries over {kernels.keys} keys, {kernels.heads} heads of {kernels.head_dim} channels"
    text = [f"kernels at {size}", *(f"  {sentence}" for sentence in kernels.cut)]
    checks = (*kernels.dense, kernels.sparse)
    rows = [_row(check, kernels) for check in checks if check.status != "unusable"]
    titles = ("kernel", "", "error of out", "of budget", "of lse", "of budget", "ms", "fastest to slowest", "TFLOP/s")
    text += _aligned([titles, *rows])
    for status in ("wrong", "failed", "unusable"):
        text += [f"  {_title(check, kernels)}: {check.reason}" for check in checks if check.status == status]
    text.append(f"{min(SAMPLE, kernels.queries)} queries are compared with `reference` in float32; budget of {BUDGET}")
    faster = "no other usable kernel was measurably faster"
    if kernels.faster:
        faster = f"measurably faster here: {', '.join(kernels.faster)} (--set kernel={kernels.faster[0]})"
    return [*text, f"auto uses {kernels.auto}{f' ({kernels.why})' if kernels.why else ''}; {faster}"]


def _row(check: Check, kernels: "Checks") -> Sequence[str]:
    few = "" if check.queries in (None, kernels.queries) else f" ({check.queries} queries)"
    spread = "-" if check.fastest is None else f"{check.fastest:.3g} to {check.slowest:.3g}"
    return (
        _title(check, kernels) + few,
        check.status if check.status == "right" else check.status.upper(),
        *(_number(check.out_error, ".1e"), _number(check.out_share, ".0%")),
        *(_number(check.lse_error, ".1e"), _number(check.lse_share, ".0%")),
        *(_number(check.milliseconds, ".3g"), spread, _number(check.tflops, ".3g")),
    )


def _title(check: Check, kernels: "Checks") -> str:
    return f"block sparse, {DENSITY:.0%} of blocks of {BLOCK}" if check is kernels.sparse else check.kernel


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
