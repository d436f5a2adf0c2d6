"""A config as the text of a config file: every value with the rule of sizes.py that it follows from."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from btlm_jax.recipe import sizes
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.mup import make_parametrization

_WIDTH = 120
_STEP = "TOKENS_PER_STEP"
_IN_STEPS = ("curriculum.num_tokens", "optimizer.warmup_tokens")


def format_config(
    config: TrainConfig, *, title: str, notes: Sequence[str], topology: str, why: Mapping[str, str]
) -> str:
    """Return a config file that makes `config`, as `ruff format` leaves it.

    Args:
      title: first line of its docstring, which `btlm configs` shows.
      notes: the docstring's other lines.
      topology: the slice that its layout is for, for `btlm plan --table`; "" if none.
      why: comments of the keys (section.key) whose values are not the rules' own; they replace ours.
    """
    step, longest, shortest = (config.curriculum.table.tokens_per_step, *reversed(config.curriculum.seq_len))
    batches = config.curriculum.batch_size
    docstring = "\n".join([title, "", *notes]).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    lines = [f'"""{docstring}', '"""', "", "from ml_collections import ConfigDict", ""]
    if topology:
        lines += [f'TOPOLOGY = "{topology}"', "OTHERS = ()  # further layouts for btlm plan --table"]
    lines += [f"{_STEP} = {batches[0]} * {shortest}  # = {batches[-1]} * {longest} = {step:,}", "", ""]
    lines += ["def get_config() -> ConfigDict:", "    return ConfigDict(", "        dict("]
    comments = {**_reasons(config), **why}
    for section, values in dataclasses.asdict(config).items():
        if not isinstance(values, dict):
            lines += _entry(section, repr(values), comments[section], indent=12)
            continue
        lines.append(f"            {section}=dict(")
        for name, value in values.items():
            key = f"{section}.{name}"
            lines += _entry(name, _value(key, value, step=step), comments[key], indent=16)
        lines.append("            ),")
    return "\n".join([*lines, "        )", "    )", ""])


def _entry(name: str, value: str, comment: str, *, indent: int) -> Iterator[str]:
    """Yield a line of the file; its comment stands above where it is too long for the line's end."""
    line = f"{' ' * indent}{name}={value},"
    if len(line) + len(comment) + 4 <= _WIDTH:
        yield f"{line}  # {comment}"
        return
    prefix = f"{' ' * indent}# "
    yield from textwrap.wrap(comment, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)
    yield line


def _value(key: str, value: object, *, step: int) -> str:
    """Return a value as Python; tokens as multiples of a step."""
    if key in _IN_STEPS:
        counts: tuple[int, ...] = value if isinstance(value, tuple) else (value,)  # pyright: ignore[reportAssignmentType]
        assert all(count % step == 0 for count in counts), key
        shown = [f"{_number(count // step)} * {_STEP}" for count in counts]
        return f"({', '.join(shown)})" if isinstance(value, tuple) else shown[0]
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    return _number(value) if type(value) is int else repr(value)


def _number(value: int) -> str:
    return f"{value:_}" if value >= 10_000 and value != sizes.GPT2_VOCAB_SIZE else str(value)


def _reasons(config: TrainConfig) -> dict[str, str]:
    """Return what is said of every key."""
    return {
        "seed": "of the initial parameters",
        **{f"model.{name}": text for name, text in _of_model(config).items()},
        **{f"mup.{name}": text for name, text in _of_mup(config).items()},
        **{f"curriculum.{name}": text for name, text in _of_curriculum(config).items()},
        **{f"optimizer.{name}": text for name, text in _of_optimizer(config).items()},
        "mesh.tensor": "ways that heads and d_ff are split",
        "mesh.context": "ways that positions are split",
        "mesh.accumulation": "micro-batches a step",
        "mesh.gradient_dtype": "in which devices sum gradients; bfloat16 halves what is exchanged",
        "data.store": "the token store, from the workdir if relative; --config.data.store=STORE",
        "data.seed": "of the order of blocks",
        "data.weights": "the sources as they are",
        "data.max_epochs": "passes over the store that the tokens may take",
        "data.prefetch": "batches read ahead",
        "data.document_mask": "as BTLM's",
        "corpus.source": "the store must exist: btlm corpus makes it",
        "corpus.max_bytes": "as BTLM's; of no effect on a prepared store, as the two below",
        "corpus.heldout_fraction": "as BTLM's",
        "corpus.heldout_bytes_per_source": "as BTLM's",
        "evaluation.every_steps": "a twentieth of the run, at most BTLM's 2,000",
        "evaluation.blocks_per_source": "as BTLM's",
        "evaluation.batch_size": "a micro-batch of the last phase, whose sequences are a block of the store long",
        "checkpoint.every_steps": "a tenth of the run, at most BTLM's 200",
        "checkpoint.keep_last": "as BTLM's",
        "checkpoint.keep_every": "as BTLM's",
        "checkpoint.keep_hours": "none for its age",
        "bad_numbers.spike_score": "deviations above the median; none of the runs measured has 14",
        "bad_numbers.max_skips": "steps in a row, and then the run goes back to a checkpoint",
        "bad_numbers.max_rollbacks": "times, and then it stops",
        "bad_numbers.compare_every": "steps between comparisons of the devices' copies; 0: none",
        "bad_numbers.recompute_every": "steps of which one is computed twice and compared; 0: none",
        "log.every_steps": "every step in runs below 1,000",
        "log.sample_prompt": "continued at the end",
        "log.sample_tokens": "of the continuation",
        "log.trackers": "wandb, mlflow or both: a run's numbers go there too",
        "log.reference": "no run to compare the curve with",
        "log.profile_steps": "as 100:105: steps to trace",
    }


