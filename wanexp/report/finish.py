"""The end of a sweep: its report and its summary run. What these need (matplotlib, mlflow) is imported late."""

from pathlib import Path

from wanexp.config import TrackingConfig
from wanexp.tracking.location import tool_command


def finish_sweep(folder: Path, tracking: TrackingConfig) -> list[str]:
    """Write the report of the sweep in `folder`, and its summary run where tracking is on. Returns lines to print.

    Raises nothing: the records are safe, and the report can be made from them at any time.
    """
    try:
        from wanexp.report.collect import read_sweep
        from wanexp.report.command import write_report
        from wanexp.report.compose import compose
        from wanexp.report.summary import track_summary

        sweep = read_sweep(folder)
        report = compose(sweep)
        pages = write_report(report, folder)
    except ImportError as error:
        problem = f"{error.name} is not installed; pip install {error.name}"
    except Exception as error:  # a full disk, a broken record, a mistake of ours
        problem = f"{type(error).__name__}: {error}"
    else:
        lines = [*(f"{term}: {said}" for term, said in report.headline), f"report: {pages[0]}"]
        return lines + (track_summary(sweep, report, folder, tracking).lines if tracking.enabled else [])
    again = tool_command("report.py", "wanexp.report.command", folder)
    return [f"the report was not written: {problem}", f"  to write it later: {again}"]
