"""wanexp: run, measure and compare every way of spreading a WanVideo transformer over GPUs."""

__version__ = "0.1.0"
