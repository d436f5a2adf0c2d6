"""The frame of the report's HTML page, and its tables. Everything is in the one file; texts of a run are escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from btlm_jax.display.html_chart import SCRIPT, STYLE
from btlm_jax.display.progress import printable

_PAGE_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#646a73;--line:#cfd3d8;--grid:#ebedf0;
 --restart:#c2410c;--accent:#1d4ed8;--good:#15803d;--bad:#b91c1c;--warn:#b45309;
 --c0:#1d4ed8;--c1:#d97706;--c2:#059669;--c3:#be185d;--c4:#7c3aed;--c5:#0e7490;--c6:#65a30d;--c7:#78716c;
 --b0:#1d4ed8;--b1:#93c5fd;--b2:#7c3aed;--b3:#d97706;--b4:#dc2626;--b5:#9ca3af;--b6:#0e7490;--b7:#5eead4;--b8:#059669;
 --b9:#65a30d;--b10:#be185d;--b11:#57534e}
@media (prefers-color-scheme:dark){:root{--page:#141618;--card:#1b1e21;--ink:#e6e8ea;--soft:#9aa1aa;--line:#3b4047;
 --grid:#272b30;--restart:#fb923c;--accent:#7aa2ff;--good:#4ade80;--bad:#f87171;--warn:#fbbf24;
 --c0:#7aa2ff;--c1:#fbbf24;--c2:#34d399;--c3:#f472b6;--c4:#a78bfa;--c5:#22d3ee;--c6:#a3e635;--c7:#a8a29e;
 --b0:#5b8cff;--b1:#274a8f;--b2:#a78bfa;--b3:#fbbf24;--b4:#f87171;--b5:#6b7280;--b6:#22d3ee;--b7:#115e59;--b8:#34d399;
 --b9:#a3e635;--b10:#f472b6;--b11:#a8a29e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
 Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.2rem 1.4rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 1rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:1.4rem 0 .5rem}
p{margin:.4rem 0 .9rem}
.lead{color:var(--soft);margin:0 0 1.4rem}
.pill{display:inline-block;padding:.05rem .6rem;border-radius:1rem;font-size:.85rem;font-weight:600;margin-right:.4rem;
 border:1px solid currentColor}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}.accent{color:var(--accent)}
.none{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.8rem;margin:0 0 1rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.3rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.82rem;display:block;line-height:1.35}
.tile .other{color:var(--c2);font-size:1rem;font-weight:600;margin-top:.1rem}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 2rem}
.scroll{overflow-x:auto;margin:0 0 1rem}
table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
th{font-weight:600;color:var(--soft);border-bottom-color:var(--line);white-space:nowrap}
th.n,td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.code,code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.84em}
td.code{overflow-wrap:anywhere}
td:first-child{white-space:nowrap}
tr.first td{background:color-mix(in srgb,var(--c1) 16%,transparent)}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .9rem;margin:.3rem 0 1rem;
 white-space:pre-wrap;overflow-wrap:anywhere}
blockquote{margin:.3rem 0 1rem;padding:.5rem .9rem;border-left:3px solid var(--accent);background:var(--card);
 white-space:pre-wrap;overflow-wrap:anywhere}
blockquote em{font-style:normal;color:var(--soft)}
details summary{cursor:pointer;color:var(--accent);margin:.4rem 0}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.88rem;margin:0 0 1.4rem}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
footer{margin-top:3rem;color:var(--soft);font-size:.82rem}
@media (max-width:46rem){main{padding:1.3rem 1rem 3rem}.two{grid-template-columns:minmax(0,1fr)}
 .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile b{font-size:1.12rem}.plot{height:13rem;margin-left:3rem;
 margin-right:.2rem}.wide .plot{height:15rem}.xtitle{margin-left:3rem}h1{font-size:1.35rem}}
@media print{body{background:#fff}details{display:none}}
"""


def text(value: object) -> str:
    """Return a text of a run as HTML; control characters, and what is no character, are replaced."""
    return html.escape(printable(str(value)), quote=True)


def page(title: str, sections: Sequence[tuple[str, str]], *, head: str, footer: str) -> str:
    """Return the page: a title, what comes before the sections, the sections by name, a last line."""
    named = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#s{number}">{text(name)}</a>' for number, (name, _) in enumerate(named))
    body = "".join(
        f'<section id="s{number}"><h2>{text(name)}</h2>{body}</section>' for number, (name, body) in enumerate(named)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body><main>"
        f"<h1>{text(title)}</h1>{head}<nav>{links}</nav>{body}<footer>{text(footer)}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return tiles of (value, what it is, the other run's value or "")."""
    made = (
        f'<div class="tile"><b>{text(value)}</b>'
        + (f'<span class="other">{text(other)}</span>' if other else "")
        + f"<span>{text(name)}</span></div>"
        for value, name, other in rows
        if value or other
    )
    return f'<div class="tiles">{"".join(made)}</div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    code: Sequence[int] = (),
    marked: int = -1,
) -> str:
    """Return a table; columns `right` are of numbers, columns `code` of code, the row `marked` stands out."""
    if not rows:
        return ""
    kinds = {**{number: ' class="code"' for number in code}, **{number: ' class="n"' for number in right}}

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{kinds.get(number, '')}>{text(cell)}</{tag}>" for number, cell in enumerate(row))

    body = "".join(
        f"<tr{' class=first' if number == marked else ''}>{cells(row, 'td')}</tr>" for number, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def details(summary: str, body: str) -> str:
    """Return what is shown when it is clicked on."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>" if body else ""
