"""The verbs of `btlm tune`: check the parametrization."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from btlm_jax import notices, stopping
from btlm_jax.cli import DONE, ERROR, PREEMPTED, USAGE, UsageError
from btlm_jax.cli.parse import Flags, did_you_mean
from btlm_jax.storage.files import write_atomically

if TYPE_CHECKING:
    from btlm_jax.data.reader import TokenStore
    from btlm_jax.recipe.config import TrainConfig
    from btlm_jax.stopping import Stop
    from btlm_jax.tune.lr_transfer import Sweep
    from btlm_jax.tune.search import Dimension, Search
    from btlm_jax.tune.trials import Result, RunTrial

_Plan = TypeVar("_Plan", "Sweep", "Search")  # of trials
_LEAST_RATE, _MOST_RATE = -40, 10  # log2 of learning rates

TUNE_HELP = """btlm tune VERB: check what a narrow model says of a wide one, and use it.

  coord-check  train at several widths for a few steps and see that nothing depends on the width
  lr-transfer  sweep the learning rate at several widths: where is the best one, and does it stay there?
  search       search for better constants on a proxy, with successive halving
  scaling      fit a law of the loss to finished runs, predict a larger one, hold it against that

examples:  btlm tune coord-check --directory=runs/coord_check
           btlm tune coord-check --directory=runs/my_check --config=my.py
           btlm tune scaling --law=law.json --runs runs/4M runs/8M runs/16M runs/32M

btlm tune VERB --help explains a verb; without one it is coord-check.
"""

COORD_CHECK_HELP = """btlm tune coord-check: train at several widths for a few steps; nothing may depend on the width.

examples:  btlm tune coord-check --directory=runs/coord_check
           btlm tune coord-check --directory=runs/my_check --config=my.py
           btlm tune coord-check --directory=runs/my_check --config=my.py --mutate
           btlm tune coord-check --directory=runs/depth --config=my.py --config.mup.preset=completep --depths=2,4,8

Without --config a tiny model is checked on one CPU device: presets btlm and completep must be flat, standard
parametrization and all deliberately broken ones must be caught. With --config it is that config's model, optimizer,
step and mesh, on the devices here; --mutate breaks it in all those ways too, and says which ones only the exact checks
can see. Exit code 0 when all are as expected, 1 otherwise; the table, a plot and all numbers as JSON
stay in the directory. Limits and what is chosen: docs/guide/tune.md.
"""


LR_TRANSFER_HELP = """btlm tune lr-transfer: sweep the learning rate at several widths; does the best one stay?

examples:  btlm tune lr-transfer --directory=runs/transfer --config=local_cpu --widths=256,512 --rates=-9:-5
           btlm tune lr-transfer --directory=runs/transfer --config=my.py --widths=256,512,1024 --presets=btlm,sp \\
             --rates=-10:-5 --seeds=2 --workers=2

Every trial is an ordinary run of the config in a folder of the directory, with its width (depth, batch, tokens), preset
and peak learning rate changed. The same command goes on after a kill; any number of them, on any host that sees the
directory, take trials from it. At the end: the best rate of every curve with its interval, what the first curve's best
rate costs at the last one, a plot and all numbers as JSON.
"""

SEARCH_HELP = """btlm tune search: search for better constants on a proxy, with successive halving.

examples:  btlm tune search --directory=runs/search --config=local_cpu --points=40
           btlm tune search --directory=runs/search --config=my.py --points=80 --rungs=3 --seeds=3 --workers=2 \\
             --space optimizer.peak_learning_rate=0.001:0.03:log mup.init_std=0.03:0.15:log warmup=0.5:4:log
           btlm new --params=124M --constants=runs/search/search.json --output=large.py

Points are tried on a third or a ninth of the config's tokens, the best third goes on to three times as many, up to all;
the config as it is goes on beside them. Every trial is an ordinary run in a folder of the directory; the same command
goes on after a kill, and any number of them take trials from it. At the end the best point and the config are trained
--fresh_seeds times more, with seeds that nothing was chosen by: their difference is the gain, with its interval. It
prints the best points, the gain, and how much of the result each key decides. btlm new --constants writes the large
model's config with what was found.
"""

SCALING_HELP = """btlm tune scaling: fit a law of the loss to finished runs, predict a larger one, hold it against that.

