"""The pages of docs/modes say what the code does: their commands compose, their numbers are those of the formulas."""

import re
import shlex
from math import prod
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.conftest import cpu_devices
from wanexp.config import AUTO_MODE, MODES, RunConfig, conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.parallel.layout import REFUSED_PRODUCTS, Layout
from wanexp.parallel.pipeline import best_chunks, pipeline_time, place_chunks, stages_of
from wanexp.parallel.shares import part_of_rank
from wanexp.parallel.traffic import context_parallel_bytes, fsdp_bytes, ring_factor, tensor_parallel_bytes
from wanexp.planning.layouts import layouts
from wanexp.planning.plan import make_plan
from wanexp.wan.architecture import WanArchitecture
from wanexp.workloads.samples import sample_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "modes"
GIB = 2**30


def text_of(mode: str) -> str:
    """A page, its lines joined and runs of spaces made one."""
    return re.sub(r"\s+", " ", (PAGES / f"{mode}.md").read_text())


def composed(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(compose("config", overrides=list(overrides)))


COMMANDS = sorted(
    {
        line.strip().split("#")[0].strip()
        for page in [*PAGES.glob("*.md"), ROOT / "README.md"]
        for line in page.read_text().splitlines()
        if line.startswith("    python -m wanexp ") and "parallelism=" in line and " -m parall" not in line
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_legal(command):
    words = [word for word in shlex.split(command)[3:] if not word.startswith("checkpoint=")]
    config = composed(*words)
    if config.parallelism.mode != AUTO_MODE:
        assert config.gpus is not None, "a page shows the GPUs"
        assert make_plan(config, cpu_devices(len(config.gpus))).layout.num_devices == len(config.gpus)


def test_every_mode_has_a_page():
    assert {page.stem for page in PAGES.glob("*.md")} == {*MODES, AUTO_MODE}
    for mode in (*MODES, AUTO_MODE):
        page = (PAGES / f"{mode}.md").read_text()
        assert page.startswith(f"# {mode}\n")
        for heading in ("## Data flow", "## What it buys", "## When not to use it"):
            assert page.count(heading) == 1, (mode, heading)
        assert "moved" in page.lower() and re.search("split|sharded", page) and "python -m wanexp" in page


def test_links_lead_somewhere():
    for page in [*PAGES.glob("*.md"), ROOT / "docs" / "architecture.md", ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
        for target in re.findall(r"`(wanexp/[\w/]+\.py|tests/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / target).exists(), (page.name, target)


def test_the_table_of_refused_products():
    rows = [f"| {first} x {second} | {reason} |" for first, second, reason in REFUSED_PRODUCTS]
    _, table = (PAGES / "hybrid.md").read_text().split("| product | why |\n| --- | --- |\n")
    assert table.split("\n\n")[0].splitlines() == rows


# --- worked numbers: 14B at 832x480x81 in bf16, 2 GPUs unless said ---

TOKENS, DIM, LAYERS = 32_760, 5120, 40
ARCHITECTURE = WanArchitecture(dim=DIM, ffn_dim=13824, num_heads=40, num_layers=LAYERS)
HIDDEN = TOKENS * DIM * 2


def sent_by_context(ulysses: int, ring: int) -> str:
    return f"{context_parallel_bytes(TOKENS, DIM, LAYERS, ulysses, ring, 2) / 1e9:.2f}"


def held(layout: Layout, rank: int = 0) -> float:
    """GiB of bf16 weights."""
    parts = (
        part_of_rank(layout, ARCHITECTURE, rank, name, shape).shape_in(shape)
        for name, shape in ARCHITECTURE.tensor_shapes()
    )
    return 2 * sum(map(prod, parts)) / GIB


def test_the_model_of_the_numbers():
    config = composed("model=wan2.1_t2v_14b", "video=480p")
    assert config.model.architecture == ARCHITECTURE
    assert f"{ARCHITECTURE.num_parameters() / 1e9:.3f}" == "14.288" and f"{held(Layout()):.2f}" == "26.61"


def test_data_parallel():
    shapes = sample_shapes(*(lambda c: (c.model, c.video))(composed("model=wan2.1_t2v_14b", "video=480p")))
    num_bytes = {name: 4 * prod(shape) for name, shape in shapes.items()}
    page = text_of("data_parallel")
    assert (
        f"{num_bytes['noise'] / 1e6:.1f} MB of noise and 2 * {num_bytes['text'] / 1e6:.1f} MB of text" in page
    )
    assert f"so {sum(num_bytes.values()) / 1e6:.1f} MB go" in page
    assert set(num_bytes) == {"noise", "text", "negative_text"}


def test_distributed():
    page, parameters = text_of("distributed"), ARCHITECTURE.num_parameters()
    assert f"{ring_factor(2) * 4 * parameters / 1e9:.1f} GB a step" in page
    assert f"{16 * parameters / GIB:.0f} GiB for 14B" in page


def test_cfg_parallel():
    num_bytes = 16 * 21 * 60 * 104 * 4
    assert f"16 * 21 * 60 * 104 * 4 = {num_bytes / 1e6:.2f} MB a step" in text_of("cfg_parallel")


def test_context_parallel():
    page = text_of("context_parallel")
    assert f"40 * 335 MB + 4 MB = {sent_by_context(2, 1)} GB" in page
    table = {
        "Ulysses": [sent_by_context(ranks, 1) for ranks in (2, 4, 8)],
        "ring": [sent_by_context(1, ranks) for ranks in (2, 4, 8)],
        "U=2 inside, ring across": ["-", sent_by_context(2, 2), sent_by_context(2, 4)],
    }
    for name, numbers in table.items():
        assert f"| {name} | {' | '.join(numbers)} |" in page


def test_tensor_parallel():
    page = text_of("tensor_parallel")
    sent = tensor_parallel_bytes(ARCHITECTURE, batch=1, tokens=TOKENS, element_size=2, degree=2)
    assert f"40 * (3 * {HIDDEN / 1e6:.1f} MB + 0.4 MB) = {sent / 1e9:.1f} GB" in page
    assert f"({held(Layout(tp=2)):.2f} GiB in place of {held(Layout()):.2f})" in page
    assert round(sent / float(sent_by_context(2, 1)) / 1e9) == 3 and "three times what Ulysses sends" in page


def test_fsdp():
    page, parameters = text_of("fsdp"), ARCHITECTURE.num_parameters()
    forward = fsdp_bytes(parameters, element_size=2, shards=2, training=False)
    block = fsdp_bytes(ARCHITECTURE.num_block_parameters(), element_size=2, shards=2, training=False)
    training = fsdp_bytes(parameters, element_size=4, shards=2, training=True)
    hsdp = fsdp_bytes(parameters, element_size=4, shards=2, replicas=2, training=True)
    assert f"{forward / 1e9:.1f} GB a forward, {block / 1e9:.2f} GB of it a block" in page
    copied = ARCHITECTURE.num_layers * block
    assert f"(copies: {copied / 1e9:.1f} GB)" in page
    assert f"(e = 4): {training / 1e9:.1f} GB a step" in page and f"on 4 GPUs: {hsdp / 1e9:.1f} GB" in page
    assert f"{held(Layout(dp=2, shard=2)):.1f} GiB of shards" in page


def test_hybrid():
    """Axes divide each other's share: heads and tokens of Ulysses under ring, a step's forwards under cfg."""
    page = text_of("hybrid")
    assert f"a rank sends {sent_by_context(2, 2)[:5]} GB in its one forward" in page
    assert f"on cfg=2 x ulysses=4 {sent_by_context(4, 1)} GB" in page


def test_block_distribution():
    page = text_of("block_distribution")
    assert f"A seam is {HIDDEN / 1e6:.0f} MB: {HIDDEN / 394e6:.2f} ms over NVLink (394 GB/s)" in page
    assert f"{HIDDEN / 25e6:.1f} ms over PCIe 4.0 x16 at 25 GB/s" in page
    flow, modulation, time_vector = TOKENS * 64 * 4, 6 * DIM * 4, DIM * 4
    for placement, chunks in (
        ("contiguous", 2),
        ("interleaved, 10 chunks", 10),
        ("interleaved, 40 chunks", 40),
    ):
        num_bytes = (chunks - 1) * HIDDEN + modulation + time_vector + flow
        digits = 1 if num_bytes > 10e9 else 2
        assert f"| {placement} | {chunks} | {chunks - 1} | {num_bytes / 1e9:.{digits}f} GB |" in page
    once = 2 * 512 * DIM * 2 + TOKENS * 128 * 4  # two prompts, cos and sin
    assert f"Once a video, under guidance: {once / 1e6:.0f} MB" in page


@pytest.mark.parametrize(("seam_s", "chunks", "speedup"), [(0.00085, 40, 1.92), (0.0134, 14, 1.73)])
def test_schedules_of_block_distribution(seam_s, chunks, speedup):
    assert best_chunks(LAYERS, 2, 2.3, seam_s, 2) == chunks
    stages = stages_of(place_chunks(LAYERS, 2, chunks), LAYERS)
    stage_s = [2.3 * (stage.stop - stage.start) / LAYERS for stage in stages]
    time_s = pipeline_time(stage_s, [stage.position for stage in stages], 2, seam_s)
    assert round(2 * 2.3 / time_s, 2) == speedup
    assert f"{chunks} chunks, {speedup}x" in text_of("block_distribution")


def test_auto():
    number = len(list(layouts(cpu_devices(8))))
    assert f"{number} layouts on 8 GPUs" in text_of("auto")
