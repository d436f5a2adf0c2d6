"""A layout: what of a config can be changed for a slice without changing what is trained."""

from __future__ import annotations

import dataclasses

from btlm_jax.recipe.config import REMATS, MeshConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is divided over devices and micro-batches, and what its backward pass keeps."""

    mesh: MeshConfig
    remat: str

    @property
    def flags(self) -> str:
        """The flags that give a config this layout."""
        values = [f"--config.mesh.{name}={value}" for name, value in dataclasses.asdict(self.mesh).items()]
        return " ".join([*values, f"--config.model.remat={self.remat}"])

    def __str__(self) -> str:
        return mesh_text(self.mesh) + f" model.remat={self.remat}"

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return `config` with this layout.

        Raises:
          ValueError: mesh.accumulation does not divide a batch.
        """
        model = dataclasses.replace(config.model, remat=self.remat)
        return dataclasses.replace(config, mesh=self.mesh, model=model)

    def share_needed(self, other: Layout) -> float:
        """Return the share of the memory of `other` that this needs at least.

        1 with micro-batches as large or larger, no less kept of each, and the state copied over as many chips; with n
        times as many micro-batches 1 / n, because at most everything shrinks with them; 0 where nothing follows.
        """
        keeps_as_much = REMATS.index(self.remat) >= REMATS.index(other.remat)
        if self.mesh.tensor != other.mesh.tensor or self.mesh.context < other.mesh.context or not keeps_as_much:
            return 0.0
        return min(1.0, other.mesh.accumulation / self.mesh.accumulation)

    def gives_up_time_for_memory(self, other: Layout) -> bool:
        """Whether this exchanges and computes at least what `other` does: nothing but memory could be said for it."""
        return (
            self.mesh.tensor == other.mesh.tensor
            and self.mesh.context >= other.mesh.context
            and self.mesh.accumulation >= other.mesh.accumulation
            and REMATS.index(self.remat) <= REMATS.index(other.remat)
        )


def layout_of(config: TrainConfig) -> Layout:
    """Return the layout that a config has."""
    return Layout(mesh=config.mesh, remat=config.model.remat)


def mesh_text(mesh: MeshConfig) -> str:
    """Return a mesh as "mesh.tensor=2 mesh.accumulation=4"."""
    return " ".join(f"mesh.{name}={value}" for name, value in dataclasses.asdict(mesh).items())
