"""The layouts that the planner weighs are all that are legal, and each is asked for by what is printed."""

import shlex
from itertools import product

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from tests.conftest import cpu_devices
from wanexp.config import MODES, ParallelismConfig, conf_dir
from wanexp.errors import LayoutError
from wanexp.parallel.layout import AXES_OF_MODE, REFUSED_PRODUCTS, REPLICA_MODES, Layout, resolve_layout
from wanexp.planning.layouts import (
    BUYS,
    PRESETS,
    layout_name,
    layout_of,
    layout_settings,
    layouts,
    mode_of,
)


def is_legal(mode: str, layout: Layout, num_gpus: int) -> bool:
    try:
        return resolve_layout(ParallelismConfig(mode=mode, **layout.degrees()), num_gpus) == layout
    except LayoutError:
        return False


@pytest.mark.parametrize("num_gpus", [2, 3, 4, 6, 8])
def test_every_legal_product_is_weighed_once(num_gpus):
    """By brute force: what `hybrid` lets through, weights whole or sharded over all ranks, and plain replicas."""
    weighed = [
        layout_of(parallelism)
        for parallelism, devices in layouts(cpu_devices(num_gpus))
        if len(devices) == num_gpus and parallelism.block_placement != "interleaved"
    ]
    degrees = [degree for degree in range(1, num_gpus + 1) if num_gpus % degree == 0]
    legal = {
        layout
        for dp, cfg, ring, ulysses, tp, blocks in product(degrees, repeat=6)
        for shard in (1, num_gpus // blocks)
        if dp * cfg * ring * ulysses * tp * blocks == num_gpus
        if is_legal("hybrid", layout := Layout(dp, cfg, ring, ulysses, tp, shard, blocks), num_gpus)
    }
    replicas = Layout(dp=num_gpus)
    assert set(weighed) == legal
    assert sorted(weighed.count(layout) for layout in legal) == [1] * (len(legal) - 1) + [len(REPLICA_MODES)]
    assert weighed.count(replicas) == len(REPLICA_MODES)


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 5, 6, 8])
def test_every_layout_resolves_to_itself_on_its_devices(num_gpus):
    names = []
    for parallelism, devices in layouts(cpu_devices(num_gpus)):
        layout = resolve_layout(parallelism, len(devices))
        assert layout == layout_of(parallelism) and layout.num_devices == len(devices)
        assert parallelism.mode == mode_of(layout) or parallelism.mode == "distributed"
        names.append(layout_name(parallelism, len(devices)))
    assert len(set(names)) == len(names), "names tell layouts apart"


def test_those_with_most_memory_come_first():
    chosen = {
        tuple(device.index for device in devices)
        for _, devices in layouts(cpu_devices(5, (10, 50, 20, 40, 30)))
    }
    assert chosen == {(1,), (1, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4)}


@pytest.fixture(scope="module")
def ask():
    """Composes the group `parallelism` by what a person writes on the command line."""
    node = {
        "defaults": ["_self_", {"parallelism": "none"}],
        "parallelism": ParallelismConfig,
        "gpus": None,
    }
    ConfigStore.instance().store(name="only_parallelism", node=node)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield lambda words: compose("only_parallelism", overrides=shlex.split(words))


@pytest.mark.parametrize(("num_gpus", "stride"), [(2, 1), (4, 1), (6, 4), (8, 4)])
def test_what_is_printed_asks_for_the_layout(ask, num_gpus, stride):
    weighed = list(layouts(cpu_devices(num_gpus, tuple(range(num_gpus, 0, -1)))))
    for parallelism, devices in weighed[::stride]:
        words = layout_settings(parallelism, devices)
        asked = ask(words)
        assert asked.gpus == [device.index for device in devices], words
        found = ParallelismConfig(**asked.parallelism)
        assert resolve_layout(found, len(devices)) == layout_of(parallelism), words
        assert (found.mode, found.block_placement) == (parallelism.mode, parallelism.block_placement), words


def test_settings_of_blocks_are_printed(ask):
    parallelism = ParallelismConfig(
        mode="block_distribution", blocks=2, block_placement="interleaved", block_chunks=10
    )
    asked = ask(layout_settings(parallelism, cpu_devices(2))).parallelism
    assert (asked.block_placement, asked.block_chunks, asked.block_split) == ("interleaved", 10, None)
    parallelism = ParallelismConfig(mode="block_distribution", blocks=2, block_split=[24, 16])
    asked = ask(layout_settings(parallelism, cpu_devices(2))).parallelism
    assert asked.block_split == [24, 16]


def test_presets_are_those_of_the_files():
    """A mode has a file, a preset and a word for what it buys."""
    for mode in MODES:
        written = yaml.safe_load((conf_dir() / "parallelism" / f"{mode}.yaml").read_text())
        assert written.pop("mode") == mode
        degrees = {name: written.get(name, 1) for name in Layout().degrees()}
        assert PRESETS.get(mode, Layout()) == Layout(**degrees)
        assert set(written) & set(degrees) <= set(AXES_OF_MODE[mode])
    assert set(BUYS) == set(AXES_OF_MODE) == set(MODES) and set(PRESETS) == set(MODES) - {"none"}


@pytest.mark.parametrize(("first", "second", "reason"), REFUSED_PRODUCTS)
def test_a_refused_product_says_why(first, second, reason):
    degrees = {first: 2, second: 2} | ({"dp": 2} if "shard" in (first, second) else {})
    layout = Layout(**degrees)
    with pytest.raises(LayoutError) as caught:
        resolve_layout(ParallelismConfig(mode="hybrid", **degrees), layout.num_devices)
    assert str(caught.value) == f"{first}=2 with {second}=2 is refused: {reason}"
    assert all(layout not in (layout_of(p) for p, _ in layouts(cpu_devices(n))) for n in (4, 8))


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        (Layout(), "none"),
        (Layout(dp=2), "data_parallel"),
        (Layout(cfg=2), "cfg_parallel"),
        (Layout(ring=2), "context_parallel"),
        (Layout(ring=2, ulysses=3), "context_parallel"),
        (Layout(tp=2), "tensor_parallel"),
        (Layout(dp=4, shard=2), "fsdp"),
        (Layout(cfg=2, shard=2), "hybrid"),
        (Layout(dp=2, cfg=2, blocks=2), "block_distribution"),
        (Layout(dp=2, cfg=2), "hybrid"),
    ],
)
def test_modes_by_their_degrees(layout, mode):
    assert mode_of(layout) == mode
    assert is_legal(mode, layout, layout.num_devices)
