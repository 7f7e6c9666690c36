"""The two kinds of table that the terminal gets."""

from rich import box
from rich.table import Table

LABEL_WIDTH = 12  # of the left column of `facts`


def facts() -> Table:
    """Two columns: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, min_width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    return table


def plain_table() -> Table:
    """Columns under a line, as narrow as can be."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
