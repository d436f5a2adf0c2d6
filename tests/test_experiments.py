"""The experiments: which runs they make, what they report of given numbers, and one tiny run that is really made."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest
from support.real_store import BLOCK_LEN, build_real_store, write_config
from support.run_here import one_device
from support.tiny import tiny_config

from btlm_jax import notices, stopping
from btlm_jax.cli import DONE, PREEMPTED, UsageError
from btlm_jax.evaluate.positions import Setting
from btlm_jax.recipe.config import train_config_from, with_later_keys
from experiments import study
from experiments.curriculum import positions

FOLDER = Path(__file__).parent.parent / "experiments"
# Those whose runs are made by a verb of btlm tune are in test_experiments_of_tune.py.
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/__main__.py") if "EXPERIMENT = " in path.read_text())
STORE = {"": Path("/a/store")}


def experiment_of(name):
    return importlib.import_module(f"experiments.{name}.__main__").EXPERIMENT


def config_of(name, size=""):
    made = importlib.import_module(f"experiments.{name}.config").get_config
    return train_config_from((made(size) if size else made()).to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_has_its_parts_and_its_config_in_three_sizes(name, capsys):
    experiment = experiment_of(name)
    assert experiment.folder == FOLDER / name and (FOLDER / name / "README.md").is_file()
    tokens = [config_of(name, size).curriculum.table.num_tokens for size in (study.QUICK, "", study.LARGE)]
    assert tokens == sorted(set(tokens))
    assert study.conduct(experiment, ["--help"]) == DONE
    assert f"python -m experiments.{name} --folder=" in capsys.readouterr().out
    readme = (FOLDER / name / "README.md").read_text()
    assert f"python -m experiments.{name} --folder=" in readme


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_of_the_config_that_is_there(name):
    path = FOLDER / name / study.RESULTS_FILE
    if not path.exists():
        assert "not run yet" in (FOLDER / name / "README.md").read_text()
        return
    values = json.loads(path.read_text())
    size = study.QUICK if "--quick" in values["command"] else ""
    assert with_later_keys(values["config"]) == json.loads(json.dumps(dataclasses.asdict(config_of(name, size))))
    assert values["experiment"] == name and values["num_seeds"] >= 1
    assert (FOLDER / name / study.FIGURE_FILE).is_file()
    assert experiment_of(name).describe(values) in (FOLDER / name / "README.md").read_text()


def made_up(folder, **changes):
    """An experiment of two variants, the second of which follows from the first one's loss."""

    def make_variants(config, first, stores):
        made = {"a": study.on_store(config, stores[""])}
        if "a" in first:
            made["b"] = dataclasses.replace(made["a"], seed=round(10 * first["a"]["loss"]))
        return made

    values = {
        "folder": folder,
        "kind": "made up",
        "help_text": "made up",
        "make_stores": lambda config, data, folder: STORE,
        "make_variants": make_variants,
        "measure": lambda config, workdir: {"seed": config.seed},
        "report": lambda config, seeds: {"losses": [[run["loss"] for run in runs.values()] for runs in seeds]},
        "describe": lambda values: f"losses {values['losses']}",
        "plot": lambda values, path: path.write_bytes(b"figure"),
        "num_seeds": 2,
    }
    return study.Experiment(**{**values, **changes})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of an experiment, and a stand-in for training whose loss is a tenth of the seed."""
    (tmp_path / "own").mkdir()
    write_config(tmp_path / "own" / "config.py", store="store")
    runs = []

    def make_run_trial(stop, *, most_heldout_tokens):
        def train(config, workdir):
            runs.append(workdir.name)
            heldout = {"loss": config.seed / 10, "bits_per_byte": 1.0, "sources": {}}
            (workdir / "summary.json").write_text(json.dumps({"heldout": heldout}))
            rows = [{"kind": "train", "step": n + 1, "seq_len": 24, "seconds": 1.0 + n} for n in range(20)]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return "done"

        return train

    monkeypatch.setattr("btlm_jax.cli.tune.make_run_trial", make_run_trial)
    monkeypatch.setattr(
        "btlm_jax.train.metric_writer.read_metrics", lambda path: map(json.loads, path.read_text().splitlines())
    )
    monkeypatch.setattr("btlm_jax.tune.trials.share_compiled", lambda folder: None)
    return tmp_path, runs


def test_other_text_of_the_same_name_is_refused_once_there_is_a_store(tmp_path):
    for name, text in (("a", "one\n"), ("b", "one two\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    study.check_text([str(tmp_path / "b/text.txt")], tmp_path)
    study.check_text([str(tmp_path / "a/text.txt")], tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").touch()
    study.check_text([str(tmp_path / "a/text.txt")], tmp_path)
    with pytest.raises(ValueError, match="b/text.txt is other text than that of .*; give that text"):
        study.check_text([str(tmp_path / "b/text.txt")], tmp_path)
    (tmp_path / "a/text.txt").unlink()
    study.check_text([str(tmp_path / "a/text.txt")], tmp_path)
    assert notices.counts() == {"data-gone": 1}


def test_runs_are_made_once_with_seeds_last_and_then_reported(here, capsys):
    folder, runs = here
    experiment = made_up(folder / "own")
    arguments = [f"--folder={folder / 'runs'}", "--data", "/a/place/text.txt"]
    assert study.conduct(experiment, [*arguments, "--gather"]) == PREEMPTED
    assert study.conduct(experiment, arguments) == DONE
    assert runs == ["a-s0", "b-s0", "a-s1", "b-s1"]
    assert study.conduct(experiment, [*arguments, "--minutes=5"]) == DONE
    assert len(runs) == 4
    text = (folder / "own/results.json").read_text()
    values = json.loads(text)
    assert values["losses"] == [[0.1, 0.1], [0.2, 0.2]]  # b has the seed 10 x 0.1, and one more in the second
    assert values["text"] == ["text.txt"] and "/a/place" not in text and str(folder) not in text
    assert values["command"] == "python -m experiments.own --folder=DIR --data text.txt"
    measured = json.loads((folder / "runs/trials/b-s1/measured.json").read_text())
    assert measured["seed"] == 2 and measured["step_seconds"] == {"24": 3.0}  # the third of 20


def test_only_seeds_of_which_all_runs_are_finished_are_reported(here):
    folder, _ = here
    experiment = made_up(folder / "own")
    arguments = [f"--folder={folder / 'runs'}"]
    study.conduct(experiment, arguments)
    (folder / "runs/trials/b-s1/measured.json").unlink()
    assert study.conduct(experiment, [*arguments, "--gather"]) == DONE
    assert json.loads((folder / "own/results.json").read_text())["losses"] == [[0.1, 0.1]]


def test_another_text_and_contradicting_flags_are_refused(here):
    folder, _ = here
    experiment = made_up(folder / "own")
    study.conduct(experiment, [f"--folder={folder / 'runs'}", "--data", "one.txt"])
    with pytest.raises(ValueError, match=r"text\[0\]=\"one.txt\", not \"two.txt\""):
        study.conduct(experiment, [f"--folder={folder / 'runs'}", "--data", "two.txt"])
    for wrong in (["--quick", "--config=local_cpu"], ["--seeds=0"], ["--minutes=-1"]):
        with pytest.raises(UsageError):
            study.conduct(experiment, [f"--folder={folder / 'more'}", *wrong])


def test_a_seed_changes_parameters_and_order_alike():
    config = tiny_config(seed=7)
    assert study.with_seed(config, 0) == config
    other = study.with_seed(config, 2)
    assert (other.seed, other.data.seed) == (9, config.data.seed + 2)


def test_the_interval_of_seeds_is_students():
    found = study.mean_and_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # two degrees of freedom, 97.5 %, of a table
    assert found["mean"] == 2 and found["low"] == pytest.approx(2 - half) and found["high"] == pytest.approx(2 + half)
    assert study.mean_and_interval([1.5])["low"] is None and "one seed" in study.shown(study.mean_and_interval([1.5]))


def curve(length, loss, *, alibi="none", factor=1.0):
    """A curve whose loss in a bin is loss(its last position); bins of doubling width, a token a position."""
    firsts = [1, *(2**n + 1 for n in range(int(math.log2(length))))]
    lasts = [1, *(2 ** (n + 1) for n in range(int(math.log2(length))))]
    bins = {
        "first": firsts, "last": lasts, "loss": [loss(last) for last in lasts],
        "num_tokens": [last - first + 1 for first, last in zip(firsts, lasts, strict=True)],
    }  # fmt: skip
    mean = sum(x * n for x, n in zip(bins["loss"], bins["num_tokens"], strict=True)) / length
    return {"length": length, "alibi": alibi, "factor": factor, "loss": mean, "first_rise": 0, "bins": bins}


def curves_of(trained, longest, *, loss, divided):
    """The curves of a run: as trained they have one loss, with divided slopes another."""
    plain = [curve(length, loss) for length in sorted({2 * trained, 4 * trained, 8 * trained, longest})]
    fixed = [curve(8 * trained, divided, alibi="fixed", factor=factor) for factor in positions.FACTORS]
    return [*plain, *fixed, *(curve(times * trained, divided, alibi="dynamic") for times in (2, 4))]


def test_the_curriculum_at_equal_tokens_and_at_equal_time():
    module = importlib.import_module("experiments.curriculum.__main__")
    config = config_of("curriculum")
    assert list(module.make_variants(config, {}, STORE)) == ["mixed", "short", "long"]
    first = {
        "mixed": {"step_seconds": {"128": 1.5, "512": 3.0}},
        "short": {"step_seconds": {"128": 1.0}},
        "long": {"step_seconds": {"512": 4.0}},
    }
    made = module.make_variants(config, first, STORE)
    assert {made[name].curriculum.table.num_tokens for name in ("mixed", "short", "long")} == {480 * 1024}
    steps = {name: variant.curriculum.table.num_steps for name, variant in made.items()}
    assert steps["short-equal-time"] == 360 + 120 * 3 and steps["long-equal-time"] == 240  # of 720 seconds
    assert made["long-equal-time"].optimizer.warmup_tokens == config.optimizer.warmup_tokens // 2
    assert made["short"].curriculum.seq_len == (128,) and made["long"].curriculum.seq_len == (512,)
    assert made["short"].data.store == "/a/store"


def test_what_is_reported_of_the_curriculum_and_of_alibi(tmp_path):
    def measured(trained, loss):
        step_seconds = {"128": 1.0, "512": 3.0}
        curves = curves_of(trained, 4096, loss=lambda last: loss + (last > 512), divided=lambda last: loss + 2)
        return {"loss": loss, "step_seconds": step_seconds, "trained_length": trained, "curves": curves}

    lengths = {"mixed": 512, "short": 128, "long": 512, "short-equal-time": 128, "long-equal-time": 512}
    seeds = [
        {name: measured(length, seed + (name == "short") / 2) for name, length in lengths.items()} for seed in (1, 2)
    ]
    for name in ("curriculum", "alibi"):
        experiment, config = experiment_of(name), config_of(name)
        values = {"config": dataclasses.asdict(config), **experiment.report(config, seeds)}
        experiment.plot(values, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert "| mixed" in experiment.describe(values)
        short = values["variants"]["short"]
        if name == "curriculum":
            assert values["bands"] == {"inside_short": (1, 128), "inside_long": (129, 512), "beyond": (513, 4096)}
            assert short["losses"]["beyond"]["values"] == [2.5, 3.5] and short["losses"]["inside_long"]["mean"] == 2
            assert short["minus_mixed"]["heldout"]["values"] == [0.5, 0.5]
            assert short["seconds_to_mixed"] == pytest.approx(480 / 720)
        else:
            assert short["losses"]["plain"]["1x"]["values"] == [1.5, 2.5]
            assert short["losses"]["plain"]["8x"]["values"] == [2.5, 3.5]  # positions 513-1,024
            assert (
                short["minus_plain"]["fixed 8"]["2x"]["mean"] == 2
                and short["minus_plain"]["fixed 8"]["8x"]["mean"] == 1
            )
            assert short["dynamic_minus_plain"]["256"]["mean"] == pytest.approx(2)
            assert short["dynamic_minus_plain"]["1024"]["mean"] == pytest.approx(1.5)  # half of it has risen by 1


def test_loss_between_weighs_bins_by_their_tokens():
    one = {"bins": {"first": [1, 2, 3], "last": [1, 2, 4], "loss": [9.0, 1.0, 2.0], "num_tokens": [5, 1, 3]}}
    assert positions.loss_between(one, 2, 4) == (1 * 1 + 2 * 3) / 4
    with pytest.raises(ValueError, match="no bin"):
        positions.loss_between(one, 5, 9)


@pytest.mark.slow
def test_a_run_of_the_curriculum_is_made_and_its_curves_are_measured(tmp_path, monkeypatch):
    from btlm_jax.cli.tune import make_run_trial

    settings = positions.settings_for(config_of("curriculum"), longest=4096)  # 7 curves, of which 2 are compiled here
    assert [setting.length for setting in settings] == [1024, 2048, 4096, 4096, 4096, 1024, 2048]
    few = [
        Setting(length=8 * BLOCK_LEN, alibi=alibi, factor=factor) for alibi, factor in (("none", 1.0), ("fixed", 8.0))
    ]
    monkeypatch.setattr(positions, "settings_for", lambda config, longest: few)

    build_real_store(tmp_path / "store")
    config = tiny_config(model__vocab_size=400, log__sample_tokens=1)
    config = experiment_of("curriculum").make_variants(config, {}, {"": tmp_path / "store"})["short"]
    notices.begin(strict=())
    with one_device():
        make_trial = make_run_trial(stopping.current(), most_heldout_tokens=3 * BLOCK_LEN)
        assert make_trial(config, tmp_path / "run") == "done"
        measured = positions.measure_positions_of(config, tmp_path / "run")
    assert [curve["length"] for curve in measured["curves"]] == 2 * [8 * BLOCK_LEN]
    assert measured["trained_length"] == 24
    for curve in measured["curves"]:
        assert 4 < curve["loss"] < 7 and sum(curve["bins"]["num_tokens"]) >= 8 * BLOCK_LEN
    plain, divided = (curve["bins"]["loss"][:6] for curve in measured["curves"])
    assert plain[0] == pytest.approx(divided[0]) and plain[3:] != pytest.approx(divided[3:])  # one token has no slope
    assert study.step_seconds(tmp_path / "run").keys() == {"24"}
    sources = json.loads((tmp_path / "run" / "summary.json").read_text())["heldout"]["sources"]
    assert [source["tokens"] for source in sources.values()] == [3 // len(sources) * BLOCK_LEN] * len(sources)
    _check_written_store(tmp_path)


def _check_written_store(folder):
    """A store of the dedup experiment has the documents, each after the end-of-text id, and those held out apart."""
    from btlm_jax.data.reader import open_store
    from btlm_jax.tokenizers.tokenizer import find_tokenizer
    from experiments.dedup.stores import write_store

    train, heldout = ["one two three", "four " * 50], ["five six"]
    write_store(folder / "written", train, heldout, folder / "store", config=tiny_config())
    store, tokenizer = open_store(folder / "written", expected_fingerprint=""), find_tokenizer(folder / "store")
    for split, texts in (("train", train), ("heldout", heldout)):
        reader = store.split(split)
        blocks = reader.read_many(range(reader.split.num_blocks))
        ids = [token for block in blocks for token in block.tokens[1 : block.num_targets + 1].tolist()]
        wanted = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
        assert ids == wanted and blocks[0].tokens[0] == tokenizer.eos_id


def test_ends_of_the_rate_at_few_and_many_tokens(tmp_path):
    experiment, config = experiment_of("end_rate"), config_of("end_rate")
    made = experiment.make_variants(config, {}, STORE)
    assert len(made) == 12 and list(made)[0].startswith("few")
    zero, tenth = made["many-end0-peak2"], made["few-end10-peak1"]
    assert (zero.optimizer.peak_learning_rate, zero.optimizer.end_learning_rate) == (0.012, 0)
    assert tenth.optimizer.end_learning_rate == pytest.approx(0.1 * 0.006)
    assert made["few-end10-peak2"].optimizer.end_learning_rate == pytest.approx(0.1 * 0.012)
    assert zero.curriculum.table.num_tokens == 8 * tenth.curriculum.table.num_tokens
    assert zero.optimizer.warmup_tokens == 8 * tenth.optimizer.warmup_tokens

    def loss(name, seed):  # an end at 0 is best at twice the peak, by 0.3; the others at the config's
        return 3.0 + seed - {"few-end0-peak2": 0.3, "few-end0.85-peak1": 0.1, "few-end10-peak1": 0.05}.get(name, 0)

    seeds = [{name: {"loss": loss(name, seed)} for name in made} for seed in (0, 1)]
    values = experiment.report(config, seeds)
    few = values["budgets"]["few"]
    assert few["best_peak"] == {"10 %": "1", "0.85 %": "1", "0": "2"}
    assert few["best_minus_btlm"]["0"]["mean"] == pytest.approx(-0.2)
    assert few["minus_btlm"]["0"]["2"]["mean"] == pytest.approx(-0.3)
    model = config.model
    matrices = 2 * (4 * model.d_model**2 + 3 * model.d_model * model.d_ff) + model.vocab_size * model.d_model
    assert values["num_parameters"] == pytest.approx(matrices, rel=0.02)
    experiment.plot(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists() and "-0.2000" in experiment.describe(values)


def test_gelu_has_as_many_parameters_and_the_best_peaks_are_compared(tmp_path):
    experiment, config = experiment_of("activation"), config_of("activation")
    made = experiment.make_variants(config, {}, STORE)
    losses = {"swiglu-peak2": 2.5, "gelu-peak0.5": 2.75}
    seeds = [{name: {"loss": losses.get(name, 3.0), "step_seconds": {"128": 1.0}} for name in made}] * 2
    values = experiment.report(config, seeds)
    swiglu, gelu = values["layers"]["swiglu"], values["layers"]["gelu"]
    assert (swiglu["d_ff"], gelu["d_ff"]) == (256, 384)
    assert gelu["parameters"] == pytest.approx(swiglu["parameters"], rel=0.002)
    assert made["gelu-peak1"].model.d_ff / made["gelu-peak1"].mup.base_d_ff == 1
    assert made["gelu-peak2"].optimizer.peak_learning_rate == 2 * config.optimizer.peak_learning_rate
    assert values["swiglu_minus_gelu"]["mean"] == -0.25 and gelu["best_peak"] == "0.5"
    experiment.plot(values, tmp_path / "figure.png")
    assert "-0.2500" in experiment.describe(values)


def test_each_option_is_held_against_the_recipe_at_its_own_best_rate(tmp_path):
    experiment, config = experiment_of("options"), config_of("options")
    made = experiment.make_variants(config, {}, STORE)
    assert len({*made.values()}) == len(made) == 10 * 3 + 4
    peak = config.optimizer.peak_learning_rate
    hot, tenth = made["recipe-peak8"].optimizer, made["end_at_10percent-peak0.5"].optimizer
    assert hot.peak_learning_rate == 8 * peak and hot.end_learning_rate == pytest.approx(0.0085 * 8 * peak)
    assert tenth.end_learning_rate == pytest.approx(0.1 * peak / 2)
    muon = made["muon-peak2"].optimizer
    assert (muon.muon_learning_rate, muon.peak_learning_rate) == (2 * config.optimizer.muon_learning_rate, peak)
    assert made["completep-peak1"].mup.base_num_layers * 2 == made["completep-peak1"].model.num_layers

    losses = {"recipe-peak2": 2.5, "muon-peak0.5": 2.25, "qk-norm_rms-peak8": 1.0, "decay_to_zero-peak1": None}
    averages = {"recipe-peak1": 2.75, "constant_last_0.2-peak1": 2.375}
    seeds = [{name: {"loss": losses.get(name, 3.0), "loss_of_average": averages.get(name, 3.0)} for name in made}] * 2
    values = experiment.report(config, seeds)
    minus = {name: each["minus_recipe"]["mean"] for name, each in values["options"].items()}
    assert minus["muon"] == -0.25 and minus["average: ema"] == 0.25
    assert minus["qk-norm rms"] == 0.5  # a hot run is no best one
    assert (minus["constant, last 0.2"], minus["decay to zero"]) == (-0.125, 0.5)
    assert values["options"]["muon"]["best_peak"] == "0.5"
    experiment.plot(values, tmp_path / "figure.png")
    for run in (name for name in made if name.startswith("muon")):
        seeds[0][run]["loss"] = None
    values = experiment.report(config, seeds)
    text = experiment.describe(json.loads(json.dumps(values)))
    experiment.plot(values, tmp_path / "figure.png")
    assert "| muon | diverged | diverged | diverged |  | diverged |" in text
    assert (tmp_path / "figure.png").exists() and "-0.125 (-0.125 to -0.125)" in text
    assert "| decay to zero | 3.000 | diverged | 3.000 |  |" in text
    assert "| qk-norm rms | 3.000 | 3.000 | 3.000 | 1.000 |" in text


def test_the_network_with_gelu_is_down_of_gelu_of_up():
    import flax.linen as nn
    import jax
    import numpy as np

    from btlm_jax.model import transformer
    from btlm_jax.model.projection import project_scheduled
    from btlm_jax.parallel.make_mesh import make_mesh
    from btlm_jax.parallel.mesh import RULES
    from btlm_jax.recipe.mup import make_parametrization
    from experiments.activation.gelu import GeluMlp, gelu_in_place_of_swiglu

    config = tiny_config()
    usual = transformer.Mlp
    with gelu_in_place_of_swiglu():
        assert transformer.Mlp is GeluMlp
    assert transformer.Mlp is usual
    mlp = GeluMlp(
        config=config.model,
        parametrization=make_parametrization(config.mup, config.model),
        rules=RULES,
        project=project_scheduled,
        name="mlp",
    )
    x_BTD = np.random.default_rng(0).normal(size=(2, 3, config.model.d_model)).astype(np.float32)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1], tensor=1)):
        placed_BTD = jax.reshard(x_BTD, RULES.spec("batch", "length", "act_embed"))
        params = nn.meta.unbox(jax.jit(mlp.init)(jax.random.key(1), placed_BTD)["params"])
        params["up"]["bias"] += 0.5
        found_BTD = jax.jit(mlp.apply)({"params": params}, placed_BTD)
    weights = {
        name: {key: np.asarray(value, np.float64) for key, value in part.items()} for name, part in params.items()
    }
    assert sorted(weights) == ["down", "up"]
    up = x_BTD @ weights["up"]["kernel"] + weights["up"]["bias"]
    hidden = up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
    wanted_BTD = hidden @ weights["down"]["kernel"] + weights["down"]["bias"]
    np.testing.assert_allclose(found_BTD, wanted_BTD, rtol=1e-4, atol=1e-5)


def test_what_is_planted_and_what_is_kept_apart():
    from experiments.dedup.stores import COPIES, PIECE_CHARACTERS, choose_texts, pieces_of

    texts = [f"document {number} " + " ".join(f"w{number * k % 97}" for k in range(600)) for number in range(40)]
    chosen = choose_texts(texts, [600] * 40, num_tokens=11_990, seed=3)
    assert len(chosen.unique) == 22 and len(set(chosen.unique)) == 22  # 1.1 x 11,990, of 600 each
    assert len(chosen.copied) == len(chosen.control) == 2 and not set(chosen.copied) & set(chosen.control)
    assert {*chosen.copied, *chosen.control} <= {*chosen.unique}
    assert len(chosen.copies) == 2 * COPIES and len(set(chosen.copies)) == 2 * COPIES
    words = chosen.copied[0].split(" ")
    changed = [sum(a != b for a, b in zip(words, copy.split(" "), strict=True)) for copy in chosen.copies[:COPIES]]
    assert 1 <= max(changed) <= round(0.01 * len(words))
    assert chosen == choose_texts(texts, [600] * 40, num_tokens=11_990, seed=3)
    long = " ".join(texts[:9])
    pieces = pieces_of(long)
    assert " ".join(pieces) == long and max(map(len, pieces)) <= PIECE_CHARACTERS and len(pieces) == 6
    assert pieces_of("x" * 9_000) == ["x" * 4_000, "x" * 4_000, "x" * 1_000]
    with pytest.raises(ValueError, match="give more --data"):
        choose_texts(texts, [600] * 40, num_tokens=120_000, seed=3)


def test_what_is_reported_of_near_duplicates(tmp_path):
    def measured(loss, copied):
        groups = {
            "copied": {"loss": copied, "right": 1 / copied}, "control": {"loss": 4.0, "right": 0.25},
            "heldout": {"loss": 5.0, "right": 0.2},
        }  # fmt: skip
        facts = {
            "unique_documents": 12, "copied_documents": 2, "planted_copies": 32, "planted_share": 0.61,
            "left_by_dedup": 12, "natural_documents": 787, "natural_near_duplicates": 0,
        }  # fmt: skip
        return {"loss": loss, "groups": groups, "facts": facts}

    experiment, config = experiment_of("dedup"), config_of("dedup")
    seeds = [{"clean": measured(5 + n, 4.0), "planted": measured(5.5 + n, 2.0), "deduplicated": measured(5 + n, 4.0)}
             for n in (0, 1)]  # fmt: skip
    values = experiment.report(config, seeds)
    planted = values["variants"]["planted"]
    assert planted["minus_clean"]["heldout_split"]["values"] == [0.5, 0.5]
    assert planted["minus_clean"]["copied_loss"]["mean"] == -2 and planted["values"]["copied_right"]["mean"] == 0.5
    experiment.plot(values, tmp_path / "figure.png")
    text = experiment.describe(values)
    assert "| planted | 6.0000 | +0.5000" in text and "leaves 12 documents of 44" in text
