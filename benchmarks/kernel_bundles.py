"""Count the instruction bundles of our attention kernels for TPUs (plan/chips.py `_bundles`), from libtpu's dump.

    python benchmarks/kernel_bundles.py v5e v6e

No TPU is needed, but libtpu is (pip install 'btlm_jax[tpu]'), and about a minute a generation. A bundle is what a core
issues in one cycle. Each kernel has two loops over 8 heads of 80 lanes, for a block off the diagonal and for one on it.
Of a 512 x 512 block of one head this prints:

    off diagonal   bundles of the first loop's body, and an eighth of the code right before it
    on diagonal    bundles of the second loop's body, and an eighth of the code around the loops: splitting and merging
                   heads, in stretches of more than LONG bundles
    out of window  those of "off diagonal" that remain where the branch skips the block
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEADS, HEAD_DIM, LENGTH, BLOCK = 8, 80, 1024, 512
LONG, SHORT = 200, 10  # bundles: of a stretch of code that counts, and of the set-up of a loop
BRANCH = 5  # a branch and its four delay slots, which the dump writes after the loop
_LINE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)")


def compile_kernels(chip: str) -> None:
    """Compile forward and backward for one device of a generation; libtpu writes its dump meanwhile."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from btlm_jax.attention import attend
    from btlm_jax.plan.chips import CHIPS, slice_devices

    jax.config.update("jax_platforms", "cpu")
    devices = slice_devices(f"{chip}:{CHIPS[chip].slices[0]}")[:1]
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=devices)
    replicated = NamedSharding(mesh, PartitionSpec())
    x_BTNH = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16, sharding=replicated)
    slopes_N = jax.ShapeDtypeStruct((HEADS,), jnp.float32, sharding=replicated)

    def loss(q, k, v, slopes_N):
        o = attend(q, k, v, slopes_N, scale=1 / HEAD_DIM, implementation="tpu")
        return o.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(x_BTNH, x_BTNH, x_BTNH, slopes_N).compile()


def read_bundles(path: Path) -> dict[str, int]:
    """Return the three counts of a kernel from its `final_bundles` file.

    Raises:
      ValueError: it does not have the two loops over heads.
    """
    depths, markers, texts = [], [], []
    for line in path.read_text().splitlines():
        if found := _LINE.match(line):
            is_empty = line[found.end() :].lstrip().startswith("{}")  # these have no mark of their loop's depth
            depths.append(depths[-1] if is_empty and depths else len(found[3]))
            markers.append(found[2] or "")
            texts.append(line)
    loops, stretches, start = [], [], 0
    for at in range(1, len(depths) + 1):
        is_end = at == len(depths) or depths[at] != depths[start] or (depths[at] == 1 and markers[at])
        if is_end:
            (loops if depths[start] >= 2 else stretches).append((start, at))
            start = at
    loops = [span for span in loops if span[1] - span[0] > LONG]
    if len(loops) != 2:
        raise ValueError(f"{path} has {len(loops)} loops of more than {LONG} bundles, not the two over heads")
    around = sum(
        end - (_last_branch(texts, (first, end)) if markers[first] == "LB" else first)
        for first, end in stretches
        if end - first > LONG
    )
    (first, end), on_diagonal = loops
    # Code right before the first loop runs for every block off the diagonal: the backward kernel splits queries there.
    before = sum(
        stop - start
        for start, stop in stretches
        if first - SHORT < stop <= first and stop - start > LONG and markers[start] == "PF"
    )
    skipped = next(at for at in range(first, end) if "sbr.rel" in texts[at]) + BRANCH
    resumed = max(at for at in range(first, end) if markers[at] == "PF")
    return {
        "off diagonal": end - first + BRANCH + round(before / HEADS),
        "on diagonal": on_diagonal[1] - on_diagonal[0] + BRANCH + round(around / HEADS),
        "out of window": skipped - first + end - resumed + BRANCH + round(before / HEADS),
    }


def _last_branch(texts: list[str], span: tuple[int, int]) -> int:
    """Return where the code after the last branch of a stretch begins: before it a program is set up."""
    return max((at + 1 for at in range(*span) if "sbr.rel" in texts[at]), default=span[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", default=["v4", "v5e", "v5p", "v6e"])
    parser.add_argument("--one", action="store_true", help="compile in this process, which libtpu dumps from")
    arguments = parser.parse_args()
    if arguments.one:
        compile_kernels(*arguments.chips)
        return
    print(f"{'chip':<5} {'kernel':<15} {'off diagonal':>13} {'on diagonal':>12} {'out of window':>14}")
    for chip in arguments.chips:
        with tempfile.TemporaryDirectory() as folder:
            options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            environment = os.environ | {"LIBTPU_INIT_ARGS": options}
            subprocess.run([sys.executable, __file__, "--one", chip], env=environment, check=True)
            for kernel in ("alibi_forward", "alibi_backward"):
                (path,) = [each for each in Path(folder).glob(f"*-{kernel}*-final_bundles.txt")]
                counts = read_bundles(path)
                print(
                    f"{chip:<5} {kernel:<15} "
                    + " ".join(f"{n:>{w}}" for n, w in zip(counts.values(), (13, 12, 14), strict=True))
                )


if __name__ == "__main__":
    main()
