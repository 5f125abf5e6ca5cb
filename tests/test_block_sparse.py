"""Attention by lists of key blocks: what it means, and that every way to compute it computes that."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import assert_within

from diffaccel import KernelError, KnobError
from diffaccel.kernel import KERNELS
from diffaccel.kernel.block_sparse import BlockLists, Summary, block_sparse, by_fa4, gathered, written_out
from diffaccel.kernel.merge import HAS_TRITON

if HAS_TRITON:
    from diffaccel.kernel.fused_block_sparse import CANDIDATES, Config, attend, configured

SCALE = 0.3


class Case:
    """Random tensors and lists of some shape, and the parts of the contract that they use."""

    def __init__(
        self, b=1, s=40, n=77, h=2, d=64, query_block=16, key_block=16, lists="random", parts=(), dtype=torch.float32,
        device="cpu", shared=None,
    ):  # fmt: skip
        g = shared or h  # heads of the keys
        self.q = torch.randn(b, s, h, d).to(device, dtype)
        # keys and values as a cache holds them: a part of larger buffers, heads inside or outside; the rest is poison
        self.k = torch.full((b, n + 3, g, d + 32), torch.nan)[:, 2:-1, :, :d].copy_(torch.randn(b, n, g, d))
        self.v = torch.full((b, g, n + 5, d + 32), torch.nan)[:, :, 1:-4, :d].copy_(torch.randn(b, g, n, d))
        self.k, self.v = self._placed(self.k, device, dtype), self._placed(self.v, device, dtype).transpose(1, 2)
        query_blocks, key_blocks = -(-s // query_block), -(-n // key_block)
        ids = torch.rand(b, h, query_blocks, key_blocks).argsort(-1)  # every block once, in a random order
        if lists == "full":
            counts = torch.full((b, h, query_blocks), key_blocks)
        elif lists == "equal":
            ids = ids[..., : max(1, key_blocks // 2)]
            counts = torch.full((b, h, query_blocks), ids.shape[-1])
        else:
            counts = torch.randint(0, key_blocks + 1, (b, h, query_blocks))
            counts[:, 0, 0] = 0
        past = torch.arange(ids.shape[-1]) >= counts[..., None]
        ids = ids.masked_fill(past, 10**6)  # to follow an entry past the end is an error
        self.blocks = BlockLists(ids.int().to(device), counts.int().to(device), query_block, key_block)
        self.options = {}
        if "order" in parts:
            self.options["order"] = torch.rand(b, h, s).argsort(-1).to(device)
        if "weight" in parts:
            self.options["log_weight"] = torch.randint(1, 9, (b, g, n)).float().log().to(device)
        if "summary" in parts:
            means = [torch.randn(b, key_blocks, g, d).to(device, dtype) for _ in range(2)]
            self.options["summary"] = Summary(*means, 3 * torch.rand(b, g, key_blocks).to(device))

    @staticmethod
    def _placed(part, device, dtype):
        """The same part of the same buffer elsewhere."""
        whole = part._base.to(device, dtype)
        return whole.as_strided(part.shape, part.stride(), part.storage_offset())

    @property
    def largest(self):
        """Of the values that a result averages."""
        values = [self.v, self.options["summary"].v] if "summary" in self.options else [self.v]
        return max(float(x.abs().max()) for x in values)

    def exact(self):
        """fp64, one query at a time, from the words of the contract."""
        q, k, v = (x.double().cpu() for x in (self.q, self.k, self.v))
        lists, counts = self.blocks.lists.cpu(), self.blocks.counts.cpu()
        out, lse = torch.zeros(q.shape).double(), torch.full(q.shape[:-1], -torch.inf).double()
        batch, queries, heads, _ = q.shape
        size = self.blocks.key_block
        key_blocks = -(-k.shape[1] // size)
        order, weight, summary = (self.options.get(name) for name in ("order", "log_weight", "summary"))
        for b in range(batch):
            for h in range(heads):
                g = h // (heads // k.shape[2])
                for place in range(queries):
                    query = place if order is None else int(order[b, h, place])
                    block = place // self.blocks.query_block
                    named = lists[b, h, block, : counts[b, h, block]].tolist()
                    keys = [key for i in named for key in range(i * size, min((i + 1) * size, k.shape[1]))]
                    scores = k[b, keys, g] @ q[b, query, h] * SCALE
                    values = v[b, keys, g]
                    if weight is not None:
                        scores = scores + weight[b, g, keys].cpu()
                    if summary is not None:
                        rest = [i for i in range(key_blocks) if i not in named]
                        means = summary.k[b, rest, g].double().cpu() @ q[b, query, h] * SCALE
                        scores = torch.cat([scores, means + summary.log_count[b, g, rest].cpu()])
                        values = torch.cat([values, summary.v[b, rest, g].double().cpu()])
                    if len(scores):
                        out[b, query, h] = scores.softmax(0) @ values
                        lse[b, query, h] = scores.logsumexp(0)
        return out, lse

    def check(self, compute, exact=None):
        out, lse = compute(self.q, self.k, self.v, self.blocks, scale=SCALE, **self.options)
        exact_out, exact_lse = self.exact() if exact is None else exact
        assert out.dtype == self.q.dtype
        assert lse.dtype == torch.float32
        assert_within(out.cpu(), exact_out.cpu(), self.q.dtype, inputs=self.largest)
        assert_within(lse.cpu(), exact_lse.cpu(), torch.float32)


CASES = {
    "ragged queries and keys": {},
    "whole blocks": {"s": 48, "n": 96},
    "full lists": {"lists": "full"},
    "an order": {"parts": ("order",)},
    "log-weights": {"parts": ("weight",)},
    "summaries": {"parts": ("summary",)},
    "everything, two rows": {"b": 2, "h": 3, "s": 37, "n": 83, "parts": ("order", "weight", "summary")},
    "96 channels": {"d": 96, "parts": ("weight", "summary")},
    "128 channels": {"d": 128, "n": 90},
    "large blocks": {"s": 70, "n": 300, "query_block": 64, "key_block": 128, "parts": ("order", "summary")},
    "blocks of no power of two": {"s": 53, "n": 130, "query_block": 24, "key_block": 40, "parts": ("order", "weight")},
    "fewer keys than a block": {"n": 5, "lists": "full"},
    "shared heads": {"b": 2, "h": 6, "s": 21, "n": 60, "shared": 2, "parts": ("order", "weight", "summary")},
    "one head of keys": {"h": 3, "n": 70, "shared": 1, "key_block": 40},
    "one block of queries": {"s": 9, "n": 64, "query_block": 128, "parts": ("order", "summary")},
}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
def test_written_out_is_the_contract(case):
    Case(**CASES[case]).check(written_out)
    Case(**CASES[case]).check(block_sparse)  # on the CPU the same


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES)
def test_fused_is_the_contract(case, tma, keys):
    """By Triton's interpreter where there is no GPU. Tiles of keys are parts of a block, blocks, or several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(**CASES[case], device=device)
    tile = min(32, case.blocks.query_block)
    case.check(partial(attend, config=Config(16 if tile < 32 else 32, keys, 4, 2, tma=tma)))


