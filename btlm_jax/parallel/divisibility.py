"""Check, before anything is built, that the mesh divides every size that it splits."""

from __future__ import annotations

from collections.abc import Iterator

from btlm_jax.recipe.config import MeshConfig, TrainConfig


def check_divisible(config: TrainConfig, *, num_devices: int) -> None:
    """Check that the config's mesh on so many devices divides every size that it splits.

    Raises:
      ValueError: it does not; names each size, its divisor, and the nearest sizes that would do.
    """
    if problems := divisibility_problems(config, num_devices=num_devices):
        layout = f"on {num_devices} devices as {describe_mesh(config.mesh, num_devices=num_devices)}"
        raise ValueError(f"the config does not divide {layout}:\n  " + "\n  ".join(problems))


def describe_mesh(mesh: MeshConfig, *, num_devices: int) -> str:
    """Return the axes of a config's mesh on so many devices, for example "fsdp 32 x context 8 x tensor 1"."""
    return f"fsdp {num_devices // (mesh.tensor * mesh.context)} x context {mesh.context} x tensor {mesh.tensor}"


def divisibility_problems(config: TrainConfig, *, num_devices: int) -> list[str]:
    """Return, for each size that the mesh on so many devices does not divide, a line with the nearest that it does."""
    mesh = config.mesh
    if num_devices % (mesh.tensor * mesh.context):
        ways = f"mesh.tensor={mesh.tensor} x mesh.context={mesh.context}"
        return [f"{ways} does not divide the {num_devices} devices"]
    fsdp = num_devices // (mesh.tensor * mesh.context)
    return [
        f"{name}={size} is not divisible by {by} ({reason}); nearest: "
        + ", ".join(map(str, sorted({max(size // by * by, by), (size // by + 1) * by})))
        for name, size, by, reason in _divisions(config, fsdp=fsdp)
        if size % by
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _divisions(config: TrainConfig, *, fsdp: int) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, size, divisor, what the divisor is made of) of everything that is split."""
    mesh = config.mesh
    batch_ways = f"mesh fsdp {fsdp} x mesh.accumulation {mesh.accumulation}"
    inner, inner_ways = mesh.tensor * mesh.context, f"mesh.tensor {mesh.tensor} x mesh.context {mesh.context}"
    for phase in config.curriculum.table.phases:
        name = f"of phase {phase.index + 1}"
        yield f"curriculum.batch_size {name}", phase.batch_size, fsdp * mesh.accumulation, batch_ways
        yield f"curriculum.seq_len {name}", phase.seq_len, inner, inner_ways
    yield "evaluation.batch_size", config.evaluation.batch_size, fsdp, f"mesh fsdp {fsdp}"
    stored_ways = f"mesh fsdp {fsdp} x mesh.tensor {mesh.tensor}"
    yield "model.d_model", config.model.d_model, fsdp * mesh.tensor, stored_ways
    yield "model.num_heads", config.model.num_heads, inner, inner_ways
