"""Search the layouts of a config on a slice for the fastest that fits, compiling as few as possible.

Layouts are tried in the order of a rough estimate of their step time. A layout is not compiled if it cannot win: its
state and saved activations alone exceed a chip's memory; a compiled layout proves that it does not fit; it trades speed
for memory against a compiled layout that has memory to spare; or its estimate is _FAR_BEHIND times that layout's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from btlm_jax.plan.chips import GIB, Chip, chip_of, slice_devices
from btlm_jax.plan.compiling import CompileCache, NoCompilationsLeftError
from btlm_jax.plan.gpus import Gpu, is_stand_in
from btlm_jax.plan.layout import KEPT, MeshLayout
from btlm_jax.plan.slice_plan import SlicePlan, dividing_meshes, layout_problems, plan_fitting_phases
from btlm_jax.recipe.config import REMATS, TrainConfig
from btlm_jax.train.flops import flops_per_token, peak_flops
from btlm_jax.train.memory import whole_state_bytes

SPARE = 0.1  # share of a chip's memory that the best layout must leave
TOO_LARGE, SLOWER, NOT_REACHED = "too large", "slower", "not reached"  # reasons not to compile a layout

# By remat: share of the forward pass that is recomputed. Only the order of trying depends on it.
_COMPUTED_AGAIN = {"full": 1.0, "attention_saved": 0.75, "out_recomputed": 0.2, "matmuls_saved": 0.1, "none": 0.0}
_MATMUL_SPEED = 0.6  # share of the peak; only the order depends on it
_FAR_BEHIND = 1.3  # times the estimate of a layout that has memory to spare: not compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """A layout that divides, and a rough estimate of its step time."""

    layout: MeshLayout
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippedLayout:
    """A layout that divides and was not compiled, and why."""

    layout: MeshLayout
    reason: str  # TOO_LARGE, SLOWER or NOT_REACHED
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Result of a search."""

    topology: str
    num_chips: int
    tried: tuple[SlicePlan, ...]  # the best first
    skipped: tuple[SkippedLayout, ...]
    problems: tuple[str, ...]  # why no layout could be tried

    @property
    def is_by_formula(self) -> bool:
        return any(plan.is_by_formula for plan in self.tried)

    @property
    def best(self) -> SlicePlan | None:
        return self.tried[0] if self.tried and self.tried[0].works else None


def search_layouts(
    config: TrainConfig, *, topology: str, cache: CompileCache, report_progress: Callable[[str], None]
) -> SearchResult:
    """Try the layouts of a config on a slice, the most promising first; `report_progress` gets lines of progress.

    Raises:
      ValueError: there is no such slice, libtpu is not installed, or optimizer.freeze is refused.
    """
    chip, devices = chip_of(topology), slice_devices(topology)
    remaining = promising_layouts(config, chip=chip, devices=devices)
    problems = () if remaining else layout_problems(config, num_devices=len(devices), chip=chip)
    if (others := _meshes_without_evaluation(config, num_devices=len(devices))) > 0:
        report_progress(
            f"{others} meshes are left out, over which evaluation.batch_size={config.evaluation.batch_size} does not "
            f"divide: to try them, --config.evaluation.batch_size={config.curriculum.batch_size[-1]}"
        )
    tried: list[SlicePlan] = []
    skip_by_bound = functools.partial(
        _skip_by_bound,
        config=config,
        chip=chip,
        chips=len(devices),
        state=whole_state_bytes(config, jax.devices("cpu")[0]),
    )
    skipped, remaining = _sift(remaining, skip_by_bound)
    while remaining:
        guess, *rest = remaining
        outlook = "by formula"
        if not is_stand_in(devices[0]):
            outlook = cache.outlook(layouts=len(remaining), phases=len(config.curriculum.table.phases))
        report_progress(f"{len(tried) + 1}. {guess.layout}; {outlook}")
        try:
            plan = plan_fitting_phases(
                guess.layout.applied_to(config), topology=topology, cache=cache, report_progress=report_progress
            )
        except NoCompilationsLeftError as error:
            skipped += [SkippedLayout(layout=each.layout, reason=NOT_REACHED, detail=str(error)) for each in remaining]
            break
        report_progress(_describe_outcome(plan))
        tried.append(plan)
        newly_skipped, remaining = _sift(rest, functools.partial(_skip_after, guess, plan))
        skipped += newly_skipped
    return SearchResult(
        topology=topology,
        num_chips=len(devices),
        tried=tuple(sorted(tried, key=_rank)),
        skipped=tuple(skipped),
        problems=problems,
    )


def promising_layouts(config: TrainConfig, *, chip: Chip | Gpu, devices: Sequence[jax.Device]) -> list[Guess]:
    """Return every layout that divides, sorted by a rough estimate of its step time."""
    peak = peak_flops(devices[0]).flops
    guesses = [
        Guess(layout=layout, seconds=_rough_seconds(config, layout, chip=chip, chips=len(devices), peak=peak))
        for mesh in dividing_meshes(config, num_devices=len(devices))
        for layout in (MeshLayout(mesh=mesh, remat=remat) for remat in REMATS)
    ]
    return sorted(guesses, key=lambda guess: guess.seconds)


