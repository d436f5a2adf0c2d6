"""The part of a config that may be changed for a slice without changing what is trained."""

from __future__ import annotations

import dataclasses

from btlm_jax.recipe.config import REMATS, MeshConfig, TrainConfig

# By remat: activations saved a token and a layer, as (arrays of width d_model, arrays of width d_ff). Lower bounds.
# Where there are several of d_model, four of them are attention's: q, k, v and its output.
KEPT = {"full": (1, 0), "attention_saved": (5, 0), "out_recomputed": (5, 2), "matmuls_saved": (6, 2), "none": (10, 5)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """How a step is divided over devices and micro-batches, and what is saved for its backward pass."""

    mesh: MeshConfig
    remat: str

    @property
    def keys(self) -> dict[str, int | str]:
        """The keys of a config that are this layout, with their values."""
        return {
            **{f"mesh.{name}": value for name, value in dataclasses.asdict(self.mesh).items()},
            "model.remat": self.remat,
        }

    @property
    def flags(self) -> str:
        """Flags that set this layout."""
        return " ".join(f"--config.{key}={value}" for key, value in self.keys.items())

    def __str__(self) -> str:
        return format_mesh(self.mesh) + f" model.remat={self.remat}"

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return `config` with this layout.

        Raises:
          ValueError: mesh.accumulation does not divide a batch.
        """
        model = dataclasses.replace(config.model, remat=self.remat)
        return dataclasses.replace(config, mesh=self.mesh, model=model)

    def relative_memory(self, other: MeshLayout) -> float:
        """Return a lower bound of this layout's memory relative to that of `other`.

        1 where micro-batches are as large, remat saves as much, and the state is replicated as often; 1 / n with n
        times as many micro-batches, since at most everything shrinks with them; 0 where no bound is known.
        """
        is_alike = (self.mesh.tensor, self.mesh.gradient_dtype) == (other.mesh.tensor, other.mesh.gradient_dtype)
        keeps_as_much = REMATS.index(self.remat) >= REMATS.index(other.remat)
        if not is_alike or self.mesh.context < other.mesh.context or not keeps_as_much:
            return 0.0
        return min(1.0, other.mesh.accumulation / self.mesh.accumulation)

    def trades_speed_for_memory(self, other: MeshLayout) -> bool:
        """Whether this communicates and computes at least as much as `other`, and can only save memory."""
        return (
            self.mesh.tensor == other.mesh.tensor
            and self.mesh.context >= other.mesh.context
            and self.mesh.accumulation >= other.mesh.accumulation
            and REMATS.index(self.remat) <= REMATS.index(other.remat)
        )


def layout_of(config: TrainConfig) -> MeshLayout:
    """Return the layout that a config has."""
    return MeshLayout(mesh=config.mesh, remat=config.model.remat)


def format_mesh(mesh: MeshConfig) -> str:
    """Return a mesh as "mesh.tensor=2 mesh.context=1 mesh.accumulation=4"."""
    return " ".join(f"mesh.{name}={value}" for name, value in shown_mesh(dataclasses.asdict(mesh)).items())


def shown_mesh(values: dict) -> dict:
    """Return the values of a mesh that are shown: mesh.gradient_dtype only where it is not float32."""
    return {name: value for name, value in values.items() if (name, value) != ("gradient_dtype", "float32")}
