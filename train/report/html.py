"""The frame of all HTML pages: one file without scripts that needs no network, light or dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --back: #ffffff; --line: #d0d7de;
  --soft: #f6f8fa; --mark: #009e73 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dce2; --back: #15181c; --line: #3b424b; --soft: #1e2329 } }
body { margin: 2rem auto; padding: 0 1.2rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin-bottom: .4rem }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line) }
figure { margin: 0 } figure svg { width: 100%; height: auto }
img { max-width: 100%; height: auto; background: #ffffff }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top }
thead th { background: var(--soft); border-bottom-width: 2px }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--soft) }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.legend { position: sticky; top: 0; background: var(--back); padding: .5rem 0; z-index: 1;
  display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; border-bottom: 1px solid var(--line) }
.legend svg { vertical-align: middle; margin-right: .4rem }
.lead { font-size: 1.1rem; background: var(--soft); border-left: 4px solid var(--mark);
  padding: .7rem 1rem }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto }
footer { margin-top: 2rem; font-size: .85rem; opacity: .75 }
"""


def document(title: str, *parts: str, width: str = "76rem") -> str:
    """Makes the page: head, style, the title as a heading, and parts in HTML below it.

    `width` is the largest width of the text, in CSS.
    """
    name = html.escape(title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>",
            f"<style>{_STYLE}body {{ max-width: {width} }}</style></head><body>",
            f"<h1>{name}</h1>",
            *parts,
            "</body></html>",
        ]
    )


def table(headings: Sequence[str], body: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Makes a table; the first `text_columns` columns hold text, the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{'' if i < text_columns else ' class=n'}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    rows = "".join(line(cells, "td") for cells in body)
    return (
        f"<div class='scroll'><table><thead>{line(headings, 'th')}</thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def image(png: Path, description: str) -> str:
    """Puts a PNG file into the page."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def command_line(command: str) -> str:
    """Shows a command to copy."""
    return f"<pre>{html.escape(command)}</pre>"
