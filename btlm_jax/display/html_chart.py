"""Charts as HTML with inline SVG: lines, bands and points over two axes, and a stacked bar. No plotting library.

The plot is stretched to the width of the page, and labels are text of the page, so that they can be read at any width.
Colours are the page's CSS variables --c0 to --c7. With SCRIPT in the page, the values below the pointer are shown.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from btlm_jax.display.progress import printable

NUM_COLOURS, NUM_BAR_COLOURS = 8, 12  # of lines, of parts of a bar
MAX_POINTS = 500  # of a line: of more, the mean of about so many bins, with a band from their least to their greatest
_WIDTH, _HEIGHT = 1000, 400  # of the SVG's own coordinates
_TICKS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart, of the points that are finite, in order of x."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    has_points: bool = False  # drawn beside the line
    has_band: bool = False  # from least to greatest, where several points are one
    is_dashed: bool = False
    is_faint: bool = False  # and not in the legend
    breaks: tuple[float, ...] = ()  # x at which the line is interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line, with a label if it has one."""

    x: float
    label: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows, and how its numbers are written."""

    title: str
    text: Callable[[float], str]
    is_log: bool = False
    limits: tuple[float, float] | None = None  # None: all points
    begins_at_zero: bool = False


def line_chart(series: Sequence[Series], *, x: Axis, y: Axis, marks: Sequence[Mark] = (), note: str = "") -> str:
    """Return a chart as HTML, or a sentence if no point can be drawn."""
    drawn = [each for each in map(_finite, series) if len(each.x)]
    if y.is_log:
        drawn = [each for each in map(_positive, drawn) if len(each.x)]
    if not drawn:
        return f'<p class="none">{_text(y.title)}: nothing to draw yet</p>'
    to_x = _Scale(x, [each.x for each in drawn])
    to_y = _Scale(y, [each.y for each in drawn])
    lines = "".join(_marks(marks, to_x)) + "".join(_grid(to_y)) + "".join(_lines(drawn, to_x, to_y))
    labels = [
        f'<span class="xt" style="left:{100 * at:.2f}%">{_text(x.text(value))}</span>' for value, at in to_x.ticks()
    ] + [f'<span class="yt" style="bottom:{100 * at:.2f}%">{_text(y.text(value))}</span>' for value, at in to_y.ticks()]
    named = [mark for mark in marks if mark.label and 0 <= to_x(mark.x) <= 1]
    labels += [
        f'<span class="mark" style="left:{100 * to_x(mark.x):.2f}%">{_text(mark.label)}</span>' for mark in named
    ]
    legend = "".join(
        f'<span class="key"><i class="c{each.colour % NUM_COLOURS}{" dashed" if each.is_dashed else ""}"></i>'
        f"{_text(each.label)}</span>"
        for each in drawn
        if each.label != y.title and not each.is_faint
    )
    return (
        f'<figure class="chart"><figcaption><b>{_text(y.title)}</b><span class="legend">{legend}</span></figcaption>'
        f'<div class="plot" data-x="{to_x.data()}" data-y="{to_y.data()}"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{_text(y.title)}">{lines}</svg>{"".join(labels)}</div>'
        f'<p class="xtitle">{_text(x.title)}{" · " + _text(note) if note else ""}</p></figure>'
    )


def stacked_bar(parts: Sequence[tuple[str, float, str, int]]) -> str:
    """Return a bar of (name, amount, text of the amount, number of the colour), and its legend.

    Its colours are the page's variables --b0 to --b11.
    """
    total = sum(amount for _, amount, _, _ in parts)
    if total <= 0:
        return '<p class="none">nothing to draw yet</p>'
    bars, keys = [], []
    for name, amount, text, number in parts:
        colour = f"b{min(number, NUM_BAR_COLOURS - 1)}"
        share = f"{amount / total:.1%}"
        bars.append(
            f'<span class="{colour}" style="width:{100 * amount / total:.3f}%" '
            f'title="{_text(f"{name}: {text}, {share}")}"></span>'
        )
        keys.append(f'<span><i class="{colour}"></i>{_text(name)}<b>{_text(text)}</b><em>{share}</em></span>')
    return f'<div class="bar">{"".join(bars)}</div><div class="keys">{"".join(keys)}</div>'


class _Scale:
    """From values of an axis to 0...1."""

    def __init__(self, axis: Axis, values: Sequence[np.ndarray]):
        low, high = axis.limits or (min(map(np.min, values)), max(map(np.max, values)))
        self.is_log, self._text = axis.is_log, axis.text
        self.low, self.high = map(float, (low, high))
        if axis.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
        low = 0.0 if axis.begins_at_zero else low
        margin = 0.0 if axis.limits else 0.03 * (high - low)
        if high - low <= 1e-12 * max(abs(high), abs(low), 1e-30):
            margin = abs(high) * 0.1 or 0.5
        self._low, self._high = low - margin * (not axis.begins_at_zero), high + margin

    def __call__(self, value):
        return ((np.log10(value) if self.is_log else value) - self._low) / (self._high - self._low)

    def data(self) -> str:
        return f"{self._low:.9g},{self._high:.9g},{int(self.is_log)}"

    def ticks(self) -> list[tuple[float, float]]:
        """Return (value, place) of round numbers."""
        if self.is_log:
            decades = range(max(math.floor(self._low), -300), min(math.ceil(self._high), 300) + 1)
            stride = max(1, round(len(decades) / (_TICKS + 1)))
            factors = (1, 2, 5) if len(decades) <= 3 else (1,)
            values = [factor * 10.0**decade for decade in decades if decade % stride == 0 for factor in factors]
        else:
            step = _round_step((self._high - self._low) / _TICKS)
            first = math.ceil(self._low / step)
            values = [index * step for index in range(first, math.floor(self._high / step) + 1)]
        places = [(value, float(self(value))) for value in values]
        return [(value, at) for value, at in places if -1e-9 <= at <= 1 + 1e-9]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _finite(series: Series) -> Series:
    keep = np.isfinite(series.x) & np.isfinite(series.y)
    return dataclasses.replace(series, x=series.x[keep], y=series.y[keep])


def _positive(series: Series) -> Series:
    keep = series.y > 0
    return dataclasses.replace(series, x=series.x[keep], y=series.y[keep])


def _grid(to_y: _Scale) -> list[str]:
    return [
        f'<path class="grid" d="M0,{_HEIGHT * (1 - at):.1f}H{_WIDTH}" vector-effect="non-scaling-stroke"/>'
        for _, at in to_y.ticks()
    ]


def _marks(marks: Sequence[Mark], to_x: _Scale) -> list[str]:
    return [
        f'<path class="{"phase" if mark.label else "restart"}" d="M{_WIDTH * to_x(mark.x):.1f},0V{_HEIGHT}" '
        f'vector-effect="non-scaling-stroke"/>'
        for mark in marks
        if 0 <= to_x(mark.x) <= 1
    ]


def _lines(drawn: Sequence[Series], to_x: _Scale, to_y: _Scale) -> list[str]:
    parts, lines = [], []
    for each in drawn:
        colour, paths, bands = f"c{each.colour % NUM_COLOURS}", [], []
        for x, y in _stretches(each):
            x, low, mean, high = binned(x, y, num_bins=max(2, MAX_POINTS * len(x) // len(each.x)))
            at, height = _WIDTH * to_x(x), [_HEIGHT * (1 - np.clip(to_y(v), -0.5, 1.5)) for v in (low, mean, high)]
            paths.append(_path(at, height[1]))
            if each.has_band and len(x) < len(y):
                bands.append(_path(np.concatenate([at, at[::-1]]), np.concatenate([height[0], height[2][::-1]])) + "Z")
        d = "".join(paths)
        if bands:
            parts.append(f'<path class="band {colour}" d="{"".join(bands)}"/>')
        style = "line" + " dashed" * each.is_dashed + " faint" * each.is_faint
        lines.append(
            f'<path class="{style} {colour}" d="{d}" data-label="{_text(each.label)}" '
            f'vector-effect="non-scaling-stroke"/>'
        )
        if each.has_points or len(each.x) == 1:
            dots = d.replace("L", "M").replace("M", "h0M").removeprefix("h0") + "h0"
            lines.append(f'<path class="points {colour}" d="{dots}" vector-effect="non-scaling-stroke"/>')
    return parts + lines


def _stretches(series: Series) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the points between the breaks."""
    edges = [0, *np.searchsorted(series.x, series.breaks).tolist(), len(series.x)]
    return [(series.x[a:b], series.y[a:b]) for a, b in itertools.pairwise(sorted(edges)) if b > a]


