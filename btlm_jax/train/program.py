"""From a config and a mesh to compiled train steps: `btlm train` runs and `btlm plan` examines the same program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from btlm_jax.model import Btlm, freeze, make_model, parameter_table, with_decay
from btlm_jax.parallel.mesh import AxisRules, batch_sharding, rules_for
from btlm_jax.recipe.config import TrainConfig, UpdateRule
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.flops import compiler_options
from btlm_jax.train.step import TrainState, abstract_batch, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The model, optimizer and abstract state of a config on a mesh; nothing is compiled or allocated yet."""

    config: TrainConfig
    mesh: Mesh
    model: Btlm
    table: dict  # the parameters' tree of ParameterInfo
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState  # abstract
    update_rules: tuple[UpdateRule, ...]  # one a phase
    options: dict[str, str | bool]  # of XLA

    def rules_for(self, phase: Phase) -> AxisRules:
        """Return the sharding rules of a phase, which depend on its batch size."""
        return rules_for(phase.batch_size, mesh=self.mesh, config=self.config.mesh)

    def with_table(self, table: dict) -> Program:
        """Return the program with other rules of the parameters, which its optimizer follows."""
        num_steps = self.config.curriculum.table.num_steps
        optimizer = make_optimizer(self.config.with_numbers().optimizer, table, num_steps=num_steps)
        return dataclasses.replace(self, table=table, optimizer=optimizer)

    def make_train_step(self, phase: Phase) -> Callable:
        """Make the step of a phase, not yet jitted: see `make_train_step` of step.py."""
        return make_train_step(
            self.model.clone(rules=self.rules_for(phase)), self.optimizer, self.table,
            loss_chunk=self.config.model.loss_chunk, rule=self.update_rules[phase.index],
            z_loss=self.config.optimizer.z_loss,
        )  # fmt: skip

    def trace_train_step(self, phase: Phase) -> jax.stages.Traced:
        """Trace the step of a phase, for `compile`."""
        rules, accumulation = self.rules_for(phase), self.config.mesh.accumulation
        step = self.make_train_step(phase)
        shape = (accumulation, phase.batch_size // accumulation, phase.seq_len)
        sharding = batch_sharding(self.mesh, rules)
        batch = abstract_batch(shape, sharding, document_mask=self.config.data.document_mask)
        learning_rate = jax.ShapeDtypeStruct((), np.float32)
        with jax.set_mesh(self.mesh):
            return jax.jit(step, donate_argnums=0).trace(self.state, batch, learning_rate)

    def compile(self, traced: jax.stages.Traced) -> jax.stages.Compiled:
        """Compile a traced step for the mesh's devices."""
        with jax.set_mesh(self.mesh):
            return traced.lower().compile(compiler_options=self.options)


def make_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Make the model, optimizer and abstract state of a config.

    Raises:
      ValueError: optimizer.freeze names no parameter, or all of them.
    """
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    model = model.clone(rules=model.rules.over_slices(mesh))
    table = freeze(parameter_table(model, mesh), config.optimizer.frozen_patterns)
    table = with_decay(table, config.optimizer.weight_decay_convention)
    if config.optimizer.hidden_optimizer == "muon":
        from btlm_jax.recipe.muon import with_muon_rates

        table = with_muon_rates(table, config)
    num_steps = config.curriculum.table.num_steps
    optimizer = make_optimizer(config.with_numbers().optimizer, table, num_steps=num_steps)
    state = abstract_state(table, optimizer, mesh)
    return Program(
        config=config, mesh=mesh, model=model, table=table, optimizer=optimizer, state=state,
        update_rules=tuple(map(config.update_rule, config.curriculum.table.phases)),
        options=compiler_options(mesh.devices.flat[0]),
    )  # fmt: skip
