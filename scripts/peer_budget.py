"""How many turns a case of bench_peers.py gets, and what it may cost. Pure."""

from collections.abc import Sequence

from peer_models import Contender

LONG_FLOPS = 4e15  # of a forward: from here on (14B at 720p) fewer turns

# What an H200 takes, on the safe side.
SLOW_FLOPS, COMPILE_S, BUILD_S = 6e14, 15.0, 3.0


def num_rounds(*, flops: float, samples_per_round: int) -> int:
    """Turns of each contender: 4; of a long forward 3, or 2 where each turn is one sample on each of several GPUs.

    flops: of a forward.
    """
    if flops < LONG_FLOPS:
        return 4
    return 3 if samples_per_round == 1 else 2


def expected_seconds(*, flops: float, num_gpus: int, contenders: Sequence[Contender], rounds: int) -> float:
    """Of a case: each contender is built, called once, which compiles it, and takes its turns.

    flops: of a forward, of which a guided step has one on each GPU.
    """
    seconds = 0.0
    for contender in contenders:
        share = flops / (1 if contender.is_guided else num_gpus)
        seconds += BUILD_S + COMPILE_S * contender.is_compiled + (rounds + 1) * share / SLOW_FLOPS
    return seconds
