#!/usr/bin/env python3
"""Writes a checkpoint with random weights, of any model and in any layout that wanexp reads.

    scripts/make_checkpoint.py --model wan2.1_t2v_1.3b --out models/wan.safetensors
    scripts/make_checkpoint.py --model wan2.2_t2v_a14b --out models/a14b --layout diffusers --shards 6

The weights are those of a run with `checkpoint=null` and the same seed. One tensor at a time is in host memory; with
a GPU as --device one of each file, of which up to eight are written at once. Two experts (Wan 2.2 A14B) become two
folders under --out.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from own_python import ROOT, use_own_python

use_own_python()

import torch
import yaml

from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.write_checkpoint import DTYPES, LAYOUTS, write_model

MODELS = ROOT / "conf" / "model"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a name in conf/model")
    parser.add_argument("--out", required=True, type=Path, help="a .safetensors file, or a folder")
    parser.add_argument("--layout", choices=LAYOUTS, default="native")
    parser.add_argument("--shards", type=int, default=1, help="files per transformer (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of what is not fp8 (default bf16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the values are computed: cpu, cuda:0, ...")
    args = parser.parse_args()
    try:
        model = read_model(args.model)
        check_device(args.device)
        files = write_model(
            WanArchitecture(**model["architecture"]),
            args.out,
            num_experts=model.get("num_experts", 1),
            layout=args.layout,
            num_shards=args.shards,
            dtype=DTYPES[args.dtype],
            seed=args.seed,
            device=args.device,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = "" if error.filename in (None, str(args.out)) else f" ({error.filename})"
        print(
            f"error: cannot write {args.out}: {error.strerror}{place}; write another --out", file=sys.stderr
        )
        return 2
    for file in files:
        print(f"{file}  {file.stat().st_size / 2**20:,.1f} MiB")
    return 0


def read_model(name: str) -> dict[str, Any]:
    """conf/model/<name>.yaml as a table; raises UserError with the valid names for an unknown one."""
    names = sorted(path.stem for path in MODELS.glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown model {name!r}; choose one of {', '.join(names)}")
    return yaml.safe_load((MODELS / f"{name}.yaml").read_text())


def check_device(name: str) -> None:
    """Raises UserError for a device that torch does not know or find."""
    if not (found := re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)):
        raise UserError(f"--device is {name!r}; write cpu or cuda:0")
    count = torch.cuda.device_count()
    if name != "cpu" and int(found[1] or 0) >= count:
        choices = " or ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise UserError(f"--device is {name!r} and torch finds {count} CUDA devices; write {choices}")


if __name__ == "__main__":
    sys.exit(main())