examples:  btlm tune scaling --law=law.json --runs runs/4M runs/8M runs/16M runs/32M
           btlm tune scaling --law=law.json --points=points.json --form=power
           btlm tune scaling --law=law.json --config=my.py
           btlm tune scaling --law=law.json --check=runs/mine
           btlm new --params=124M --law=law.json --output=my.py

--runs or --points fits a law and writes it: chinchilla, L = E + A / N^alpha + B / D^beta, where the runs' tokens a
parameter differ enough and they are 6 or more, otherwise power, L = E + (C / C0)^-gamma. --config predicts that
config's run and records it with date and hash beside the law; --check=WORKDIR holds what was recorded against the
finished run. A law is trusted up to 10 times beyond its runs.
"""


def tune(arguments: Sequence[str]) -> int:
    """Run `btlm tune`; return the exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(TUNE_HELP)
        return DONE if arguments else USAGE
    verb, *rest = arguments
    if verb.startswith("-"):  # the spelling of before there were several
        return _coord_check(arguments)
    if verb.replace("_", "-") not in VERBS:
        raise UsageError(f"btlm tune needs one of {', '.join(VERBS)}; got {verb}{did_you_mean(verb, list(VERBS))}")
    return VERBS[verb.replace("_", "-")](rest)


def coord_check_flags() -> Flags:
    """Define the flags of `btlm tune coord-check`."""
    flags = Flags(COORD_CHECK_HELP)
    flags.define_string("directory", "", "where the table, the plot and the numbers go")
    flags.define_config()
    flags.define_string("widths", "", "widths, 256,512,1024; otherwise from the base width on, doubled twice")
    flags.define_string("depths", "", "numbers of layers, 2,4,8, at the base width, in place of widths")
    flags.define_integer("num_layers", 0, "layers at every width; otherwise the config's, at most 4")
    flags.define_integer("steps", 8, "steps")
    flags.define_integer("seeds", 5, "seeds to average over")
    flags.define_float("learning_rate", 2.0**-9, "peak rate of these steps, without warm-up")
    flags.define_boolean("mutate", False, "break the parametrization in every known way too, and see each one caught")
    return flags


def _coord_check(arguments: Sequence[str]) -> int:
    flags = coord_check_flags()
    if not flags.parse(arguments):
        return DONE
    directory = flags.path("directory")
    of_config = ("widths", "depths", "num_layers", "steps", "seeds", "learning_rate", "mutate")
    if not flags.string("config"):
        for name in of_config:
            if flags.is_given(name):
                raise UsageError(f"--{name} goes with --config: the check without one is always the same")
    if flags.string("widths") and flags.string("depths"):
        raise UsageError("--widths and --depths are both given; one of them grows, give that")
    for name, why in (("num_layers", "depths say the layers"), ("mutate", "what it breaks are rules of the width")):
        if flags.string("depths") and flags.is_given(name):
            raise UsageError(f"--{name} has no effect with --depths: {why}; leave it out")
    if flags.integer("seeds") < 1:
        raise UsageError(f"--seeds={flags.integer('seeds')} must be at least 1")
    sizes = {name: _whole_numbers(flags, name) for name in ("widths", "depths")}
    config = flags.optional_config()
    import jax

    from btlm_jax.display.progress import print_line
    from btlm_jax.tune import coord_check
    from btlm_jax.tune.coord_report import describe_design, report_coord_check

    if config is None:
        design, devices = coord_check.FULL, jax.local_devices(backend="cpu")[:1]
    else:
        devices = jax.devices()
        design = coord_check.design_for(
            config,
            num_devices=len(devices),
            ladder=coord_check.DEPTH if sizes["depths"] else coord_check.WIDTH,
            sizes=sizes["depths"] or sizes["widths"],
            seeds=flags.integer("seeds"),
            num_steps=flags.integer("steps"),
            learning_rate=flags.number("learning_rate"),
            num_layers=flags.integer("num_layers"),
            mutate=flags.boolean("mutate"),
        )
        print_line(describe_design(design, config, num_devices=len(devices)))
    report = report_coord_check(design, directory=directory, devices=devices, report_progress=print_line)
    print(report.table)
    return DONE if report.passed else ERROR


