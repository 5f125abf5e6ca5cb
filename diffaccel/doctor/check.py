"""Every kernel on a model's own shape: is it right, and how fast is it?

Queries are three times as long as their channels would make them, so that a few keys hold most of the mass: results are
then as large as values are, and a wrong one cannot hide under the budget.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from statistics import median
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernel import EXACT, KERNELS, Partial, choose, pick, reference, sage
from ..kernel.block_sparse import BlockLists, written_out
from ..kernel.merge import HAS_TRITON
from .shape import Shape

SAMPLE = 256
"""Queries whose results are compared."""

DENSITY = 0.25
"""Share of the key blocks that a list names."""

BLOCK = 128
"""Queries of a block, and keys of one, for the kernel that reads lists of blocks."""

BUDGET = (
    "out: eps (m + |out|) + e m, of lse: e; m is |v| averaged as v is in out, eps that of the dtype, e 128 eps of "
    "float32, times the largest |lse| if that is above 1"
)
"""The formula of `budget`, in words."""

_SHARPNESS = 3.0
_CPU_OPERATIONS = 2e10  # of one call over the sample, well under a second on two cores
_ROUNDS = 15
_LEAST_ROUNDS = 3

Status = Literal["right", "wrong", "failed", "unusable"]


@dataclass(frozen=True)
class Check:
    """What was found of one kernel.

    `status` is "right", "wrong" (over budget), "failed" (it raised) or "unusable" here; `reason` is a sentence for all
    but the first. `out_error` and `lse_error` are the largest absolute differences from the reference, the `_share`s
    the largest share of the budget that one of them takes, None where it is not finite. `queries` were timed:
    `milliseconds` is the median of calls, `fastest` and `slowest` the ends, `tflops` of the median, over pairs of a
    query and a key that it reads.
    """

    kernel: str
    status: Status
    reason: str | None = None
    queries: int | None = None
    out_error: float | None = None
    out_share: float | None = None
    lse_error: float | None = None
    lse_share: float | None = None
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    tflops: float | None = None


@dataclass(frozen=True)
class Checks:
    """All kernels at one shape: (1, `queries`, `heads`, `head_dim`) queries over `keys` keys.

    `cut` says, a sentence each, how that differs from the model's own shape. `auto` is the kernel that "auto" resolves
    to, on a GPU for reasons in `why`: what was measured here is kept for it. `faster` are those that are right and were
    faster than it in every call, by 5 % in the median.
    """

    queries: int
    keys: int
    heads: int
    head_dim: int
    cut: tuple[str, ...]
    auto: str
    why: str
    faster: tuple[str, ...]
    dense: tuple[Check, ...]
    sparse: Check

    def of(self, name: str) -> Check:
        return next(check for check in self.dense if check.kernel == name)


class Truth(NamedTuple):
    """fp32 results: `out` (B, S, H, D), `lse` (B, S, H), and `size` (B, S, H, D), |v| averaged as v is in `out`."""

    out: Tensor
    lse: Tensor
    size: Tensor


class Errors(NamedTuple):
    """The largest absolute differences from the truth and shares of the budget; None where not finite."""

    out_error: float | None
    out_share: float | None
    lse_error: float | None
    lse_share: float | None


class Arm(NamedTuple):
    """A call to be checked and timed, the result's rows to look at, and what they should be."""

    call: Callable[[], Partial]
    rows: Tensor | None
    truth: Truth
    queries: int
    operations: float


def budget(truth: Truth, dtype: torch.dtype) -> tuple[Tensor, float]:
    """How far a right result in `dtype` may lie from the fp32 one: of out (B, S, H, D) and of any lse.

    A kernel keeps scores and sums in fp32 and rounds to its dtype twice: probabilities, each by eps / 2 of itself, and
    the result; one that merges parts rounds each part as well. That is eps / 2 of |v| averaged as v is, for each of
    the first two, and eps / 2 of |out|. An error e of the scores in fp32, or of their exponentials, is one of e in
    lse, and of e times itself in a probability.
    """
    eps = torch.finfo(dtype).eps
    scores = 128 * torch.finfo(torch.float32).eps * max(1.0, float(truth.lse.abs().max()))
    return eps * (truth.size + truth.out.abs()) + scores * truth.size, scores


