"""`btlm train --data`: chosen once and kept, the time is filled, and no other text is trained on than was asked."""

import dataclasses
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from support.corpus_files import made_up_text, write_raw
from support.real_store import write_config
from support.tiny import tiny_config
from support.tiny_tokenizers import tiny_byte_level

from btlm_jax.cli import main, train_data
from btlm_jax.corpus.engine.inputs import raw_inputs
from btlm_jax.data.store import read_manifest
from btlm_jax.recipe.config import train_config_from
from btlm_jax.train import loop, size_run, sizing
from btlm_jax.train.flops import Peak
from btlm_jax.train.step_time import RunTimes

TIMES = RunTimes(prepare=1.0, compile=3.0, steps=(0.4, 0.6), evaluation=0.1)


@pytest.fixture
def texts(tmp_path):
    return write_book(tmp_path / "texts")


def write_book(folder):
    folder.mkdir()
    (folder / "book.txt").write_text("\n".join(made_up_text(seed=seed, num_words=200) for seed in range(52)))  # 70 kB
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The configs that would be trained, on a machine of known speed."""
    configs = []
    known_machine(monkeypatch, configs)
    return configs


def known_machine(patch, configs):
    def train(config, **named):
        configs.append(config)
        (named["workdir"] / "config.json").write_text(config.to_json())
        return loop.DONE

    patch.setattr(loop, "train", train)
    patch.setattr(size_run, "measure_run", lambda config, **named: TIMES)
    patch.setattr(size_run, "peak_flops", lambda device: Peak(flops=1e11, source="made up"))
    patch.setattr(train_data, "seconds_since_start", lambda: 10.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `texts` and with `run`, a workdir that was begun on them with --minutes=1."""
    folder = tmp_path_factory.mktemp("made")
    write_book(folder / "texts")
    with pytest.MonkeyPatch.context() as patch:
        known_machine(patch, [])
        assert run(f"--data={folder / 'texts'}", f"--workdir={folder / 'run'}", "--minutes=1") == 0
    return folder


@pytest.fixture
def begun(made, tmp_path):
    """A copy of that folder, at its place."""
    kept = shutil.copytree(made, tmp_path / "kept")
    yield made
    shutil.rmtree(made)
    shutil.copytree(kept, made)


def run(*arguments):
    return main(["train", *map(str, arguments)])


def refused(capsys, *arguments, code=2):
    """Run, and return what was said; the commands that are proposed must parse."""
    assert run(*arguments) == code
    said = capsys.readouterr().err
    assert len(said) < 1500, said
    return said


