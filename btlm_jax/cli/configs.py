"""`btlm configs`: list the configs that --config takes by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from btlm_jax.cli import DONE
from btlm_jax.cli.parse import Flags, config_names, packaged_folder

CONFIGS_HELP = """btlm configs: list the configs that come with this installation: name, parameters, tokens, what it is.

examples:  btlm configs
           btlm train --config=pods/v5e_256 --dry-run       one of them, by its name
           btlm train --config=111M --dry-run               by the last part of its name, if no other has the same
           btlm train --config=mine.py --workdir=runs/mine  a file of your own, for example a copy of one of them

Those of family/ were written by btlm new, which writes such a file for any number of parameters.
The last lines say where the files are, and the scripts that launch runs on TPU slices and GPUs.
"""


def configs(arguments: Sequence[str]) -> int:
    """Run `btlm configs`; return the exit code."""
    if not configs_flags().parse(arguments):
        return DONE
    rows = _rows()
    width = max(len(row.name) for row in rows)
    print(f"{'name':<{width}}  {'parameters':>13}  {'tokens':>15}")
    for row in rows:
        print(f"{row.name:<{width}}  {row.num_parameters:>13,}  {row.num_tokens:>15,}  {row.summary}")
    print(f"\nfiles:           {packaged_folder('configs')}")
    print(f"launch scripts:  {packaged_folder('launch')}")
    return DONE


def configs_flags() -> Flags:
    """Define the flags of `btlm configs`."""
    return Flags(CONFIGS_HELP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    name: str
    num_parameters: int
    num_tokens: int  # of the whole curriculum
    summary: str  # the first line of the file's docstring


def _rows() -> list[_Row]:
    import runpy

    from btlm_jax.recipe.config import train_config_from
    from btlm_jax.recipe.sizes import count_parameters

    rows = []
    for name in config_names():
        module = runpy.run_path(str(packaged_folder("configs") / f"{name}.py"))
        config = train_config_from(module["get_config"]().to_dict())
        rows.append(
            _Row(
                name=name,
                num_parameters=count_parameters(config.model),
                num_tokens=config.curriculum.table.num_tokens,
                summary=module["__doc__"].splitlines()[0],
            )
        )
    return sorted(rows, key=lambda row: (row.name.rpartition("/")[0], row.num_parameters, row.name))
