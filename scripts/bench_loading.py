"""Loading against the safetensors library: a checkpoint of Wan 14B (bf16, 26.6 GiB) to one GPU, to two, by two ranks.

    python scripts/bench_loading.py --folder /tmp --out docs/results/loading.md

`safetensors.torch.load_file(device="cuda:0")` of all files, and ours by turns: to one GPU; to two by block
distribution, from one process; by two ranks that hold a copy each. First out of the page cache, then with the files
dropped from it before each turn. Timed is what lies between a path and weights on the GPUs: opening included, the empty
model and the start of processes not. Every turn begins with no GPU memory cached. The first turn of each stands by
itself (ours pins its staging then), and afterwards the weights are compared bit by bit. Without --checkpoint one is
made under --folder and removed at the end.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from gpu_needed import check_device
from make_checkpoint import read_model

from wanexp.errors import UserError
from wanexp.measure.memory import anonymous_rss_bytes
from wanexp.parallel.block_distribution import position_of
from wanexp.parallel.loading import Loader
from wanexp.wan import reading
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import open_checkpoint
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import load_weights
from wanexp.wan.write_checkpoint import write_model

SCHEMA = "wanexp.loading/1"
GIB = 2**30
BASE, ONE, TWO, RANKS = "load_file", "one GPU", "two GPUs, blocks", "two ranks, a copy each"
TUNED_THREADS, TUNED_PIECES_MIB = (2, 4, 8, 16), (8, 16, 32)
WARM_SHARE = 0.6  # of the budget, after which no round out of the page cache begins

Sample = dict[str, Any]
"""seconds; growth_bytes of anonymous host memory at its peak; read_bytes by read calls; bytes on the devices."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="wan2.1_t2v_14b", help="a name in conf/model (default 14B)")
    parser.add_argument("--layers", type=int, help="blocks, for a smaller file (default: all)")
    parser.add_argument("--checkpoint", type=Path, help="one that is there, instead of --case")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on a local disk")
    parser.add_argument("--shards", type=int, default=6, help="files of the checkpoint (default 6)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each out of the page cache")
    parser.add_argument("--cold-rounds", type=int, default=1, help="turns after dropping it; 0: none")
    parser.add_argument("--budget-s", type=float, default=100.0, help="no turn begins after it (default 100)")
    parser.add_argument("--tune", action="store_true", help="measure numbers of threads and sizes of pieces")
    parser.add_argument("--out", type=Path, required=True, help="Markdown; the JSON is written beside it")
    options = parser.parse_args()
    try:
        check_device(options.device, instead="--device cpu")
        if options.checkpoint:
            bench(options.checkpoint, None, options)
        else:
            with tempfile.TemporaryDirectory(prefix="bench_loading_", dir=options.folder) as folder:
                bench(Path(folder), architecture_of(options), options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def architecture_of(options: argparse.Namespace) -> WanArchitecture:
    architecture = WanArchitecture(**read_model(options.case)["architecture"])
    return dataclasses.replace(architecture, num_layers=options.layers or architecture.num_layers)


def bench(path: Path, to_make: WanArchitecture | None, options: argparse.Namespace) -> None:
    """Measure the checkpoint at `path`, which is made first if `to_make` says of what."""
    begin = time.perf_counter()
    if options.device == "cuda":
        devices = [torch.device("cuda", index) for index in range(min(2, torch.cuda.device_count()))]
    else:
        devices = [torch.device("cpu")] * 2
    with ranks(devices) as load_by_ranks:  # they start while the file is written
        write_s = None
        if to_make:
            write_model(to_make, path, num_shards=options.shards, device=devices[0])
            write_s = time.perf_counter() - begin
            say(f"checkpoint written in {write_s:.1f} s")
        checkpoint = open_checkpoint(path)
        contenders: dict[str, Callable[[], Sample]] = {
            BASE: lambda: measure(devices, lambda: library_load(checkpoint.files, devices[0])),
            ONE: lambda: ours(path, checkpoint.architecture, devices[:1]),
        }
        if len(devices) == 2:
            contenders |= {
                TWO: lambda: ours(path, checkpoint.architecture, devices),
                RANKS: lambda: load_by_ranks(path),
            }
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(devices),
            "files": len(checkpoint.files),
            "num_bytes": checkpoint.num_bytes,
            "layers": checkpoint.architecture.num_layers,
            "write_s": write_s,
            "first_s": {name: contender()["seconds"] for name, contender in contenders.items()},
            "differing": compare(path, checkpoint.files, checkpoint.architecture, devices),
            "tuned": [],
            "rows": [],
        }
        say(f"first turns: {seconds_of(result['first_s'])}")
        if options.tune:
            result["tuned"] = tune(contenders[ONE])

        def is_over(share: float) -> bool:
            return time.perf_counter() - begin > share * options.budget_s

        warm = take_turns(contenders, options.rounds, is_over=lambda: is_over(WARM_SHARE), at_least=1)
        result["rows"] += rows("page cache", warm, checkpoint.num_bytes)
        write_results(result, options.out)
        if options.cold_rounds and not is_over(1):
            cold = take_turns(
                contenders,
                options.cold_rounds,
                is_over=lambda: is_over(1),
                before=lambda: drop_from_cache(checkpoint.files),
            )
            result["rows"] += rows("disk", cold, checkpoint.num_bytes)
    result["bench_s"] = time.perf_counter() - begin
    write_results(result, options.out)
    print(table(result["rows"]))