def proposed(said):
    return [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  btlm ")]


def test_the_steps_fill_the_time_and_the_config_says_so(texts, trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(f"--data={texts}", f"--workdir={workdir}", "--minutes=1") == 0
    (config,) = trained
    table = config.curriculum.table
    # 10 s are over; 1 s to prepare, 12 s for the end; 5 evaluations of a few blocks in batches of 8.
    rows = json.loads((workdir / "store" / "manifest.json").read_text())["splits"]["heldout"]["num_blocks"]
    assert table.num_steps == steps_that_fill(60, some=-(-min(rows, 8) // 8), whole=-(-rows // 8)) > sizing.MIN_STEPS
    assert table.phases[0].num_steps == round(0.75 * table.num_steps)
    assert (config.optimizer.schedule, config.data.store, config.corpus.source) == ("wsd", "store", "prepared")
    assert config.curriculum.seq_len == (64, 256) and config.model.vocab_size == 512
    said = capsys.readouterr().out
    assert f"{table.num_steps:,} steps of {table.tokens_per_step:,} tokens" in said and "what 1 minutes hold" in said
    assert "Time: about 1.0 minutes for the whole command" in said and "xz -9 takes" in said


def steps_that_fill(seconds, *, some, whole):
    """The steps that are left beside evaluations of `some` batches and of all, of `whole` batches, by TIMES."""
    step = 0.75 * 0.4 + 0.25 * 0.6
    return int((seconds - 10 - 1 - 12 - 0.1 * (4 * some + whole)) / (1.02 * step))


def test_flags_that_a_longer_run_takes_are_taken_and_the_averages_evaluation_has_its_time(texts, trained, tmp_path):
    command = [f"--data={texts}", f"--workdir={tmp_path / 'run'}", "--minutes=1"]
    flags = ["optimizer.warmup_tokens=90000", "log.profile_steps=50:55"]  # of the 60 steps, not of the fewest
    flags += ["optimizer.average=last", "evaluation.batch_size=1", "evaluation.blocks_per_source=2"]
    assert run(*command, *(f"--config.{flag}" for flag in flags)) == 0
    (config,) = trained
    rows = json.loads((tmp_path / "run" / "store" / "manifest.json").read_text())["splits"]["heldout"]["num_blocks"]
    assert rows > 2 and config.optimizer.warmup_tokens == 90000 > sizing.MIN_STEPS * 2048
    assert config.curriculum.table.num_steps == steps_that_fill(60, some=2, whole=2 * rows) > 55 > sizing.MIN_STEPS


def test_a_later_start_measures_nothing_and_trains_the_same(made, trained, monkeypatch, capsys):
    arguments = [f"--data={made / 'texts'}", f"--workdir={made / 'run'}"]

    def measured(*arguments, **named):
        raise AssertionError("a step is measured again")

    monkeypatch.setattr(size_run, "measure_run", measured)
    first = json.loads((made / "run" / "config.json").read_text())
    assert run(*arguments, "--minutes=1", "--config.log.sample_tokens=9") == 0
    assert run(*arguments) == 0
    assert trained[1] == train_config_from(first)
    first["log"]["sample_tokens"] = 9
    assert trained[0] == train_config_from(first)
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("Model: ", "Run: ", "Time: ")) for line in said) == 2 * 3


def test_little_text_is_not_repeated_beyond_use(texts, trained, tmp_path, capsys):
    assert run("--data", texts, f"--workdir={tmp_path / 'run'}", "--hours=2") == 0
    (config,) = trained
    assert config.data.max_epochs == sizing.MAX_EPOCHS
    assert f"at most {sizing.MAX_EPOCHS}: more would only repeat the text" in capsys.readouterr().out


def test_a_given_tokenizer_is_the_models(texts, trained, tmp_path):
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    assert run(f"--data={texts}", f"--workdir={tmp_path / 'run'}", f"--tokenizer={tmp_path}") == 0
    (config,) = trained
    assert config.model.vocab_size == tiny_byte_level().get_vocab_size()


def test_sources_can_be_weighted(trained, tmp_path, capsys):
    """Subfolders are the sources; the store has a stream of each, and the epochs allowed are those that are read."""
    for number, (name, size) in enumerate((("many", 50), ("few", 12))):
        texts = [made_up_text(seed=100 * number + seed, num_words=200) for seed in range(size)]
        write_raw(tmp_path / "texts" / name / "a.jsonl", texts, source="")
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / "texts" / name / "a.jsonl").write_text("\n".join(lines))
    arguments = [f"--data={tmp_path / 'texts'}", f"--workdir={tmp_path / 'run'}", "--minutes=1"]
    assert "data.weights names 'mayn', which the text does not have; its sources are 'few', 'many'" in refused(
        capsys, *arguments, "--config.data.weights=mayn=1,few=1", code=1
    )
    weights = "--config.data.weights=many=1,few=1"
    assert run(*arguments, weights) == 0
    (config,) = trained
    manifest = read_manifest(tmp_path / "run" / "store")
    assert manifest.features == ("sources",) and config.data.weights == "many=1,few=1"
    tokens = {name: part.num_blocks * 256 for name, part in manifest.splits["train"].sources.items()}
    assert config.data.max_epochs == math.ceil(config.curriculum.table.num_tokens / 2 / tokens["few"])
    assert f"{config.curriculum.table.num_tokens / 2 / tokens['many']:.2f} epochs of many" in capsys.readouterr().out
    said = refused(capsys, *arguments)
    assert "--config.data.weights was many=1,few=1, is now not given. It is one of" in said
    assert proposed(said)[1] == ["train", "--data", str(tmp_path / "texts"), arguments[1], weights]
    assert main(proposed(said)[1]) == 0 and trained[0] == trained[1]


def test_a_tokenizer_with_more_ids_than_the_config_is_refused_before_the_text_is_read(texts, tmp_path, capsys):
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    command = (f"--data={texts}", "--config=local_cpu", f"--tokenizer={tmp_path}", f"--workdir={tmp_path / 'run'}")
    said = refused(capsys, *command, "--config.model.vocab_size=256")
    assert "has 300 ids, and model.vocab_size=256; give --config.model.vocab_size=300 or more" in said
    assert not (tmp_path / "run").exists()


def test_flags_that_contradict_data_are_refused_with_commands(texts, trained, tmp_path, capsys):
    data, workdir = f"--data={texts}", f"--workdir={tmp_path / 'run'}"
    for arguments, said in (
        ([data, workdir, "--config=local_cpu", "--minutes=5"], "--config=local_cpu and --minutes are both given"),
        ([data, workdir, "--config=local_cpu", "--init=runs/x"], "--config=local_cpu and --init are both given"),
        ([data, workdir, "--config=local_cpu", "--config.corpus.max_bytes=9"], "corpus.max_bytes has no effect on a"),
        ([data, workdir, "--config=local_cpu", "--config.model.d_model=9"], "d_model=9 is not divisible by"),
        ([data, workdir, "--config.log.trackers=comet"], "log.trackers='comet' must name each of"),
        ([f"--data={tmp_path}", workdir], "lies in --data="),
        ([data, workdir, "--template="], "--template= is empty; leave it out, or give one"),
        ([data, workdir, "--config.log.profile_steps=5"], "log.profile_steps='5' must be FIRST:LAST"),
        ([data, workdir, "--config.optimizer.beta1=2"], "beta1"),
        ([data, workdir, "--config.data.store=store"], "--data and --config.data.store=store are both given"),
        ([data, workdir, "--config.data.weights=a=1;a=1;a=1"], "has 3 phases, and the run will have 2; give 1 or 2"),
        ([data, workdir, "--config.data.weights=a"], "cannot be read from 'a' on; it is SOURCE=NUMBER"),
        ([data, workdir, "--config.model.d_model=64"], "--config.model.d_model cannot be given with --data"),
        ([data, workdir, "--config.optimizer.peak_learning_rat=1"], "did you mean optimizer.peak_learning_rate or "),
        ([data, workdir, "--distributed"], "--data is for one process, and --distributed for several"),
        ([data, workdir, "--minutes=1", "--hours=1"], "--minutes and --hours are both given"),
        ([data, workdir, "--minutes=0.5"], "the time is 0.5 minutes; it must be from 1 to "),
        (["--config=local_cpu", workdir, "--minutes=5"], "--minutes goes with --data=PATH"),
        ([data], "--workdir=DIR is needed"),
        (["--data=", workdir], "--data needs a path"),
    ):
        assert said in refused(capsys, *arguments)
    words = proposed(refused(capsys, data, workdir, "--config.data.store=store"))
    assert words[0] == ["train", "--data", str(texts), workdir]
    assert words[1][-2:] == [
        f"--config.data.store={Path.cwd() / 'store'}",
        "--config.corpus.source=prepared",
    ]
    assert trained == [] and not (tmp_path / "run").exists()


def test_a_workdir_of_other_data_or_of_another_run_is_refused_with_commands(begun, trained, tmp_path, capsys):
    texts, workdir = begun / "texts", begun / "run"
    other = shutil.copytree(texts, tmp_path / "other")
    said = refused(capsys, f"--data={other}", f"--workdir={workdir}")
    assert f"--data was {texts}, is now {other}" in said
    anew, on = proposed(said)
    assert anew == ["train", "--data", str(other), f"--workdir={begun / 'run-2'}"]
    assert on == ["train", "--data", str(texts), f"--workdir={workdir}"] and main(on) == 0
    assert "--minutes was 1.0, is now 3.0" in refused(capsys, f"--data={texts}", f"--workdir={workdir}", "--minutes=3")
    assert "--tokenizer was not given, is now " in refused(
        capsys, f"--data={texts}", f"--workdir={workdir}", "--tokenizer=t"
    )
    (texts / "more.txt").write_text(made_up_text(seed=0, num_words=300))
    said = refused(capsys, f"--data={texts}", f"--workdir={workdir}")
    assert "the files of --data are others than when" in said and len(proposed(said)) == 2
    assert proposed(said)[1] == ["train", f"--config={workdir / 'config.json'}", f"--workdir={workdir}"]
    assert main(proposed(said)[1]) == 0 and trained[0] == trained[1]
    converted = tmp_path / "model"
    converted.mkdir()
    (converted / "model.safetensors").write_bytes(b"weights")
    said = refused(capsys, f"--data={other}", f"--workdir={converted}")
    assert "has model.safetensors, which were not made from --data" in said
    assert proposed(said)[1] == ["generate", f"--checkpoint={converted}"]
    assert len(trained) == 2


def test_a_token_store_or_a_stage_is_no_text(made, trained, tmp_path, capsys):
    for folder, what in (("store", "a token store"), ("corpus/split", "the work of a stage of btlm corpus")):
        said = refused(capsys, f"--data={made / 'run' / folder}", f"--workdir={tmp_path / 'new'}")
        assert f"is {what}, not text" in said and len(proposed(said)) == 2
    assert not (tmp_path / "new").exists()
    assert {item.name.split("/")[0] for item in raw_inputs(made)} == {"texts"}  # of the run beside it nothing is read
    assert f"{made / 'run' / 'corpus'} is not read: it is of a training run (left-out" in capsys.readouterr().err


def test_text_that_is_gone_is_said_and_the_run_goes_on(begun, trained, capsys):
    shutil.rmtree(begun / "texts")
    assert run(f"--data={begun / 'texts'}", f"--workdir={begun / 'run'}") == 0
    assert trained == [train_config_from(json.loads((begun / "run" / "config.json").read_text()))]
    assert "there is no such file or folder; the run goes on with the store" in capsys.readouterr().err
    assert refused(capsys, f"--data={begun / 'texts'}", f"--workdir={begun / 'new'}", code=1)


def test_a_tokenizer_that_is_not_there_is_refused_before_the_work(texts, trained, tmp_path, capsys):
    said = refused(capsys, f"--data={texts}", f"--workdir={tmp_path / 'run'}", f"--tokenizer={texts}", code=1)
    assert "holds no tokenizer" in said and not (tmp_path / "run").exists()


def test_patterns_and_several_paths(trained, tmp_path, capsys):
    for number in range(4):
        write_raw(
            tmp_path / f"{number}.jsonl",
            [made_up_text(seed=100 * number + seed, num_words=300) for seed in range(20)],
            source="",
        )
    assert run("--data", f"{tmp_path}/[01].jsonl", tmp_path / "2.jsonl", f"--workdir={tmp_path / 'run'}") == 0
    assert "Data: 3 files" in capsys.readouterr().out
    said = refused(capsys, f"--data={tmp_path}/*.parquet", f"--workdir={tmp_path / 'new'}", code=1)
    assert "nothing matches" in said


def test_a_damaged_record_is_named(begun, trained, capsys):
    path = begun / "run" / train_data.RECORD_FILE
    record = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(record | {"config": "{}"}), json.dumps(record | {"format": "x"})):
        path.write_text(damaged)
        said = refused(capsys, f"--data={begun / 'texts'}", f"--workdir={begun / 'run'}", code=1)
        assert "own_text.json is damaged" in said