def _whole_numbers(flags: Flags, name: str) -> tuple[int, ...]:
    """Return the positive whole numbers that a flag lists, none if it is not given.

    Raises:
      UsageError: there is another thing among them.
    """
    text = flags.string(name)
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in parts):
        raise UsageError(f"--{name}={text[:80]} must be whole numbers with a comma between them, as 256,512")
    return tuple(map(int, parts))


def scaling_flags() -> Flags:
    """Define the flags of `btlm tune scaling`."""
    flags = Flags(SCALING_HELP)
    flags.define_string("law", "", "JSON file of the law: written with --runs or --points, otherwise read")
    flags.define_paths("runs", "workdirs of finished runs to fit to, or URLs")
    flags.define_string("points", "", "JSON file of the same: points of name, num_parameters, num_tokens, flops, loss")
    flags.define_string("form", "auto", "form of the law", choices=("auto", "chinchilla", "power"))
    flags.define_config()
    flags.define_string("check", "", "workdir of the finished run that was predicted, or a URL")
    flags.define_string("plot", "", "PNG file to draw runs, law and predictions into")
    return flags


def _scaling(arguments: Sequence[str]) -> int:
    flags = scaling_flags()
    if not flags.parse(arguments):
        return DONE
    path, is_fit = flags.path("law"), bool(flags.strings("runs")) or flags.is_given("points")
    if bool(flags.strings("runs")) and flags.is_given("points"):
        raise UsageError("--runs and --points are both given; fit to one of them")
    if flags.is_given("form") and not is_fit:
        raise UsageError("--form goes with --runs or --points: it is fitted")
    if not is_fit and not flags.string("config") and not flags.is_given("check") and not flags.is_given("plot"):
        raise UsageError("btlm tune scaling needs --runs or --points to fit to, --config to predict, or --check")
    config = flags.optional_config()
    checked, plot = flags.run_path("check") if flags.is_given("check") else None, flags.optional_path("plot")
    from btlm_jax.tune import scaling, scaling_report

    if is_fit:
        if flags.is_given("points"):
            points, vocab_size = scaling.read_points(flags.path("points"))
        else:
            points, vocab_size = scaling.read_runs(flags.run_paths("runs"))
        if not vocab_size:
            print("the points' file has no vocab_size: that a config's losses are of the same tokens is not checked")
        form, reason = flags.string("form"), ""
        if form == "auto":
            form, reason = scaling.choose_form(points)
        if reason:
            print(f"the {form} form: {reason}")
        law = scaling.fit(points, form=form, vocab_size=vocab_size)
        scaling.write_law(law, path)
        print(f"wrote {path}")
    else:
        law = scaling.read_law(path)
    print(scaling_report.describe_law(law))
    predicted, kept = [], scaling.predictions_file(path)
    if config is not None:
        predicted = [scaling.predict_config(law, config)]
        sha256 = scaling.record(kept, {"predicted": dataclasses.asdict(predicted[0])})
        print(scaling_report.describe_prediction(predicted[0]))
        print(f"recorded in {kept} with hash {sha256[:12]}")
    if checked is not None:
        outcomes = scaling.hold_against(scaling.read_run(checked), scaling.recorded_predictions(kept))
        for outcome in outcomes:
            print(scaling_report.describe_outcome(outcome))
            scaling.record(kept, {"held": {"run": flags.string("check"), "loss": outcome.loss, "of": outcome.sha256}})
    if plot is not None:
        scaling_report.plot_law(law, plot, predictions=predicted)
    return DONE


