"""What to write where a run cannot fit: the smallest change with which it does. Pure."""

import dataclasses
from collections.abc import Sequence

from wanexp.config import DeviceProfile, ParallelismConfig, RunConfig
from wanexp.hardware.devices import Device
from wanexp.planning.candidates import Candidate
from wanexp.planning.planner import Profiles, judge, plan_layouts


def nearest_that_fits(config: RunConfig, devices: Sequence[Device], profiles: Profiles) -> str:
    """The smallest change that makes the run fit on these devices, as a sentence; empty where none was found.

    Tried in this order: another layout, one sample a replica, fewer frames, then how many such GPUs it takes.
    """
    if best := plan_layouts(config, devices, profiles).winner:
        return f"write {best.settings}"
    batch = config.workload.batch_size
    if batch is not None and batch > 1:
        smaller = dataclasses.replace(config, workload=dataclasses.replace(config.workload, batch_size=None))
        if best := plan_layouts(smaller, devices, profiles).winner:
            return f"write workload.batch_size=null {best.settings}"
    words = []
    stride = config.model.vae_stride[0]
    few, many = 0, (config.video.num_frames - 1) // stride  # latent frames less one: what fits, what does not
    winner = _with_frames(config, 1, devices, profiles)
    if winner and many:
        while many - few > 1:
            middle = (few + many) // 2
            if found := _with_frames(config, middle * stride + 1, devices, profiles):
                few, winner = middle, found
            else:
                many = middle
        words.append(f"write video.num_frames={few * stride + 1} {winner.settings}")
    if devices[0].type == "cuda" and (count := _enough_gpus(config, devices[0], profiles[0])):
        words.append(f"block_distribution over {count} such GPUs would hold all of it")
    return "; ".join(words)


def _with_frames(
    config: RunConfig, num_frames: int, devices: Sequence[Device], profiles: Profiles
) -> Candidate | None:
    video = dataclasses.replace(config.video, num_frames=num_frames)
    return plan_layouts(dataclasses.replace(config, video=video), devices, profiles).winner


def _enough_gpus(config: RunConfig, device: Device, profile: DeviceProfile | None) -> int | None:
    """The smallest number of GPUs like `device` over which block distribution fits."""
    for count in range(2, config.model.architecture.num_layers + 1):
        many = [dataclasses.replace(device, index=index) for index in range(count)]
        parallelism = ParallelismConfig(mode="block_distribution", blocks=count)
        if not judge(config, parallelism, many, [profile] * count).rejection:
            return count
    return None