@needs_triton
def test_the_means_are_merged_with_what_another_kernel_read():
    sizes = {"b": 2, "h": 3, "s": 37, "n": 83, "d": 48}
    case = Case(**sizes, parts=("order", "summary"))
    order = case.options["order"]

    def merged(q, k, v, blocks, *, scale, order, summary):
        rows = order[..., None].expand(-1, -1, -1, q.shape[3])
        ordered = q.transpose(1, 2).gather(2, rows).transpose(1, 2)
        part = written_out(ordered, k, v, blocks, scale=scale)
        return attend(q, k, v, blocks, scale, order, summary=summary, part=(part.out, part.lse.transpose(1, 2)))

    assert (case.blocks.counts == 0).any()  # an empty part is nothing
    assert not torch.equal(order, torch.arange(37).expand_as(order))
    case.check(merged)


@needs_triton
def test_full_lists_are_dense_attention():
    case = Case(lists="full", s=33, n=70)
    dense = KERNELS["reference"].partial(case.q, case.k, case.v, scale=SCALE)
    case.check(attend, dense)
    case.check(written_out, dense)


@needs_triton
@pytest.mark.parametrize("how", ["dissimilar", "weighted"])
def test_scores_far_below_zero_do_not_vanish(how):
    """Neither beside keys past the end, were those read as zeros, nor beside the value that the maximum starts from."""
    case = Case(n=45, d=64)
    if how == "dissimilar":
        case.q, case.k = case.q.abs() + 1, -case.k.abs() - 1
    else:
        case.options["log_weight"] = torch.full((1, 2, 45), -120.0)  # exp(-120) is less than fp32 holds
    case.check(attend)
    case.check(written_out)


