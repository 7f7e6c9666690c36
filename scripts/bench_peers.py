#!/usr/bin/env python
"""Our forward against those of diffusers and xDiT: same weights, same inputs, same processes, in turns.

For each case (a model at a video size, on one GPU or on all by Ulysses) every contender is built on the same random
weights and called once, which compiles it; its output is compared with ours. Then they take turns, A B C A B C, each
forward between synchronised barriers: whatever the clocks and the heat do, they do to all. The ratio of two contenders
is taken turn by turn; its median stands in the table with its bootstrap interval. On one GPU of several, each GPU
measures on its own at the same time, and counts with its own turns.

    python scripts/bench_peers.py --floor docs/results/floor.json --out docs/results/peers.md
    python scripts/bench_peers.py --case wan2.1_t2v_1.3b:480p:1 --contender ours --contender diffusers --out /tmp/p.md

Peers are optional (pip install diffusers==0.42.1 xfuser==0.7.0 fa3-fwd, and what they need): one that is missing is a
row that says so. Results are written after each case, Markdown and JSON; with --budget-s the script starts nothing that
it does not expect to finish. docs/peers.md describes the file. One machine only; CUDA_VISIBLE_DEVICES chooses GPUs.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from bench_case import Case, parse_case

from wanexp.config import HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware.devices import Device, find_devices

# The most important first.
CASES = (
    "wan2.1_t2v_14b:480p:1",
    "wan2.1_t2v_14b:480p:2",
    "wan2.1_t2v_14b:720p:1",
    "wan2.1_t2v_14b:720p:2",
    "wan2.1_t2v_1.3b:480p:1",
    "wan2.1_t2v_1.3b:480p:2",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help=f"model:video:gpus; default: {' '.join(CASES)}")
    parser.add_argument("--contender", action="append", help="name as in peer_models.py; default: the best")
    parser.add_argument(
        "--rounds",
        type=int,
        help="turns of each; default: 4, and 3 where a forward is long (one GPU of two: 2)",
    )
    parser.add_argument(
        "--attention", help="our kernels, self,cross such as fa3,sdpa_cudnn; default: a probe"
    )
    parser.add_argument("--floor", type=Path, help="JSON of bench_floor.py on the same kind of GPU")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds; default: no limit")
    parser.add_argument("--out", type=Path, required=True, help="Markdown; a .json is written beside it")
    options = parser.parse_args()
    options.start = time.time()
    try:
        return launch(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def launch(options: argparse.Namespace) -> int:
    """Check what can be checked before processes start, then start one for each GPU."""
    from peer_models import CONTENDERS, DEFAULT_CONTENDERS
    from peer_run import run_rank
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from wanexp.launch import launch_ranks, quiet_agent

    options.cases = [parse_case(text) for text in dict.fromkeys(options.case or CASES)]
    options.contender = options.contender or list(DEFAULT_CONTENDERS)
    if unknown := set(options.contender) - set(CONTENDERS):
        raise UserError(f"unknown contender {sorted(unknown)[0]!r}; write one of: {', '.join(CONTENDERS)}")
    found = find_devices(HardwareConfig(name="auto"))
    num_ranks = min(len(found), max(case.num_gpus for case in options.cases))
    check_sizes(options.cases, num_ranks)
    options.devices = found[:num_ranks]
    options.floors = read_floors(options.floor, found[0]) if options.floor else {}
    with quiet_agent():
        try:
            launch_ranks(num_ranks, run_rank, options)
        except ChildFailedError as error:
            print("failed:", {rank: failure.exitcode for rank, failure in error.failures.items()})
            return 1
        except SignalException as error:
            print(f"error: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
            return 128 + error.sigval
    print(options.out.read_text())
    return 0


def check_sizes(cases: Sequence[Case], num_ranks: int) -> None:
    """Raises UserError for a case between one GPU and all: there would be GPUs without work."""
    for case in cases:
        if 1 < case.num_gpus < num_ranks:
            raise UserError(
                f"{case}: the GPUs of a case are 1 or those of the largest case, {num_ranks}; measure it by itself"
            )


def read_floors(path: Path, device: Device) -> dict[tuple[str, str, int], float]:
    """Seconds by (model, video, GPUs). Raises UserError for a file of another GPU, whose floor says nothing here."""
    content = json.loads(path.read_text())
    name = device.name if device.type == "cuda" else "cpu"
    if content["device"] != name:
        raise UserError(
            f"{path} is the floor of {content['device']}, this is {name}; run scripts/bench_floor.py here"
        )
    return {
        (floor["model"], floor["video"], floor["num_gpus"]): floor["floor_s"]
        for floor in content["floors"]
        if floor["floor_s"] is not None
    }


if __name__ == "__main__":
    sys.exit(main())