def lr_transfer_flags() -> Flags:
    """Define the flags of `btlm tune lr-transfer`."""
    flags = Flags(LR_TRANSFER_HELP)
    _define_study(flags)
    flags.define_string("presets", "btlm", "parametrizations, btlm,sp,completep")
    flags.define_string("widths", "", "widths, 256,512,1024; otherwise the config's alone")
    flags.define_string("depths", "", "numbers of layers; otherwise the config's")
    flags.define_string("batches", "1", "factors of the config's batch, 1,2,4")
    flags.define_string("tokens", "1", "factors of the config's tokens, 1,2,4")
    flags.define_string("rates", "-9:-5", "log2 of the peak learning rates: FIRST:LAST, FIRST:LAST:STEP or a list")
    flags.define_integer("seeds", 1, "runs of each, that differ in initial parameters and order of data")
    return flags


def _lr_transfer(arguments: Sequence[str]) -> int:
    flags = lr_transfer_flags()
    if not flags.parse(arguments):
        return DONE
    rates, factors = _rates(flags), {name: _numbers(flags, name) for name in ("batches", "tokens")}
    sizes = {name: _whole_numbers(flags, name) for name in ("widths", "depths")}
    study = _Study(flags, ["tune", "lr-transfer", *arguments])
    presets = tuple(part.strip() for part in flags.string("presets").split(","))
    from btlm_jax.recipe.config import PRESETS

    for preset in presets:
        if preset not in PRESETS:
            raise UsageError(f"--presets={preset[:40]} is not known; allowed are {', '.join(PRESETS)}")
    from btlm_jax.tune import lr_transfer

    model = study.config.model

    def make_sweep(config: TrainConfig) -> lr_transfer.Sweep:
        return lr_transfer.Sweep(
            config=config,
            presets=presets,
            widths=sizes["widths"] or (model.d_model,),
            depths=sizes["depths"] or (model.num_layers,),
            batches=factors["batches"],
            tokens=factors["tokens"],
            log2_rates=rates,
            num_seeds=flags.integer("seeds"),
        )

    sweep, results = study.results_of(make_sweep, kind="lr-transfer")
    if results is None:
        return PREEMPTED
    values = lr_transfer.report(sweep, results)
    study.write("lr_transfer.json", values)
    lr_transfer.plot(values, study.directory / "lr_transfer.png")
    print(lr_transfer.format_report(values))
    return DONE


def search_flags() -> Flags:
    """Define the flags of `btlm tune search`."""
    flags = Flags(SEARCH_HELP)
    _define_study(flags)
    flags.define_integer("points", 40, "points of the space to try, beside the config as it is")
    flags.define_integer(
        "rungs", 2, "rungs of successive halving, until one point is left at most; 1: all on all tokens"
    )
    flags.define_integer("seeds", 1, "runs of each point on the last rung, by whose mean loss the best is chosen")
    flags.define_integer(
        "fresh_seeds", 3, "further runs of the best point and of the config, whose gain is not flattered"
    )
    flags.define_string("method", "sobol", "how points are spread", choices=("sobol", "random"))
    flags.define_integer("seed", 1, "of the points")
    flags.define_paths("space", "KEY=LOW:HIGH[:log|linear|log2_whole]: keys of the config, or batch, warmup: factors")
    return flags


def _search(arguments: Sequence[str]) -> int:
    flags = search_flags()
    if not flags.parse(arguments):
        return DONE
    if flags.integer("seed") < 0:
        raise UsageError(f"--seed={flags.integer('seed')} must be 0 or more")
    study = _Study(flags, ["tune", "search", *arguments])
    from btlm_jax.tune import search

    space = tuple(map(_dimension, flags.strings("space"))) or search.DEFAULT_SPACE

    def make_search(config: TrainConfig) -> search.Search:
        return search.Search(
            config=config,
            space=space,
            num_points=flags.integer("points"),
            num_rungs=flags.integer("rungs"),
            num_seeds=flags.integer("seeds"),
            num_fresh=flags.integer("fresh_seeds"),
            method=flags.string("method"),
            seed=flags.integer("seed"),
        )

    made, results = study.results_of(make_search, kind="search")
    if results is None:
        return PREEMPTED
    values = search.report(made, results)
    study.write("search.json", values)
    print(search.format_report(values))
    return DONE