def binned(x: np.ndarray, y: np.ndarray, *, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x, and the least, mean and greatest y, of at most so many bins of as many points each; x ascends."""
    if len(x) <= num_bins:
        return x, y, y, y
    edges = np.linspace(0, len(x), num_bins + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    mean_x, mean_y = np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts
    return mean_x, np.minimum.reduceat(y, edges), mean_y, np.maximum.reduceat(y, edges)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _text(text: str) -> str:
    return html.escape(printable(text), quote=True)


STYLE = (
    """
.chart{margin:0 0 1.6rem;min-width:0}
.chart figcaption{display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:baseline;margin:0 0 .7rem}
.chart figcaption b{font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.82rem;color:var(--soft)}
.key{white-space:nowrap}
.key i{display:inline-block;width:1.1rem;border-top:2.5px solid;vertical-align:middle;margin-right:.35rem}
.key i.dashed{border-top-style:dashed}
.plot{position:relative;height:15rem;margin:0 .6rem 1.5rem 3.4rem;border-left:1px solid var(--line);
  border-bottom:1px solid var(--line)}
.wide .plot{height:21rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;display:block}
.plot .xt,.plot .yt,.plot .mark{position:absolute;font-size:.75rem;color:var(--soft);white-space:nowrap;
  font-variant-numeric:tabular-nums;line-height:1}
.plot .xt{top:calc(100% + .45rem);transform:translateX(-50%)}
.plot .yt{right:calc(100% + .45rem);transform:translateY(50%)}
.plot .mark{top:.3rem;padding-left:.3rem;color:var(--soft)}
.xtitle{margin:0 .6rem 0 3.4rem;font-size:.8rem;color:var(--soft);text-align:right}
.grid{stroke:var(--grid);stroke-width:1;fill:none}
.phase{stroke:var(--soft);stroke-width:1;stroke-dasharray:5 4;fill:none}
.restart{stroke:var(--restart);stroke-width:1;stroke-dasharray:1.5 3;fill:none}
.line{fill:none;stroke-width:1.7;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.38}
.line.dashed{stroke-dasharray:6 4}
.points{fill:none;stroke-width:6;stroke-linecap:round}
.band{stroke:none;opacity:.18}
.tip{position:absolute;top:.4rem;pointer-events:none;background:var(--card);border:1px solid var(--line);
  border-radius:.35rem;padding:.3rem .5rem;font-size:.75rem;line-height:1.4;white-space:nowrap;z-index:2;
  font-variant-numeric:tabular-nums;box-shadow:0 2px 8px rgb(0 0 0/.12)}
.cross{position:absolute;top:0;bottom:0;border-left:1px solid var(--soft);pointer-events:none}
.bar{display:flex;height:2.2rem;border-radius:.35rem;overflow:hidden;margin:0 0 .8rem}
.bar span{min-width:0}
.keys{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.15rem 2rem;font-size:.88rem;
  margin:0 0 1.4rem}
.keys span{display:flex;align-items:baseline;gap:.5rem;border-bottom:1px solid var(--grid);padding:.15rem 0}
.keys i{flex:none;width:.75rem;height:.75rem;border-radius:.15rem}
.keys b{margin-left:auto;font-weight:500;font-variant-numeric:tabular-nums}
.keys em{font-style:normal;color:var(--soft);min-width:3.6em;text-align:right;font-variant-numeric:tabular-nums}
"""
    + "".join(
        f".line.c{n},.points.c{n}{{stroke:var(--c{n})}}.band.c{n}{{fill:var(--c{n})}}"
        f".key i.c{n}{{border-color:var(--c{n})}}\n"
        for n in range(NUM_COLOURS)
    )
    + "".join(f".b{n}{{background:var(--b{n})}}\n" for n in range(NUM_BAR_COLOURS))
)

# Shows the values of every line at the pointer, from the lines' own coordinates.
SCRIPT = """
document.querySelectorAll('.plot').forEach(plot=>{
 const axis=name=>plot.dataset[name].split(',').map(Number),[x0,x1,xl]=axis('x'),[y0,y1,yl]=axis('y');
 const value=(share,a,b,log)=>{const v=a+share*(b-a);return log?10**v:v};
 const text=v=>{const a=Math.abs(v);return a>=1e4?Math.round(v).toLocaleString('en'):a>=100?v.toFixed(1):
  a>=1e-3||a==0?v.toPrecision(4):v.toExponential(2)};
 const lines=[...plot.querySelectorAll('.line')].map(p=>({label:p.dataset.label,
  colour:getComputedStyle(p).stroke,points:p.getAttribute('d').match(/-?[0-9.]+,-?[0-9.]+/g).map(q=>q.split(',').map(Number))}));
 let tip,cross;
 const leave=()=>{tip&&tip.remove();cross&&cross.remove();tip=cross=null};
 plot.addEventListener('pointermove',e=>{
  const box=plot.getBoundingClientRect(),share=Math.min(1,Math.max(0,(e.clientX-box.left)/box.width));
  if(!tip){tip=document.createElement('div');tip.className='tip';cross=document.createElement('div');
   cross.className='cross';plot.append(cross,tip)}
  cross.style.left=100*share+'%';
  tip.replaceChildren(...lines.map(l=>{const at=share*1000,p=l.points.reduce((a,b)=>
   Math.abs(b[0]-at)<Math.abs(a[0]-at)?b:a),row=document.createElement('div');
   row.style.color=l.colour;row.textContent=l.label+'  '+text(value(1-p[1]/400,y0,y1,yl));return row}));
  const head=document.createElement('div');head.textContent=plot.closest('figure').querySelector('.xtitle').textContent
   .split(' \\u00b7 ')[0]+': '+text(value(share,x0,x1,xl));tip.prepend(head);
  tip.style.left=share<.5?`calc(${100*share}% + .6rem)`:'auto';
  tip.style.right=share<.5?'auto':`calc(${100*(1-share)}% + .6rem)`;
 });
 plot.addEventListener('pointerleave',leave);
});
"""