def least_bytes(config: TrainConfig, layout: MeshLayout, *, state: int, num_chips: int) -> int:
    """Return a lower bound of a chip's bytes: its share of the state, of so many bytes, and of saved activations."""
    model = config.model
    num_d, num_f = KEPT[layout.remat]
    width = num_d * model.d_model + num_f * model.d_ff
    tokens = config.curriculum.table.tokens_per_step // layout.mesh.accumulation
    activations = tokens * model.num_layers * width * (2 if model.dtype == "bfloat16" else 4)
    if config.optimizer.freeze:  # what only the gradients of frozen parameters need is not saved
        activations = 0
    # The state is copied over the chips that share a sequence.
    return (state * layout.mesh.context + activations) // num_chips


def _meshes_without_evaluation(config: TrainConfig, *, num_devices: int) -> int:
    """Return how many more meshes would divide if an evaluation had as many sequences as the last phase's step."""
    evaluation = dataclasses.replace(config.evaluation, batch_size=config.curriculum.batch_size[-1])
    larger = dataclasses.replace(config, evaluation=evaluation)
    return len(dividing_meshes(larger, num_devices=num_devices)) - len(dividing_meshes(config, num_devices=num_devices))


def _sift(
    guesses: Sequence[Guess], skip: Callable[[Guess], SkippedLayout | None]
) -> tuple[list[SkippedLayout], list[Guess]]:
    """Split guesses into those that `skip` rules out, and the others."""
    decisions = [(guess, skip(guess)) for guess in guesses]
    return [skipped for _, skipped in decisions if skipped], [guess for guess, skipped in decisions if not skipped]


def _skip_by_bound(
    guess: Guess, *, config: TrainConfig, chip: Chip | Gpu, chips: int, state: int
) -> SkippedLayout | None:
    """Return why a layout need not be compiled, by its own lower bound of memory; None if it must."""
    least = least_bytes(config, guess.layout, state=state, num_chips=chips)
    if least <= chip.hbm_bytes:
        return None
    detail = f"state and saved activations alone are {least / GIB:.1f} of {chip.hbm_bytes / GIB:.2f} GiB"
    return SkippedLayout(layout=guess.layout, reason=TOO_LARGE, detail=detail)


def _skip_after(tried: Guess, plan: SlicePlan, guess: Guess) -> SkippedLayout | None:
    """Return why a layout need not be compiled, given the plan of another; None if it must."""
    layout = guess.layout
    least = plan.needed * layout.relative_memory(plan.layout)
    if least > plan.chip.hbm_bytes:
        detail = f"needs {least / GIB:.2f} GiB at least, by what {plan.layout} needs"
        return SkippedLayout(layout=layout, reason=TOO_LARGE, detail=detail)
    if not plan.works or plan.spare < SPARE:
        return None
    if layout.trades_speed_for_memory(plan.layout):
        detail = f"exchanges or computes more than {plan.layout}, which has memory to spare"
        return SkippedLayout(layout=layout, reason=SLOWER, detail=detail)
    if guess.seconds > _FAR_BEHIND * tried.seconds:
        detail = f"by a rough guess {guess.seconds / tried.seconds:.1f} times the time of {plan.layout}"
        return SkippedLayout(layout=layout, reason=SLOWER, detail=detail)
    return None


def _rank(plan: SlicePlan) -> tuple:
    """Sort key: with SPARE memory left, then other fitting ones, each by time; then the rest by memory needed."""
    if not plan.works:
        return 2, plan.needed
    return int(plan.spare < SPARE), plan.central_seconds


def _rough_seconds(config: TrainConfig, layout: MeshLayout, *, chip: Chip | Gpu, chips: int, peak: float) -> float:
    """Estimate a step's seconds: matrix products, weights gathered, gradients scattered, activations exchanged."""
    model, mesh = config.model, layout.mesh
    phases = config.curriculum.table.phases
    flops = sum(flops_per_token(model, seq_len=phase.seq_len) * phase.tokens_per_step for phase in phases) / len(phases)
    computing = flops * (1 + _COMPUTED_AGAIN[layout.remat] / 3) / (chips * peak * _MATMUL_SPEED)
    # Of each micro-batch, weights are gathered twice in 2 bytes, and their gradients scattered in 4.
    weights = (2 * 2 + 4) * _matrix_parameters(config) / mesh.tensor * mesh.accumulation
    activations = 2 * model.d_model * model.num_layers * config.curriculum.table.tokens_per_step / chips
    # Over `tensor`, both halves of a block are reduced, forward and backward; over `context`, q, k, v and the output
    # are exchanged.
    shared = activations * (2 * 4 * (mesh.tensor - 1) + 2 * 4 * (1 - 1 / mesh.context))
    return computing + (weights + shared) / (2 * chip.link_bytes)


def _matrix_parameters(config: TrainConfig) -> int:
    model = config.model
    block = 4 * model.d_model * model.d_model + 3 * model.d_model * model.d_ff
    return model.num_layers * block + model.vocab_size * model.d_model


def _describe_outcome(plan: SlicePlan) -> str:
    if not plan.works:
        return f"  {plan.problems[0]}"
    low, high = (seconds / 86_400 for seconds in plan.seconds)
    return (
        f"  fits with {plan.spare:.0%} to spare; the run takes {plan.central_seconds / 86_400:.1f} days "
        f"({low:.1f} to {high:.1f})"
    )
