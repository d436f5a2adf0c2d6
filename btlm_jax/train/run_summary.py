"""The plan of a run as text: what `btlm train --dry-run` prints and a run logs at its start."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax

from btlm_jax.recipe.config import CurriculumConfig, ModelConfig, MupConfig, OptimizerConfig, TrainConfig
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.recipe.optimizer import learning_rate_at, stretches_of
from btlm_jax.train.flops import FLOPS_CONVENTION, flops_per_token

_GB = 1e9


def describe_run(config: TrainConfig, table: dict) -> str:
    """Return the whole plan; `table` is the model's tree of ParameterInfo."""
    sections = (
        _parameters(config.model, config.mup, table),
        _phases(config.curriculum, config.model),
        _schedule(config.optimizer, config.curriculum),
        _memory(table),
        _parameter_rows(config.optimizer, table, num_steps=config.curriculum.table.num_steps),
    )
    return "\n\n".join("\n".join(section) for section in sections)


def num_parameters(table: dict) -> int:
    """Return how many parameters the tree of ParameterInfo holds."""
    return sum(math.prod(info.shape) for info in jax.tree.leaves(table))


def _parameters(model: ModelConfig, mup: MupConfig, table: dict) -> Iterator[str]:
    yield f"Model: {num_parameters(table):,} parameters"
    yield (
        f"  {model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads x {model.head_dim}, "
        f"d_ff {model.d_ff}, vocabulary {model.vocab_size:,}, compute in {model.dtype}"
    )
    yield f"  parametrization {mup.preset}: d_model / base = {model.d_model} / {mup.base_d_model:g}"
    if frozen := [info for info in jax.tree.leaves(table) if info.rule.is_frozen]:
        count, total = sum(math.prod(info.shape) for info in frozen), num_parameters(table)
        yield f"  frozen, to stay as they are: {count:,} parameters of {total:,}, {total - count:,} are trained"
        yield f"    {', '.join(info.path for info in frozen)}"


def _phases(curriculum: CurriculumConfig, model: ModelConfig) -> Iterator[str]:
    table = curriculum.table
    yield (
        f"Curriculum: {table.num_steps:,} steps of {table.tokens_per_step:,} tokens, "
        f"{table.num_tokens / 1e9:.2f} B tokens"
    )
    for phase in table.phases:
        share = phase.num_tokens / table.num_tokens
        flops = flops_per_token(model, seq_len=phase.seq_len)
        yield (
            f"  phase {phase.index + 1}: {phase.num_steps:,} steps of {phase.batch_size:,} x {phase.seq_len:,} = "
            f"{phase.tokens_per_step:,} tokens; {phase.num_tokens:,} tokens ({share:.2%}); "
            f"{flops / 1e9:.4g} GFLOP a token"
        )
    total = sum(p.num_tokens * flops_per_token(model, seq_len=p.seq_len) for p in table.phases)
    yield f"  {total:.4g} FLOP in all ({FLOPS_CONVENTION})"


def _schedule(optimizer: OptimizerConfig, curriculum: CurriculumConfig) -> Iterator[str]:
    table = curriculum.table

    def rate(step: int) -> float:
        tokens = table.tokens_seen(step)
        return learning_rate_at(optimizer, tokens=tokens, total_tokens=table.num_tokens)

    parts = stretches_of(optimizer, total_tokens=table.num_tokens)
    stretches = [f"warm-up {_steps(parts.warmup, table)} to {optimizer.peak_learning_rate:g}"]
    if parts.stable:
        stretches.append(f"constant for {_steps(parts.stable, table)}")
    if parts.decay:
        shape = "cosine" if optimizer.schedule == "cosine" else "linear"
        share = f", the last {optimizer.decay_share:.4g}" if optimizer.schedule == "wsd" else ""
        stretches.append(f"{shape} to {optimizer.end_learning_rate:g} in {_steps(parts.decay, table)}{share}")
    begin = f" from {optimizer.schedule_begin:,} tokens on" if optimizer.schedule_begin else ""
    last = rate(table.num_steps)
    yield f"Schedule {optimizer.schedule}{begin}: {', then '.join(stretches)}; {last:.5g} at the end"
    for phase in table.phases[1:]:
        if table.tokens_seen(phase.first_step + 1) <= optimizer.schedule_begin:
            continue
        yield (
            f"  LR at the switch to {phase.seq_len:,} (first step of phase {phase.index + 1}, step "
            f"{phase.first_step + 1:,}): {rate(phase.first_step + 1):.6g}"
        )
    yield (
        f"  AdamW beta ({optimizer.beta1:g}, {optimizer.beta2:g}), eps {optimizer.eps:g}, weight decay "
        f"{optimizer.weight_decay:g} coupled to the learning rate, clip at global norm {optimizer.clip_norm:g}"
    )


def _steps(tokens: int, table: Curriculum) -> str:
    return f"{tokens / table.tokens_per_step:g} steps ({tokens:,} tokens)"


def _memory(table: dict) -> Iterator[str]:
    infos = jax.tree.leaves(table)

    def size(infos: list, *, on_device: bool) -> int:
        return sum(4 * math.prod(info.sharding.shard_shape(info.shape) if on_device else info.shape) for info in infos)

    trained = [info for info in infos if not info.rule.is_frozen]
    whole, per_device = (size(infos, on_device=x) + 2 * size(trained, on_device=x) for x in (False, True))
    axes = ", ".join(f"{name} {size}" for name, size in infos[0].sharding.mesh.shape.items())
    yield (
        f"Memory, float32 state (parameters + 2 AdamW moments{' of those that are trained' * (trained != infos)}): "
        f"{whole / _GB:.4g} GB in all, {per_device / _GB:.4g} GB a device on this mesh ({axes}); "
        f"gradients {size(trained, on_device=True) / _GB:.4g} GB more while a step runs, activations on top"
    )


def _parameter_rows(optimizer: OptimizerConfig, table: dict, *, num_steps: int) -> Iterator[str]:
    yield "Parameters (init std before the cut at two sigma; tau = 1 / (LR x weight decay x steps), AdamW's memory)"
    yield (
        f"  {'parameter':<30} {'shape':<22} {'class':<13} {'init':>10} {'LR mult':>8} {'peak LR':>9} "
        f"{'decay':>7} {'eps':>8} {'tau':>7}"
    )
    for info in jax.tree.leaves(table):
        rule = info.rule
        peak = optimizer.peak_learning_rate * rule.learning_rate
        decay = optimizer.weight_decay * rule.weight_decay
        init = f"{rule.init_std:.6g}" if rule.init_std else f"= {rule.init_mean:g}"
        tau = f"{1 / (peak * decay * num_steps):.4f}" if decay else "-"
        shape = " x ".join(map(str, info.shape))
        yield (
            f"  {info.path:<30} {shape:<22} {rule.parameter_class:<13} {init:>10} {rule.learning_rate:>8.5g} "
            f"{peak:>9.4g} {decay:>7.3g} {optimizer.eps * rule.eps:>8.2g} {tau:>7}"
        )