def compare(found: Partial, truth: Truth, dtype: torch.dtype) -> Errors:
    """Largest errors and largest shares of the budget."""
    allowed, allowed_lse = budget(truth, dtype)
    error, error_lse = (found.out.float() - truth.out).abs(), (found.lse - truth.lse).abs()
    return Errors(*map(_largest, (error, error / allowed, error_lse, error_lse / allowed_lse)))


def _largest(x: Tensor) -> float | None:
    largest = float(x.max())
    return largest if isfinite(largest) else None


def check_kernels(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, seconds: float = 10.0, per_call: float = 1.0
) -> Checks:
    """Compare and time every kernel at that shape.

    Heads are cut where the sample alone would not fit in memory or, on a CPU, take too long; then queries to what one
    call does in `per_call` seconds. The timed rounds end after `seconds`.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # events are of the current device
        return _check_kernels(shape, device, dtype, seconds, per_call)


def _check_kernels(shape: Shape, device: torch.device, dtype: torch.dtype, seconds: float, per_call: float) -> Checks:
    heads, cut = _fit(shape, device, dtype)
    scale = shape.head_dim**-0.5
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, tokens, heads, shape.head_dim, generator=generator, device=device, dtype=dtype)

    q, k, v = draw(shape.block) * _SHARPNESS, draw(shape.keys), draw(shape.keys)
    usable: dict[str, ModuleType] = {}
    found: dict[str, Check] = {}
    slowest = 0.0
    for name, kernel in KERNELS.items():
        try:
            reason = kernel.unusable(device, dtype, shape.head_dim)
            if reason is not None:
                found[name] = Check(name, "unusable", reason)
                continue
            if kernel is sage:
                found[name] = Check(
                    name, "unusable", "it is not exact; it is compared on the tensors that it is used on"
                )
                continue
            took = _probe(partial(kernel.partial, q[:, :SAMPLE], k, v, scale=scale), device)
        except Exception as error:  # of somebody else's kernel, which may raise anything
            found[name] = Check(name, "failed", said(error))
            continue
        usable[name] = kernel
        if kernel is not reference:  # the definition is timed over the sample alone
            slowest = max(slowest, took)
    queries = shape.block
    if slowest * queries > per_call * min(SAMPLE, queries):
        queries = max(SAMPLE, int(SAMPLE * per_call / slowest) // SAMPLE * SAMPLE)
        if queries < shape.block:
            cut.append(f"{shape.block} queries cut to {queries}, so that a call takes about {per_call:g} s at most")
        queries = min(queries, shape.block)
    q = q[:, :queries]
    rows = _sample(queries).to(device)
    truth = dense_truth(q[:, rows], k, v, scale)
    arms: dict[str, Arm] = {}
    for name, kernel in usable.items():
        few = kernel is reference and queries > len(rows)
        asked = q[:, rows] if few else q
        operations = 4.0 * asked.shape[1] * shape.keys * heads * shape.head_dim
        call = partial(kernel.partial, asked, k, v, scale=scale)
        arms[name] = Arm(call, None if few else rows, truth, asked.shape[1], operations)
    sparse = Check("triton", "unusable", sparse_unusable(device, dtype, shape.head_dim))
    if sparse.reason is None:
        try:
            arms["triton"] = sparse_arm(q, k, v, scale)
        except Exception as error:  # as above
            sparse = Check("triton", "failed", said(error))
    found |= judge(arms, device, dtype, seconds)
    sparse = found.pop("triton", sparse)
    size = choose.size_of(q, shape.keys)
    if device.type == "cuda":
        tried = [found[kernel.name] for kernel in EXACT if found[kernel.name].status != "unusable"]
        choose.table(device).keep(size, {check.kernel: _lasts(check) for check in tried})
    auto, why = pick("auto", device, dtype, shape.head_dim, size)
    return Checks(
        queries=queries,
        keys=shape.keys,
        heads=heads,
        head_dim=shape.head_dim,
        cut=tuple(cut),
        auto=auto,
        why=why,
        faster=_faster(found, auto),
        dense=tuple(found[name] for name in KERNELS),
        sparse=sparse,
    )


def _lasts(check: Check) -> float:
    """Milliseconds; infinite for a kernel that "auto" is not to choose."""
    return check.milliseconds if check.status == "right" and check.milliseconds is not None else float("inf")


def judge(arms: dict[str, Arm], device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Check]:
    """Compare every arm with its truth, and time those that returned, arms alternating, for about `seconds`."""
    found = {}
    for name, arm in arms.items():
        try:
            got = arm.call()
            synchronize(device)
        except Exception as error:  # as above
            found[name] = Check(name, "failed", said(error))
            continue
        found[name] = _verdict(name, got, arm, dtype)
    times = _times({name: arms[name].call for name in found if found[name].status != "failed"}, device, seconds)
    for name, took in times.items():
        middle = median(took)
        found[name] = replace(
            found[name],
            queries=arms[name].queries,
            milliseconds=1e3 * middle,
            fastest=1e3 * min(took),
            slowest=1e3 * max(took),
            tflops=arms[name].operations / middle / 1e12,
        )
    return found


def _verdict(name: str, got: Partial, arm: Arm, dtype: torch.dtype) -> Check:
    shape = (1, arm.queries, *arm.truth.out.shape[2:])
    met = (tuple(got.out.shape), got.out.dtype, tuple(got.lse.shape), got.lse.dtype)
    wanted = (shape, dtype, shape[:-1], torch.float32)
    if met != wanted:
        return Check(name, "wrong", f"it returns {met} as shapes and dtypes of out and lse in place of {wanted}")
    if arm.rows is not None:
        got = Partial(got.out[:, arm.rows], got.lse[:, arm.rows])
    errors = compare(got, arm.truth, dtype)
    wrong = []
    for title, error, share in (("out", *errors[:2]), ("the log-sum-exp", *errors[2:])):
        if error is None or share is None:
            wrong.append(f"{title} is not finite")
        elif share > 1:
            wrong.append(f"{title} is off by up to {error:.2g}, {share:.3g} times its budget")
    status: Status = "wrong" if wrong else "right"
    return Check(name, status, " and ".join(wrong) or None, None, *errors)


def dense_truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Truth:
    """`reference` in fp32, head by head so that the scores of one head are all that is held."""
    parts = []
    for head in range(q.shape[2]):
        query, key, value = (x[:, :, head : head + 1].float() for x in (q, k, v))
        parts.append(reference.partial(query, key, torch.cat([value, value.abs()], -1), scale=scale))
    return _truth(parts)


def _truth(parts: list[Partial]) -> Truth:
    out, size = torch.cat([part.out for part in parts], 2).chunk(2, -1)
    return Truth(out, torch.cat([part.lse for part in parts], 2), size)


def sparse_unusable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernel that reads lists of key blocks cannot run there, or None."""
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}; there PyTorch computes the same"
    if not HAS_TRITON:
        return "triton is not installed (`pip install triton`)"
    if head_dim > 256:
        return f"it takes up to 256 channels, not {head_dim}"
    return None