def test_a_dry_run_makes_nothing(texts, trained, tmp_path, capsys):
    assert run(f"--data={texts}", f"--workdir={tmp_path / 'run'}", "--dry-run") == 0
    assert "Data: 1 files" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_config_beside_data_is_trained_on_a_store_of_the_text(texts, trained, tmp_path, capsys):
    file = write_config(tmp_path / "mine.py", store="store", model__vocab_size=500, corpus__source="installed_python")
    workdir = tmp_path / "run"
    arguments = [f"--data={texts}", f"--workdir={workdir}", f"--config={file}"]
    changes = [
        "--config.model.num_heads=2",
        "--config.curriculum.seq_len=16,32",
        "--config.curriculum.batch_size=24,12",
    ]
    assert run(*arguments, *changes, "--dry_run") == 0 and not workdir.exists()
    assert "Token store: none in" in capsys.readouterr().out
    assert run(*arguments, *changes) == 0
    manifest = read_manifest(workdir / "store")
    assert (manifest.tokenizer.vocab_size, manifest.block_len) == (500, 32)
    said = capsys.readouterr()
    assert f"Model and run: as --config={file} has them" in said.out and said.err.count("config: ") == 1
    assert run(*arguments, *changes, "--config.log.every_steps=7") == 0
    expected = tiny_config(
        model__vocab_size=500, model__num_heads=2, curriculum__seq_len=(16, 32), curriculum__batch_size=(24, 12),
        data__store="store", corpus__source="prepared", log__sample_tokens=1,
    )  # fmt: skip
    assert trained[0] == expected
    assert trained[1] == dataclasses.replace(expected, log=dataclasses.replace(expected.log, every_steps=7))
    said = refused(capsys, f"--data={texts}", f"--workdir={workdir}")
    assert f"--config was {file}, is now" in said
    assert proposed(said)[1] == ["train", "--data", str(texts), f"--workdir={workdir}", f"--config={file}"]
    said = refused(capsys, *arguments[:2], "--config=local_cpu")
    assert proposed(said)[0][-1] == "--config=local_cpu" and f"--config was {file}" in said


def test_a_config_that_names_a_store_is_refused_beside_data(texts, tmp_path, capsys):
    file = write_config(tmp_path / "mine.py", store=tmp_path / "other")
    said = refused(capsys, f"--data={texts}", f"--workdir={tmp_path / 'run'}", f"--config={file}")
    assert f"--config={file} names one, data.store={tmp_path / 'other'}" in said
    first, second = proposed(said)
    assert first == ["train", "--data", str(texts), f"--workdir={tmp_path / 'run'}"]
    assert f"--config={file}" in second and f"--config.data.store={tmp_path / 'other'}" in second


def test_a_tracker_whose_package_is_missing_is_refused_before_the_text_is_read(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for more in (["--config.log.trackers=wandb"], ["--config=local_cpu", "--config.log.trackers=wandb"]):
        said = refused(capsys, f"--data={texts}", f"--workdir={tmp_path / 'run'}", *more, code=1)
        assert "needs the package wandb" in said and not (tmp_path / "run").exists()
