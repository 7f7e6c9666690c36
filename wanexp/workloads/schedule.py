"""Which noise levels the steps of a denoising have, and which expert serves each. Pure; no torch.

    sigma' = shift * sigma / (1 + (shift - 1) * sigma),  t = 1000 * sigma'

Formulas of the Wan 2.1 sampler (flow matching, Euler); of two experts the first serves t >= boundary * 1000.
"""

from wanexp.config import RunConfig
from wanexp.workloads.sizes import forwards_per_step


def sigma_schedule(num_steps: int, shift: float) -> list[float]:
    """`num_steps` + 1 noise levels from 1 to 0."""
    sigmas = [1 - index / num_steps for index in range(num_steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


def expert_for(config: RunConfig, timestep: float) -> int:
    """The index of the expert that serves `timestep` (0 to 1000)."""
    boundary = config.model.expert_boundary
    return int(config.model.num_experts > 1 and boundary is not None and timestep < boundary * 1000)


def experts_of_steps(config: RunConfig) -> list[int]:
    """The expert that serves each step."""
    sigmas = sigma_schedule(config.workload.num_steps, config.model.shift)
    return [expert_for(config, 1000 * sigma) for sigma in sigmas[:-1]]


def warmup_steps(config: RunConfig) -> list[int]:
    """The steps to run before those that are timed: of each expert that these reach, its first one."""
    experts = experts_of_steps(config)
    first_ones = [experts.index(expert) for expert in sorted(set(experts))]
    return [index for index in first_ones for _ in range(config.workload.num_warmup_steps)]


def parity_steps(config: RunConfig) -> list[int]:
    """The steps whose flows the parity check compares: first and last, without guidance one between."""
    last = config.workload.num_steps - 1
    return sorted({0, last} if forwards_per_step(config) == 2 else {0, round(last / 2), last})


def num_parity_forwards(config: RunConfig) -> int:
    """Forwards that the check takes for a sample."""
    return len(parity_steps(config)) * forwards_per_step(config)


def missed_expert_warning(config: RunConfig) -> str:
    """Of a denoising that ends before one of the experts: neither timed nor compared. Empty where there is none."""
    if config.workload.name == "train" or len(set(experts_of_steps(config))) == config.model.num_experts:
        return ""
    steps = config.workload.num_steps
    return (
        f"workload.num_steps={steps} reaches one of {config.model.num_experts} experts: the other is neither timed nor "
        f"compared; write more, such as workload.num_steps={2 * steps}"
    )
