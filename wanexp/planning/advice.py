"""What to write where a run cannot fit: the smallest change with which it does. Pure."""

import dataclasses
from collections.abc import Callable, Sequence

from wanexp.config import DeviceProfile, ParallelismConfig, RunConfig
from wanexp.hardware.devices import Device, select_devices
from wanexp.planning.candidates import Candidate
from wanexp.planning.planner import Profiles, judge, plan_layouts, with_asked


def nearest_that_fits(
    config: RunConfig,
    devices: Sequence[Device],
    profiles: Profiles,
    *,
    host_free_bytes: int | None = None,
) -> str:
    """The smallest change that makes the run fit on these devices, as a sentence; empty where none was found.

    Tried in this order: another layout, block swap, one sample a replica, then 8-bit weights and fewer frames (both are
    said, as either gives something up). Beside block swap and these, how many such GPUs it takes. host_free_bytes: as
    of `plan_layouts`.
    """

    def best(changed: RunConfig) -> Candidate | None:
        return plan_layouts(changed, devices, profiles, host_free_bytes=host_free_bytes).winner

    if found := best(config):
        return f"write {found.settings}"
    words = []
    denoises_on_gpus = config.workload.name == "denoise" and devices[0].type == "cuda"
    can_swap = denoises_on_gpus and config.offload.blocks != "auto"
    if can_swap and (swapping := _with_block_swap(config, devices, profiles, host_free_bytes)):
        replaced = "" if config.offload.blocks == "0" else " offload.blocks=auto"
        words.append(f"write offload=block_swap{replaced} {swapping.settings}")
    else:
        batch = config.workload.batch_size
        if batch is not None and batch > 1:
            workload = dataclasses.replace(config.workload, batch_size=None)
            if found := best(dataclasses.replace(config, workload=workload)):
                return f"write workload.batch_size=null {found.settings}"
        if denoises_on_gpus and (config.precision.dtype, config.precision.linear) == ("bfloat16", "dtype"):
            precision = dataclasses.replace(config.precision, name="fp8_weight", linear="fp8_weight")
            if found := best(dataclasses.replace(config, precision=precision)):
                words.append(f"write precision=fp8_weight {found.settings} (lossy: weights in 8 bits)")
        if shorter := _most_frames(config, best):
            words.append(shorter)
    if devices[0].type == "cuda" and (count := _enough_gpus(config, devices[0], profiles[0])):
        words.append(f"block_distribution over {count} such GPUs would hold all of it")
    return "; ".join(words)


def _with_block_swap(
    config: RunConfig, devices: Sequence[Device], profiles: Profiles, host_free_bytes: int | None
) -> Candidate | None:
    """The layout asked for with the fewest blocks on the host, where it then fits; else the best layout with that."""
    swapping = dataclasses.replace(
        config, offload=dataclasses.replace(config.offload, name="block_swap", blocks="auto")
    )
    planned = plan_layouts(swapping, devices, profiles, host_free_bytes=host_free_bytes)
    chosen = select_devices(devices, config.gpus, config.parallelism.mode)
    known = [profiles[devices.index(device)] for device in chosen]
    asked = with_asked(planned, swapping, chosen, known, host_free_bytes=host_free_bytes).asked
    return asked if asked and not asked.rejection else planned.winner


def _most_frames(config: RunConfig, best: Callable[[RunConfig], Candidate | None]) -> str:
    """The longest video with which a layout fits, and that layout; empty where not even one frame does."""
    stride = config.model.vae_stride[0]

    def with_frames(latent_frames_less_one: int) -> Candidate | None:
        video = dataclasses.replace(config.video, num_frames=latent_frames_less_one * stride + 1)
        return best(dataclasses.replace(config, video=video))

    few, many = 0, (config.video.num_frames - 1) // stride  # what fits, what does not
    winner = with_frames(few)
    if not winner or not many:
        return ""
    while many - few > 1:
        middle = (few + many) // 2
        if found := with_frames(middle):
            few, winner = middle, found
        else:
            many = middle
    return f"write video.num_frames={few * stride + 1} {winner.settings}"


def _enough_gpus(config: RunConfig, device: Device, profile: DeviceProfile | None) -> int | None:
    """The smallest number of GPUs like `device` over which block distribution fits."""
    for count in range(2, config.model.architecture.num_layers + 1):
        many = [dataclasses.replace(device, index=index) for index in range(count)]
        parallelism = ParallelismConfig(mode="block_distribution", blocks=count)
        if not judge(config, parallelism, many, [profile] * count).rejection:
            return count
    return None
