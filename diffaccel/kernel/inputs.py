"""What all kernels ask of queries, keys and values; looked at on the host, nobody waits for a device."""

from torch import Tensor

from ..errors import KernelError


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `KernelError` unless q is (B, S, H, D), k (B, N, G, D) and v (B, N, G, any), H a multiple of G, all of one
    dtype on one device.
    """
    if (q.device, q.device, q.dtype, q.dtype) != (k.device, v.device, k.dtype, v.dtype):
        met = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise KernelError(f"queries, keys and values are of one dtype on one device, got {met}: move or convert them")
    fit = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not (fit and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]):
        met = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise KernelError(
            "queries are (batch, queries, heads, channels), keys and values (batch, keys, heads, channels) of the same "
            f"batch, and keys as wide as queries, got {met}"
        )
    if q.shape[2] != k.shape[2] and (not k.shape[2] or q.shape[2] % k.shape[2]):
        raise KernelError(
            f"heads of queries are a multiple of those of keys, got {q.shape[2]} and {k.shape[2]}: "
            "repeat the heads of the keys"
        )