def take_turns(
    contenders: dict[str, Callable[[], Sample]],
    rounds: int,
    *,
    is_over: Callable[[], bool],
    at_least: int = 0,
    before: Callable[[], float | None] = lambda: None,
) -> dict[str, list[Sample]]:
    """Samples of each contender, A B C A B C; `before` each turn says what share of the files is in the page cache."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            if number >= at_least and is_over():
                return samples
            resident = before()
            samples[name].append(contender() | {"resident_share": resident})
            say(f"{name}: {samples[name][-1]['seconds']:.2f} s")
    return samples


# What is measured


def library_load(files: Sequence[Path], device: torch.device) -> list[dict[str, torch.Tensor]]:
    return [load_file(file, device=str(device)) for file in files]


def ours(path: Path, architecture: WanArchitecture, devices: Sequence[torch.device]) -> Sample:
    """A sample of loading to the devices, the first blocks to the first."""
    model = empty_model(architecture)
    return measure(devices, lambda: fill(model, path, devices))


def fill(model: WanTransformer, path: Path, devices: Sequence[torch.device]) -> WanTransformer:
    num_layers = len(model.blocks)
    owner = [index * len(devices) // num_layers for index in range(num_layers)]
    load_weights(model, open_checkpoint(path), device_of=lambda name: devices[position_of(name, owner)])
    return model


def empty_model(architecture: WanArchitecture) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=torch.bfloat16)


def measure(devices: Sequence[torch.device], load: Callable[[], Any]) -> Sample:
    """One sample of `load`, whose result is let go of afterwards. Begins without cached memory on the devices."""
    settle(devices)
    read_before = bytes_by_read_calls()
    with peak_of_anonymous_memory() as peak:
        begin = time.perf_counter()
        loaded = load()
        synchronize(devices)
        seconds = time.perf_counter() - begin
    read_after = bytes_by_read_calls()
    del loaded
    settle(devices)
    return {
        "seconds": seconds,
        "growth_bytes": peak[0],
        "read_bytes": None if read_after is None or read_before is None else read_after - read_before,
    }


@contextmanager
def peak_of_anonymous_memory() -> Iterator[list[int]]:
    """[bytes by which anonymous memory has grown at most], looked at every 20 ms."""
    before, peak, is_over = anonymous_rss_bytes(), [0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous_rss_bytes() - before)
            if is_over.wait(0.02):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        is_over.set()
        watcher.join()


def bytes_by_read_calls() -> int | None:
    """Bytes that this process has read by system calls, from disk or cache, mapped files left out; None if unknown."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])
    except (OSError, KeyError, ValueError):
        return None