def _dimension(text: str) -> Dimension:
    """Return what one --space says.

    Raises:
      UsageError: it says none.
    """
    from btlm_jax.tune import search

    key, _, given = text.partition("=")
    low, _, rest = given.partition(":")
    high, _, scale = rest.partition(":")
    scales = (search.LINEAR, search.LOG, search.LOG2_WHOLE)
    try:
        ends = float(low), float(high)
    except ValueError:
        raise UsageError(f"--space={text[:80]} must be KEY=LOW:HIGH or KEY=LOW:HIGH:SCALE") from None
    if (scale or search.LOG) not in scales:
        raise UsageError(f"--space={text[:80]}: the scale must be one of {', '.join(scales)}")
    return search.Dimension(key=key, low=ends[0], high=ends[1], scale=scale or search.LOG)


def _define_study(flags: Flags) -> None:
    """Define the flags of the verbs whose trials are training runs."""
    flags.define_string("directory", "", "where the trials go; the same command goes on there")
    flags.define_config()
    flags.define_integer("workers", 1, "processes that make trials here, each on its share of the machine")


class _Study:
    """The directory of a verb whose trials are training runs."""

    def __init__(self, flags: Flags, arguments: Sequence[str]):
        self.directory = flags.path("directory")
        self._workers, self._arguments = flags.integer("workers"), _without_workers(arguments)
        if self._workers < 1:
            raise UsageError(f"--workers={self._workers} must be at least 1")
        self.config = flags.config()

    def results_of(self, make: Callable[[TrainConfig], _Plan], *, kind: str) -> tuple[_Plan, dict[str, Result] | None]:
        """Make the trials of a plan; return it, on the study's token store, and their results, None if stopped."""
        from btlm_jax.display.progress import print_line
        from btlm_jax.tune import trials

        tokens, stop = trials.heldout_tokens(self.config), stopping.current()
        study = {"kind": kind, "most_heldout_tokens": tokens, **dataclasses.asdict(make(self.config))}
        trials.begin_study(self.directory, study)
        with trials.workers_beside(self._workers, self._arguments, directory=self.directory, stop=stop, log=print_line):
            trials.share_compiled(self.directory)
            store = trials.study_store(self.config, self.directory, _prepare_store)
            plan = make(trials.on_store(self.config, store))
            _check_shapes(plan, store, directory=self.directory)
            run_trial = make_run_trial(stop, most_heldout_tokens=tokens)
            return plan, trials.work(self.directory, plan.choose, run_trial, stop=stop, log=print_line)

    def write(self, name: str, values: dict) -> None:
        """Write a file of JSON into the directory."""
        write_atomically(self.directory / name, json.dumps(values, indent=1))


def _prepare_store(config: TrainConfig, directory: Path) -> TokenStore:
    """Return the token store of a study, which is made in its directory if there is none."""
    from btlm_jax.cli.train import build_store
    from btlm_jax.train import setup

    return setup.prepare_store(
        config, workdir=directory, expected_fingerprint="", build_store=build_store, wait_for_all=lambda: None
    )


def _check_shapes(plan: Sweep | Search, store: TokenStore, *, directory: Path) -> None:
    """Check, where trials are left, that all of them can be run on the devices here and on the study's store.

    Memory is checked of the largest batch of each model.

    Raises:
      ValueError: one cannot; names the flags that it follows from.
    """
    import jax

    from btlm_jax.parallel.make_mesh import make_run_mesh, num_slices
    from btlm_jax.recipe.config import check_divisible
    from btlm_jax.train import setup
    from btlm_jax.train.memory import check_memory
    from btlm_jax.train.program import make_program
    from btlm_jax.tune import trials

    results = trials.read_results(directory)
    if all(trial.name in results for trial in plan.choose(results)):
        return
    devices, shapes = jax.devices(), plan.shapes()
    shapes.sort(key=lambda shape: shape[1].curriculum.batch_size, reverse=True)  # stable: else in their order
    models = set()
    for flags, config in shapes:
        try:
            check_divisible(config, num_devices=len(devices), slices=num_slices(devices))
            setup.check_curriculum(config, store.manifest)
            if config.model not in models:
                mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices)
                check_memory(make_program(config, mesh))
            models.add(config.model)
        except ValueError as error:
            raise ValueError(f"trials of {flags} cannot be run: {error}") from error


