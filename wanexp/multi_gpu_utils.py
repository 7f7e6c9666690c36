"""The small API of the guide that wanexp grew from: the same names, arguments and return shapes, and honest answers.

    from wanexp.multi_gpu_utils import setup_optimal_parallelism, validate_gpu_setup, print_gpu_status

Every error a caller can cause is a `wanexp.errors.UserError` (a ValueError) of one line. A machine without GPUs gets
answers, not tracebacks. Importing this imports no torch; what needs it imports it when called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanexp.errors import UserError
from wanexp.guide.configuration import config_from_guide
from wanexp.guide.gpus import print_gpu_status, validate_gpu_setup
from wanexp.guide.monitor import MemoryMonitor, MemorySample, monitor_memory_usage
from wanexp.guide.recommend import setup_optimal_parallelism

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MemoryMonitor",
    "MemorySample",
    "benchmark_multi_gpu_performance",
    "config_from_guide",
    "monitor_memory_usage",
    "print_gpu_status",
    "setup_optimal_parallelism",
    "validate_gpu_setup",
]


def benchmark_multi_gpu_performance(
    model: "nn.Module | str | Path", input_data: Any = None, num_runs: int = 5
) -> dict[str, dict[str, Any]]:
    """Time every mode of the guide on the devices of this machine, each warmed up before its `num_runs` timed runs.

    `model` as a live module: in this process, on this model. `input_data` is what its forward takes, a dict of
    arguments or a tuple; a round is one forward, of data_parallel and distributed one a replica, all at once. The model
    stays as and where it is: see wanexp/guide/benchmark.py. Compiled blocks run uncompiled, as copies lose that.

    `model` as a path: real runs (`python -m wanexp`) of that checkpoint, each in processes of its own, planned first,
    on samples of its own; of `input_data` only the latent's size is used, None takes the model's usual video. Their
    records stay in multirun/runs ("record").

    Without GPUs two logical CPU devices take their place: true times, which say nothing of GPUs.

    Returns:
        mode -> {"ran": True, "devices", "num_runs", "median_ms", "iqr_ms", "min_ms", "max_ms", "samples_ms" (a round
        each), "samples_per_run", "samples_per_s", "peak_gib" (by device), against mode none "throughput_ratio"
        (replicas) or "speedup" (block_distribution), "rel_l2" and "bit_equal" (the answers), and "warning" where there
        is one}, or {"ran": False, "reason": ...} where it does not fit or makes no sense here.

    Raises UserError for inputs that are no inputs; an error of the model itself passes through.
    """
    if isinstance(num_runs, bool) or not isinstance(num_runs, int) or num_runs < 1:
        raise UserError(f"num_runs is {num_runs!r}; write a whole number of 1 or more")
    if isinstance(model, str | Path):
        from wanexp.guide.benchmark_runs import benchmark_checkpoint

        return benchmark_checkpoint(model, input_data, num_runs)
    from wanexp.guide.benchmark import benchmark_model  # torch is slow to import

    return benchmark_model(model, input_data, num_runs)
