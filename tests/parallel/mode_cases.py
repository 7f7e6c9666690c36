"""The runs of `test_modes_exact.py`: layouts by number of ranks, each on a small model of one kind."""

import dataclasses
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.conftest import compose_run
from wanexp.config import ModelConfig, ParallelismConfig, RunConfig, VideoConfig
from wanexp.parallel.layout import REFUSED_PRODUCTS, Layout
from wanexp.planning.layouts import mode_of

STEPS = 3

SMALL = ("model.architecture.text_len=11", "model.architecture.text_dim=20", "model.architecture.freq_dim=16")
KINDS = {
    "t2v": (),
    "i2v": (
        "model.architecture.in_channels=36",
        "model.architecture.clip_tokens=257",
        "model.architecture.clip_dim=12",
    ),
    "ti2v": (
        "model.per_token_timestep=true",
        "model.architecture.in_channels=48",
        "model.architecture.out_channels=48",
    ),
    # of the three steps (shift 5: timesteps 1000, 909, 714) the last is the second expert's
    "experts": ("model.num_experts=2", "model.expert_boundary=0.9", "model.guidance_scale=[4,3]"),
}


@dataclass(frozen=True)
class Case:
    """One run. grid: video tokens along time, height and width. batch: None for one sample a replica."""

    layout: Layout
    mode: str = ""  # empty: the one that has these degrees
    kind: str = "t2v"
    heads: int = 4
    head_dim: int = 8
    grid: tuple[int, int, int] = (3, 5, 3)
    batch: int | None = None
    placement: str = "contiguous"
    pipeline: bool = True
    train: bool = False
    on_gpus: bool = False  # in bf16, with what kernels there are; else fp32 on logical devices

    @property
    def config(self) -> RunConfig:
        config = composed(self.kind, self.train, self.on_gpus)
        architecture = dataclasses.replace(
            config.model.architecture,
            dim=self.heads * self.head_dim,
            num_heads=self.heads,
            ffn_dim=2 * self.heads * self.head_dim + 3,
        )
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, architecture=architecture),
            video=video_of(config.model, self.grid),
            parallelism=ParallelismConfig(
                mode=self.mode or mode_of(self.layout),
                block_placement=self.placement if self.layout.blocks > 1 else "contiguous",
                pipeline=self.pipeline,
                **self.layout.degrees(),
            ),
            workload=dataclasses.replace(config.workload, batch_size=self.batch),
        )


@cache
def composed(kind: str, train: bool, on_gpus: bool) -> RunConfig:
    workload = ("workload=train", "workload.learning_rate=1e-3") if train else ()
    return compose_run(
        *SMALL,
        *KINDS[kind],
        *workload,
        *(("hardware=auto", "precision=bf16") if on_gpus else ()),
        "model.architecture.num_layers=3",
        f"workload.num_steps={2 if train else STEPS}",
        "workload.num_warmup_steps=0",
        "verify=always",
    )


def video_of(model: ModelConfig, grid: tuple[int, int, int]) -> VideoConfig:
    frames, rows, columns = grid
    stride = model.vae_stride
    return VideoConfig(
        name="small",
        num_frames=(frames - 1) * stride[0] + 1,
        height=rows * 2 * stride[1],
        width=columns * 2 * stride[2],
    )


def random_cases(ranks: int, number: int, seed: int) -> dict[str, Case]:
    """Legal products of degrees over this many ranks, of one to three devices each, on models that suit them."""
    choose = random.Random(seed)
    cases = {}
    products = legal_products(ranks)
    for index in range(number):
        layout = choose.choice(products)
        cases[f"random {index}"] = Case(
            layout,
            kind=choose.choice(list(KINDS)),
            heads=choose.randint(layout.tp * layout.ulysses, layout.tp * layout.ulysses + 4),
            head_dim=choose.choice([6, 8, 10]),
            grid=(choose.randint(1, 3), choose.randint(2, 5), choose.randint(4, 5)),
            batch=layout.dp + choose.randint(0, 2),
            placement=choose.choice(["contiguous", "interleaved", "memory"]),
            pipeline=choose.random() < 0.7,
        )
    return cases


