"""The training run, in chapters: prepare, restore, loop, finish.

`train` may be called again at any time: it goes on from the last complete checkpoint and ends with the same bits as a
run that was never interrupted. All code that the steps need is imported before the first of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from btlm_jax import notices
from btlm_jax.data.loader import Batch, TrainLoader
from btlm_jax.data.store import HELDOUT, keep_settings, keep_tokenizer
from btlm_jax.kernels.build import multiplies_bfloat16
from btlm_jax.parallel.make_mesh import make_run_mesh, num_slices
from btlm_jax.parallel.mesh import batch_sharding, rules_for
from btlm_jax.recipe.config import PREPARED, TrainConfig, check_divisible
from btlm_jax.stopping import Stop
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import is_absolute, mirror_of
from btlm_jax.train import CONFIG_FILE, KEPT_TOKENIZER, METRICS_FILE, REPLACED
from btlm_jax.train.checkpoint import (
    Checkpointer,
    Position,
    SettingChange,
    changed_settings,
    environment_changes,
    go_back,
    last_position,
    restore_last,
    run_environment,
)
from btlm_jax.train.finish import (
    ContinuePrompt,
    evaluate_some,
    final_blocks_per_source,
    finish_run,
    finished_report,
    heldout_blocks,
    num_final_evaluations,
)
from btlm_jax.train.flops import FLOPS_CONVENTION, flops_per_token, peak_flops
from btlm_jax.train.memory import check_memory
from btlm_jax.train.metric_writer import (
    MACHINE_CHANGED,
    Compare,
    EvaluationWork,
    Follower,
    GoodputLedger,
    MetricWriter,
    append_setting_changed,
    compare_with_nothing,
)
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import (
    Beginning,
    BuildStore,
    PredictSteps,
    Run,
    check_curriculum,
    describe_examples,
    describe_run,
    has_store,
    keep_compiled,
    locate_store,
    log,
    make_run,
    make_workdir,
    open_run_store,
    predict_stop,
    prepare_store,
)
from btlm_jax.train.step import WINDOW, CorruptionError, TrainState

if TYPE_CHECKING:
    from btlm_jax.train.corruption import Checks
    from btlm_jax.train.step_trace import StepTrace

DONE, PREEMPTED, BAD_NUMBERS, WRONG_DEVICE = "done", "preempted", "bad numbers", "a device computes wrongly"
CheckDevices = Callable[[TrainConfig, Sequence[jax.Device]], str]  # -> what is known of the layout, or ""


class BadNumbersError(Exception):
    """A loss or a gradient was not finite after `step` steps."""

    def __init__(self, step: int, message: str):
        super().__init__(f"step {step:,}: {message}")
        self.step = step


def train(
    config: TrainConfig,
    *,
    workdir: Path,
    check_devices: CheckDevices,
    predict_steps: PredictSteps,
    resume_step: int,
    build_store: BuildStore,
    beginning: Beginning,
    continue_prompt: ContinuePrompt,
    stop: Stop,
    ledger: GoodputLedger,
    most_heldout_tokens: int | None = None,
) -> str:
    """Train `config` in `workdir` to its end, from wherever the workdir stands; return DONE or how else it ended.

    With a `resume_step` other than 0 it goes back to that checkpoint first, and later ones are set aside.

    What belongs to folders above this one is handed in: `check_devices` refuses a layout that is known not to fit the
    chips, `predict_steps` says how long steps will take, `build_store` makes the token store that the config describes,
    `beginning` the first state, `continue_prompt` the sample at the end. `ledger` counts the time of this start.
    `most_heldout_tokens`: see Run.

    Raises:
      ValueError: the config, the store, the mesh or the checkpoint do not fit together, or the step does not fit the
        chips' memory; says which and how.
      OSError: a file cannot be read or written.
      ProcessesDifferError: processes of this run have other devices, or see another store or checkpoint.
      Stopped: `stop` was requested where there is nothing to save.
    """
    _check_trackers(config)
    if layout_note := check_devices(config, jax.devices()):
        log(layout_note)
    make_workdir(workdir)
    check_divisible(config, num_devices=jax.device_count(), slices=num_slices(jax.devices()))
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    events = _go_back(workdir, resume_step, stop) if resume_step else []
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    try:
        stop.agree("checkpoints", {"checkpoints that are seen": ", ".join(map(str, checkpointer.steps()))})
        position, state, damages = last_position(checkpointer, config)
        stop.agree("start", _start_facts(position))
        if report := finished_report(config, workdir=workdir, step=position.step):
            changes = _report_changes(checkpointer, config, position)
            for change in changes if jax.process_index() == 0 else ():
                append_setting_changed(
                    workdir / METRICS_FILE, position.step, key=change.key, old=change.old, new=change.new
                )
            for event in events:
                log(event)
            log(report)
            return DONE
        program = make_program(config, mesh)
        log(describe_run(config, program.table))
        if mesh.devices.flat[0].platform == "gpu":
            from btlm_jax.train.gpu_step import describe_gpu_step  # only there: a run loads few modules

            log(describe_gpu_step(program))
        if mesh.devices.flat[0].platform == "cpu" and config.model.dtype == "float32" and multiplies_bfloat16():
            log("This CPU multiplies bfloat16 itself: model.dtype=bfloat16 would take 0.55 to 0.6 of the time a step")
        check_memory(program)
        if position.step:
            keep_compiled(workdir)
            with ledger.measure("restore"):
                position, state, more = restore_last(checkpointer, config, abstract=program.state)
            damages += more
        changes = _report_changes(checkpointer, config, position)
        with ledger.measure("corpus"):
            token_store = prepare_store(
                config,
                workdir=workdir,
                expected_fingerprint=position.store_fingerprint,
                build_store=build_store,
                wait_for_all=functools.partial(stop.wait_for_all, "token store made"),
            )
        check_curriculum(config, token_store.manifest)
        if examples := describe_examples(token_store.manifest):
            log(examples)
        compare = _make_comparison(config, workdir=workdir, first_step=position.step + 1)
        run = make_run(
            program,
            workdir=workdir,
            token_store=token_store,
            ledger=ledger,
            predict_steps=predict_steps,
            most_heldout_tokens=most_heldout_tokens,
        )
        events += _machine_changes(checkpointer, position.step)
        ledger.facts |= {"token store": token_store.manifest.fingerprint, **run_environment()}
        stop.agree("first step", ledger.facts)
        if jax.process_index() == 0:
            write_atomically(workdir / CONFIG_FILE, config.to_json())
            keep_tokenizer(
                token_store.manifest.tokenizer, store=token_store.directory, directory=workdir / KEPT_TOKENIZER
            )
            keep_settings(token_store.manifest, directory=workdir / KEPT_TOKENIZER)
        if state is None:
            state = beginning.make_state(run)
        else:
            log(f"Resuming from step {position.step:,} ({position.tokens_seen:,} tokens)")
            state = _begin_history(state, changes, spike_score=config.bad_numbers.spike_score)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        log(predict_stop(workdir, num_bytes=num_bytes, num_processes=jax.process_count()))
        writer = _make_writer(run, position, compare=compare)
        # The first exchange on CPUs fails where another process comes to it 30 s later, which compiling may take.
        stop.wait_for_all("ready for the first exchange")
        with jax.set_mesh(mesh), writer:
            writer.config(config)
            for event in events:
                writer.event(position.step, event)
            for damage in damages:
                writer.record_event(position.step, damage)
            if position.step == 0:
                result = evaluate_some(run, state.params)
                for event in beginning.events and (*beginning.events, f"held-out before the first step: {result}"):
                    writer.event(0, event)
                writer.evaluation(0, result)
            for change in changes:
                writer.setting_changed(position.step, key=change.key, old=change.old, new=change.new)
            return _train_from(
                run,
                state,
                position,
                checkpointer=checkpointer,
                writer=writer,
                stop=stop,
                beginning=beginning,
                continue_prompt=continue_prompt,
            )
    finally:
        checkpointer.close()


def _start_facts(position: Position) -> dict[str, str]:
    """Return what of the devices and the checkpoint must be the same in all processes."""
    devices = jax.local_devices()
    kinds = {"devices of each process": f"{len(devices)} x {devices[0].device_kind}"}
    return kinds | {f"checkpoint's {name}": repr(value) for name, value in dataclasses.asdict(position).items()}


def _go_back(workdir: Path, step: int, stop: Stop) -> list[str]:
    """Go back to an earlier checkpoint, in one process for all that share a folder; return what to say of it."""
    is_done = (workdir / REPLACED / f"from-{step}").is_dir()
    said = go_back(workdir, step) if jax.process_index() == 0 or mirror_of(workdir).is_remote else ""
    stop.wait_for_all("went back to an earlier checkpoint")
    if said and is_done:
        log(said)
    return [said] if said and not is_done else []


def _report_changes(checkpointer: Checkpointer, config: TrainConfig, position: Position) -> list[SettingChange]:
    """Report which settings are not those of the last checkpoint, and return them."""
    changes = changed_settings(checkpointer, config)
    for change in changes:
        notices.report("setting-changed", f"{change} (from step {position.step:,} on)")
    return changes


def _begin_history(state: TrainState, changes: Sequence[SettingChange], *, spike_score: float) -> TrainState:
    """Return the state without the updates that spikes are told by, if other settings of the optimizer made them."""
    keys = [change.key for change in changes if not change.key.startswith("optimizer.average")]
    if not any(key.startswith("optimizer.") for key in keys):
        return state
    if spike_score:
        log(f"Spikes are looked for again after {WINDOW} updates, as settings of the optimizer have changed")
    none = jax.device_put(np.int32(0), state.history.count.sharding)
    return dataclasses.replace(state, history=dataclasses.replace(state.history, count=none))


def _machine_changes(checkpointer: Checkpointer, step: int) -> list[str]:
    """Report what decides the last bits and is not as where the checkpoint was written; return it as events."""
    changes = environment_changes(checkpointer, step) if step else []
    for change in changes:
        notices.report("machine-changed", f"{change}: numbers may differ in their last bits from step {step:,} on")
    return [f"{MACHINE_CHANGED}{change}" for change in changes]


def dry_run(config: TrainConfig, *, workdir: Path | None) -> str:
    """Return the whole plan of a run; only shapes are computed, so a 3B plan takes seconds.

    Without a workdir a store that is relative to it is not looked for.

    Raises:
      ValueError: the token store is there and does not serve the config.
      OSError: it is there and lacks a file, or cannot be reached.
    """
    _check_trackers(config)
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    plan = describe_run(config, make_program(config, mesh).table)
    try:
        check_divisible(config, num_devices=mesh.size, slices=num_slices(jax.devices()))
    except ValueError as error:
        plan += f"\n\nNote: {error}"
    return f"{plan}\n{_store_plan(config, workdir)}"


def _store_plan(config: TrainConfig, workdir: Path | None) -> str:
    """Return what a run would do with its token store, after checking the store if it is there."""
    if workdir is None and not is_absolute(config.data.store):
        return f"Token store: not looked for; data.store={config.data.store} is relative to the workdir, give --workdir"
    location = locate_store(config.data, workdir=workdir or Path())
    if has_store(location):
        manifest = open_run_store(config, location, expected_fingerprint="").manifest
        use, examples = check_curriculum(config, manifest), describe_examples(manifest)
        return f"Token store: {location}, checked\nData: {use}" + (f"\n{examples}" if examples else "")
    plan = "give another data.store" if config.corpus.source == PREPARED else f"made from {config.corpus.source}"
    return f"Token store: none in {location} yet; {plan}"


class TooManySkipsError(Exception):
    """The updates of bad_numbers.max_skips steps in a row, up to `step`, were not made; `state` is as before them."""

    def __init__(self, step: int, state: TrainState):
        super().__init__(f"step {step:,}")
        self.step, self.state = step, state


def _train_from(
    run: Run,
    state: TrainState,
    position: Position,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: Stop,
    beginning: Beginning,
    continue_prompt: ContinuePrompt,
) -> str:
    """Run the loop from a position to the end, back from bad numbers where there are some, then finish."""
    loader = _make_loader(run)
    log(f"Data: {loader.use}")
    trace = _make_trace(run, first_step=position.step + 1)
    try:
        if not position.is_evaluated and position.step < run.config.curriculum.table.num_steps:  # else the end does it
            _evaluate(run, state, position.step, writer)
        stop.begin_steps()
        while True:
            try:
                ended = _run_steps(
                    run,
                    state,
                    position,
                    loader=loader,
                    trace=trace,
                    checkpointer=checkpointer,
                    writer=writer,
                    stop=stop,
                )
                break
            except TooManySkipsError as error:
                stop.allow_long()
                if reason := _reason_to_stop(run, error, position, checkpointer=checkpointer, beginning=beginning):
                    raise BadNumbersError(error.step, f"{reason}; {_write_evidence(run, error, loader)}") from error
                state, position = _roll_back(
                    run, error, position, checkpointer=checkpointer, writer=writer, beginning=beginning
                )
        if ended.is_preempted:
            return PREEMPTED
        stop.begin_end()
        state = ended.state
        finish_run(run, state.params, writer, continue_prompt=continue_prompt, opt_state=state.opt_state)
        stop.finish()
        return DONE
    except BadNumbersError as error:
        return _stop_on_bad_numbers(run, error, checkpointer=checkpointer, writer=writer)
    except CorruptionError as error:
        return _stop_on_corruption(error, checkpointer=checkpointer, writer=writer)
    except FloatingPointError as error:  # from the last evaluation
        bad = BadNumbersError(run.config.curriculum.table.num_steps, str(error))
        return _stop_on_bad_numbers(run, bad, checkpointer=checkpointer, writer=writer)
    finally:
        if trace:
            trace.close(writer.last_step)


class _Ended(NamedTuple):
    """How the steps ended: all are trained, or the run is preempted."""

    state: TrainState
    is_preempted: bool


def _run_steps(
    run: Run,
    state: TrainState,
    position: Position,
    *,
    loader: TrainLoader,
    trace: StepTrace | None,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: Stop,
) -> _Ended:
    """Train, evaluate and save from a position to the end, or up to a preemption.

    Raises:
      TooManySkipsError: updates were not made, as often in a row as the config allows.
      BadNumbersError: an evaluation is not finite.
    """
    config, curriculum = run.config, run.config.curriculum.table
    phase_ends, every = {phase.end_step for phase in curriculum.phases}, config.checkpoint.every_steps
    pending = None  # the last step's metrics, still on the device: fetched while the next step runs
    batches, checks = _batches(run, loader, first_step=position.step), _make_checks(run)
    try:
        for index, batch in batches:
            step = index + 1
            learning_rate = float(run.learning_rates[index])
            train_step = run.train_steps[curriculum.phase_at(index).index]
            with run.ledger.measure("step"):
                if trace:
                    trace.before(step, state)
                if checks:
                    train_step = functools.partial(checks.step, train_step, step)
                state, metrics = train_step(state, batch, np.float32(learning_rate))
                if trace:
                    trace.after(step, state)
                skips = _record(writer, *pending) if pending else 0
                pending = (step, learning_rate, metrics | loader.order.epochs_seen(step))
                is_last, is_stopping = step == curriculum.num_steps, stop.is_agreed(step)
                is_evaluating = step in phase_ends or step % config.evaluation.every_steps == 0
                is_saving = is_last or is_stopping or step % every == 0
                if checks:
                    checks.compare(step, state, is_saving=is_saving)
                if (is_evaluating or is_saving) and skips < config.bad_numbers.max_skips:
                    stop.allow_long()
                    # What is evaluated or saved must be known to be finite first.
                    skips = _record(writer, *pending)
                    pending = None
            if skips >= config.bad_numbers.max_skips:
                raise TooManySkipsError(step - 1 if pending else step, state)
            is_due = is_evaluating and not is_last  # what follows the last step is the end's
            if is_due and not is_stopping:
                _evaluate(run, state, step, writer)
            # A machine that is taken away leaves time to save alone: the next start evaluates.
            position = dataclasses.replace(
                _position(run, step), passed_over=position.passed_over, is_evaluated=not (is_due and is_stopping)
            )
            with run.ledger.measure("checkpoint"):
                # A run goes back to what is saved at multiples of `every`: there no bad numbers may have followed.
                if is_last or (is_stopping and (not skips or step % every)):
                    checkpointer.save_or_go_on(state, position=position, config=config)
                    checkpointer.finish(state, position=position, config=config)
                elif is_stopping:
                    checkpointer.wait_or_report(then="the run stops, and goes on from the one before")
                elif is_saving and not skips:
                    checkpointer.save_or_go_on(state, position=position, config=config)
                elif step % every == every // 2:
                    checkpointer.retry(state, position=position, config=config)
            if is_stopping:
                saved = (checkpointer.steps() or [0])[-1]
                log(
                    f"Preempted ({stop.reason}): saved at step {saved:,}, {stop.seconds_since:.1f} s after it; run the "
                    "same command to go on"
                )
                if is_evaluating:
                    writer.evaluation_follows()
                stop.finish()
                return _Ended(state, is_preempted=True)
        return _Ended(state, is_preempted=False)
    finally:
        batches.close()


def _evaluate(run: Run, state: TrainState, step: int, writer: MetricWriter) -> None:
    """Evaluate a few blocks after a step.

    Raises:
      BadNumbersError: the result is not finite.
    """
    try:
        writer.evaluation(step, evaluate_some(run, state.params))
    except FloatingPointError as error:
        raise BadNumbersError(step, str(error)) from error


def _reason_to_stop(
    run: Run, error: TooManySkipsError, position: Position, *, checkpointer: Checkpointer, beginning: Beginning
) -> str:
    """Return why a run does not go back from bad numbers once more, or ""."""
    bad_numbers = run.config.bad_numbers
    skipped = f"the updates of {bad_numbers.max_skips} steps in a row were not made"
    if len(position.passed_over) >= bad_numbers.max_rollbacks:
        return f"{skipped}, and the run has gone back {len(position.passed_over)} times (bad_numbers.max_rollbacks)"
    if error.step == run.config.curriculum.table.num_steps:
        return f"{skipped}, and no step is left"
    checkpointer.wait_or_report(then="the run goes back from bad numbers without it")
    first = error.step - bad_numbers.max_skips + 1
    if checkpointer.rollback_steps(before=first, position=position):
        return ""
    if not checkpointer.may_begin_again(before=first, position=position):
        return f"{skipped}, and there is no checkpoint to go back to"
    if reason := beginning.why_not_again():
        return f"{skipped}, and there is no checkpoint to go back to, nor the run's beginning: {reason}"
    return ""


def _roll_back(
    run: Run,
    error: TooManySkipsError,
    position: Position,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    beginning: Beginning,
) -> tuple[TrainState, Position]:
    """Return the state of the last good checkpoint, or of the beginning, and the position after the bad steps.

    The steps from there on are passed over: tokens and learning rate advance, and nothing is trained on their windows.
    """
    first = error.step - run.config.bad_numbers.max_skips + 1
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), error.state)
    jax.tree.map(lambda x: x.delete(), error.state)  # two states may not fit into the devices' memory
    if steps := checkpointer.rollback_steps(before=first, position=position):
        (good, state), damages = checkpointer.newest(
            lambda step: (
                checkpointer.read_metadata(step)[0].step,  # which `changed_settings` reads
                checkpointer.restore_state(step, abstract=abstract),
            ),
            steps=steps,
        )
        for damage in damages:
            writer.record_event(error.step, damage)
    else:
        good, state = 0, beginning.make_state(run)
    checkpointer.delete_after(good)
    changes = changed_settings(checkpointer, run.config)
    state = _begin_history(state, changes, spike_score=run.config.bad_numbers.spike_score)
    state = dataclasses.replace(state, step=jax.device_put(np.int32(error.step), state.step.sharding))
    said = f"went back to step {good:,}; steps {good + 1:,} to {error.step:,} are passed over"
    notices.report("went-back", said)
    writer.record_event(error.step, said, is_repeated=True)
    run.ledger.passed_over.append((good + 1, error.step))
    passed_over = (*position.passed_over, (good + 1, error.step))
    return state, dataclasses.replace(_position(run, error.step), passed_over=passed_over)


def _write_evidence(run: Run, error: TooManySkipsError, loader: TrainLoader) -> str:
    """Write what may tell why a step's numbers are bad; return what is where."""
    from btlm_jax.train.evidence import write_evidence  # only a run that stops so loads it

    folder = write_evidence(run, error.state, step=error.step, loader=loader)
    return f"the batch, the norms of each layer and the last metrics are in {folder}"


