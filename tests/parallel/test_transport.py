"""What carries exchanges is decided without a device; peer memory itself needs two GPUs."""

import dataclasses

import pytest
import torch

from tests.planning.test_planner import composed
from wanexp.config import conf_dir
from wanexp.errors import LayoutError
from wanexp.hardware.devices import Device
from wanexp.hardware.profiles import profile_for
from wanexp.parallel.layout import Layout
from wanexp.parallel.transport import choose_transport
from wanexp.plan_task import devices_to_plan
from wanexp.planning.memory import predict_memory
from wanexp.planning.plan import make_plan
from wanexp.planning.planner import plan_layouts
from wanexp.planning.time import BUSY_LINKS_FACTOR, predict_time


def gpus(count: int, *, apart: bool = False) -> list[Device]:
    device = devices_to_plan(composed("model=tiny", "hardware=2x_h200"))[0]
    indices = range(count)
    return [
        dataclasses.replace(
            device, index=index, peers=() if apart else tuple(i for i in indices if i != index)
        )
        for index in indices
    ]


def on_machines(count: int) -> list[Device]:
    """GPUs of one machine each."""
    return [dataclasses.replace(device, node="abcd"[device.index]) for device in gpus(count)]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(ulysses=2), "copies"),
        (Layout(cfg=2, ulysses=2), "copies"),
        (Layout(dp=2, shard=2), "copies"),
        (Layout(ring=2), "collectives"),
        (Layout(tp=2), "collectives"),
        (Layout(), "collectives"),
    ],
)
def test_auto(layout, expected):
    assert choose_transport("auto", layout, gpus(layout.num_devices), training=False) == expected


@pytest.mark.parametrize(
    ("layout", "devices", "training", "words"),
    [
        (Layout(ring=2), gpus(2), False, "neither ulysses nor shard"),
        (Layout(dp=2, shard=2), gpus(2), True, "serve inference, found workload=train"),
        (Layout(ulysses=2), gpus(2, apart=True), False, "gpu0 cannot reach the memory of gpu1 (P2P)"),
        (Layout(dp=2, shard=2), on_machines(2), False, "gpu0.a and gpu1.b are apart"),
    ],
)
def test_where_copies_cannot_be_had(layout, devices, training, words):
    assert choose_transport("auto", layout, devices, training=training) == "collectives"
    with pytest.raises(LayoutError) as caught:
        choose_transport("copies", layout, devices, training=training)
    assert words in str(caught.value)
    assert "write transport=auto or collectives" in str(caught.value)


def test_groups_apart_from_each_other_are_enough():
    """Two Ulysses groups on two pairs of GPUs that only reach each other inside the pair."""
    devices = [dataclasses.replace(device, peers=(device.index ^ 1,)) for device in gpus(4)]
    assert choose_transport("auto", Layout(cfg=2, ulysses=2), devices, training=False) == "copies"
    assert choose_transport("auto", Layout(ulysses=4), devices, training=False) == "collectives"


def test_logical_devices_have_the_process_group():
    config = composed("model=tiny", "parallelism=context_parallel", "hardware=cpu", "gpus=[0,1]")
    assert make_plan(config, devices_to_plan(config)[:2]).transport == "collectives"


def test_the_places_of_copies_are_planned():
    """v, k, q and o of 14B at 480p: half of the tokens each, 160 MiB."""
    needed = {}
    for transport in ("copies", "collectives"):
        config = composed(
            "model=wan2.1_t2v_14b",
            "video=480p",
            "parallelism=context_parallel",
            "hardware=2x_h200",
            f"transport={transport}",
        )
        plan = make_plan(config, devices_to_plan(config))
        assert plan.transport == transport
        needed[transport] = predict_memory(config, plan)[0].allocated
    places = 4 * 16380 * 5120 * 2
    # At the worst moment NCCL's path has 3 of the 4 received, and what was joined of the last.
    assert 0.25 * places < needed["copies"] - needed["collectives"] < 0.5 * places


def test_a_plan_goes_on_where_one_layout_has_no_copies():
    config = composed("model=wan2.1_t2v_14b", "video=480p", "hardware=2x_h200", "transport=copies")
    devices = devices_to_plan(config)
    planned = plan_layouts(
        config, devices, [profile_for(config.hardware, one, conf_dir()) for one in devices]
    )
    assert {candidate.name for candidate in planned.candidates if not candidate.rejection} >= {
        "context_parallel x 2, ulysses=2"
    }
    assert any("neither ulysses nor shard" in (candidate.rejection or "") for candidate in planned.candidates)


def test_whole_blocks_beside_shards_are_planned():
    """2 blocks in place of 3, of 0.64 GiB, and half of the 0.43 GiB outside of them; no kernel copies them out."""
    needed, seconds = {}, {}
    for transport in ("copies", "collectives"):
        config = composed(
            "model=wan2.1_t2v_14b",
            "video=480p",
            "parallelism=fsdp",
            "hardware=2x_h200",
            f"transport={transport}",
        )
        devices = devices_to_plan(config)
        plan = make_plan(config, devices)
        assert plan.transport == transport
        needed[transport] = predict_memory(config, plan)[0].allocated
        profiles = [config.hardware.device] * 2
        seconds[transport] = predict_time(config, plan, profiles).forward_s
    arch = config.model.architecture
    saved = 2 * arch.num_block_parameters() + arch.num_outer_parameters()
    assert needed["collectives"] - needed["copies"] == pytest.approx(saved, rel=0.01)
    alone = composed("model=wan2.1_t2v_14b", "video=480p", "parallelism=none", "hardware=2x_h200")
    whole_s = predict_time(
        alone, make_plan(alone, devices_to_plan(alone)[:1]), [alone.hardware.device]
    ).forward_s
    assert seconds["copies"] == pytest.approx(BUSY_LINKS_FACTOR * whole_s, rel=1e-3)
    assert seconds["collectives"] > 1.01 * whole_s


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_peer_memory_between_gpus(world):
    """Exchanges of many sizes in a row, each checked against all_to_all of the process group."""
    from tests.parallel.gpu_ranks import exchange_on_gpus

    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    for differences in exchange_on_gpus(world):
        assert differences == [0.0] * len(differences)
        assert len(differences) >= 8
