"""Draw the figures of the documentation as SVG files beside this script: `python docs/drawings/draw.py`.

Sizes, orders and numbers come from the package's own functions. A figure is at most 560 units wide, so that its text
can be read on a phone, has its own background, and follows the reader's light or dark colours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from btlm_jax.attention.alibi import SPREAD, alibi_slopes, alibi_window
from btlm_jax.attention.alibi_lanes import NUM_LANES, NUM_PARTS, bfloat16_parts
from btlm_jax.data.order import TrainingOrder
from btlm_jax.parallel.mesh import balanced_head_order
from btlm_jax.recipe.curriculum import Curriculum, make_curriculum

FOLDER = Path(__file__).resolve().parent
WIDTH = 560
TOKENS_PER_STEP = 1920 * 2048
PAPER = dict(
    seq_len=(2048, 8192), batch_size=(1920, 480), num_tokens=(119_727 * TOKENS_PER_STEP, 39_909 * TOKENS_PER_STEP)
)
_STYLE = """
  .page { fill: #fcfcfd; stroke: #d8dbe2 }
  text { fill: #1f2430; font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
  .head { font-weight: 600 }
  .soft { fill: #59606e }
  .code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px }
  .a { fill: #bcd7f5 } .b { fill: #f9d3a8 } .c { fill: #c4e3c0 } .d { fill: #e3c9ea } .n { fill: #e7e9ee }
  .box { stroke: #6b7280; stroke-width: 1 }
  .line { stroke: #59606e; stroke-width: 1.5; fill: none }
  .tip { fill: #59606e }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1b1e26; stroke: #3a3f4b }
    text { fill: #e6e8ee }
    .soft { fill: #a8afbd }
    .a { fill: #264a73 } .b { fill: #74481a } .c { fill: #2c5b2c } .d { fill: #593a66 } .n { fill: #31353f }
    .box { stroke: #8b92a0 }
    .line { stroke: #a8afbd }
    .tip { fill: #a8afbd }
  }
"""
COLOURS = "abcd"


class Drawing:
    """An SVG being drawn; sizes are user units, text is text."""

    def __init__(self, *, height: int, title: str, description: str):
        self._height, self._title, self._description = height, title, description
        self._items: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, *, kind: str = "n", label: str = "") -> None:
        """Draw a filled rectangle with a label in its middle; `kind` is one of a, b, c, d, n (neutral)."""
        self._items.append(f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')
        if label:
            lines = label.split("\n")
            for number, line in enumerate(lines):
                self.text(
                    x + width / 2, y + height / 2 + 5 + 17 * (number - (len(lines) - 1) / 2), line, anchor="middle"
                )

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> None:
        """Write a line; `kind` is a class of the style sheet, or ""."""
        attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        self._items.append(f'<text{attributes} x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def head(self, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """Write a heading."""
        self.text(x, y, text, kind="head", anchor=anchor)

    def soft(self, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """Write a remark."""
        self.text(x, y, text, kind="soft", anchor=anchor)

    def code(self, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """Write a name from the code."""
        self.text(x, y, text, kind="code", anchor=anchor)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a straight arrow."""
        length = float(np.hypot(x2 - x1, y2 - y1))
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        bx, by = x2 - 9 * ux, y2 - 9 * uy
        points = f"{x2:g},{y2:g} {bx - 4 * uy:g},{by + 4 * ux:g} {bx + 4 * uy:g},{by - 4 * ux:g}"
        self.rule(x1, y1, bx, by)
        self._items.append(f'<polygon class="tip" points="{points}"/>')

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a line."""
        self._items.append(f'<path class="line" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>')

    def svg(self) -> str:
        """Return the file's contents."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}" width="{WIDTH}" '
            f'height="{self._height}" role="img" aria-labelledby="title description">\n'
            f'<title id="title">{escape(self._title)}</title>\n'
            f'<desc id="description">{escape(self._description)}</desc>\n'
            f"<style>{_STYLE}</style>\n"
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self._height - 1}" rx="8"/>\n'
            + "\n".join(self._items)
            + "\n</svg>\n"
        )


def system() -> Drawing:
    """Draw the way from raw text to a model in use, by verbs."""
    drawing = Drawing(
        height=236,
        title="From raw text to a model in use",
        description="btlm corpus makes a token store out of raw text. btlm train reads it in a 2k and an 8k phase and "
        "writes checkpoints. btlm convert and btlm generate use them. btlm plan and btlm tune check before.",
    )
    boxes = [
        (16, 78, "raw text", "n"),
        (116, 98, "token store", "a"),
        (236, 172, "2k phase \u2192 8k phase", "b"),
        (430, 114, "checkpoints", "c"),
    ]
    for x, width, label, kind in boxes:
        drawing.box(x, 74, width, 46, kind=kind, label=label)
    for left, right in zip(boxes, boxes[1:], strict=False):
        drawing.arrow(left[0] + left[1], 97, right[0], 97)
    drawing.head(16, 30, "One code and one set of config keys, from a laptop to a pod")
    drawing.code(105, 62, "btlm corpus", anchor="middle")
    drawing.code(322, 62, "btlm train", anchor="middle")
    drawing.soft(322, 140, "the same bits after kill -9", anchor="middle")
    for x, verb, first, second in (
        (16, "btlm plan", "compiles the steps", "for a TPU slice"),
        (156, "btlm tune", "checks the µP", "on a CPU"),
        (290, "btlm convert", "Hugging Face,", "GGUF, vLLM, 4 bits"),
        (438, "btlm generate", "streams text", "on a CPU"),
    ):
        drawing.code(x, 182, verb)
        drawing.soft(x, 201, first)
        drawing.soft(x, 218, second)
    drawing.arrow(460, 120, 360, 166)
    drawing.arrow(487, 120, 487, 166)
    return drawing


def mesh() -> Drawing:
    """Draw 8 devices: which part of a batch and of a stored weight each has, and a weight's gather and scatter."""
    fsdp, tensor = 4, 2
    drawing = Drawing(
        height=640,
        title="The mesh, and how a weight is gathered and its gradient scattered",
        description="Eight devices as fsdp 4 by tensor 2. A stored weight is split 8 ways along the model dim. For use "
        "it is cast to bfloat16, exchanged over tensor and gathered over fsdp, so that it is whole along the model dim "
        "and split along its hidden dim over tensor. A gradient goes back: reduce-scattered over fsdp in float32, then "
        "exchanged over tensor.",
    )
    drawing.head(16, 30, f"{fsdp * tensor} devices as fsdp {fsdp} × tensor {tensor} (its other axes 1)")
    for row in range(tensor):
        drawing.soft(16, 76 + 44 * row, f"tensor {row}")
        for column in range(fsdp):
            device = f"device {column * tensor + row}"
            drawing.box(90 + 112 * column, 52 + 44 * row, 104, 36, kind=COLOURS[column], label=device)
    for column in range(fsdp):
        drawing.soft(142 + 112 * column, 158, f"fsdp {column}", anchor="middle")
    drawing.soft(16, 186, "Colour = which quarter of the sequences a device has; the two devices of a")
    drawing.soft(16, 204, "colour share those sequences and split heads and d_ff.")

    drawing.head(16, 244, "A kernel [D, M], stored")
    drawing.soft(16, 262, "float32, D in 8 parts")
    for part in range(fsdp * tensor):
        drawing.box(16, 276 + 20 * part, 150, 20, kind=COLOURS[part // tensor], label=str(part))
    drawing.head(380, 244, "The same, in use")
    drawing.soft(380, 262, "bfloat16, M in 2 parts")
    drawing.box(380, 276, 75, 160, kind="n", label="devices\n0 2 4 6")
    drawing.box(455, 276, 75, 160, kind="n", label="devices\n1 3 5 7")
    drawing.arrow(180, 320, 368, 320)
    drawing.text(274, 294, "cast; all-to-all (tensor)", anchor="middle")
    drawing.text(274, 312, "all-gather (fsdp)", anchor="middle")
    drawing.code(274, 340, "gather_kernel", anchor="middle")
    drawing.arrow(368, 396, 180, 396)
    drawing.text(274, 370, "reduce-scatter (fsdp)", anchor="middle")
    drawing.text(274, 388, "all-to-all (tensor)", anchor="middle")
    drawing.code(274, 416, "scatter_kernel_gradient", anchor="middle")
    drawing.soft(274, 434, "float32", anchor="middle")

    drawing.head(16, 476, "What each device computes with it")
    drawing.box(16, 492, 150, 64, kind="a", label="x: its sequences\n[B/4, T, D]")
    drawing.text(184, 528, "×")
    drawing.box(206, 492, 110, 64, kind="n", label="kernel\n[D, M/2]")
    drawing.text(332, 528, "=")
    drawing.box(356, 492, 174, 64, kind="a", label="y: its sequences,\nits half of M")
    for number, line in enumerate(
        (
            "A projection into heads or d_ff needs no exchange of activations; one",
            "out of them is summed over tensor. Where the other two axes are above",
            "1, their devices store copies, and gradients are summed over them too.",
        )
    ):
        drawing.soft(16, 584 + 18 * number, line)
    return drawing


def ulysses() -> Drawing:
    """Draw the exchange of positions for heads."""
    ways, heads = 4, 8
    order = balanced_head_order(heads, ways=ways)
    drawing = Drawing(
        height=560,
        title="The Ulysses exchange: positions for heads, and back",
        description=f"Before the exchange each of {ways} devices has a quarter of the positions and all {heads} heads. "
        "After an all-to-all each has all positions of two heads, one steep and one flat. Attention runs, and the "
        "exchange goes back.",
    )
    drawing.head(16, 30, f"A sequence split over {ways} devices, {heads} heads")
    left, cell, top = 150, 46, 84

    def grid(top: float, *, by_head: bool) -> None:
        for column, head in enumerate(order):
            drawing.code(left + cell * (column + 0.5), top - 8, f"h{head}", anchor="middle")
        for row in range(ways):
            drawing.soft(16, top + 30 * row + 20, f"positions {'¼½¾1'[row - 1] if row else '0'} – {'¼½¾1'[row]} T")
            for column in range(heads):
                owner = column // (heads // ways) if by_head else row
                drawing.box(left + cell * column, top + 30 * row, cell, 30, kind=COLOURS[owner], label=str(owner))

    drawing.soft(16, 54, "Projections: a device has a span of positions, all heads")
    grid(top, by_head=False)
    drawing.arrow(280, 214, 280, 262)
    drawing.text(296, 234, "all-to-all of q, k and v")
    drawing.code(296, 252, "seq_to_heads")
    drawing.soft(16, 282, "Attention: a device has all positions of a few heads")
    grid(312, by_head=True)
    drawing.arrow(280, 442, 280, 490)
    drawing.text(296, 462, "all-to-all of the output")
    drawing.code(296, 480, "heads_to_seq")
    drawing.soft(16, 512, "Projection out: positions again. Numbers in cells are devices. Head order:")
    drawing.soft(16, 530, f"{', '.join(map(str, order))}: each device has a steep and a flat ALiBi slope, so")
    drawing.soft(16, 548, "all have about as many keys to look at.")
    return drawing


def alibi_lanes() -> Drawing:
    """Draw ALiBi as 12 lanes of q and k, with numbers of one pair of positions."""
    head, query, key = 0, 1000, 300
    slope = alibi_slopes(32, scaling=1.0)[head]
    parts = np.asarray(bfloat16_parts(np.asarray([slope], np.float32)))[0]
    q_coarse, q_fine, k_coarse, k_fine = query // 256 * 256, query % 256, key // 256 * 256, key % 256
    q_lanes = [value for part in parts for value in (part, -q_coarse, part, -q_fine)]
    k_lanes = [value for part in parts for value in (k_coarse, part, k_fine, part)]
    products = [float(q) * float(k) for q, k in zip(q_lanes, k_lanes, strict=True)]
    assert len(products) == NUM_LANES == 4 * NUM_PARTS and abs(sum(products) - slope * (key - query)) < 1e-3

    drawing = Drawing(
        height=452,
        title="ALiBi as lanes of q and k",
        description="Each of three parts of a slope takes four lanes. Products of q's and k's lanes sum to the slope "
        "times the distance from query to key.",
    )
    drawing.head(16, 30, "q′ · k′ = q · k + slope × (s − t)")
    drawing.soft(16, 54, f"Head {head} of 32, slope {slope:.7f}; query at t = {query}, key at s = {key}")
    for x, width, kind, label in (
        (16, 268, "n", "head dim: q or k itself"),
        (284, 120, "a", f"{NUM_LANES} lanes: ALiBi"),
        (404, 140, "n", "zeros to a tile"),
    ):
        drawing.box(x, 70, width, 32, kind=kind, label=label)
    columns = (16, 96, 210, 324)
    for x, title in zip(columns, ("lane", "in q", "in k", "product"), strict=True):
        drawing.head(x, 132, title)
    for lane, (q, k, product) in enumerate(zip(q_lanes, k_lanes, products, strict=True)):
        y = 140 + 20 * lane
        drawing.box(16, y, 410, 20, kind=COLOURS[lane // 4])
        for x, text in zip(columns, (str(lane), f"{q:.7g}", f"{k:.7g}", f"{product:.6g}"), strict=True):
            drawing.code(x + 6, y + 15, text)
    for part in range(NUM_PARTS):
        drawing.text(440, 184 + 80 * part, f"part {part + 1}")
    drawing.head(16, 404, f"sum {sum(products):.4f} = slope × ({key} − {query})")
    drawing.soft(16, 428, "A slope is a sum of three bfloat16 numbers, a position of two. Each is")
    drawing.soft(16, 445, "exact in bfloat16's 8 bits, and the products add up in float32.")
    return drawing


def alibi_windows() -> Drawing:
    """Draw how far back each of 32 heads sees at 8,192 tokens."""
    heads, length = 32, 8192
    windows = np.minimum(alibi_window(SPREAD, alibi_slopes(heads, scaling=1.0).astype(np.float64), xp=np), length)
    share = windows.sum() / (heads * length)
    drawing = Drawing(
        height=320,
        title="How far back ALiBi lets a head see",
        description=f"Of 32 heads, the steep ones see under a thousand positions back, the flat ones all {length:,}.",
    )
    drawing.head(16, 30, f"Positions back that count in float32, {heads} heads, T = {length:,}")
    drawing.soft(16, 52, f"scores of a row within {SPREAD:g} nats of each other without ALiBi")
    base, top, left, step = 276, 76, 66, 15
    for value in (0, 2048, 4096, 8192):
        y = base - (base - top) * value / length
        drawing.rule(left - 4, y, left + step * heads, y)
        drawing.soft(left - 10, y + 5, f"{value:,}", anchor="end")
    for head, window in enumerate(windows):
        height = (base - top) * window / length
        drawing.box(left + step * head + 1, base - height, step - 2, height, kind="a" if window < length else "b")
    for head in (0, 7, 15, 23, 31):
        drawing.soft(left + step * (head + 0.5), base + 18, str(head), anchor="middle")
    drawing.soft(16, 312, f"head (0 is the steepest). The last query sees {share:.0%} of all heads' keys.")
    return drawing


def curriculum() -> Drawing:
    """Draw store, blocks, windows and phases of the paper's run."""
    table = make_curriculum(**PAPER)
    order = TrainingOrder(curriculum=table, num_blocks=1 << 19, block_len=table.block_len, seed=1)
    short, long = table.phases
    per_block = order.windows_per_block(short)
    first = order.first_position(long)
    drawing = Drawing(
        height=590,
        title="From the token store to the steps of both phases",
        description=f"Documents are packed into one stream, cut into blocks of {table.block_len:,} targets. In phase "
        f"1 a block gives {per_block} windows of {short.seq_len:,}, in phase 2 one of {long.seq_len:,}.",
    )
    drawing.head(16, 30, "1  Stream: documents with an end-of-text token between")
    x = 16
    for width, label, kind in (
        (18, "", "n"),
        (150, "document", "a"),
        (18, "", "n"),
        (70, "doc.", "b"),
        (18, "", "n"),
        (190, "document", "c"),
        (18, "", "n"),
        (46, "…", "d"),
    ):
        drawing.box(x, 42, width, 30, kind=kind, label=label)
        x += width

    drawing.head(16, 112, f"2  Blocks: block b is tokens b·T to b·T + T, T = {table.block_len:,}")
    for block, kind in enumerate("nnn"):
        drawing.box(16 + 176 * block, 124, 176, 30, kind=kind, label=f"block {block}")
    drawing.soft(16, 174, f"{table.block_len:,} targets and one token more: the last target of a block is the first")
    drawing.soft(16, 192, "input of the next, so every token is a target exactly once.")

    drawing.head(16, 232, "3  Order: positions 0, 1, 2, … take blocks in a permuted order")
    drawing.box(16, 244, 392, 30, kind="a", label=f"phase 1: positions 0 – {first - 1:,}")
    drawing.box(408, 244, 136, 30, kind="b", label="phase 2: the rest")
    drawing.soft(16, 294, f"{short.num_tokens:,} tokens ÷ {table.block_len:,} = {first:,} blocks;")
    drawing.soft(16, 312, f"then {long.num_tokens // table.block_len:,} blocks. In one epoch, no block is in both.")

    drawing.head(16, 352, "4  Windows: a block, cut to the phase's length")
    for window in range(per_block):
        drawing.box(16 + 66 * window, 364, 66, 30, kind="a", label=f"{short.seq_len:,}")
    drawing.box(300, 364, 244, 30, kind="b", label=f"{long.seq_len:,}")
    drawing.soft(16, 414, f"phase 1: {per_block} windows, permuted again,")
    drawing.soft(16, 432, "so that they do not share a batch")
    drawing.soft(300, 414, "phase 2: one window")

    drawing.head(16, 472, "5  Steps: batch k is sequences k·B to k·B + B − 1 of its phase")
    drawing.box(16, 484, 392, 44, kind="a", label=_phase_text(table, 0))
    drawing.box(408, 484, 136, 44, kind="b", label=f"{long.num_steps:,} steps\n{long.batch_size:,} × {long.seq_len:,}")
    drawing.soft(16, 552, f"Both: {table.tokens_per_step:,} tokens a step; {table.num_tokens:,} in all.")
    drawing.soft(16, 570, "Learning rate and data order follow from the step number alone.")
    return drawing


def _phase_text(table: Curriculum, index: int) -> str:
    phase = table.phases[index]
    return f"{phase.num_steps:,} steps\n{phase.batch_size:,} × {phase.seq_len:,}"


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "system": system,
    "mesh": mesh,
    "ulysses": ulysses,
    "alibi_lanes": alibi_lanes,
    "alibi_windows": alibi_windows,
    "curriculum": curriculum,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())