def sparse_arm(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Arm:
    """The Triton kernel, every block of queries with a random `DENSITY` of the key blocks, head by head."""
    from ..kernel import fused_block_sparse

    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    query_blocks, key_blocks = -(-queries // BLOCK), -(-keys // BLOCK)
    take = max(1, round(DENSITY * key_blocks))
    generator = torch.Generator(q.device).manual_seed(1)
    drawn = torch.rand(1, heads, query_blocks, key_blocks, generator=generator, device=q.device).topk(take).indices
    lists = drawn.sort(-1).values.int()
    counts = torch.full(lists.shape[:-1], take, dtype=torch.int32, device=q.device)
    blocks = BlockLists(lists, counts, BLOCK, BLOCK, ascending=True)
    place = torch.tensor(sorted({0, query_blocks - 1}), device=q.device)
    rows = (place[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
    rows = rows[rows < queries]
    parts = []
    for head in range(heads):
        query, key, value = (x[:, :, head : head + 1].float() for x in (q[:, rows], k, v))
        some = BlockLists(lists[:, head : head + 1, place], counts[:, head : head + 1, place], BLOCK, BLOCK)
        parts.append(written_out(query, key, torch.cat([value, value.abs()], -1), some, scale=scale))
    key_sizes = torch.full((key_blocks,), BLOCK, device=q.device)
    key_sizes[-1] = keys - (key_blocks - 1) * BLOCK
    query_sizes = torch.full((query_blocks,), BLOCK, device=q.device)
    query_sizes[-1] = queries - (query_blocks - 1) * BLOCK
    pairs = int((key_sizes[lists.long()].sum(-1) * query_sizes).sum())

    def call() -> Partial:
        return Partial(*fused_block_sparse.attend(q, k, v, blocks, scale))

    return Arm(call, rows, _truth(parts), queries, 4.0 * pairs * q.shape[3])


def _fit(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[int, list[str]]:
    """The heads that the sample can be computed with, and what was cut."""
    heads, why = shape.heads, ""
    sample = min(SAMPLE, shape.block)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        while heads > 1 and _bytes(shape, heads, dtype) > 0.8 * free:
            heads, why = heads // 2, f"{free / 2**30:.1f} GiB of GPU memory are free"
    elif device.type == "cpu":
        while heads > 1 and 4.0 * sample * shape.keys * heads * shape.head_dim > _CPU_OPERATIONS:
            heads, why = heads // 2, "a CPU would take too long"
    return heads, [f"{shape.heads} heads cut to {heads}: {why}"] if why else []


def _bytes(shape: Shape, heads: int, dtype: torch.dtype) -> int:
    """About what the comparison holds at once: tensors and results, and the reference's scores of the sample in fp32,
    its weights and their masked copy."""
    sample = min(SAMPLE, shape.block)
    tensors = heads * shape.head_dim * dtype.itemsize * (2 * shape.keys + 4 * shape.block)
    upcast = 2 * shape.keys * shape.head_dim * 4 * heads
    return tensors + upcast + 3 * sample * shape.keys * heads * 4


def _sample(queries: int) -> Tensor:
    """The places of up to `SAMPLE` queries in ascending order, the last query among them."""
    drawn = torch.randperm(queries - 1, generator=torch.Generator().manual_seed(2))[: SAMPLE - 1]
    return torch.cat([drawn.sort().values, torch.tensor([queries - 1])])


def _probe(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, without what only the first one takes."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        synchronize(device)
        took = time.perf_counter() - start
        if device.type == "cpu" and took > 1.0:  # it says enough
            break
    return took


def _times(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, in rounds of all of them; the device's own clock on a GPU."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            times[name].append(_timed(call, device))
    return times


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that an error is that of the call before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _faster(found: dict[str, Check], auto: str) -> tuple[str, ...]:
    """Right kernels whose slowest call did more a second than the fastest of `auto`."""
    own = found[auto]

    def rates(check: Check) -> tuple[float, float, float]:
        assert check.tflops is not None
        assert check.milliseconds is not None
        assert check.slowest is not None
        assert check.fastest is not None
        work = check.tflops * check.milliseconds
        return work / check.slowest, check.tflops, work / check.fastest

    if own.tflops is None:
        return ()
    _, middle, most = rates(own)
    better = []
    for name, check in found.items():
        if name == auto or check.status != "right" or check.tflops is None:
            continue
        least, rate, _ = rates(check)
        if least > most and rate > 1.05 * middle:
            better.append(name)
    return tuple(better)


def said(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
