"""What a run's attention did, counted from its report."""

from ..report import Report
from .cost import Cost


def attention_of(report: Report, *, queries: int, heads: int, dim: int, rows: int = 1, itemsize: float = 2) -> Cost:
    """Work and bytes of the self-attention of a run, from the keys that its kernels read.

    Args:
        report: `run.report()`; its key counts are per query, over all calls.
        queries: tokens of one forward: those of a block at work, or of a whole video.
        heads, dim: of the model, channels a head.
        rows: videos of a batch; passes of guidance are calls of their own, or rows where they share one.
        itemsize: bytes a channel of keys.
    """
    layers = [layer for layer in report.layers if layer.part == "self"]
    read, calls = sum(layer.keys_read for layer in layers), sum(layer.calls for layer in layers)
    return rows * Cost(
        flops=4 * queries * read * heads * dim,
        memory=2 * itemsize * heads * dim * (read + calls * queries),
    )
