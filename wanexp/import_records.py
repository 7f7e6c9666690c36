"""Import records into MLflow: after a dead server, from a GPU node without network, or into another store.

A record that is there already is left alone, so a whole tree can be imported again and again. Each sweep in it gets
its report and its summary run, which replaces an older one.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, read_record
from wanexp.report.finish import finish_sweep
from wanexp.tracking.location import resolve_uri
from wanexp.tracking.mlflow_store import track


def find_records(paths: Sequence[Path]) -> Iterator[Path]:
    """Every record.json among `paths` and below them; a path that is no folder is taken for a record."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob(FILE_NAME))
        else:
            yield path


def sweep_folders(paths: Sequence[Path]) -> list[Path]:
    """Folders of whole sweeps among `paths` and below them."""
    trees = [path for path in paths if path.is_dir()]
    return sorted({found.parent for tree in trees for found in tree.rglob("sweep.json")})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all records are in MLflow, 1 when one is not, 2 for bad usage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="records, run folders, or trees of them")
    parser.add_argument("--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--experiment", default=TrackingConfig.experiment, help="default: %(default)s")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.paths if not path.exists()]
    if missing:
        parser.error(f"there is no {', '.join(missing)}")
    paths = list(dict.fromkeys(find_records(options.paths)))
    if not paths:
        parser.error(f"there is no {FILE_NAME} below {', '.join(map(str, options.paths))}")
    try:
        resolve_uri(options.uri)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tracking = TrackingConfig(uri=options.uri, experiment=options.experiment)
    states: Counter[str] = Counter()
    for path in paths:
        try:
            tracked = track(read_record(path), path.parent, tracking, many=True)
        except UserError as error:
            states["failed"] += 1
            print(f"failed   {error}")
            continue
        states[tracked.state] += 1
        detail = tracked.lines[0] if tracked.state == "failed" else tracked.run_url or ""
        print(f"{tracked.state:8} {path}  {detail}", flush=True)
    for folder in sweep_folders(options.paths):
        print(*finish_sweep(folder, tracking), sep="\n")
    print(f"{states['logged']} logged, {states['present']} already there, {states['failed']} failed")
    return 1 if states["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