@needs_triton
def test_log_weights_may_rule_out_every_key():
    case = Case(lists="full")
    case.options["log_weight"] = torch.full((1, 2, 77), -torch.inf)
    for compute in (attend, written_out):
        out, lse = compute(case.q, case.k, case.v, case.blocks, scale=SCALE, **case.options)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.isneginf(lse).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("n", [96, 83], ids=["whole", "ragged"])
@pytest.mark.parametrize("parts", [(), ("order",)], ids=["in place", "an order"])
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_gathered_is_the_contract(name, parts, n, at_once):
    for shared in (2, 1):
        case = Case(b=2, n=n, lists="equal", parts=parts, shared=shared)
        case.check(partial(gathered, KERNELS[name], at_once=at_once))


@pytest.mark.parametrize("compute", [block_sparse, written_out, partial(gathered, KERNELS["sdpa"])])
def test_lists_of_nothing_are_nothing(compute):
    case = Case(lists="equal")
    blocks = BlockLists(case.blocks.lists[..., :0], 0 * case.blocks.counts, 16, 16)
    out, lse = compute(case.q, case.k, case.v, blocks, scale=SCALE)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


def test_no_keys_are_nothing():
    case = Case()
    blocks = BlockLists(case.blocks.lists[..., :0], 0 * case.blocks.counts, 16, 16)
    out, lse = block_sparse(case.q, case.k[:, :0], case.v[:, :0], blocks, scale=SCALE)
    assert torch.equal(out, torch.zeros_like(case.q))
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("shape", [(0, 40, 2, 64), (1, 0, 2, 64), (1, 40, 0, 64)], ids=str)
def test_no_queries_are_nothing(shape):
    b, s, h, d = shape
    q, (k, v) = torch.randn(shape), (torch.randn(b, 77, h, d) for _ in range(2))
    lists = torch.zeros(b, h, -(-s // 16), 3, dtype=torch.int32)
    blocks = BlockLists(lists, torch.zeros_like(lists[..., 0]), 16, 16)
    for compute in (block_sparse, partial(gathered, KERNELS["sdpa"])):
        out, lse = compute(q, k, v, blocks, scale=SCALE)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_keys_may_lie_further_apart_than_32_bits_count(device, tma):
    """Of a buffer of more than 2^31 numbers, nearly all of which nobody touches."""
    case = Case(n=48, dtype=torch.float16, device=device, parts=("order",))
    step = 2**26 + 8
    exact = case.exact()
    for name in ("k", "v"):
        buffer = torch.empty(48 * step + 2**12, dtype=torch.float16, device=device)
        far = buffer.as_strided((1, 48, 2, 64), (48 * step, step, 64, 1))
        setattr(case, name, far.copy_(getattr(case, name)))
    assert 47 * step > 2**31
    case.check(partial(attend, config=Config(16, 16, 4, 2, tma=tma)), exact)


def test_misuse_is_named():
    case = Case()
    lists, counts = case.blocks.lists, case.blocks.counts
    with pytest.raises(KnobError, match="query blocks, most"):
        BlockLists(lists, counts[0], 16, 16)
    with pytest.raises(KnobError, match="int32"):
        BlockLists(lists.long(), counts, 16, 16)
    with pytest.raises(KnobError, match="one token at least"):
        BlockLists(lists, counts, 16, 0)

    def refused(match, q=case.q, k=case.k, v=case.v, blocks=case.blocks, scale=SCALE, **options):
        for compute in (block_sparse, partial(gathered, KERNELS["sdpa"])):
            if compute is block_sparse or not {"log_weight", "summary"} & set(options):
                with pytest.raises(KernelError, match=match):
                    compute(q, k, v, blocks, scale=scale, **options)

    refused("40 queries in blocks of 32", blocks=BlockLists(lists, counts, 32, 16))
    refused("must be positive", scale=-1.0)
    refused("multiple of those of keys, got 2 and 3", k=torch.randn(1, 77, 3, 64), v=torch.randn(1, 77, 3, 64))
    refused(r"order of the queries must be \(1, 2, 40\).*got \(40,\)", order=torch.arange(40))
    refused("contiguous", q=case.q.mT.contiguous().mT)
    refused("float64 on cpu", q=case.q.double())
    refused("on meta", k=case.k.to("meta"))
    refused(r"as wide as queries, got .*77, 2, 32", k=case.k[..., :32])
    refused(r"of the same batch", v=case.v[:, :-1])
    refused(r"log-weights must be \(1, 2, 77\)", log_weight=torch.zeros(77))
    summary = Summary(*(torch.randn(1, 5, 2, 64) for _ in range(2)), torch.zeros(1, 2, 4))
    refused(r"counts of the means must be \(1, 2, 5\).*got \(1, 2, 4\)", summary=summary)
    refused("lists must be .* on cpu, got .* on meta", blocks=BlockLists(lists.to("meta"), counts.to("meta"), 16, 16))


BROKEN = {
    "an id of no block": ([0, 5, 1], 2, False, "from 0 to 4.*count 2 and ids .0, 5"),
    "an id below zero": ([0, 2, -1], 3, False, "from 0 to 4.*ids .0, 2, -1"),
    "a count past the list": ([0, 1, 2], 4, False, "between 0 and the 3 entries.*count 4"),
    "a count below zero": ([0, 1, 2], -1, False, "between 0 and the 3 entries.*count -1"),
    "a block twice": ([3, 1, 3], 3, False, "names a block once; .*ids .3, 1, 3"),
    "no ascending order": ([1, 3, 2], 3, True, "once, in ascending order"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lists_are_named(kind):
    ids, count, ascending, match = BROKEN[kind]
    case = Case(s=30)
    lists = torch.arange(3).int().repeat(1, 2, 2, 1)
    counts = torch.full((1, 2, 2), 3, dtype=torch.int32)
    BlockLists(lists.clone(), counts, 16, 16, ascending=ascending).check(77)
    lists[0, 1, 0], counts[0, 1, 0] = torch.tensor(ids).int(), count
    blocks = BlockLists(lists, counts, 16, 16, ascending=ascending)
    with pytest.raises(KernelError, match=match):
        blocks.check(77)
    with pytest.raises(KernelError, match="the list of row 0, head 1, query block 0"):
        block_sparse(case.q, case.k, case.v, blocks, scale=SCALE)


@needs_triton
@pytest.mark.parametrize("keys", [16, 64], ids=["tiles of a block", "tiles of several"])
@pytest.mark.parametrize("parts", [(), ("weight",), ("order", "summary")], ids=str)
@pytest.mark.parametrize("n", [64, 83, 5], ids=["whole", "ragged", "less than a block"])
def test_broken_lists_read_nothing_outside(n, parts, keys):
    """Whatever lists, counts and orders say: memory beside the tensors is NaN, and other rows are right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(n=n, lists="full", parts=parts, device=device)
    exact, exact_lse = case.exact()
    lists, counts = case.blocks.lists, case.blocks.counts
    lists[0, 1, 1, :] = torch.tensor([7, -1, 10**8, -(10**8), 2**31 - 1, 6], dtype=torch.int32)[: lists.shape[-1]]
    counts[0, 0, 2], counts[0, 1, 2] = 10**9, -5
    if "order" in parts:
        case.options["order"][0, 1, 33], case.options["order"][0, 1, 34] = 10**9, -(10**9)
    blocks = BlockLists(lists, counts, 16, 16)
    out, lse = attend(case.q, case.k, case.v, blocks, SCALE, **case.options, config=Config(16, keys, 4, 2, tma=False))
    assert_within(out[:, :, 0].cpu(), exact[:, :, 0], torch.float32, inputs=case.largest)
    assert_within(lse[:, :, 0].cpu(), exact_lse[:, :, 0], torch.float32)
    if "order" not in parts:  # where two places name no query, two queries have no result
        assert torch.isfinite(out).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("query_block", [16, 64, 1170])
def test_every_shape_has_a_configuration(query_block, dtype):
    for width in (16, 64, 128, 256):
        for key_block in (16, 40, 64, 128, 256):
            for major in (8, 9, 10):
                config = configured(width, query_block, key_block, dtype, major)
                assert 16 <= config.queries <= max(16, query_block)
                assert not config.tma or (key_block % config.keys == 0 and major >= 9)


LARGE = {
    "ragged": {"s": 1000, "n": 3001},
    "everything": {"b": 2, "s": 500, "n": 2000, "h": 3, "parts": ("order", "weight", "summary")},
    "64 channels, small blocks": {"s": 700, "n": 1999, "d": 64, "query_block": 64, "key_block": 32},
    "96 channels": {"s": 700, "n": 1999, "d": 96, "parts": ("order", "summary")},
    "256 channels": {"s": 300, "n": 1111, "d": 256, "key_block": 64},
    "shared heads": {"h": 12, "shared": 3, "s": 300, "n": 1111, "parts": ("order", "weight", "summary")},
    "few queries a block": {"s": 300, "n": 1111, "query_block": 16, "key_block": 64, "parts": ("order",)},
    "blocks of no power of two": {"s": 1170, "n": 2040, "query_block": 390, "key_block": 120, "parts": ("weight",)},
}


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_fused_is_the_contract_on_a_gpu(case, dtype):
    on_a_gpu(LARGE[case], dtype, block_sparse)


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", CANDIDATES if HAS_TRITON else [], ids=str)
@pytest.mark.parametrize("case", ["ragged", "everything", "blocks of no power of two"])
def test_every_configuration_is_the_contract(case, config):
    on_a_gpu(LARGE[case], torch.bfloat16, partial(attend, config=config))


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "sizes",
    [
        {"s": 300, "n": 1111},
        {"s": 256, "n": 1024, "parts": ("order",), "key_block": 64},
        {"b": 2, "h": 3, "s": 389, "n": 2305, "parts": ("order", "summary"), "query_block": 256},
        {"b": 2, "h": 8, "shared": 2, "s": 389, "n": 2305, "parts": ("order", "summary")},
    ],
    ids=["ragged", "whole", "everything", "shared heads"],
)
def test_fa4_is_the_contract_on_a_gpu(sizes, d, dtype):
    reason = KERNELS["fa4"].unusable(torch.device("cuda"), dtype, d)
    if reason:
        pytest.skip(f"fa4: {reason}")
    on_a_gpu({"d": d, **sizes}, dtype, by_fa4, ascending=True)


def on_a_gpu(sizes, dtype, compute, ascending=False):
    case = Case(**{"d": 128, "query_block": 128, "key_block": 128, **sizes}, dtype=dtype, device="cuda")
    if ascending:  # what is past the counts is larger than any id
        case.blocks = replace(case.blocks, lists=case.blocks.lists.sort(-1).values, ascending=True)
    exact = written_out(*(x.double() for x in (case.q, case.k, case.v)), case.blocks, scale=SCALE, **case.options)
    case.check(compute, exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["sdpa", "fa3"])
@pytest.mark.parametrize("n", [2048, 2000], ids=["whole", "ragged"])
def test_gathered_is_the_contract_on_a_gpu(name, n):
    reason = KERNELS[name].unusable(torch.device("cuda"), torch.bfloat16, 128)
    if reason:
        pytest.skip(f"{name}: {reason}")
    case = Case(s=700, n=n, d=128, query_block=128, key_block=64, lists="equal", parts=("order",),
                dtype=torch.bfloat16, device="cuda")  # fmt: skip
    exact = written_out(*(x.double() for x in (case.q, case.k, case.v)), case.blocks, scale=SCALE, **case.options)
    case.check(partial(gathered, KERNELS[name]), exact)