def settle(devices: Sequence[torch.device]) -> None:
    gc.collect()
    synchronize(devices)
    if devices[0].type == "cuda":
        torch.cuda.empty_cache()


def synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def compare(
    path: Path, files: Sequence[Path], architecture: WanArchitecture, devices: Sequence[torch.device]
) -> list[str]:
    """Names of the tensors that the library and ours, on one device and on all, do not have in common bit by bit.

    Of checkpoints in the native layout and in bf16; others are not compared.
    """
    expected = {name: tensor for part in library_load(files, devices[0]) for name, tensor in part.items()}
    differing: list[str] = []
    for owners in (devices[:1], devices):
        model = fill(empty_model(architecture), path, owners)
        for name, parameter in model.named_parameters():
            other = expected.get(name)
            if other is not None and other.dtype == parameter.dtype:
                differing += [] if torch.equal(parameter.to(other.device), other) else [name]
        del model
    say(f"compared with the library's: {len(differing)} tensors differ")
    return differing


def tune(contender: Callable[[], Sample]) -> list[dict[str, Any]]:
    """Seconds with other numbers of threads and other sizes of pieces; the second of two turns each."""
    found, usual = [], (reading.NUM_THREADS, reading.PIECE_BYTES)
    for threads in TUNED_THREADS:
        for piece_mib in TUNED_PIECES_MIB:
            reading.NUM_THREADS, reading.PIECE_BYTES = threads, piece_mib * 2**20
            contender()
            found.append({"threads": threads, "piece_mib": piece_mib, "seconds": contender()["seconds"]})
            say(f"{threads} threads, pieces of {piece_mib} MiB: {found[-1]['seconds']:.2f} s")
    reading.NUM_THREADS, reading.PIECE_BYTES = usual
    return found


# Ranks


@contextmanager
def ranks(devices: Sequence[torch.device]) -> Iterator[Callable[[Path], Sample]]:
    """A process for each of two devices, and a function that lets them load a checkpoint together."""
    if len(devices) < 2:
        yield lambda path: {}
        return
    context, pipes, processes = mp.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, device in enumerate(devices):
                own, other = context.Pipe()
                process = context.Process(
                    target=serve, args=(rank, str(device), f"{folder}/store", other), daemon=True
                )
                process.start()
                other.close()  # so that a rank that has died is the end of its pipe
                pipes.append(own)
                processes.append(process)

            def load(path: Path) -> Sample:
                try:
                    for pipe in pipes:
                        pipe.send(path)
                    samples = [pipe.recv() for pipe in pipes]
                except (EOFError, BrokenPipeError) as error:
                    raise UserError("a rank has died; its error stands above") from error
                return {
                    "seconds": max(sample["seconds"] for sample in samples),
                    "growth_bytes": max(sample["growth_bytes"] for sample in samples),
                    "read_bytes": None
                    if any(sample["read_bytes"] is None for sample in samples)
                    else sum(sample["read_bytes"] for sample in samples),
                }

            yield load
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(20)
        finally:
            for process in processes:
                process.kill()


def serve(rank: int, device_name: str, store: str, pipe: Any) -> None:
    """A rank: loads what it is sent the path of, together with the other, until it is sent None."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    while (path := pipe.recv()) is not None:
        architecture = open_checkpoint(path).architecture
        loader = Loader(
            architecture,
            part_of=lambda rank, name, shape: Part.whole(shape),
            nodes=[[0, 1]],
            rank=rank,
            home=device,
        )
        model = empty_model(architecture)
        meet(device)
        pipe.send(measure([device], partial(fill_together, loader, model, path, device)))
        del model
    dist.destroy_process_group()


def fill_together(loader: Loader, model: WanTransformer, path: Path, device: torch.device) -> WanTransformer:
    loader.load(model, open_checkpoint(path), device_of=lambda _: device)
    return model


def meet(device: torch.device) -> None:
    """Returns when both ranks are here. (`barrier` guesses a device.)"""
    dist.all_reduce(torch.ones(1, device=device))
    synchronize([device])


# The page cache


def drop_from_cache(files: Sequence[Path]) -> float | None:
    """Take the files out of the page cache; returns the share of their pages that stays in it nevertheless."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet cannot go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident_share(files)


