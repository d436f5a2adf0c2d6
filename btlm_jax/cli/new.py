"""`btlm new`: write a config file for so many parameters, every value with the rule that it follows from."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.parse import Flags
from btlm_jax.recipe import sizes
from btlm_jax.storage.files import write_atomically

if TYPE_CHECKING:
    from btlm_jax.plan.placement import Placement
    from btlm_jax.recipe.config import TrainConfig

NEW_HELP = """btlm new: write a config for so many parameters; every value has the rule that it follows from beside it.

examples:  btlm new --params=124M --output=my.py
           btlm new --params=124M --tokens=10B --topology=v5e-8 --output=my.py
           btlm new --params=4.2M --store=runs/store --machine=this --output=small.py
then:      btlm train --config=my.py --dry-run
           btlm train --config=my.py --workdir=runs/mine --config.data.store=STORE

The shape is BTLM's in proportion, its constants are transferred by muP from the proxy, and batch, warm-up and lengths
follow the tokens: 20 a parameter, or --tokens, or all of --store. At 2.7B parameters and the paper's tokens everything
is the paper's own. Sources of the rules: docs/guide/new.md.

--topology=v5e-8 searches layouts for that slice, as btlm plan --search does, and writes the fastest with its predicted
memory and time; this takes minutes and libtpu. h100-8 and other GPUs are planned as there. --topology=cpu writes a
CPU's layout. --machine=this compiles and times a step on the CPU or the GPUs here. Without either the layout fits most
devices and is not the fastest.
--constants=search.json takes what btlm tune search found on a proxy in place of BTLM's constants. --law=law.json, a
scaling law of btlm tune scaling, predicts the loss as far as it is trusted; otherwise none is.
"""

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_CPU = "cpu"
_MOST = 10**15
_NO_LOSS = "none is predicted: no scaling law has been fitted to models of this recipe"


def new(arguments: Sequence[str]) -> int:
    """Run `btlm new`; return the exit code."""
    flags = new_flags()
    if not flags.parse(arguments):
        return DONE
    output = _output(flags)
    topology = _topology(flags)
    choices, origin = _choices(flags)
    change, why = _constants(flags)
    origin |= why
    bare = change(sizes.make_config(choices))
    placement = _placement(flags, bare, topology=topology)
    config = change(
        sizes.make_config(
            dataclasses.replace(
                choices, dtype=placement.dtype, mesh=placement.layout.mesh, remat=placement.layout.remat
            )
        )
    )
    loss = _loss(flags, config)
    write_atomically(output, _text(config, placement, origin=origin, arguments=arguments, loss=loss, output=output))
    asked = _amount("params", flags.string("params"))
    print(_summary(config, placement, asked=asked, data=origin.get("data.max_epochs", ""), loss=loss, output=output))
    return DONE


def new_flags() -> Flags:
    """Define the flags of `btlm new`."""
    flags = Flags(NEW_HELP)
    flags.define_string(
        "params", "", "parameters, embedding included: 124M, 1.3B, 2646255744; within 5 %, or else 10 %"
    )
    flags.define_string("tokens", "", "tokens to train on: 10B, 600K")
    flags.define_float("tokens_per_parameter", sizes.TOKENS_PER_PARAMETER, "without --tokens and --store: how many")
    flags.define_string(
        "store", "", "token store: its vocabulary and block length, and, without --tokens, all of it once"
    )
    flags.define_integer(
        "vocab_size", sizes.GPT2_VOCAB_SIZE, "ids of the tokenizer; those of --store where it is given"
    )
    flags.define_integer("d_model", 0, "width, where it is not to follow from --params; the depth then does")
    flags.define_integer(
        "seq_len", 0, "longest sequences, a block of the store, where they are not to follow from tokens"
    )
    flags.define_string(
        "weight_decay",
        sizes.PUBLISHED,
        "BTLM's 0.1, or so that AdamW's memory follows the tokens a parameter",
        choices=sizes.WEIGHT_DECAYS,
    )
    flags.define_string("topology", "", "where it is to run: v5e-8, v5p:4x4x8, h100-8, ... as btlm plan has it, or cpu")
    flags.define_string("machine", "", "this: time a step on the CPU or the GPUs here", choices=("this",))
    flags.define_integer("max_compiles", 12, "most compilations for --topology; the same command goes on")
    flags.define_string("plan_from", "", "table of btlm plan --table to take the layout from, instead of compiling")
    flags.define_string(
        "cache", "", "directory of what compilations said, as of btlm plan; or plan/ in the user's cache"
    )
    flags.define_string("constants", "", "search.json of btlm tune search: its best constants in place of BTLM's")
    flags.define_string("law", "", "scaling law that predicts the loss, as btlm tune scaling writes it")
    flags.define_string("output", "", "file to write")
    flags.define_boolean("replace", False, "replace the file if it is there")
    return flags


def _output(flags: Flags) -> Path:
    """Return the file to write.

    Raises:
      UsageError: it is not given, or is there already.
    """
    if not flags.string("output"):
        raise UsageError("--output=FILE is needed, for example --output=my.py")
    output = flags.path("output").expanduser()
    if output.is_dir():
        raise UsageError(f"--output={output} is a directory; give a file in it: --output={output / 'my.py'}")
    if output.suffix != ".py":
        raise UsageError(f"--output={output} must end in .py: a config is a Python file")
    if output.exists() and not flags.boolean("replace"):
        raise UsageError(f"--output={output} is there already; --replace replaces it")
    if not output.parent.is_dir():
        raise UsageError(f"--output={output}: there is no directory {output.parent}")
    return output


def _topology(flags: Flags) -> str:
    """Return the slice, "cpu", or "" for neither.

    Raises:
      UsageError: flags contradict each other.
      ValueError: there is no such slice.
    """
    given = flags.string("topology")
    if given and flags.string("machine"):
        raise UsageError("--topology and --machine are both given; --machine=this is the CPU or the GPUs here")
    is_slice = given not in ("", _CPU)
    for name in ("max_compiles", "plan_from", "cache"):
        if flags.is_given(name) and not is_slice:
            raise UsageError(f"--{name} has no effect without the --topology of a slice")
    if flags.is_given("plan_from") and (flags.is_given("max_compiles") or flags.is_given("cache")):
        raise UsageError("--plan_from takes the layout from a table: leave out --max_compiles and --cache")
    if flags.integer("max_compiles") < 1:
        raise UsageError(f"--max_compiles={flags.integer('max_compiles')} must be at least 1")
    if not is_slice:
        return given
    from btlm_jax.plan.chips import topology_named

    return topology_named(given)


def _choices(flags: Flags) -> tuple[sizes.Choices, dict[str, str]]:
    """Return what the rules get, and comments of keys that do not follow from them.

    Raises:
      UsageError: a flag is refused.
      ValueError: the rules find nothing, or the store cannot be read.
    """
    from btlm_jax.recipe.config import MeshConfig

    asked = _amount("params", flags.string("params"))
    vocab_size, longest, store, of_store, why = flags.integer("vocab_size"), flags.integer("seq_len"), "store", 0, {}
    if not 0 < vocab_size < 2**31:
        raise UsageError(f"--vocab_size={vocab_size} must be positive and below 2**31")
    for name in ("seq_len", "d_model"):
        if flags.is_given(name) and flags.integer(name) < 1:
            raise UsageError(f"--{name}={flags.integer(name)} must be positive")
    if flags.string("store"):
        found = _store(flags)
        store, vocab_size, longest, of_store = found.name, found.vocab_size, found.block_len, found.num_tokens
        why = {
            "data.store": "as --store",
            "model.vocab_size": "ids of the store's tokenizer",
            "curriculum.seq_len": "the store's blocks, and a quarter of them as in BTLM",
        }
    elif longest:
        why = {"curriculum.seq_len": "as --seq_len, and a quarter of it as in BTLM"}
    if flags.is_given("d_model"):
        shape = sizes.shape_of_width(asked, vocab_size=vocab_size, d_model=flags.integer("d_model"))
        why |= {"model.d_model": "as --d_model", "model.num_layers": "what is missing to --params at this width"}
    else:
        shape = sizes.shape_for(asked, vocab_size=vocab_size)
    num_tokens = _num_tokens(flags, shape.num_parameters, of_store=of_store)
    epochs = -(-num_tokens // of_store) if of_store else 1
    if of_store:
        why["data.max_epochs"] = f"{num_tokens / of_store:.3g} epochs of the store's {of_store:,} tokens"
    return sizes.Choices(
        shape=shape,
        num_tokens=num_tokens,
        longest=longest or sizes.longest_for(num_tokens),
        weight_decay=flags.string("weight_decay"),
        dtype="bfloat16",
        mesh=MeshConfig(tensor=1, context=1, accumulation=1),
        remat="full",
        store=store,
        max_epochs=epochs,
    ), why


def _num_tokens(flags: Flags, num_parameters: int, *, of_store: int) -> int:
    """Return the tokens to train on.

    Raises:
      UsageError: flags contradict each other, or a number is refused.
    """
    if flags.is_given("tokens_per_parameter"):
        ratio = flags.number("tokens_per_parameter")
        if flags.string("tokens") or of_store:
            raise UsageError(
                "--tokens_per_parameter is given beside --tokens or --store, which say how many; leave it out"
            )
        if not 0 < ratio * num_parameters < _MOST:
            raise UsageError(f"--tokens_per_parameter={ratio:g} must be positive, and {_MOST:.0e} tokens the most")
        return round(ratio * num_parameters)
    if flags.string("tokens"):
        return _amount("tokens", flags.string("tokens"))
    return of_store or round(flags.number("tokens_per_parameter") * num_parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Store:
    name: str  # for a config
    vocab_size: int
    block_len: int
    num_tokens: int  # of its train split, once


def _store(flags: Flags) -> _Store:
    """Return what a config needs to know of the token store.

    Raises:
      UsageError: another flag contradicts it.
      ValueError: it cannot be read, or has nothing to train on.
    """
    from btlm_jax.data.store import TRAIN, read_manifest
    from btlm_jax.storage.location import parse_location

    location = parse_location(flags.string("store"))
    manifest = read_manifest(location)
    for name, value, what in (
        ("vocab_size", manifest.tokenizer.vocab_size, "ids"),
        ("seq_len", manifest.block_len, "tokens a block"),
    ):
        if flags.is_given(name) and flags.integer(name) != value:
            raise UsageError(
                f"--{name}={flags.integer(name)}, but --store={location} has {value:,} {what}; leave it out"
            )
    if TRAIN not in manifest.splits or not manifest.splits[TRAIN].num_blocks:
        raise ValueError(
            f"--store={location} has no blocks to train on, only {', '.join(manifest.splits) or 'nothing'}"
        )
    return _Store(
        name=str(location.resolve()) if isinstance(location, Path) else str(location),
        vocab_size=manifest.tokenizer.vocab_size,
        block_len=manifest.block_len,
        num_tokens=manifest.splits[TRAIN].num_blocks * manifest.block_len,
    )


def _amount(name: str, text: str) -> int:
    """Return the number that 124M, 1.3B or 2646255744 is.

    Raises:
      UsageError: it is none, or not positive.
    """
    example = {"params": "124M or 1.3B", "tokens": "10B or 600K"}[name]
    if not text:
        raise UsageError(f"--{name} is needed, for example {example}")
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)([A-Za-z]?)", text)
    if not found or found[2].upper() not in _SUFFIXES:
        raise UsageError(
            f"--{name}={text[:40]} is not a number such as {example}; the letters are K, M, B and T, for thousand, "
            "million, billion and trillion"
        )
    digits, scale = re.sub(r"[_,]", "", found[1]), _SUFFIXES[found[2].upper()]
    number = round(float(digits) * scale) if "." in digits else int(digits[:40]) * scale
    if not 0 < number <= _MOST:
        raise UsageError(f"--{name}={text[:40]} must be from 1 to {_MOST:,}")
    return number


def _placement(flags: Flags, config: TrainConfig, *, topology: str) -> Placement:
    """Return where the config is to run.

    Raises:
      ValueError: it cannot run there.
    """
    from btlm_jax.plan import placement

    if flags.string("machine"):
        from btlm_jax.plan.measured_step import measure_here

        return measure_here(config, report_progress=_print_progress)
    if topology == _CPU:
        return placement.cpu_placement(config.curriculum.table)
    if not topology:
        return placement.nowhere()
    if flags.string("plan_from"):
        return placement.from_table(config, topology=topology, table=flags.path("plan_from"))
    import jax

    from btlm_jax.plan.calibration import MEASURED_FOLDER
    from btlm_jax.plan.compiling import CompileCache, default_cache
    from btlm_jax.plan.search import search_layouts

    jax.config.update("jax_platforms", _CPU)  # leave this machine's own accelerators out of it
    directory = flags.path("cache").expanduser() if flags.string("cache") else default_cache()
    cache = CompileCache(
        directory=directory, max_compiles=flags.integer("max_compiles"), measured=directory / MEASURED_FOLDER
    )
    result = search_layouts(config, topology=topology, cache=cache, report_progress=_print_progress)
    return placement.searched(result)


def _constants(flags: Flags) -> tuple[Callable[[TrainConfig], TrainConfig], dict[str, str]]:
    """Return what puts the constants of a search into a config, and comments of their keys.

    Raises:
      UsageError: --weight_decay is not for them.
      ValueError: the file is none of a search.
    """
    if not flags.is_given("constants"):
        return lambda config: config, {}
    from btlm_jax.tune import search

    path = flags.path("constants")
    found = search.read_constants(path)
    why = dict.fromkeys(found.values, f"of {path.name}, btlm tune search at base width {found.base_width:g}")
    if "optimizer.peak_learning_rate" in why:
        why["optimizer.end_learning_rate"] = "0.85 % of the peak, as BTLM's"
    proxys = "of the proxy that was searched on"
    why |= dict.fromkeys(("mup.preset", "mup.base_d_model", "optimizer.hidden_optimizer"), proxys)
    why["mup.base_num_layers"] = f"{proxys}; read by completep only"
    is_by_tau = flags.string("weight_decay") == sizes.TAU
    if is_by_tau and found.hidden_optimizer == search.MUON:
        raise UsageError(f"--weight_decay=tau is a law of AdamW, and --constants={path} is of Muon; leave it out")

    def change(config: TrainConfig) -> TrainConfig:
        config = search.with_constants(config, found=found)
        return sizes.with_decay_by_tau(config) if is_by_tau else config

    return change, why


def _loss(flags: Flags, config: TrainConfig) -> str:
    """Return what is known of the loss of a config's run.

    Raises:
      ValueError: the law cannot be read.
    """
    if not flags.is_given("law"):
        return _NO_LOSS
    from btlm_jax.tune import scaling

    path = flags.path("law")
    law = scaling.read_law(path)
    try:
        found = scaling.predict_config(law, config)
    except ValueError as error:
        return f"none is predicted: {error}"
    return (
        f"{found.loss:.3f} nats a token predicted, {scaling.LEVEL:.0%} of runs from {found.low:.3f} to "
        f"{found.high:.3f}, by the {law.form} law {path.name} of {len(law.points)} runs, "
        f"{found.flops / max(point.flops for point in law.points):.3g} times the FLOPs of the largest"
    )


def _text(
    config: TrainConfig,
    placement: Placement,
    *,
    origin: dict[str, str],
    arguments: Sequence[str],
    loss: str,
    output: Path,
) -> str:
    from btlm_jax.recipe.config_text import format_config

    table = config.curriculum.table
    count = sizes.count_parameters(config.model)
    title = (
        f"{short(count)} parameters, {short(table.num_tokens)} tokens ({table.num_tokens / count:.3g} a parameter), "
        f"{config.curriculum.seq_len[0]:,} then {config.curriculum.seq_len[1]:,} long{placement.where}."
    )
    stored = "" if "data.store" in origin else " --config.data.store=STORE"
    commands = {
        "Written by": " ".join(["btlm", "new", *(shlex.quote(each) for each in arguments if each != "--replace")]),
        "See first": f"btlm train --config={output} --dry-run",
        "Train": f"btlm train --config={output} --workdir=DIR{stored}",
    }
    facts = {
        "Memory": placement.memory.replace("THIS", str(output)),
        "Time": placement.time,
        "Loss": loss,
        "Rules": "docs/guide/new.md; what follows from none is as in configs/btlm_3b_8k.py",
    }
    notes = [f"{_head(name)}{command}" for name, command in commands.items()]
    notes += [line for name, text in facts.items() for line in _wrapped(_head(name), text)]
    return format_config(config, title=title, notes=notes, topology=placement.topology, why={**origin, **placement.why})


def _head(name: str) -> str:
    return f"{name + ':':<11} "


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, 120, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _summary(config: TrainConfig, placement: Placement, *, asked: int, data: str, loss: str, output: Path) -> str:
    model, table = config.model, config.curriculum.table
    count = sizes.count_parameters(model)
    phases = ", then ".join(
        f"{phase.num_steps:,} steps of {phase.batch_size:,} x {phase.seq_len:,}" for phase in table.phases
    )
    return "\n".join(
        [
            f"Wrote {output}",
            f"  {count:,} parameters ({count / asked - 1:+.1%} of what was asked): {model.num_layers} layers, d_model "
            f"{model.d_model}, {model.num_heads} heads x {model.head_dim}, d_ff {model.d_ff}, {model.vocab_size:,} ids",
            f"  {table.num_tokens:,} tokens, {table.num_tokens / count:.3g} a parameter: {phases}",
            *([f"  data   {data}"] if data else []),
            f"  layout {placement.layout}",
            f"  memory {placement.memory.replace('THIS', str(output))}",
            f"  time   {placement.time}",
            f"  loss   {loss}",
            f"See the whole plan: btlm train --config={output} --dry-run",
        ]
    )


def short(number: int) -> str:
    """Return a number in three digits with a letter: 109M, 2.19B."""
    for letter, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * scale:
            return f"{float(f'{number / scale:.3g}'):g}{letter}"
    return str(number)


def _print_progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