def legal_products(ranks: int) -> list[Layout]:
    """Every vector of degrees that has this many ranks and that the table lets through."""
    divisors = [degree for degree in range(1, ranks + 1) if ranks % degree == 0]
    found = []
    for cfg in (1, 2):
        for ring in divisors:
            for ulysses in divisors:
                for tp in divisors:
                    if ranks % (cfg * ring * ulysses * tp):
                        continue
                    dp = ranks // (cfg * ring * ulysses * tp)
                    for shard in divisors:
                        for blocks in (1, 2, 3):
                            found.append(Layout(dp, cfg, ring, ulysses, tp, shard, blocks))
    return [
        layout
        for layout in found
        if not any(getattr(layout, a) > 1 and getattr(layout, b) > 1 for a, b, _ in REFUSED_PRODUCTS)
    ]


CASES: dict[int, dict[str, Case]] = {
    1: {
        "none": Case(Layout(), mode="none", batch=3),
        "block_distribution, 2 devices": Case(Layout(blocks=2)),
        "block_distribution, 3 devices, i2v, batch 3": Case(Layout(blocks=3), kind="i2v", batch=3),
        "block_distribution, interleaved, ti2v, batch 3": Case(
            Layout(blocks=2), kind="ti2v", batch=3, placement="interleaved"
        ),
        "block_distribution, one after another, batch 3": Case(Layout(blocks=2), batch=3, pipeline=False),
        "block_distribution, experts": Case(Layout(blocks=2), kind="experts", placement="interleaved"),
        "block_distribution, train": Case(Layout(blocks=2), batch=2, train=True),
    },
    2: {
        "data_parallel, batch 3": Case(Layout(dp=2), batch=3),
        "distributed": Case(Layout(dp=2), mode="distributed"),
        "distributed, train": Case(Layout(dp=2), mode="distributed", batch=4, train=True),
        "cfg_parallel": Case(Layout(cfg=2)),
        "cfg_parallel, i2v, batch 3": Case(Layout(cfg=2), kind="i2v", batch=3),
        "cfg_parallel, experts": Case(Layout(cfg=2), kind="experts"),
        "ulysses, 5 heads, i2v": Case(Layout(ulysses=2), kind="i2v", heads=5),
        "ring, ti2v, batch 3": Case(Layout(ring=2), kind="ti2v", batch=3),
        "tensor_parallel, 5 heads, i2v, batch 3": Case(Layout(tp=2), kind="i2v", heads=5, batch=3),
        "fsdp, batch 3": Case(Layout(dp=2, shard=2), batch=3),
        "fsdp, train": Case(Layout(dp=2, shard=2), batch=4, train=True),
        "fsdp, i2v, train": Case(Layout(dp=2, shard=2), kind="i2v", train=True),
        "cfg x blocks": Case(Layout(cfg=2, blocks=2), placement="interleaved"),
        "cfg x shard, experts": Case(Layout(cfg=2, shard=2), kind="experts"),
        **random_cases(2, 4, seed=2),
    },
    4: {
        "data_parallel, batch 5": Case(Layout(dp=4), batch=5),
        "distributed": Case(Layout(dp=4), mode="distributed"),
        "distributed, train": Case(Layout(dp=4), mode="distributed", train=True),
        "dp x blocks": Case(Layout(dp=4, blocks=2), batch=5),
        "dp x cfg x blocks": Case(Layout(dp=2, cfg=2, blocks=2), batch=3, placement="interleaved"),
        "dp x cfg": Case(Layout(dp=2, cfg=2), batch=3),
        "cfg x ulysses": Case(Layout(cfg=2, ulysses=2), heads=5),
        "ulysses, 5 heads, ti2v": Case(Layout(ulysses=4), kind="ti2v", heads=5),
        "ring, i2v, batch 3": Case(Layout(ring=4), kind="i2v", batch=3),
        "ring x ulysses, 3 heads": Case(Layout(ring=2, ulysses=2), heads=3),
        "tensor_parallel, 5 heads": Case(Layout(tp=4), heads=5),
        "tensor_parallel, ti2v, batch 3": Case(Layout(tp=4), kind="ti2v", batch=3),
        "fsdp, i2v": Case(Layout(dp=4, shard=4), kind="i2v"),
        "fsdp, ti2v, two groups of shards": Case(Layout(dp=4, shard=2), kind="ti2v"),
        "fsdp, train": Case(Layout(dp=4, shard=4), train=True),
        "HSDP, train": Case(Layout(dp=4, shard=2), train=True),
        "ulysses x shard, experts": Case(Layout(dp=2, ulysses=2, shard=4), kind="experts"),
        **random_cases(4, 5, seed=4),
    },
    8: {
        "cfg x ring x ulysses": Case(Layout(cfg=2, ring=2, ulysses=2)),
        "cfg x ring x ulysses, i2v": Case(Layout(cfg=2, ring=2, ulysses=2), kind="i2v", heads=3),
        "cfg x tp, 5 heads, ti2v": Case(Layout(cfg=2, tp=4), kind="ti2v", heads=5),
        "dp x cfg x ulysses, batch 3": Case(Layout(dp=2, cfg=2, ulysses=2), batch=3),
        "ulysses x tp, 9 heads": Case(Layout(ulysses=4, tp=2), heads=9),
        "dp x cfg x ring x shard": Case(Layout(dp=2, cfg=2, ring=2, shard=8)),
        "dp x cfg x shard of 2": Case(Layout(dp=4, cfg=2, shard=2), batch=5),
        "ulysses, 12 heads": Case(Layout(ulysses=8), heads=12),
        "tensor_parallel, 12 heads": Case(Layout(tp=8), heads=12),
        "ring x ulysses, 45 tokens, batch 3": Case(Layout(ring=2, ulysses=4), heads=5, batch=3),
        "ring x tp, experts": Case(Layout(cfg=2, ring=2, tp=2), kind="experts"),
        "dp x ring x tp": Case(Layout(dp=2, ring=2, tp=2), batch=3),
        **random_cases(8, 6, seed=8),
    },
}