def make_run_trial(stop: Stop, *, most_heldout_tokens: int | None = None) -> RunTrial:
    """Return what makes a trial's run in its workdir, as `btlm train` makes it; its final loss is of so many tokens."""
    from btlm_jax.cli.train import build_store, code_of_outcome, recorded_errors
    from btlm_jax.train import loop, setup
    from btlm_jax.train.metric_writer import GoodputLedger, StartRecord

    def run_trial(config: TrainConfig, workdir: Path) -> str:
        stop.begin_run(workdir)
        ledger = GoodputLedger()
        record = StartRecord(workdir, ledger, of_others=notices.counts())
        record.keep()
        with stop.calling_at_exit(record.end), recorded_errors(record, stop):
            outcome = loop.train(
                config,
                workdir=workdir,
                ledger=ledger,
                check_devices=lambda config, devices: "",
                predict_steps=lambda program, traced: setup.NO_PREDICTION,
                resume_step=0,
                build_store=build_store,
                beginning=setup.FROM_SEED,
                continue_prompt=lambda run, params: "",
                stop=stop,
                most_heldout_tokens=most_heldout_tokens,
            )
        stop.finish()  # bad numbers leave the time by which a next step is due
        record.end(code_of_outcome(outcome), stop.reason)
        return outcome

    return run_trial


def _without_workers(arguments: Sequence[str]) -> list[str]:
    """Return a command line without --workers and its value, for the workers themselves."""
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if not (argument.startswith("-") and name.lstrip("-") == "workers"):  # as Flags reads names: -workers too
            kept.append(argument)
        elif not equals:
            rest[:1] = []
    return kept


def _rates(flags: Flags) -> tuple[float, ...]:
    """Return what --rates lists.

    Raises:
      UsageError: it is no list and no range, or the step does not divide the range.
    """
    text = flags.string("rates")
    if ":" not in text:
        rates = _numbers(flags, "rates")
        if not _LEAST_RATE <= min(rates) <= max(rates) <= _MOST_RATE:
            raise UsageError(f"--rates={text[:80]} must be between {_LEAST_RATE} and {_MOST_RATE}")
        return rates
    parts = text.split(":")
    try:
        first, last, step = map(float, [*parts, "1"][:3] if len(parts) == 2 else parts)
    except ValueError:
        raise UsageError(f"--rates={text[:80]} must be FIRST:LAST or FIRST:LAST:STEP, as -9:-5 or -9:-5:0.5") from None
    from btlm_jax.tune.lr_transfer import LEAST_STEP

    if not (_LEAST_RATE <= first < last <= _MOST_RATE and LEAST_STEP <= step <= last - first):
        raise UsageError(
            f"--rates={text[:80]} must rise, between {_LEAST_RATE} and {_MOST_RATE}, in steps of {LEAST_STEP} or more "
            "that fit"
        )
    span = last - first
    count = round(span / step)
    if abs(span / step - count) > 1e-4:  # a third may be given as 0.333333
        nearest = min((span / n for n in (int(span / step), int(span / step) + 1)), key=lambda fits: abs(fits - step))
        raise UsageError(
            f"--rates={text[:80]}: {last:g} is no whole number of steps of {step:g} from {first:g}; the "
            f"nearest step that fits is {nearest:.6g}"
        )
    return tuple(first + span * number / count for number in range(count + 1))


def _numbers(flags: Flags, name: str) -> tuple[float, ...]:
    """Return the numbers that a flag lists.

    Raises:
      UsageError: there is another thing among them.
    """
    text = flags.string(name)
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)) or (name != "rates" and min(found) <= 0):
        raise UsageError(f"--{name}={text[:80]} must be numbers with a comma between them")
    return found


VERBS = {"coord-check": _coord_check, "lr-transfer": _lr_transfer, "search": _search, "scaling": _scaling}

FLAGS = {
    "coord-check": coord_check_flags,
    "lr-transfer": lr_transfer_flags,
    "search": search_flags,
    "scaling": scaling_flags,
}
