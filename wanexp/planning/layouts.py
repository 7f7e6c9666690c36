"""The layouts that a planner weighs on given devices, and how each is named and asked for. Pure."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product

from wanexp.config import ParallelismConfig
from wanexp.hardware.devices import Device
from wanexp.parallel.layout import REFUSED_PRODUCTS, REPLICA_MODES, Layout

BUYS = {
    "none": "the baseline",
    "data_parallel": "throughput",
    "distributed": "throughput, training",
    "block_distribution": "memory, latency",
    "cfg_parallel": "latency",
    "context_parallel": "latency",
    "tensor_parallel": "latency, memory",
    "fsdp": "memory, throughput",
    "hybrid": "latency",
}
PRESETS = {
    "data_parallel": Layout(dp=-1),
    "distributed": Layout(dp=-1),
    "block_distribution": Layout(blocks=-1),
    "cfg_parallel": Layout(cfg=2),
    "context_parallel": Layout(ulysses=-1),
    "tensor_parallel": Layout(tp=-1),
    "fsdp": Layout(dp=-1, shard=-1),
    "hybrid": Layout(cfg=2, ulysses=-1),
}
"""The degrees that `conf/parallelism/` gives each mode; a test holds the two together."""


def layouts(devices: Sequence[Device]) -> Iterator[tuple[ParallelismConfig, tuple[Device, ...]]]:
    """Every mode, then every other product of degrees, on 1, 2, 4, ... and all devices: those with most memory."""
    by_memory = sorted(devices, key=lambda device: -device.free_bytes)
    yield ParallelismConfig(mode="none"), tuple(by_memory[:1])
    counts = sorted({len(devices), *(2**power for power in range(1, 8) if 2**power <= len(devices))} - {1})
    chosen = {count: tuple(sorted(by_memory[:count], key=lambda device: device.index)) for count in counts}
    for mode in REPLICA_MODES:
        for count in counts:
            yield ParallelismConfig(mode=mode, dp=count), chosen[count]
    vectors = [(count, layout) for count in counts for layout in _products(count)]
    vectors.sort(key=lambda pair: list(BUYS).index(mode_of(pair[1])))
    for count, layout in vectors:
        if layout.blocks == 1:
            yield _parallelism(layout), chosen[count]
            continue
        for placement in ("contiguous", "interleaved"):
            yield _parallelism(layout, placement), chosen[count]


def _products(num_gpus: int) -> Iterator[Layout]:
    """Every vector of degrees with this product that no rule refuses, but for plain replicas.

    Weights whole or in shards over all ranks: copies of fewer shards (HSDP) are for who asks for them.
    """
    divisors = [degree for degree in range(1, num_gpus + 1) if num_gpus % degree == 0]
    for dp, cfg, ring, ulysses, tp, blocks in product(
        divisors, (1, 2), divisors, divisors, divisors, divisors
    ):
        if dp * cfg * ring * ulysses * tp * blocks != num_gpus:
            continue
        ranks = num_gpus // blocks
        for shard in {1, ranks}:
            layout = Layout(dp=dp, cfg=cfg, ring=ring, ulysses=ulysses, tp=tp, shard=shard, blocks=blocks)
            refused = any(getattr(layout, a) > 1 and getattr(layout, b) > 1 for a, b, _ in REFUSED_PRODUCTS)
            if not refused and layout != Layout(dp=num_gpus):
                yield layout


def mode_of(layout: Layout) -> str:
    """The mode by name that has these degrees, else `hybrid`."""
    axes = {name for name, degree in layout.degrees().items() if degree > 1}
    if not axes:
        return "none"
    if "blocks" in axes and axes <= {"blocks", "dp", "cfg"}:
        return "block_distribution"
    if axes == {"dp", "shard"}:
        return "fsdp"
    if axes <= {"ring", "ulysses"}:
        return "context_parallel"
    return {"dp": "data_parallel", "cfg": "cfg_parallel", "tp": "tensor_parallel"}.get(
        "+".join(axes), "hybrid"
    )


def _parallelism(layout: Layout, placement: str = "contiguous") -> ParallelismConfig:
    return with_degrees(ParallelismConfig(mode=mode_of(layout), block_placement=placement), layout)


def with_degrees(parallelism: ParallelismConfig, layout: Layout) -> ParallelismConfig:
    """`parallelism` with the degrees of `layout`, which has no -1."""
    return dataclasses.replace(parallelism, **layout.degrees())  # type: ignore[arg-type]


def layout_of(parallelism: ParallelismConfig) -> Layout:
    """The degrees as they are written, -1 and all."""
    return Layout(**{name: getattr(parallelism, name) for name in Layout().degrees()})


def layout_name(parallelism: ParallelismConfig, num_gpus: int) -> str:
    """Such as `block_distribution x 4, interleaved` or `hybrid x 4, cfg=2 x ulysses=2`."""
    mode, words = parallelism.mode, []
    axes = {name: degree for name, degree in layout_of(parallelism).degrees().items() if degree > 1}
    is_plain = (len(axes) == 1 and mode != "context_parallel") or (
        mode == "fsdp" and parallelism.shard == num_gpus
    )
    if axes and not is_plain:
        words.append(" x ".join(f"{name}={degree}" for name, degree in axes.items()))
    if parallelism.block_split:
        words.append("+".join(str(share) for share in parallelism.block_split))
    elif parallelism.block_placement != "contiguous":
        chunks = f" {parallelism.block_chunks}" if parallelism.block_chunks else ""
        words.append(parallelism.block_placement + chunks)
    if not parallelism.pipeline and parallelism.blocks != 1:
        words.append("not pipelined")
    return ", ".join([f"{mode} x {num_gpus}" if num_gpus > 1 else mode, *words])


def layout_settings(parallelism: ParallelismConfig, devices: Sequence[Device]) -> str:
    """The overrides that ask for it: what differs from the mode's preset."""
    words = [f"parallelism={parallelism.mode}"]
    preset = PRESETS.get(parallelism.mode, Layout()).degrees()
    written = layout_of(parallelism).degrees()
    left = {name for name, degree in preset.items() if degree == -1}
    alone = all(written[name] in (1, preset[name]) for name in written if name not in left)
    for name, degree in written.items():
        is_all = name in left and alone and degree in (-1, len(devices))
        if degree != preset[name] and not is_all:
            words.append(f"parallelism.{name}={degree}")
    if parallelism.block_placement != "contiguous":
        words.append(f"parallelism.block_placement={parallelism.block_placement}")
    if parallelism.block_chunks:
        words.append(f"parallelism.block_chunks={parallelism.block_chunks}")
    if not parallelism.pipeline:
        words.append("parallelism.pipeline=false")
    if split := parallelism.block_split:
        words.append(f"'parallelism.block_split=[{','.join(str(share) for share in split)}]'")
    words.append(f"'gpus=[{','.join(str(device.index) for device in devices)}]'")
    return " ".join(words)
