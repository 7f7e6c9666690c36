"""Sweeps: which runs, in what order, which of them again, and what a person sees meanwhile."""

from wanexp.sweep.run import SweepCell, SweepRun, outer_rank, sweep_name_of

__all__ = ["SweepCell", "SweepRun", "outer_rank", "sweep_name_of"]
