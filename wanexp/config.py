"""The run configuration as dataclasses: every key with its type, unit and default.

Hydra composes `conf/` into a DictConfig against these classes (`register`); `config_reading.py` makes checked objects
of them. Nothing here touches a device or the environment, and nothing imports torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from wanexp.wan.architecture import WanArchitecture

MODES = (
    "none",
    "data_parallel",
    "distributed",
    "block_distribution",
    "cfg_parallel",
    "context_parallel",
    "tensor_parallel",
    "fsdp",
    "hybrid",
)
PLACEMENTS = ("contiguous", "memory", "interleaved")
WORKLOADS = ("denoise", "train")
DTYPES = ("bfloat16", "float16", "float32")
VERIFY = ("auto", "always", "never")
TASKS = ("run", "plan")
OBJECTIVES = ("latency", "throughput", "memory")
AUTO_MODE = "auto"  # the planner's choice; no layout has it
ATTENTIONS = ("auto", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "fa3", "fa4", "fa3_fp8")
KERNELS = ("auto", "triton", "torch")
TRANSPORTS = ("auto", "copies", "collectives")
LOAD_DEVICES = ("main_device", "offload_device")
DEVICE_TYPES = ("auto", "cuda", "cpu")
LINKS = ("nvlink", "pcie")
SWEEP_ORDERS = ("cheap", "given")


@dataclass
class ModelConfig:
    """One row of the Wan family. Sampling values are the published defaults of that model."""

    name: str = MISSING
    architecture: WanArchitecture = field(default_factory=WanArchitecture)
    num_experts: int = 1  # Wan 2.2 A14B: 2 transformers, the first for high noise
    expert_boundary: float | None = None  # the first expert serves timesteps >= boundary * 1000
    per_token_timestep: bool = False  # TI2V with an image: tokens of the first latent frame are at timestep 0
    vae_stride: list[int] = field(
        default_factory=lambda: [4, 8, 8]
    )  # video frames, rows, columns a latent cell
    sampling_steps: int = 50  # steps of a whole video, used for throughput
    shift: float = 5.0  # of the flow-matching noise schedule
    guidance_scale: list[float] = field(default_factory=lambda: [5.0])  # one an expert


@dataclass
class DeviceProfile:
    """What is known of one device. Rates are dense peaks from the vendor's datasheet; None where unknown."""

    name: str = ""  # as NVML and torch report it; empty: numbers of your own, for whatever device is found
    memory_gib: float | None = None
    compute_capability: float | None = None  # NVIDIA's, such as 8.9; None: float8 is not counted on
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None  # without tensor cores
    memory_bandwidth_gb_s: float | None = None
    link: str | None = None  # nvlink, pcie: between devices
    link_gb_s: float | None = None  # one direction, between two devices
    host_link_gb_s: float | None = None  # one direction, host to device
    # Achieved, as scripts/calibrate.py measures them; None: a stated share of the peaks above (planning/time.py)
    gemm_tflops: float | None = None  # 16-bit matrix products at Wan shapes
    attention_tflops: float | None = None  # 16-bit self-attention, the kernel that attention=auto takes
    attention_kernel: str = "sdpa_cudnn"  # the kernel that this was measured with
    elementwise_gb_s: float | None = None  # norms, RoPE and gates, bytes as planning/time.py counts them
    p2p_gb_s: float | None = None  # one copy between two devices
    p2p_latency_us: float | None = None  # of a small one
    launch_us: float | None = None  # a kernel launch
    context_gib: float | None = None  # CUDA context: memory in use that torch does not count


@dataclass
class HardwareConfig:
    """A hardware profile: `auto` and `cpu` are found at run time, the others are named machines."""

    name: str = MISSING
    device_type: str = "auto"  # auto (cuda where there is one), cuda, cpu
    num_devices: int | None = None  # None: as many as are found; on CPU the number of logical devices
    device: DeviceProfile | None = None  # None: looked up by the found device's name
    usd_per_gpu_hour: float | None = None  # price of one GPU, for the cost of a video in reports
    enforce_memory: bool = (
        False  # let each GPU use no more than device.memory_gib, to try a smaller card on this one
    )


@dataclass
class ParallelismConfig:
    """A mode: a named preset of the layout. A degree of -1 takes all GPUs that the others leave."""

    mode: str = MISSING
    dp: int = 1  # replicas
    cfg: int = 1  # 2: the forwards with and without the prompt at the same time
    ring: int = 1  # shares of the video tokens, keys and values passed around
    ulysses: int = 1  # shares of the video tokens, heads exchanged for the attention
    tp: int = 1  # shares of the heads and of the FFN
    shard: int = 1  # ranks over which the weights are sharded (FSDP); -1: all of them
    blocks: int = 1  # devices in one rank, over which the transformer blocks are spread
    block_placement: str = (
        "contiguous"  # contiguous, memory (shares by free memory), interleaved (round-robin)
    )
    block_split: list[int] | None = None  # explicit number of blocks for each GPU in turn
    block_chunks: int | None = None  # interleaved: runs of blocks dealt round-robin; None: single blocks
    pipeline: bool = True  # inference: GPUs of one rank work at the same time on the forwards of a step


