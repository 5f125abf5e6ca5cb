"""Every policy, once: its exact setting and a lossy one. A new technique adds one row here."""

from dataclasses import dataclass, field

from profiles import profile_of

from diffaccel import (
    CAKE,
    H2O,
    RKV,
    Accel,
    AnnCA,
    AnnSA,
    CompressKV,
    DuoAttention,
    FlashBlock,
    FlowCache,
    FrameWindow,
    FullFieldGuide,
    HeadShard,
    HiP,
    HostCache,
    HyLRA,
    InwardWindow,
    LazyEviction,
    LycheeDecode,
    MassRouter,
    NeighborhoodAttention,
    PadCollapse,
    RazorAttention,
    RemoteCache,
    RetrievalAttention,
    RollingRebased,
    Routed,
    SinkRecent,
    SnapKV,
    SpAttenCascade,
    Sticky,
    TaskKV,
    TCAStyle,
    TempCache,
    ThinK,
    TokenSelect,
    TriAttention,
    ZipCache,
)


@dataclass(frozen=True)
class Row:
    exact: Accel
    lossy: Accel | None  # None: the technique is lossless
    bits: bool = field(default=True)  # the exact setting is dense attention bit for bit, not only within rounding
    reads_all: bool = field(default=False)  # the lossy setting leaves nothing out, but holds some of it less precisely

    @property
    def name(self) -> str:
        return "+".join(type(policy).__name__ for policy in self.exact.policies().values())

    @property
    def steps(self) -> int:
        """Of denoising that all techniques take."""
        return max(4, *(policy.least_steps for policy in self.exact.policies().values()))


