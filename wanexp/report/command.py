"""Write the report on a sweep: one HTML page, the same in Markdown, its figures as PNG and SVG, the runs as JSON.

With --against an older sweep it also says which cells got slower; noise alone hardly ever looks like that
(docs/reviewing.md has the rates).
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.report.cells import Sweep
from wanexp.report.collect import read_sweep
from wanexp.report.compose import Report, compose
from wanexp.report.page import to_html, to_markdown
from wanexp.tracking.describe import clean_key

HTML, MARKDOWN, RUNS, FIGURES = "report.html", "report.md", "runs.json", "figures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a cell got worse than in the sweep of --against, 2 where there is no report."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument(
        "sweep", nargs="?", type=Path, help="folder of a sweep, multirun/NAME, or a tree of records"
    )
    parser.add_argument("--mlflow", metavar="NAME", help="take the sweep of this name or id from MLflow")
    parser.add_argument(
        "--against", metavar="SWEEP", help="an older sweep: its folder, or its name in MLflow"
    )
    parser.add_argument("--baseline", help="the cell to compare with, by label or mode; default: mode none")
    parser.add_argument("--out", type=Path, help="default: the folder of the sweep; from MLflow report_NAME")
    parser.add_argument("--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--experiment", default=TrackingConfig.experiment, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if (options.sweep is None) == (options.mlflow is None):
        parser.error("write the folder of a sweep, or --mlflow and its name")
    tracking = TrackingConfig(uri=options.uri, experiment=options.experiment)
    try:
        sweep = read_sweep(options.sweep) if options.sweep else _from_mlflow(options.mlflow, tracking)
        before = _older(options.against, tracking) if options.against else None
        report = compose(sweep, before=before, baseline=options.baseline)
        folder = options.out or options.sweep or Path(f"report_{clean_key(options.mlflow).replace('/', '_')}")
        paths = write_report(report, folder)
    except (UserError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # a mistake of ours; uncaught it would end with 1
        traceback.print_exc()
        return 2
    for term, said in report.headline:
        print(f"{term}: {said}")
    for regression in report.regressions:
        print(f"Regression: {regression}")
    if report.against:
        print(report.against)
    print(*paths, sep="\n")
    return 1 if report.regressions else 0


def write_report(report: Report, folder: Path) -> list[Path]:
    """Both pages, the figures and the data, into `folder`; figures of an older report that are no longer made go."""
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    for drawn in report.figures:
        (figures / f"{drawn.name}.png").write_bytes(drawn.png)
        (figures / f"{drawn.name}.svg").write_bytes(drawn.svg)
    made = {drawn.name for drawn in report.figures}
    before = (folder / MARKDOWN).read_text() if (folder / MARKDOWN).is_file() else ""
    for name in set(re.findall(rf"\({FIGURES}/([\w.-]+)\.png\)", before)) - made:
        for suffix in (".png", ".svg"):
            (figures / f"{name}{suffix}").unlink(missing_ok=True)
    (folder / HTML).write_text(to_html(report.title, report.blocks))
    (folder / MARKDOWN).write_text(to_markdown(report.blocks, figures=FIGURES))
    (folder / RUNS).write_text(json.dumps(report.runs, indent=1) + "\n")
    return [folder / HTML, folder / MARKDOWN]


def _older(name: str, tracking: TrackingConfig) -> Sweep:
    """A sweep by its folder, else by its name or id in MLflow."""
    return read_sweep(Path(name)) if Path(name).is_dir() else _from_mlflow(name, tracking)


def _from_mlflow(name: str, tracking: TrackingConfig) -> Sweep:
    from wanexp.report.fetch import fetch_sweep  # mlflow takes seconds to import

    return fetch_sweep(name, tracking)


if __name__ == "__main__":
    sys.exit(main())