def resident_share(files: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in the page cache; None where the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for file in files:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        num_pages = -(-len(mapped) // mmap.PAGESIZE)
        pages, start = (ctypes.c_ubyte * num_pages)(), ctypes.c_char.from_buffer(mapped)
        code = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages)
        del start
        mapped.close()
        if code:
            return None
        resident += int((torch.frombuffer(pages, dtype=torch.uint8) & 1).sum())
        total += num_pages
    return resident / total


# What is written


def rows(source: str, samples: dict[str, list[Sample]], num_bytes: int) -> list[dict[str, Any]]:
    """A row for each contender that has samples; ratios are those of the turns of one round."""
    found = []
    for name, own in samples.items():
        if not own:
            continue
        seconds = statistics.median(sample["seconds"] for sample in own)
        pairs = list(zip(samples[BASE], own, strict=False))
        ratios = [base["seconds"] / sample["seconds"] for base, sample in pairs]
        read = [sample["read_bytes"] for sample in own if sample["read_bytes"] is not None]
        found.append(
            {
                "from": source,
                "what": name,
                "seconds": seconds,
                "gib_per_second": num_bytes / GIB / seconds,
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "growth_gib": max(sample["growth_bytes"] for sample in own) / GIB,
                "read_share": max(read) / num_bytes if read else None,
                "samples": own,
            }
        )
    return found


def seconds_of(first: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in first.items())


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| from | what | n | seconds (least to most) | GiB/s | speed over load_file (least to most) "
        "| host growth GiB | read calls / file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        seconds = [sample["seconds"] for sample in row["samples"]]
        read = "-" if row["read_share"] is None else f"{row['read_share']:.3f}"
        lines.append(
            f"| {row['from']} | {row['what']} | {len(seconds)} "
            f"| {row['seconds']:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {row['gib_per_second']:.2f} "
            f"| {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) "
            f"| {row['growth_gib']:.2f} | {read} |"
        )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    machine, layers = result["environment"], result["layers"]
    written = "" if result["write_s"] is None else f", written in {result['write_s']:.0f} s"
    differing = result["differing"]
    lines = [
        "# Loading against the safetensors library",
        "",
        f"`{result['command']}`, {result['measured']}: {', '.join(machine['devices'])}; torch {machine['torch']}, "
        f"safetensors {machine['safetensors']}; {machine['cpus']} CPUs.",
        f"{result['num_bytes'] / GIB:.2f} GiB in {result['files']} files, {layers} blocks{written}.",
        "",
        "By turns in one run; medians. Host growth: anonymous memory at its peak, the most of all turns. Read calls /",
        "file: bytes that all processes together read by system calls over the size of the checkpoint (load_file maps",
        "its files). Speed over load_file: of the turns of one round.",
        "",
        table(result["rows"]),
        "",
        f"First turns, not in the table: {seconds_of(result['first_s'])}.",
        f"Bit by bit the library's weights: {f'NOT: {differing[:3]}' if differing else 'yes'}.",
    ]
    shares = [
        sample["resident_share"]
        for row in result["rows"]
        for sample in row["samples"]
        if sample["resident_share"] is not None
    ]
    if shares:
        lines.append(f"Pages still in the page cache after dropping it: {max(shares):.1%} at most.")
    if result["tuned"]:
        lines += ["", "| threads | pieces | seconds to one GPU |", "|---|---|---|"]
        lines += [
            f"| {one['threads']} | {one['piece_mib']} MiB | {one['seconds']:.2f} |" for one in result["tuned"]
        ]
    return "\n".join(lines) + "\n"


def environment(devices: Sequence[torch.device]) -> dict[str, Any]:
    from importlib.metadata import version

    names = [torch.cuda.get_device_name(one) if one.type == "cuda" else "cpu" for one in devices]
    return {
        "devices": names,
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "cpus": len(os.sched_getaffinity(0)),
        "reader": {"threads": reading.NUM_THREADS, "piece_bytes": reading.PIECE_BYTES},
    }


def write_results(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(result))
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
