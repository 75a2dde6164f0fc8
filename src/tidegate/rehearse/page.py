"""A rehearsal as one page to pass on, which loads nothing from elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tidegate.rehearse.tables import Table

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:2rem auto;
max-width:62rem;padding:0 1rem;color:#222;background:#fff}
svg{width:100%;height:auto}h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td.figure,th.figure{text-align:right}
@media (prefers-color-scheme:dark){body{color:#d5d7da;background:#16181c}
th,td{border-color:#33373d}}
"""


def page_of(title: str, sentence: str, svg: str, tables: Sequence[Table]) -> str:
    """HTML."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title>",
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(sentence)}</p>{svg}",
    ]
    for table in tables:
        parts.append(f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>')
        figures = [table.holds_figures(number) for number in range(len(table.columns))]
        parts += [_cell("th", *cell) for cell in zip(table.columns, figures, strict=True)]
        parts.append("</tr></thead><tbody>")
        for row in table.rows:
            cells = (_cell("td", *cell) for cell in zip(row, figures, strict=True))
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</tbody></table></div>")
    return "\n".join([*parts, "</body></html>", ""])


def _cell(tag: str, text: str, figure: bool) -> str:
    kind = ' class="figure"' if figure else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"
