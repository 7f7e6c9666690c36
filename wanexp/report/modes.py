"""What the report must know of a mode: which axis it belongs on, and how it is drawn. One colour a mode everywhere.

Colours are Okabe and Ito's and Paul Tol's muted ones, which stay apart for colour-blind readers; the marker says the
same again.
"""

from typing import NamedTuple

LATENCY, THROUGHPUT = "latency", "throughput"
KIND_IN_WORDS = {LATENCY: "one sample a step", THROUGHPUT: "samples side by side"}


class Style(NamedTuple):
    kind: str  # LATENCY: all GPUs on one sample; THROUGHPUT: samples side by side
    colour: str
    marker: str


STYLES = {
    "none": Style(LATENCY, "#000000", "o"),
    "block_distribution": Style(LATENCY, "#0072B2", "s"),
    "cfg_parallel": Style(LATENCY, "#E69F00", "D"),
    "context_parallel": Style(LATENCY, "#009E73", "^"),
    "tensor_parallel": Style(LATENCY, "#CC79A7", "v"),
    "hybrid": Style(LATENCY, "#D55E00", "P"),
    "data_parallel": Style(THROUGHPUT, "#56B4E9", "<"),
    "distributed": Style(THROUGHPUT, "#882255", ">"),
    "fsdp": Style(THROUGHPUT, "#999933", "X"),
}
UNKNOWN = Style(LATENCY, "#777777", "*")


def style_of(mode: str) -> Style:
    """The mode's style; that of UNKNOWN for a record of a mode which this version does not know."""
    return STYLES.get(mode, UNKNOWN)