def on_gpus(layout: Layout, kind: str = "t2v", **settings: Any) -> Case:
    """With heads that GPU kernels take."""
    return Case(layout, kind=kind, head_dim=64, on_gpus=True, **settings)


GPU_CASES: dict[int, dict[str, Case]] = {
    1: {
        "blocks, i2v": on_gpus(Layout(blocks=2), "i2v", batch=2, placement="interleaved"),
        "blocks, ti2v": on_gpus(Layout(blocks=2), "ti2v", placement="interleaved"),
    },
    2: {
        "data_parallel, i2v, batch 3": on_gpus(Layout(dp=2), "i2v", batch=3),
        "cfg_parallel, ti2v, batch 3": on_gpus(Layout(cfg=2), "ti2v", batch=3),
        "cfg_parallel, experts": on_gpus(Layout(cfg=2), "experts"),
        "ulysses, i2v, 5 heads": on_gpus(Layout(ulysses=2), "i2v", heads=5),
        "ulysses, experts, batch 3": on_gpus(Layout(ulysses=2), "experts", batch=3),
        "ring, i2v": on_gpus(Layout(ring=2), "i2v"),
        "ring, ti2v, batch 3": on_gpus(Layout(ring=2), "ti2v", batch=3),
        "tensor_parallel, i2v, 5 heads": on_gpus(Layout(tp=2), "i2v", heads=5),
        "tensor_parallel, ti2v, batch 3": on_gpus(Layout(tp=2), "ti2v", batch=3),
        "fsdp, i2v, batch 3": on_gpus(Layout(dp=2, shard=2), "i2v", batch=3),
        "fsdp, ti2v": on_gpus(Layout(dp=2, shard=2), "ti2v"),
        "cfg x shard, experts": on_gpus(Layout(cfg=2, shard=2), "experts"),
        "fsdp, train": on_gpus(Layout(dp=2, shard=2), train=True),
    },
    4: {
        "cfg x ulysses, 5 heads": on_gpus(Layout(cfg=2, ulysses=2), heads=5),
        "ulysses, ti2v, 5 heads": on_gpus(Layout(ulysses=4), "ti2v", heads=5),
        "ring, i2v, batch 3": on_gpus(Layout(ring=4), "i2v", batch=3),
        "ring x ulysses, i2v, 3 heads": on_gpus(Layout(ring=2, ulysses=2), "i2v", heads=3),
        "cfg x ring, ti2v": on_gpus(Layout(cfg=2, ring=2), "ti2v"),
        "cfg x tp": on_gpus(Layout(cfg=2, tp=2)),
        "ulysses x tp": on_gpus(Layout(ulysses=2, tp=2)),
        "tensor_parallel, i2v, 5 heads": on_gpus(Layout(tp=4), "i2v", heads=5),
        "fsdp, ti2v": on_gpus(Layout(dp=4, shard=4), "ti2v"),
        "fsdp, two groups of shards": on_gpus(Layout(dp=4, shard=2)),
        "cfg x ulysses x shard": on_gpus(Layout(cfg=2, ulysses=2, shard=2)),
        "ulysses x shard, experts": on_gpus(Layout(dp=2, ulysses=2, shard=4), "experts"),
        "HSDP, train": on_gpus(Layout(dp=4, shard=2), train=True),
    },
}
