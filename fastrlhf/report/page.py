"""The look of report.html and the only places where data becomes markup: every string passes `esc`.

No script, no external resource; a content security policy forbids both, should a string ever slip through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fastrlhf.runtime.console import clean, number, redact

TEXT_LIMIT = 700
CSS = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #16171a; --soft: #4a4d55;
  --muted: #6c707a; --line: #e3e3df; --series-1: #2a6fd0; --series-2: #d9601f; --good: #17764a; --good-bg: #e4f4ea;
  --bad: #b3261e; --bad-bg: #fce8e6; --warn-bg: #fdf3dc; --warn: #7a5200; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121316; --card: #1c1d21; --ink: #f0f0ee; --soft: #c2c4ca; --muted: #989ca6; --line: #33353b;
    --series-1: #5f9df0; --series-2: #ee8648; --good: #6fd39b; --good-bg: #17331f; --bad: #ff8a80;
    --bad-bg: #41201d; --warn-bg: #3a2f14; --warn: #f1c65b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
  "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: clamp(21px, 3vw, 29px); line-height: 1.3; font-weight: 650; margin: 6px 0 10px; max-width: 46em;
  text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 4px; font-weight: 650; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 22px 0 8px; font-weight: 600; }
p { margin: 4px 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
.eyebrow, .sub, .hint, figcaption p, dt { color: var(--muted); font-size: 13px; }
.eyebrow { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 12px; font-weight: 600;
  white-space: nowrap; background: var(--line); color: var(--soft); }
.badge.good { background: var(--good-bg); color: var(--good); }
.badge.bad { background: var(--bad-bg); color: var(--bad); }
.badge.warn { background: var(--warn-bg); color: var(--warn); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 16px 0 0; font-size: 14px; }
a { color: var(--series-1); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 195px), 1fr)); gap: 12px;
  margin: 20px 0 0; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles.bars { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.tile { padding: 12px 14px 13px; min-width: 0; }
.tile.bad { border-color: var(--bad); }
.tile .name { color: var(--muted); font-size: 13px; }
.tile .value { font-size: 22px; white-space: nowrap; font-weight: 620; line-height: 1.35;
  font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile .note { color: var(--soft); font-size: 13px; }
.tile .arrow { color: var(--muted); font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 14px;
  margin-top: 12px; }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
figure { margin: 0; padding: 13px 14px 8px; min-width: 0; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; margin-top: auto; }
figure [id*="halo"] text { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
figcaption { margin-bottom: 8px; overflow-wrap: anywhere; }
figcaption strong { font-size: 15px; font-weight: 620; }
figcaption p { margin: 1px 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); }
.swatch { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.swatch.train { background: var(--series-1); }
.swatch.held { background: var(--series-2); }
figure.missing { border: 2px dashed var(--bad); background: var(--bad-bg); }
figure.missing p { color: var(--bad); font-weight: 600; font-size: 14px; }
.card { padding: 4px 16px; margin-top: 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; }
th, td { padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
td { overflow-wrap: anywhere; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.num { text-align: right; }
.text { white-space: pre-wrap; }
.more { color: var(--muted); font-size: 12px; }
.from { color: var(--muted); font-size: 12px; display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: center;
  margin-bottom: 3px; }
.samples { table-layout: fixed; }
.samples th:first-child { width: 24%; }
.share th:last-child { width: 34%; }
.share td { overflow-wrap: normal; }
.events td:first-child { white-space: nowrap; }
.bar { margin-top: 7px; height: 8px; border-radius: 4px; background: var(--series-1); min-width: 1px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono CJK SC", monospace; }
code { overflow-wrap: anywhere; }
pre { margin: 8px 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--series-1); font-size: 14px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 28px;
  align-items: start; }
.columns > div { min-width: 0; }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) {
  main { padding: 18px 14px 48px; }
  .stack thead { display: none; }
  .stack tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  .stack tr:last-child { border-bottom: 0; }
  .stack td { display: block; border: 0; padding: 4px 0; }
  .stack td[data-label]::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: 12px; }
  .stack td:empty { display: none; }
  .share th, .share td { padding-right: 8px; }
  .share th:last-child { width: 16%; }
  .tiles, .tiles.bars { grid-template-columns: 1fr 1fr; }
  .tile .value { font-size: 18px; }
}
@media print {
  body { background: #fff; }
  figure, .tile, tr { break-inside: avoid; }
}
"""


def esc(value: Any) -> str:
    """Any value as text that HTML cannot take for markup: no controls, no bidi overrides, no credentials."""
    return escape(redact(clean(str(value))), quote=True)


def figure_of(value: float | None) -> str:
    """A number as a person reads it: as many decimals as say something, a true minus sign."""
    if value is None:
        return "n/a"
    size = abs(value)
    if 10 <= size < 1e4 and value == int(value):
        return f"{int(value)}".replace("-", "\u2212")
    text = f"{value:.2f}" if 0.1 <= size < 10 else f"{value:.1f}" if 10 <= size < 1000 else number(value)
    return text.replace("-", "\u2212") if "e" not in text else text


def page(title: str, body: str) -> str:
    """The whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def badge(text: str, kind: str = "") -> str:
    return f'<span class="badge {kind}">{esc(text)}</span>'


def tile(name: str, value: str, note: str = "", *, bad: bool = False) -> str:
    """One figure of merit. `value` may hold an arrow: "0.1 → 0.9"."""
    shown = esc(value).replace("→", '<span class="arrow">→</span>')
    return (
        f'<div class="tile{" bad" if bad else ""}"><div class="name">{esc(name)}</div>'
        f'<div class="value">{shown}</div><div class="note">{esc(note)}</div></div>'
    )


def figure(figure_id: str, title: str, svg: str, hint: str, legend: Sequence[tuple[str, bool]] = ()) -> str:
    """A curve with its caption; legend: (label, whether held out), shown when there are two."""
    keys = "".join(
        f'<span><i class="swatch {"held" if held else "train"}"></i>{esc(label)}</span>' for label, held in legend
    )
    keys = f'<div class="legend">{keys}</div>' if len(legend) > 1 else ""
    return (
        f'<figure id="{figure_id}"><figcaption><strong>{esc(title)}</strong><p>{esc(hint)}</p>{keys}</figcaption>'
        f"{svg}</figure>"
    )


def missing(figure_id: str, title: str, why: str) -> str:
    """What stands in for a figure that cannot be drawn: as large and as loud as a figure."""
    return (
        f'<figure id="{figure_id}" class="missing"><figcaption><strong>{esc(title)}</strong></figcaption>'
        f"<p>No figure: {esc(why)}</p></figure>"
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "stack", numbers: Sequence[int] = ()
) -> str:
    """A table in a card. Cells are markup already (use `esc`); `numbers`: columns set right."""
    kinds = ['class="num"' if i in numbers else "" for i in range(len(header))]
    head = "".join(f"<th {kind}>{esc(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td {kind} data-label="{esc(name)}">{cell}</td>' if cell else "<td></td>"
            for cell, name, kind in zip(row, header, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text_cell(text: Any, source: str = "") -> str:
    """A model's text, shortened; `source` is markup for the line above it (step, score)."""
    text = str(text)
    rest = len(text) - TEXT_LIMIT
    more = f'<div class="more">… {rest:,} more characters</div>' if rest > 0 else ""
    above = f'<div class="from">{source}</div>' if source else ""
    # Cut before cleaning: a reply of a megabyte must not cost more than a short one.
    return f'{above}<div class="text" dir="auto">{esc(text[:TEXT_LIMIT])}</div>{more}'