@dataclass
class WorkloadConfig:
    """What is executed and timed."""

    name: str = MISSING  # denoise, train
    num_steps: int = 4  # timed denoising (or optimiser) steps
    num_warmup_steps: int = 1  # untimed ones before them, of each expert
    batch_size: int | None = None  # samples in the whole batch; None: one a replica
    guidance_scale: list[float] | None = None  # None: the model's; above 1 each step is two forwards (CFG)
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    activation_checkpointing: bool = True


@dataclass
class VideoConfig:
    """Size of the video in pixels and frames (frames = 4n + 1)."""

    name: str = MISSING
    width: int = MISSING
    height: int = MISSING
    num_frames: int = MISSING
    fps: int = 16


@dataclass
class PrecisionConfig:
    """Number formats. `tolerance` bounds parity/rel_l2 against `none`; a lossy attention kernel may allow more."""

    name: str = MISSING
    dtype: str = MISSING  # of weights and matrix products: bfloat16, float16, float32
    linear: str = (
        "dtype"  # of the blocks: dtype, or lossy fp8 (products), fp8_weight, int8_weight (memory alone)
    )
    residual_fp32: bool = False  # keep the residual stream in fp32 between blocks
    tolerance: float = MISSING


@dataclass
class OffloadConfig:
    """What of the weights lives in host memory."""

    name: str = MISSING
    blocks: str = "0"  # how many blocks are swapped in for each use; auto: the fewest that let the run fit
    buffers: int = 2  # blocks on each device that swapped blocks take turns in
    load_device: str = "main_device"  # offload_device: the whole model is loaded to the host first


@dataclass
class TrackingConfig:
    """Where the record goes after record.json is written."""

    enabled: bool = True
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite in <working folder>/mlflow.db
    experiment: str = "wanexp"
    timeout_s: float = 5.0  # a server that does not answer within this is left alone


@dataclass
class LimitsConfig:
    """When a run is given up."""

    run_s: float = 7200.0  # a whole launch: loading, warm-up and steps
    stall_s: float = 600.0  # no sign of life from any rank


@dataclass
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    task: str = "run"  # run, plan: print what every layout would need, and run nothing
    objective: str = "latency"  # latency, throughput, memory: what the planner ranks layouts by
    plan_json: bool = False  # task=plan prints JSON instead of a table
    force: bool = False  # run although the plan says that it cannot fit
    checkpoint: str | None = None  # a safetensors file, index or folder; None: random weights
    gpus: list[int] | None = None  # torch device indices; None: one for mode none, all for the others
    attention: str = "auto"  # auto (the fastest that is installed), sdpa_*, fa3, fa4, or lossy fa3_fp8
    kernels: str = "auto"  # between the matrix products: auto, triton (fused), torch
    transport: str = (
        "auto"  # of Ulysses' exchanges and FSDP's gathers: auto, copies (copy engines), collectives
    )
    ffn_chunks: int = 1  # runs of tokens that each FFN takes one after the other, to save memory
    seed: int = 0
    verify: str = "auto"  # auto, always, never: compare the answer with mode none
    profile: bool = False  # a torch profiler trace in a pass of its own
    sweep_name: str | None = None  # a sweep's folder under multirun/; None: its date and time
    resume: bool = False  # of a named sweep: run only what its folder lacks
    repeats: int = 1  # of a sweep: runs of each cell, interleaved (A B C A B C ...)
    sweep_report: bool = True  # a sweep ends with its report (report.html, report.md) and its summary run
    sweep_order: str = "cheap"  # cheap (first the cells of little predicted time on few GPUs), given


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain containers, ready for JSON."""
    return asdict(config)


def conf_dir() -> Path:
    """The folder of the YAML groups: inside an installed package, else at the top of the source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register() -> None:
    """Make the schema known to Hydra, and the resolvers that `conf/config.yaml` names folders with."""
    ConfigStore.instance().store(name="run_config", node=RunConfig, provider="wanexp")
    OmegaConf.register_new_resolver("wanexp.sweep_folder", _sweep_folder, replace=True)
    OmegaConf.register_new_resolver("wanexp.cell_folder", _cell_folder, replace=True)


def _sweep_folder(sweep_name: str | None, now: str) -> str:
    return now if sweep_name is None else str(sweep_name)


def _cell_folder(number: int, mode: str, chosen: str, gpus: Sequence[int] | None) -> str:
    """`003_block_distribution_2gpus`: sorts in order, and holds no bracket or comma.

    chosen: the file of conf/parallelism; it may be a variant of the mode, context_parallel_ring.
    """
    if mode == "none":
        count = "1gpu"
    elif gpus is None:
        count = "all_gpus"
    else:
        count = "1gpu" if len(gpus) == 1 else f"{len(gpus)}gpus"
    return f"{int(number):03d}_{chosen if chosen.startswith(mode) else mode}_{count}"