def _of_model(config: TrainConfig) -> dict[str, str]:
    model = config.model
    width = model.d_model
    padded = math.ceil(model.d_ff / 128) * 128
    padding = "" if padded == model.d_ff else f"; a TPU pads it to {padded:,}, {padded / model.d_ff - 1:.1%} more"
    lanes = "of 64" if width < 512 else "of 128, a TPU's lanes"
    return {
        "vocab_size": "GPT-2's tokenizer" if model.vocab_size == sizes.GPT2_VOCAB_SIZE else "ids of the tokenizer",
        "num_layers": (
            f"the shape nearest to the parameters asked for and to BTLM's d_model = 80 num_layers: here "
            f"{width / model.num_layers:.0f}"
        ),
        "d_model": f"a multiple {lanes}",
        "num_heads": f"heads {model.head_dim} wide: the least power of two, from 4 on, that makes them at most 112",
        "d_ff": f"8/3 d_model, rounded down to an even number as BTLM's 6,826{padding}",
        "layer_norm_eps": "as BTLM's",
        "qk_norm": "none, as BTLM's",
        "alibi_scaling": "positions as trained",
        "dtype": "of activations; parameters and sums are float32 anyway",
        "attention": "the fastest for the devices",
        "remat": "keeps the least for the backward pass, so that it fits most",
        "loss_chunk": "positions whose logits exist at one time",
    }


def _of_mup(config: TrainConfig) -> dict[str, str]:
    width = config.model.d_model / config.mup.base_d_model
    return {
        "preset": "as BTLM's: docs/internals/mup.md",
        "base_d_model": f"width of the proxy that the constants were tuned on: m = d_model / 256 = {width:.4g}",
        "base_d_ff": "d_ff / m: both widths grow alike",
        "base_num_layers": "read by completep only",
        "init_std": "BTLM's, tuned on the proxy; / sqrt(m) for hidden matrices",
        "embedding_multiplier": "BTLM's, tuned on the proxy",
        "output_multiplier": "BTLM's, tuned on the proxy; / m",
    }


def _of_curriculum(config: TrainConfig) -> dict[str, str]:
    table = config.curriculum.table
    step, total = table.tokens_per_step, table.num_tokens
    power_law = sizes.BTLM_TOKENS_PER_STEP * (total / sizes.BTLM_TOKENS) ** sizes.BATCH_EXPONENT
    batch = (
        f"{step:,} tokens: the best batch grows as tokens^{sizes.BATCH_EXPONENT} (arXiv 2505.13738), through BTLM's "
        f"{sizes.BTLM_TOKENS_PER_STEP:,} at {sizes.BTLM_TOKENS / 1e9:.1f} B"
        if power_law <= total / sizes.MIN_STEPS
        else f"{step:,} tokens: so that there are about {sizes.MIN_STEPS} steps, by which so short a run is limited"
    )
    longest = config.curriculum.seq_len[-1]
    return {
        "seq_len": "BTLM's" if longest == sizes.LONGEST else "a quarter of the longest, as BTLM's",
        "batch_size": batch,
        "num_tokens": (
            f"3/4 and 1/4 of the steps, as BTLM's; {total / 1e9:.4g} B in all, "
            f"{total / sizes.count_parameters(config.model):.4g} a parameter"
        ),
    }


def _of_optimizer(config: TrainConfig) -> dict[str, str]:
    optimizer, table = config.optimizer, config.curriculum.table
    width = make_parametrization(config.mup, config.model).width
    is_small = table.tokens_per_step < sizes.SMALL_BATCH
    return {
        "schedule": "as BTLM's",
        "peak_learning_rate": (
            f"of {'configs/local_cpu.py, for small batches' if is_small else 'BTLM, tuned on the proxy'}; hidden "
            f"matrices have / m = {optimizer.peak_learning_rate / width:.3g}"
        ),
        "end_learning_rate": "0.85 % of the peak, as BTLM's",
        "initial_learning_rate": "as BTLM's",
        "warmup_tokens": "375 M tokens (arXiv 2304.03208), at most a tenth of the run",
        "decay_share": "of wsd only",
        "schedule_begin": "with the run",
        "schedule_tokens": "0: the whole run",
        "beta1": "as BTLM's",
        "beta2": "as BTLM's",
        "eps": "as BTLM's" if optimizer.eps == 1e-8 else "as Jais-13B's, of the same authors",
        "weight_decay": _of_weight_decay(config),
        "weight_decay_convention": (
            "independent of the width, as completep's"
            if config.is_decay_independent
            else "coupled to the learning rate, as BTLM's"
        ),
        "z_loss": "none, as BTLM's",
        "clip_norm": "as BTLM's",
        "hidden_optimizer": "AdamW, as BTLM's",
        "muon_learning_rate": "of muon only",
        "average": "none is kept",
        "average_share": "of ema and last only",
        "freeze": "every parameter is trained",
    }


def _of_weight_decay(config: TrainConfig) -> str:
    optimizer, table = config.optimizer, config.curriculum.table
    memory = 1 / (sizes.decay_rate_of(config) * optimizer.decay * table.num_steps)
    formula = "1 / (peak decay steps)" if config.is_decay_independent else "m / (peak decay steps)"
    if optimizer.hidden_optimizer == "muon":
        formula = formula if config.is_decay_independent else "1 / (muon_learning_rate decay steps)"
        return f"Muon remembers tau = {formula} = {memory:.3f} of the run in hidden matrices"
    wanted = sizes.tau_for(table.num_tokens / sizes.count_parameters(config.model))
    return (
        f"AdamW remembers tau = {formula} = {memory:.3f} of the run in hidden matrices; arXiv 2505.13738 has "
        f"{wanted:.3f} for so many tokens a parameter"
    )