MATRIX = [
    Row(Accel(cache=TempCache(threshold=None)), Accel(cache=TempCache(threshold=0.3))),
    Row(
        Accel(cache=TempCache(threshold=None, match="key")),
        Accel(cache=TempCache(0.3, budget="7 frames", match="key", representative="last", recent_frames=1)),
    ),
    Row(
        Accel(cache=TempCache(threshold=None, variant="paper")),
        Accel(cache=TempCache(threshold=(0.5, 0.3), variant="paper", budget="7 frames", sink_frames=1, hold="host")),
    ),
    Row(
        Accel(cache=TempCache(threshold=None, representative="medoid")),
        Accel(cache=TempCache(0.3, representative="medoid", max_multiplicity=3, budget="7 frames", overflow="mass")),
    ),
    Row(
        Accel(cache=TempCache(threshold=None, heads="per_head")),
        Accel(cache=TempCache(threshold=0.3, heads="per_head", budget="8 frames", bits=8)),
    ),
    Row(Accel(cache=HostCache(piece_frames=2)), None, bits=False),
    Row(Accel(cache=RemoteCache("cpu")), None, bits=False),
    Row(
        Accel(cache=RemoteCache("cpu"), reuse=FlashBlock(refresh=1), window=FrameWindow(frames=None)),
        Accel(cache=RemoteCache("cpu", recent_frames=2), reuse=FlashBlock(refresh=2), window=FrameWindow(frames=4)),
        bits=False,
    ),
    Row(Accel(cache=ZipCache(salient=None)), Accel(cache=ZipCache(0.5, recent_frames=1)), reads_all=True),
    Row(
        Accel(cache=ZipCache(salient=None), reuse=FlashBlock(refresh=1)),
        Accel(cache=ZipCache(0.3, bits=2, recent_frames=2, sink_frames=0), reuse=FlashBlock(refresh=2)),
    ),
    Row(Accel(cache=ThinK(keep=1.0)), Accel(cache=ThinK(0.5, recent_frames=1)), reads_all=True),
    Row(
        Accel(cache=SnapKV(budget=None)),
        Accel(cache=SnapKV("5 frames", recent_frames=2, dropped="bits2")),
        reads_all=True,
    ),
    Row(
        Accel(cache=TriAttention(budget=None)),
        Accel(cache=TriAttention("5 frames", recent_frames=2, profile=profile_of(TriAttention))),
    ),
    Row(
        Accel(cache=RazorAttention(share=1.0)),
        Accel(cache=RazorAttention(share=0.5, recent_frames=2, profile=profile_of(RazorAttention))),
    ),
    Row(
        Accel(cache=DuoAttention(share=1.0)),
        Accel(cache=DuoAttention("5 frames", share=0.25, recent_frames=2, profile=profile_of(DuoAttention))),
    ),
    Row(
        Accel(cache=CompressKV(budget=None)),
        Accel(cache=CompressKV("5 frames", recent_frames=2, lead=1, profile=profile_of(CompressKV))),
    ),
    Row(Accel(cache=TCAStyle(budget=None)), Accel(cache=TCAStyle("5 frames", recent_frames=2, side=2))),
    Row(Accel(cache=CAKE(budget=None)), Accel(cache=CAKE("5 frames", recent_frames=2, dropped="centroids"))),
    Row(Accel(cache=SinkRecent(recent_frames=None)), Accel(cache=SinkRecent(recent_frames=3))),
    Row(
        Accel(cache=SinkRecent(recent_frames=None, summaries="cell")),
        Accel(cache=SinkRecent(recent_frames=3, summaries="cell")),
    ),
    Row(
        Accel(cache=SinkRecent(recent_frames=None, summaries="frame"), reuse=FlashBlock(refresh=1)),
        Accel(cache=SinkRecent(recent_frames=3, summaries="frame"), reuse=FlashBlock(refresh=2)),
    ),
    Row(Accel(cache=RollingRebased(recent_frames=None)), Accel(cache=RollingRebased(recent_frames=3, sink_frames=2))),
    Row(Accel(cache=SnapKV(budget=None)), Accel(cache=SnapKV("5 frames"))),
    Row(Accel(cache=H2O(budget=None)), Accel(cache=H2O("5 frames", recent_frames=2))),
    Row(Accel(cache=LazyEviction(budget=None)), Accel(cache=LazyEviction("5 frames", recent_frames=2, alpha=0.05))),
    Row(Accel(cache=TaskKV(budget=None)), Accel(cache=TaskKV("5 frames", sink_frames=0, least=0, beta=0.6, top=4))),
    Row(Accel(cache=CAKE(budget=None)), Accel(cache=CAKE("5 frames", dropped="mean", recent_frames=2))),
    Row(
        Accel(cache=SnapKV(budget=None), reuse=FlashBlock(refresh=1)),
        Accel(cache=SnapKV("5 frames", sink_frames=0, dropped="mean"), reuse=FlashBlock(refresh=2)),
    ),
    Row(Accel(cache=RKV(budget=None)), Accel(cache=RKV("5 frames", recent_frames=2, balance=0.5))),
    Row(Accel(reuse=FlowCache(threshold=0.0)), Accel(reuse=FlowCache(0.2, warmup=2))),
    Row(
        Accel(reuse=FlowCache(threshold=0.0), cache=SnapKV(budget=None)),
        Accel(reuse=FlowCache(0.2, warmup=2), cache=SnapKV("5 frames")),
    ),
    Row(Accel(reuse=FlashBlock(refresh=1)), Accel(reuse=FlashBlock(refresh=2))),
    Row(Accel(reuse=FlashBlock(refresh=1)), Accel(reuse=FlashBlock(refresh=(0, 2), clean_pass="reuse"))),
    Row(Accel(selection=AnnSA(density=1.0)), Accel(selection=AnnSA(density=0.3, dense_steps=0, min_past=0))),
    Row(
        Accel(selection=AnnSA(density=1.0), cache=TempCache(threshold=None), reuse=FlashBlock(refresh=1)),
        Accel(
            selection=AnnSA(0.3, groups="hash", dense_steps=0, min_past=0, summaries=False, clean_pass="sparse"),
            cache=TempCache(threshold=0.5),
            reuse=FlashBlock(refresh=2),
        ),
    ),
    Row(
        Accel(selection=AnnSA(density=1.0, groups="prompt"), prompt=PadCollapse()),
        Accel(selection=AnnSA(0.3, groups="prompt", dense_steps=0, min_past=0), prompt=PadCollapse()),
        bits=False,
    ),
    Row(
        Accel(selection=TokenSelect(density=1.0)),
        Accel(selection=TokenSelect(0.3, similarity=0.999, dense_steps=0, min_past=0)),
    ),
    Row(
        Accel(selection=TokenSelect(density=1.0), cache=TempCache(threshold=None)),
        Accel(selection=TokenSelect(0.3, pool="max", dense_steps=0, min_past=0), cache=TempCache(threshold=0.5)),
    ),
    Row(Accel(selection=HiP(density=1.0)), Accel(selection=HiP(0.3, dense_steps=0, min_past=0, clean_pass="sparse"))),
    Row(
        Accel(selection=HyLRA(density=1.0)),
        Accel(selection=HyLRA(0.3, least=0.2, dense_steps=0, min_past=0, profile=profile_of(HyLRA))),
    ),
    Row(
        Accel(selection=HyLRA(density=1.0), reuse=FlashBlock(refresh=1)),
        Accel(
            selection=HyLRA(0.3, least=0.01, refresh="step", dense_steps=0, min_past=0, profile=profile_of(HyLRA)),
            reuse=FlashBlock(refresh=2),
        ),
    ),
    Row(
        Accel(selection=LycheeDecode(density=1.0)),
        Accel(selection=LycheeDecode(0.3, retrieval=0.75, dense_steps=0, min_past=0, profile=profile_of(LycheeDecode))),
    ),
    Row(
        Accel(selection=RetrievalAttention(density=1.0)),
        Accel(selection=RetrievalAttention(0.3, nearest=9, dense_steps=0, min_past=0)),
    ),
    Row(
        Accel(selection=HeadShard(density=1.0)),
        Accel(selection=HeadShard(0.5, recent_frames=1, dense_steps=0, min_past=0)),
    ),
    Row(Accel(selection=Routed(density=1.0)), Accel(selection=Routed(0.3, clusters=5, dense_steps=0, min_past=0))),
    Row(
        Accel(selection=Sticky(density=1.0)),
        Accel(selection=Sticky(0.3, refresh="step", summaries=False, dense_steps=0, min_past=0)),
    ),
    Row(
        Accel(selection=SpAttenCascade(density=1.0)),
        Accel(selection=SpAttenCascade(0.3, drop=0.4, dense_steps=0, min_past=0)),
    ),
    Row(
        Accel(selection=MassRouter(outside=0.0)),
        Accel(selection=MassRouter(outside=0.7, recent_frames=1, sink_frames=1, dense_steps=0, min_past=0)),
    ),
    Row(Accel(window=FrameWindow(frames=None)), Accel(window=FrameWindow(frames=3))),
    Row(Accel(window=InwardWindow(size=None)), Accel(window=InwardWindow((1, 2)))),
    Row(
        Accel(window=InwardWindow(size=None), reuse=FullFieldGuide(every=1)),
        Accel(window=InwardWindow((2, 2), tile=(2, 2), frames=4), reuse=FullFieldGuide(every=2, shrink=2)),
    ),
    Row(
        Accel(window=InwardWindow(size=None), reuse=FlashBlock(refresh=1)),
        Accel(window=InwardWindow((1, 2)), reuse=FlashBlock(refresh=2)),
    ),
    Row(
        Accel(window=NeighborhoodAttention(kernel=None)),
        Accel(window=NeighborhoodAttention((3, 1, 2), (1, 1, 2), causal=(True, False, False))),
    ),
    Row(
        Accel(window=NeighborhoodAttention(kernel=None), reuse=FlashBlock(refresh=1)),
        Accel(window=NeighborhoodAttention((0, 2, 1), (1, 2, 1), (1, 1, 2)), reuse=FlashBlock(refresh=2)),
    ),
    Row(Accel(prompt=PadCollapse()), None, bits=False),
    Row(Accel(prompt=AnnCA(bits=0)), Accel(prompt=AnnCA(bits=12, tables=1)), bits=False),
    Row(
        Accel(
            cache=TempCache(threshold=None),
            reuse=FlashBlock(refresh=1),
            window=FrameWindow(frames=None),
            prompt=PadCollapse(),
        ),
        Accel(
            cache=TempCache(threshold=0.3),
            reuse=FlashBlock(refresh=2),
            window=FrameWindow(frames=4),
            prompt=PadCollapse(),
        ),
        bits=False,
    ),
]
