"""Choose a whole run for a token store, a time and this machine, by a measured step (`sizing` has the arithmetic)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from btlm_jax.data.order import make_order
from btlm_jax.data.store import HELDOUT, TRAIN, Manifest, Split
from btlm_jax.display.progress import print_line
from btlm_jax.kernels.build import multiplies_bfloat16
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.mixture import weights_of
from btlm_jax.recipe.sizes import Shape
from btlm_jax.train import sizing
from btlm_jax.train.finish import heldout_blocks, num_final_evaluations
from btlm_jax.train.flops import flops_per_token, memory_bytes, peak_flops
from btlm_jax.train.sizing import Lengths
from btlm_jax.train.step_time import RunTimes, measure_run

# Share of a matmul's speed that a step reaches, by which a shape is chosen; its steps are measured then.
_CPU_EFFICIENCY, _ACCELERATOR_EFFICIENCY = 0.4, 0.3
_TRAINING_SHARE = 0.8  # of the time that is left, for the same
_MEASURED_SECONDS = 4.0  # a phase
# Of a given model: its peak learning rate as a share of the family's, and how often text is read, as long as reading it
# again is nearly as good as new text (arXiv 2305.16264).
_GIVEN_PEAK, _GIVEN_EPOCHS = 0.5, 4
_EVALUATIONS, _BLOCKS_OF_EVALUATION, _EVALUATION_ROWS = 4, 8, 8
_BYTES_A_PARAMETER = 32  # state, gradients, and as much for activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizedRun:
    """A chosen run, and what to say of it: what was chosen, and why."""

    config: TrainConfig
    lines: tuple[str, ...]


def size_run(
    manifest: Manifest,
    *,
    base: dict,
    change: Callable[[dict], TrainConfig],
    lengths: Lengths,
    weights: Sequence[dict[str, int]],
    budget: float,
    elapsed: Callable[[], float],
    workdir: Path,
    given: Shape | None,
) -> SizedRun:
    """Choose shape, batch and tokens such that the whole command takes `budget` seconds, or less if the text is small.

    A `given` shape is that of a model whose weights are trained on; `base` has its parametrization.

    `base` are the values of a config of the family, with the store; `change` makes a config of such values, with the
    user's changes, of which `weights` are those of the sources; `elapsed` returns the seconds that the command has
    taken by now.
    """
    devices = jax.devices()
    is_accelerator = devices[0].platform != "cpu"
    values = copy.deepcopy(base)
    # Losses are the same within their scatter (benchmarks/results/dtype_losses.md); steps take 0.55 to 0.6 of the time
    # (train_step_cpu.md). A shape is chosen by 0.7 of it, which errs to a smaller one; its steps are measured then.
    in_bfloat16 = not is_accelerator and multiplies_bfloat16()
    values["model"] |= {
        "dtype": "bfloat16" if is_accelerator or in_bfloat16 else "float32",
        "loss_chunk": lengths.short,
    }
    rows = len(devices) * max(1, _EVALUATION_ROWS // len(devices))
    values["evaluation"] |= {"batch_size": rows, "blocks_per_source": _BLOCKS_OF_EVALUATION}
    peak = peak_flops(devices[0]).flops * len(devices)
    efficiency = _ACCELERATOR_EFFICIENCY if is_accelerator else _CPU_EFFICIENCY / (0.7 if in_bfloat16 else 1)
    flops = _TRAINING_SHARE * max(budget - elapsed(), budget / 4) * peak * efficiency
    tokens_per_epoch = manifest.block_len * _num_blocks(manifest.splits[TRAIN], weights)
    seq_len = round(sizing.PHASE_1_SHARE * lengths.short + (1 - sizing.PHASE_1_SHARE) * lengths.block)
    max_parameters = memory_bytes(devices[0]) * (len(devices) if is_accelerator else 1) / _BYTES_A_PARAMETER
    if given is not None:
        shape = given
        _check_fits(shape, max_parameters=max_parameters)
    else:
        shape = sizing.choose_shape(
            vocab_size=manifest.tokenizer.vocab_size,
            flops=flops,
            tokens_per_epoch=tokens_per_epoch,
            seq_len=seq_len,
            max_parameters=max_parameters,
        )
    values["model"] |= dataclasses.asdict(shape)
    max_epochs = _GIVEN_EPOCHS if given else sizing.MAX_EPOCHS
    most_tokens = max_epochs * tokens_per_epoch
    peak_rate = values["optimizer"]["peak_learning_rate"] * sizing.depth_factor(shape)
    if given is not None:
        peak_rate *= _GIVEN_PEAK / (max(1.0, shape.width) if values["mup"]["preset"] == "sp" else 1.0)
    tokens_per_step = sizing.tokens_per_step_for(
        min(flops / flops_per_token(shape, seq_len=seq_len), most_tokens),
        block_len=lengths.block,
        num_devices=len(devices),
    )

    def config_of(num_steps: int, *, step_seconds: float) -> TrainConfig:
        chosen = copy.deepcopy(values)
        for section, more in sizing.run_values(
            lengths=lengths,
            tokens_per_step=tokens_per_step,
            num_steps=num_steps,
            tokens_per_epoch=tokens_per_epoch,
            peak=peak_rate,
            step_seconds=step_seconds,
        ).items():
            chosen[section] |= more
        config = change(chosen)
        if weights:  # some source is read more often than all together
            chosen["data"]["max_epochs"] = math.ceil(max(_epochs(config, manifest).values()))
            return change(chosen)
        return config

    print_line(f"Measuring the steps of {_described(shape)} ...")
    by_text = most_tokens // tokens_per_step
    # The longest run that may be chosen: flags of steps and of tokens that fit the chosen one fit it.
    longest = config_of(by_text, step_seconds=1.0)
    times = measure_run(
        longest,
        devices=devices,
        workdir=workdir,
        seconds=min(_MEASURED_SECONDS, budget / 60),
    )
    step_seconds = _step_seconds(times)
    fixed = _fixed_seconds(times, manifest, config=longest)
    by_time = int((budget - elapsed() - fixed) / step_seconds)
    config = config_of(min(by_time, by_text), step_seconds=step_seconds)
    table = config.curriculum.table
    seconds = elapsed() + fixed + table.num_steps * step_seconds
    why = _why_so_many(table.num_steps, by_time=by_time, by_text=by_text, budget=budget, max_epochs=max_epochs)
    per_step = " and ".join(
        f"{1000 * each:.0f} ms at {phase.seq_len}" for each, phase in zip(times.steps, table.phases, strict=True)
    )
    lines = (
        _model_line(shape, config=config, is_given=given is not None, peak_rate=peak_rate)
        + ", in bfloat16, which this CPU multiplies itself" * (in_bfloat16 and config.model.dtype == "bfloat16"),
        f"Run: {table.num_steps:,} steps of {table.tokens_per_step:,} tokens, "
        f"{_shown_epochs(config, manifest)} ({why}), "
        + ("" if lengths.short == lengths.block else f"75 % at length {lengths.short}, the rest ")
        + f"at length {lengths.block}",
        f"Time: about {shown_time(seconds)} for the whole command, by measured steps of {per_step}",
    )
    return SizedRun(config=config, lines=lines)


def _why_so_many(num_steps: int, *, by_time: int, by_text: int, budget: float, max_epochs: float) -> str:
    if num_steps == by_time:
        return f"what {budget / 60:g} minutes hold"
    if num_steps == by_text:
        return f"at most {max_epochs}: more would only repeat the text"
    return f"the fewest that are trained; {budget / 60:g} minutes do not hold them"


def _model_line(shape: Shape, *, config: TrainConfig, is_given: bool, peak_rate: float) -> str:
    if is_given:
        return (
            f"Model: {_described(shape)}, as given; peak learning rate {peak_rate:.3g}, {_GIVEN_PEAK:g} of a new one's"
        )
    return (
        f"Model: {_described(shape)}: the least predicted loss for time and text; muP from width "
        f"{config.mup.base_d_model:g}"
    )


def _check_fits(shape: Shape, *, max_parameters: float) -> None:
    """Check a given model against this machine's memory.

    Raises:
      ValueError: it is too large.
    """
    if shape.num_parameters > max_parameters:
        raise ValueError(
            f"the model of --init has {shape.num_parameters:,} parameters; to train it takes about "
            f"{_BYTES_A_PARAMETER} bytes for each, and this machine's memory holds {max_parameters:,.0f}"
        )


def _num_blocks(train: Split, weights: Sequence[dict[str, int]]) -> int:
    """Return how many blocks there are to train on; with weights, of the sources that have one.

    Raises:
      ValueError: the weights are of other sources.
    """
    if not weights:
        return train.num_blocks
    sizes = {name: part.num_blocks for name, part in train.sources.items()}
    by_phase = [weights_of(phase, sizes, of="the token store") for phase in weights]
    return sum(size for size, *of_source in zip(sizes.values(), *by_phase, strict=True) if any(of_source))


def _epochs(config: TrainConfig, manifest: Manifest) -> dict[str, float]:
    """Return how many epochs a run is, of the store or of each source with a weight, as its metrics say it."""
    curriculum = config.curriculum.table
    order = make_order(manifest, curriculum=curriculum, data=config.data)
    return order.epochs_seen(curriculum.num_steps)


def _shown_epochs(config: TrainConfig, manifest: Manifest) -> str:
    parts = [(name.partition("/")[2], epochs) for name, epochs in _epochs(config, manifest).items()]
    return ", ".join(f"{epochs:.2f} epochs{' of ' * bool(source)}{source}" for source, epochs in parts)


def shown_time(seconds: float) -> str:
    """Return a time as minutes, or as hours if it is long."""
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _described(shape: Shape) -> str:
    millions = shape.num_parameters / 1e6
    return f"{millions:.3g} M parameters, {shape.num_layers} layers of width {shape.d_model}"


def _step_seconds(times: RunTimes) -> float:
    """Return the seconds of a step, a mean over both phases, with what the loop adds."""
    first, second = times.steps
    return sizing.STEP_OVERHEAD * (sizing.PHASE_1_SHARE * first + (1 - sizing.PHASE_1_SHARE) * second)


def _fixed_seconds(times: RunTimes, manifest: Manifest, *, config: TrainConfig) -> float:
    """Return the seconds of a run beside its steps: preparing, evaluations, the end."""
    held_out, rows = manifest.splits[HELDOUT], config.evaluation.batch_size
    some = len(heldout_blocks(held_out, blocks_per_source=config.evaluation.blocks_per_source))
    batches = _EVALUATIONS * -(-some // rows)
    batches += num_final_evaluations(config.optimizer) * -(-held_out.num_blocks // rows)
    return times.prepare + batches * times.evaluation + sizing.END_SECONDS
