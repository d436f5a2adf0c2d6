"""Search the layouts of a config on a slice for the fastest that fits, compiling as few of them as may be.

Layouts are tried in the order of a rough guess of their step time. Not compiled is what cannot win: what needs more
than a chip has by its state and saved activations alone, or by what one that was compiled needs; what saves memory at
the expense of time while one that has memory to spare does not; what is far behind that by the same guess.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from btlm_jax.plan.chips import GIB, Chip, chip_of, slice_devices
from btlm_jax.plan.compiling import CompileCache, NoCompilationsLeftError
from btlm_jax.plan.layout import Layout
from btlm_jax.plan.slice_plan import SlicePlan, dividing_meshes, layout_problems, plan_until_misfit
from btlm_jax.recipe.config import REMATS, TrainConfig
from btlm_jax.train.flops import flops_per_token, peak_flops

SPARE = 0.1  # of a chip's memory, that the best layout leaves
TOO_LARGE, SLOWER, NOT_REACHED = "too large", "slower", "not reached"  # why a layout is not compiled

# For a token and a layer, arrays that each remat keeps for the backward pass: so many of d_model, so many of d_ff.
# No more than it does keep, so that a bound made of them is one.
_KEPT = {"full": (1, 0), "attention_saved": (5, 0), "out_recomputed": (5, 2), "matmuls_saved": (6, 2), "none": (10, 5)}
# How much of the forward pass is computed again. Only the order of trying depends on it.
_COMPUTED_AGAIN = {"full": 1.0, "attention_saved": 0.75, "out_recomputed": 0.2, "matmuls_saved": 0.1, "none": 0.0}
_MATMUL_SPEED = 0.6  # of the peak; as above
_FAR_BEHIND = 1.3  # times the guess for a layout that has memory to spare, and a layout is not compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """A layout that divides, and roughly the time of its step."""

    layout: Layout
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A layout that divides and was not compiled, and why."""

    layout: Layout
    reason: str  # one of the three above
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What came of a search."""

    topology: str
    num_chips: int
    tried: tuple[SlicePlan, ...]  # the best first
    skipped: tuple[Skipped, ...]
    problems: tuple[str, ...]  # why there was nothing to try

    @property
    def best(self) -> SlicePlan | None:
        return self.tried[0] if self.tried and self.tried[0].works else None


def search_layouts(config: TrainConfig, *, topology: str, cache: CompileCache, say: Callable[[str], None]) -> Search:
    """Try the layouts of a config on a slice, the most promising first; `say` hears of the progress.

    Raises:
      ValueError: there is no such slice, or libtpu is not installed.
    """
    chip, devices = chip_of(topology), slice_devices(topology)
    waiting = promising_layouts(config, chip=chip, devices=devices)
    problems = () if waiting else layout_problems(config, num_devices=len(devices), chip=chip)
    tried: list[SlicePlan] = []
    skipped, waiting = _sift(waiting, lambda guess: _skip_by_bound(guess, config=config, chip=chip, chips=len(devices)))
    while waiting:
        guess, *rest = waiting
        outlook = cache.outlook(layouts=len(waiting), phases=len(config.curriculum.table.phases))
        say(f"{len(tried) + 1}. {guess.layout}; {outlook}")
        try:
            plan = plan_until_misfit(guess.layout.applied_to(config), topology=topology, cache=cache, say=say)
        except NoCompilationsLeftError as error:
            skipped += [Skipped(layout=each.layout, reason=NOT_REACHED, detail=str(error)) for each in waiting]
            break
        say(_outcome(plan))
        tried.append(plan)
        newly_skipped, waiting = _sift(rest, functools.partial(_skip_after, guess, plan))
        skipped += newly_skipped
    return Search(
        topology=topology,
        num_chips=len(devices),
        tried=tuple(sorted(tried, key=_rank)),
        skipped=tuple(skipped),
        problems=problems,
    )


def promising_layouts(config: TrainConfig, *, chip: Chip, devices: Sequence[jax.Device]) -> list[Guess]:
    """Return every layout that divides, by a rough guess of its step time."""
    peak = peak_flops(devices[0]).flops
    guesses = [
        Guess(layout=layout, seconds=_rough_seconds(config, layout, chip=chip, chips=len(devices), peak=peak))
        for mesh in dividing_meshes(config, num_devices=len(devices))
        for layout in (Layout(mesh=mesh, remat=remat) for remat in REMATS)
    ]
    return sorted(guesses, key=lambda guess: guess.seconds)


def least_bytes(config: TrainConfig, layout: Layout, *, num_chips: int) -> int:
    """Return what a chip needs at least: its share of parameters and moments, and of what the backward pass is kept."""
    model = config.model
    num_d, num_f = _KEPT[layout.remat]
    width = num_d * model.d_model + num_f * model.d_ff
    tokens = config.curriculum.table.tokens_per_step // layout.mesh.accumulation
    activations = tokens * model.num_layers * width * (2 if model.dtype == "bfloat16" else 4)
    # Parameters and their two moments are float32, and copied over the chips that share a sequence.
    return (12 * _matrix_parameters(config) * layout.mesh.context + activations) // num_chips


def _sift(guesses: Sequence[Guess], skip: Callable[[Guess], Skipped | None]) -> tuple[list[Skipped], list[Guess]]:
    """Return those that `skip` has a reason against, and the others."""
    found = [(guess, skip(guess)) for guess in guesses]
    return [skipped for _, skipped in found if skipped], [guess for guess, skipped in found if not skipped]


def _skip_by_bound(guess: Guess, *, config: TrainConfig, chip: Chip, chips: int) -> Skipped | None:
    """Return why a layout need not be compiled, whatever others need, or None."""
    least = least_bytes(config, guess.layout, num_chips=chips)
    if least <= chip.hbm_bytes:
        return None
    detail = f"state and saved activations alone are {least / GIB:.1f} of {chip.hbm_bytes / GIB:.2f} GiB"
    return Skipped(layout=guess.layout, reason=TOO_LARGE, detail=detail)


def _skip_after(tried: Guess, plan: SlicePlan, guess: Guess) -> Skipped | None:
    """Return why a layout need not be compiled after what compiling another said, or None."""
    layout = guess.layout
    least = plan.needed * layout.share_needed(plan.layout)
    if least > plan.chip.hbm_bytes:
        detail = f"needs {least / GIB:.2f} GiB at least, by what {plan.layout} needs"
        return Skipped(layout=layout, reason=TOO_LARGE, detail=detail)
    if not plan.works or plan.spare < SPARE:
        return None
    if layout.gives_up_time_for_memory(plan.layout):
        detail = f"exchanges or computes more than {plan.layout}, which has memory to spare"
        return Skipped(layout=layout, reason=SLOWER, detail=detail)
    if guess.seconds > _FAR_BEHIND * tried.seconds:
        detail = f"by a rough guess {guess.seconds / tried.seconds:.1f} times the time of {plan.layout}"
        return Skipped(layout=layout, reason=SLOWER, detail=detail)
    return None


def _rank(plan: SlicePlan) -> tuple:
    """Sort key: those with memory to spare, those that just fit, each by time; then the others by what they need."""
    if not plan.works:
        return 2, plan.needed
    return int(plan.spare < SPARE), sum(plan.seconds)


def _rough_seconds(config: TrainConfig, layout: Layout, *, chip: Chip, chips: int, peak: float) -> float:
    """Guess a step's time: matrix products, weights gathered and gradients scattered, activations exchanged."""
    model, mesh = config.model, layout.mesh
    phases = config.curriculum.table.phases
    flops = sum(flops_per_token(model, seq_len=phase.seq_len) * phase.tokens_per_step for phase in phases) / len(phases)
    computing = flops * (1 + _COMPUTED_AGAIN[layout.remat] / 3) / (chips * peak * _MATMUL_SPEED)
    # Of each micro-batch, weights are gathered twice in 2 bytes, and their gradients scattered in 4.
    weights = (2 * 2 + 4) * _matrix_parameters(config) / mesh.tensor * mesh.accumulation
    activations = 2 * model.d_model * model.num_layers * config.curriculum.table.tokens_per_step / chips
    # Over `tensor`, both halves of a block are reduced, forward and backward; over `context`, q, k, v and the output
    # change hands.
    shared = activations * (2 * 4 * (mesh.tensor - 1) + 2 * 4 * (1 - 1 / mesh.context))
    return computing + (weights + shared) / (2 * chip.link_bytes)


def _matrix_parameters(config: TrainConfig) -> int:
    model = config.model
    block = 4 * model.d_model * model.d_model + 3 * model.d_model * model.d_ff
    return model.num_layers * block + model.vocab_size * model.d_model


def _outcome(plan: SlicePlan) -> str:
    if not plan.works:
        return f"  {plan.problems[0]}"
    low, high = (seconds / 86_400 for seconds in plan.seconds)
    return f"  fits with {plan.spare:.0%} to spare; the run takes {low:.1f} to {high:.1f} days"
