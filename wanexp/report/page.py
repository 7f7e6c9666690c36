"""A page as a list of blocks, and the two forms that it takes: one HTML file that loads nothing, and Markdown.

Every text is escaped here and nowhere else: names, messages and commands come from records, and a record can come
from anywhere.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from wanexp.report.drawing import Drawn


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Terms:
    """Answers: each a term in bold and what is said of it."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells are text; columns that hold numbers are given by `numeric` (their places)."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    drawn: Drawn


Block = Heading | Text | Terms | Table | Code | Picture

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem;margin-bottom:.3rem}h2{margin-top:2.4rem;border-bottom:1px solid #ddd}h3{margin-top:1.6rem}
dl.answers{background:#f4f7fa;border-left:4px solid #0072B2;padding:.8rem 1rem;margin:1rem 0}
dl.answers dt{font-weight:700}dl.answers dd{margin:0 0 .5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.87rem;margin:.6rem 0}
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #e4e4e4;vertical-align:top}
td:first-child{white-space:nowrap}
th{border-bottom:2px solid #999;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{background:#f6f6f6;padding:.6rem .8rem;overflow-x:auto;font-size:.82rem}
figure{margin:1.2rem 0}img{max-width:100%;height:auto}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page can load nothing, whatever is in it


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """A whole HTML document; figures are inline SVG images."""
    body = "\n".join(map(_block_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def to_markdown(blocks: Sequence[Block], *, figures: str | None = "figures") -> str:
    """GitHub's Markdown. figures: folder of the PNG files, relative to the page; None leaves them out."""
    return "\n\n".join(text for block in blocks if (text := _block_markdown(block, figures))) + "\n"


def _block_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Terms(pairs):
            items = "".join(
                f"<dt>{html.escape(term)}</dt><dd>{html.escape(said)}</dd>" for term, said in pairs
            )
            return f'<dl class="answers">{items}</dl>'
        case Table(head, rows, numeric):
            lines = [_row_html("th", head, numeric), *(_row_html("td", row, numeric) for row in rows)]
            return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(drawn):
            data = base64.b64encode(drawn.svg).decode()
            alt = html.escape(drawn.alt, quote=True)
            return f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></figure>'


def _row_html(tag: str, row: Sequence[str], numeric: Sequence[int]) -> str:
    cells = (
        f"<{tag}{' class=n' if place in numeric else ''}>{html.escape(text)}</{tag}>"
        for place, text in enumerate(row)
    )
    return f"<tr>{''.join(cells)}</tr>\n"


def _block_markdown(block: Block, figures: str | None) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Text(text):
            return escape_markdown(text)
        case Terms(pairs):
            return "\n".join(
                f"* **{escape_markdown(term)}**: {escape_markdown(said)}" for term, said in pairs
            )
        case Table(head, rows, numeric):
            rule = ["---:" if place in numeric else "---" for place in range(len(head))]
            lines = [map(escape_markdown, head), rule, *(map(escape_markdown, row) for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Code(text):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{text}\n{fence}"
        case Picture(drawn):
            return f"![{escape_markdown(drawn.alt)}]({figures}/{drawn.name}.png)" if figures else ""


def escape_markdown(text: str) -> str:
    """`text` on one line with nothing in it that Markdown or the HTML inside it would act on."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|~])|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", lambda found: "\\" + found[0], line)