def _make_loader(run: Run) -> TrainLoader:
    data, layout, phases = run.config.data, run.config.mesh, run.config.curriculum.table.phases
    rules = [rules_for(phase.batch_size, mesh=run.mesh, config=layout) for phase in phases]
    return TrainLoader(
        run.token_store,
        curriculum=run.config.curriculum.table,
        data=data,
        accumulation=layout.accumulation,
        shardings=[batch_sharding(run.mesh, each) for each in rules],
        most_documents=run.most_documents,
    )


def _batches(run: Run, loader: TrainLoader, *, first_step: int) -> Generator[tuple[int, Batch]]:
    """Yield (step index, batch), and count the time spent waiting for each."""
    batches = loader.batches(first_step=first_step)
    try:
        while True:
            with run.ledger.measure("data wait"):
                pair = next(batches, None)
            if pair is None:
                return
            yield pair
    finally:
        batches.close()


def _record(writer: MetricWriter, step: int, learning_rate: float, metrics: dict[str, jax.Array | float]) -> int:
    """Fetch a step's metrics and write them; return how many updates in a row, up to this one, were not made.

    A step whose batch has no targets changed nothing: its loss is written as nan, the mean over nothing.

    The updates' norms are among what an update is judged by, so what is saved after one that was made is finite too.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    skips = int(values.pop("skips"))
    if not values["weight"]:
        writer.train(step, learning_rate=learning_rate, metrics=values | {"loss": math.nan})
        message = "no update: the batch has no targets, it is all padding"
        writer.record_event(step, message, is_repeated=True)
        notices.report("no-targets", f"step {step:,}: {message}")
        return 0
    writer.train(step, learning_rate=learning_rate, metrics=values | ({"skips": skips} if skips else {}))
    if skips:
        bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        bad.sort(key=lambda text: not text.startswith("loss="))
        shown = bad[:3] or [f"a spike, or it follows {skips - 1:,} of them: loss={values['loss']:.6g}"]
        shown += [] if bad else [f"grad_norm={values['grad_norm']:.6g}"]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        message = f"no update: {', '.join(shown)}{more} at learning rate {learning_rate:.6g}"
        writer.record_event(step, message, is_repeated=True)
        notices.report("step-skipped", f"step {step:,}: {message}")
    return skips


def _stop_on_bad_numbers(run: Run, error: BadNumbersError, *, checkpointer: Checkpointer, writer: MetricWriter) -> str:
    """Wait for the last good checkpoint and log what happened, where the evidence is, and what to try."""
    checkpointer.wait_or_report(then="the run ends with the one before")
    steps = checkpointer.steps()
    writer.event(error.step, f"stopped on bad numbers at {error}")
    log(
        f"Stopped on bad numbers at {error}. "
        + (f"The last good checkpoint is step {steps[-1]:,}. " if steps else "There is no checkpoint yet. ")
        + f"The same command would stop there again. {run.workdir / METRICS_FILE} has the norms of every class up to "
        "here; try a lower optimizer.peak_learning_rate, a larger bad_numbers.max_rollbacks, or model.dtype=float32 in "
        "a new workdir"
    )
    return BAD_NUMBERS


def _stop_on_corruption(error: CorruptionError, *, checkpointer: Checkpointer, writer: MetricWriter) -> str:
    """Wait for the last checkpoint, and log what was found, and what to do about it."""
    checkpointer.wait_or_report(then="the run ends with the one before")
    steps = checkpointer.steps()
    writer.event(error.step, f"stopped because a device computes wrongly: {error}")
    log(
        f"Stopped because a device computes wrongly: {error}. Nothing of this step is saved. Take its machine out, and "
        "give the same command again; it goes on from "
        + (
            f"step {steps[-1]:,}, or with --resume_step from one of {', '.join(map(str, steps))}"
            if steps
            else "the beginning"
        )
    )
    return WRONG_DEVICE


def _make_checks(run: Run) -> Checks | None:
    """Return what looks for devices that compute wrongly, None where the config asks for nothing of it."""
    if not run.config.bad_numbers.compare_every and not run.config.bad_numbers.recompute_every:
        return None
    from btlm_jax.train.corruption import Checks

    return Checks(run.config.bad_numbers, run.mesh)


def _make_trace(run: Run, *, first_step: int) -> StepTrace | None:
    """Return what traces the steps of log.profile_steps, None where there are none or in another process than 0."""
    if not run.config.log.profile_window or jax.process_index() != 0:
        return None
    from btlm_jax.train.step_trace import StepTrace

    return StepTrace(run, first_step=first_step)


def _check_trackers(config: TrainConfig) -> None:
    """Check that the packages of log.trackers are there.

    Raises:
      ImportError: one is missing.
    """
    if config.log.trackers:
        from btlm_jax.train import trackers

        trackers.check_installed(config.log.tracker_names)


def _make_followers(run: Run, *, first_step: int) -> list[Follower]:
    """Return the processes of log.trackers."""
    if not run.config.log.trackers:
        return []
    from btlm_jax.train.trackers import TrackerProcess

    return [TrackerProcess(name, run.workdir, first_step=first_step) for name in run.config.log.tracker_names]


def _make_comparison(config: TrainConfig, *, workdir: Path, first_step: int) -> Compare:
    """Return what compares the losses with those of the run of log.reference, in the process that writes them."""
    if not config.log.reference or jax.process_index() != 0:
        return compare_with_nothing
    from btlm_jax.train.reference_curve import ReferenceCurve  # other runs load none of it

    curve = ReferenceCurve(Path(config.log.reference), config)
    curve.follow(workdir, first_step=first_step)
    return curve.add


def _make_writer(run: Run, position: Position, *, compare: Compare) -> MetricWriter:
    """Make the writer of the numbers from a position on, and log which peak MFU is a share of."""
    config, curriculum, first_step = run.config, run.config.curriculum.table, position.step + 1
    num_devices, peak = jax.device_count(), peak_flops(jax.local_devices()[0])
    log(
        f"MFU is of {num_devices} x {peak.flops:.4g} = {num_devices * peak.flops:.4g} FLOP/s ({peak.source}), "
        f"counting {FLOPS_CONVENTION}"
        + (", and attention over whole sequences, of which data.document_mask skips parts" * config.data.document_mask)
    )
    return MetricWriter(
        run.workdir,
        first_step=first_step,
        evaluates_before=position.step in (0, curriculum.num_steps) or not position.is_evaluated,
        curriculum=curriculum,
        flops_of_phase=tuple(flops_per_token(config.model, seq_len=phase.seq_len) for phase in curriculum.phases),
        evaluation=_evaluation_work(run),
        peak_flops=num_devices * peak.flops,
        log_every=config.log.every_steps,
        is_writer=jax.process_index() == 0,
        ledger=run.ledger,
        followers=_make_followers(run, first_step=first_step),
        predicted_seconds=run.prediction.seconds,
        compare=compare,
    )


def _evaluation_work(run: Run) -> EvaluationWork:
    """Return the FLOPs of the evaluations: a forward pass is a third of a training step's."""
    evaluation, manifest = run.config.evaluation, run.token_store.manifest
    flops_of_row = manifest.block_len * flops_per_token(run.config.model, seq_len=manifest.block_len) / 3

    def flops(blocks_per_source: int) -> float:
        num_blocks = len(heldout_blocks(manifest.splits[HELDOUT], blocks_per_source=blocks_per_source))
        return -(-num_blocks // evaluation.batch_size) * evaluation.batch_size * flops_of_row

    return EvaluationWork(
        every_steps=evaluation.every_steps,
        flops=flops(evaluation.blocks_per_source),
        final_flops=num_final_evaluations(run.config.optimizer) * flops(final_blocks_per_source(run)),
    )


def _position(run: Run, step: int) -> Position:
    return Position(
        step=step,
        tokens_seen=run.config.curriculum.table.tokens_seen(step),
        store_fingerprint=run.token_store.manifest.fingerprint,
    )
