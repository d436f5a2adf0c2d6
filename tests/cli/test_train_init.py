"""`btlm train --init`: what is taken of the model, what is refused, and that a resume reads the model no more."""

import dataclasses
import hashlib
import json
import re
import shutil
import types

import fsspec
import jax
import numpy as np
import pytest
from support.corpus_files import made_up_text
from support.made_up_run import run_config, write_run
from support.published_files import oracle_weights, write_published
from support.real_store import write_config
from support.run_command import ONE_PHASE
from support.tiny_tokenizers import tiny_byte_level
from tokenizers import AddedToken

from btlm_jax import notices, stopping
from btlm_jax.cli import main, train_data, train_init
from btlm_jax.data.reader import open_store
from btlm_jax.data.store import HELDOUT, read_manifest, read_tokenizer_info, write_manifest
from btlm_jax.hub.given_model import NewRows, open_given_model
from btlm_jax.hub.source import native_logits, read_native
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import train_config_from
from btlm_jax.stopping import ProcessesDifferError
from btlm_jax.train import loop, size_run
from btlm_jax.train.checkpoint import Checkpointer
from btlm_jax.train.flops import Peak
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.program import make_program
from btlm_jax.train.step_time import RunTimes

MODEL = {"model__num_layers": 3, "model__d_model": 56, "mup__preset": "sp", "mup__embedding_multiplier": 3.0}


@pytest.fixture(scope="module")
def source(token_store, tmp_path_factory):
    """The workdir of a run of another shape and parametrization than the tiny config; no test may change it."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    write_run(workdir, run_config(token_store, **MODEL), steps=(3, 7))
    return workdir


@pytest.fixture
def config_file(token_store, tmp_path):
    return write_config(tmp_path / "config.py", store=token_store)


def run(*arguments):
    return main(["train", *map(str, arguments)])


def refused(capsys, *arguments, code=2):
    assert run(*arguments) == code
    return capsys.readouterr().err


def test_processes_agree_on_the_model_before_it_is_used(source, begun, config_file, tmp_path, monkeypatch, capsys):
    def agree(stop, name, facts):
        if name == "model of --init":
            raise ProcessesDifferError(f"the processes of this run differ: {sorted(facts)}, {facts['its step']}")

    monkeypatch.setattr(stopping.Stop, "agree", agree)
    said = refused(capsys, f"--config={config_file}", f"--init={source}", f"--workdir={tmp_path / 'new'}", code=2)
    assert "differ: ['its step', 'model of --init'], 7" in said and not begun


def test_the_models_keys_are_taken_and_said(source, begun, config_file, tmp_path, capsys):
    workdir = tmp_path / "new"
    assert run(f"--config={config_file}", f"--init={source}", f"--workdir={workdir}") == 0
    ((config, beginning),) = begun
    assert (config.model.num_layers, config.model.d_model, config.model.num_heads) == (3, 56, 4)
    assert (config.mup.preset, config.mup.embedding_multiplier) == ("sp", 3.0)
    said = capsys.readouterr()
    expected = ["model.num_layers=3 (not 2)", "model.d_model=56 (not 40)", "mup.preset=sp (not btlm)"]
    assert all(part in said.err for part in expected) and notices.counts()["config-keys-replaced"] == 4
    (event,) = beginning.events
    assert f"{source} (run, step 7)" in event and "optimizer fresh; the schedule starts anew: warm-up of 768" in event
    assert "trained at up to 48 positions;" in event and "init: the weights of" in said.out
    record = json.loads((workdir / "init.json").read_text())
    assert (record["init"], record["step"], record["init_optimizer"]) == (str(source), 7, "fresh")
    assert record["fingerprint"][:16] in event


def test_a_longer_context_keeps_the_scaling_or_takes_the_one_given(source, begun, config_file, tmp_path):
    longer = ("--config.curriculum.seq_len=48,96", "--config.curriculum.batch_size=8,4")
    for number, scaling in enumerate(([], ["--config.model.alibi_scaling=2.0"])):
        workdir = tmp_path / str(number)
        # the store's blocks are too short for it, which loop.train would say
        assert run(f"--config={config_file}", f"--init={source}", f"--workdir={workdir}", *longer, *scaling) == 0
    (plain, beginning), (scaled, _) = begun
    assert (plain.model.alibi_scaling, scaled.model.alibi_scaling) == (1.0, 2.0)
    assert "trained at up to 48 positions, here up to 96, with alibi_scaling 1" in beginning.events[0]


@pytest.mark.parametrize(
    "change", ["model.num_layers=2", "mup.preset=btlm", "model.vocab_size=300", "mup.init_std=0.1"]
)
def test_a_contradicting_flag_is_refused_with_both_values(source, begun, config_file, tmp_path, capsys, change):
    arguments = (f"--config={config_file}", f"--init={source}", f"--workdir={tmp_path / 'new'}", f"--config.{change}")
    said = refused(capsys, *arguments)
    key, _, _ = change.partition("=")
    theirs = {"model.num_layers": 3, "mup.preset": "sp", "model.vocab_size": 400, "mup.init_std": 0.073}[key]
    assert f"--config.{change}: the weights of {source} were made with {key}={theirs}" in said
    assert f"--config.{key}={theirs}" in said and not begun and not (tmp_path / "new" / "init.json").exists()
    assert run(*arguments[:3], f"--config.{key}={theirs}") == 0


def test_a_resume_does_not_read_the_model_again(source, begun, config_file, token_store, tmp_path, capsys):
    model, workdir = tmp_path / "model", tmp_path / "new"
    shutil.copytree(source, model)
    command = (f"--config={config_file}", f"--init={model}", f"--workdir={workdir}")
    assert run(*command) == 0
    write_run(workdir, begun[0][0], steps=(4,))
    assert run(*command) == 0  # where it goes back to its beginning, which is the model's last checkpoint of then
    write_run(model, run_config(token_store, **MODEL), steps=(9,))
    resumed = begun[1][1]
    assert resumed.why_not_again() == ""
    program = make_program(begun[0][0], make_mesh(devices=jax.devices()[:1], tensor=1))
    state = resumed.make_state(program)
    jax.tree.map(np.testing.assert_array_equal, state.params, read_checkpoint(source, 7, program))
    (model / "checkpoints" / "7" / "more").write_text("")
    assert "is no longer the model that the run began with" in resumed.why_not_again()
    shutil.rmtree(model)
    assert run(*command) == 0
    assert f"cannot be read again: there is no {model}" in begun[2][1].why_not_again()
    assert begun[2][0] == begun[0][0] and not begun[2][1].events
    assert run(f"--config={config_file}", f"--workdir={workdir}") == 0 and begun[3][0].model.num_layers == 2
    assert begun[3][1].why_not_again()  # nor has it the seed's beginning
    said = refused(capsys, *command[:1], f"--init={source}", command[2])
    assert f"--init was {model}, is now {source}" in said
    for more in ("--grow_vocabulary", "--init_optimizer=kept"):
        assert "was begun otherwise: --" + more.strip("-").partition("=")[0] in refused(capsys, *command, more)
    assert "made with model.num_layers=3" in refused(capsys, *command, "--config.model.num_layers=2")
    assert run(*command, "--dry_run") == 0 and "3 layers" in capsys.readouterr().out
    (workdir / "init.json").write_text("{}")
    assert "init.json is damaged" in refused(capsys, *command, code=1)


def test_before_the_first_checkpoint_it_is_begun_anew(source, begun, config_file, tmp_path, capsys):
    workdir = tmp_path / "new"
    command = (f"--config={config_file}", f"--workdir={workdir}")
    assert run(*command, f"--init={source}/checkpoints/3") == run(*command, f"--init={source}") == 0
    assert "step 7" in begun[1][1].events[0]
    assert "as it was begun with --init" in refused(capsys, *command) and len(begun) == 2
    assert json.loads((workdir / "init.json").read_text())["step"] == 7


def test_a_workdir_that_holds_a_model_is_not_trained_into(source, begun, config_file, tmp_path, capsys):
    published = write_published(tmp_path / "hf", oracle_weights())
    for init, workdir in ((source, source), (published, source)):
        said = refused(capsys, f"--config={config_file}", f"--init={init}", f"--workdir={workdir}")
        assert "holds a run that did not begin with --init, at step 7" in said
    said = refused(capsys, f"--config={config_file}", f"--init={source}", f"--workdir={published}", code=1)
    assert "holds a model (model.safetensors)" in said
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.json").write_text("{}")
    said = refused(capsys, f"--config={config_file}", f"--init={source}", f"--workdir={tmp_path / 'old'}", code=1)
    assert "holds a model (model.json)" in said and not begun


def test_flags_that_need_init_are_refused_without_it(config_file, tmp_path, capsys):
    for flag in ("--init_optimizer=kept", "--grow_vocabulary"):
        assert "goes with --init=MODEL" in refused(capsys, f"--config={config_file}", f"--workdir={tmp_path}", flag)
    assert "--init= is empty" in refused(capsys, f"--config={config_file}", f"--workdir={tmp_path}", "--init=")


def test_a_store_is_needed(source, tmp_path, capsys):
    config = write_config(tmp_path / "c.py", store="store", corpus__source="installed_python")
    said = refused(capsys, f"--config={config}", f"--init={source}", f"--workdir={tmp_path / 'new'}")
    assert "no token store in" in said and "btlm corpus tokenize --tokenizer=DIR" in said


def test_a_dry_run_writes_nothing_and_shows_the_models_shape(source, config_file, tmp_path, capsys):
    command = (f"--config={config_file}", f"--init={source}/checkpoints/3", "--dry_run")
    for more in ([], [f"--workdir={tmp_path / 'new'}"]):
        assert run(*command, *more) == 0
        said = capsys.readouterr().out
        assert "(run, step 3)" in said and "3 layers, d_model 56" in said and "parametrization sp" in said
    assert not (tmp_path / "new").exists()


# Tokenizers


def store_with(folder, token_store, *, added=(), changed=False):
    """Make a token store whose tokenizer is a byte-level BPE of 300 ids and more; its blocks are another's."""
    tokenizer = tiny_byte_level()
    tokenizer.add_tokens([AddedToken(text) for text in added])
    text = tokenizer.to_str()
    if changed:
        body = json.loads(text)
        ids = body["model"]["vocab"]
        (first, second) = sorted(token for token in ids if len(token) == 2)[:2]
        ids[first], ids[second] = ids[second], ids[first]
        text = json.dumps(body)
    shutil.copytree(token_store, folder)
    (folder / "tokenizer.json").write_text(text)
    manifest = read_manifest(folder)
    info = dataclasses.replace(
        manifest.tokenizer, kind="byte_level_bpe", file="tokenizer.json", eos_id=299,
        sha256=hashlib.sha256(text.encode()).hexdigest(), vocab_size=tokenizer.get_vocab_size(),
    )  # fmt: skip
    write_manifest(folder, dataclasses.replace(manifest, tokenizer=info))
    return folder


@pytest.fixture(scope="module")
def byte_level(token_store, tmp_path_factory):
    """(folder, workdir of a run with a byte-level tokenizer of 300 ids and a table of 304 rows, its last state)."""
    folder = tmp_path_factory.mktemp("byte_level")
    store = store_with(folder / "store", token_store)
    return folder, folder / "run", write_run(folder / "run", run_config(store, model__vocab_size=304), steps=(5,))


def test_the_same_tokenizer_written_otherwise_is_the_same(byte_level, begun, token_store, tmp_path):
    store = store_with(tmp_path / "store", token_store)
    text = json.dumps(json.loads((store / "tokenizer.json").read_text()), indent=3)
    (store / "tokenizer.json").write_text(text)
    manifest = read_manifest(store)
    info = dataclasses.replace(manifest.tokenizer, sha256=hashlib.sha256(text.encode()).hexdigest())
    write_manifest(store, dataclasses.replace(manifest, tokenizer=info))
    config = write_config(tmp_path / "c.py", store=store)
    command = (f"--config={config}", f"--init={byte_level[1]}")
    assert run(*command, f"--workdir={tmp_path / 'a'}") == run(*command, f"--workdir={tmp_path / 'b'}") == 0
    assert [each.model.vocab_size for each, _ in begun] == [304, 304]
    assert "vocabulary-grown" not in notices.counts()


def test_another_tokenizer_is_refused_with_how_it_differs(byte_level, begun, token_store, tmp_path, capsys):
    extended = store_with(tmp_path / "extended", token_store, added=["<a>", "<b>"])
    swapped = store_with(tmp_path / "swapped", token_store, changed=True)
    for store, expected in (
        (token_store, ["400 ids in place of 300", "300 ids are other tokens, the first is 0: '<unk>'", "ends with id"]),
        (swapped, ["2 ids are other tokens", "are other tokens, the first is"]),
        (extended, ["302 ids in place of 300", "give --grow_vocabulary, which gives 2 new ids the mean"]),
    ):
        config = write_config(tmp_path / "c.py", store=store)
        said = refused(capsys, f"--config={config}", f"--init={byte_level[1]}", f"--workdir={tmp_path / 'new'}")
        assert f"{store} has another tokenizer than" in said and all(part in said for part in expected), said
        if store != extended:
            command = (f"--config={config}", f"--init={byte_level[1]}", f"--workdir={tmp_path / 'new'}")
            assert "is for tokenizers that keep all" in refused(capsys, *command, "--grow_vocabulary")
    assert not begun


@pytest.mark.parametrize(("num_added", "change", "size"), [(2, 0, 304), (20, 0, 320), (20, 328, 328)])
def test_the_table_grows_on_request(byte_level, begun, token_store, tmp_path, capsys, num_added, change, size):
    """The model's table has 304 rows for 300 ids: those that the new ids take are new, too."""
    store = store_with(tmp_path / "store", token_store, added=[f"<{number}>" for number in range(num_added)])
    config = write_config(tmp_path / "c.py", store=store)
    changes = [f"--config.model.vocab_size={change}"] if change else []
    command = (f"--config={config}", f"--init={byte_level[1]}", f"--workdir={tmp_path / 'new'}", "--grow_vocabulary")
    assert run(*command, *changes) == 0
    ((config, beginning),) = begun
    end = max(300 + num_added, change)
    assert config.model.vocab_size == size and notices.counts()["vocabulary-grown"] == end - 300
    assert f"ids 300 to {end - 1}, each with the mean of the 300 rows" in capsys.readouterr().err
    assert f"{end - 300} rows of embeddings new" in beginning.events[0]
    store_of_run = types.SimpleNamespace(directory=store, manifest=read_manifest(store))
    later, model = (
        types.SimpleNamespace(config=config, token_store=store_of_run),
        open_given_model(byte_level[1], step=5),
    )
    assert train_init.rows_of_run(model, later, is_grown=True) == NewRows(first=300, end=end)


# Models of Hugging Face, and URLs


def published(folder, token_store, **changes):
    eos_id = read_manifest(token_store).tokenizer.eos_id
    return write_published(folder, oracle_weights(), **{"eos_token_id": eos_id, "bos_token_id": eos_id, **changes})


def test_a_published_model_without_a_tokenizer_is_taken_with_a_notice(
    begun, config_file, token_store, tmp_path, capsys
):
    model = published(tmp_path / "hf", token_store)
    command = (f"--config={config_file}", f"--init={model}")
    assert run(*command, f"--workdir={tmp_path / 'a'}") == 0 and notices.counts()["tokenizer-unknown"] == 1
    ((config, _),) = begun
    assert (config.model.vocab_size, config.model.d_ff, config.mup.base_d_model) == (512, 170, 6.4)
    said = refused(capsys, *command, f"--workdir={tmp_path / 'b'}", "--init_optimizer=kept", code=1)
    assert "is a Hugging Face directory, which has no optimizer state" in said
    other = published(tmp_path / "other", token_store, eos_token_id=7)
    said = refused(capsys, command[0], f"--init={other}", f"--workdir={tmp_path / 'c'}")
    assert "a text ends with id" in said and "with 7: it was made with another tokenizer" in said


def test_slopes_that_follow_the_length_are_refused_beyond_it(begun, config_file, token_store, tmp_path, capsys):
    model = published(tmp_path / "hf", token_store, alibi_scaling={"type": "linear", "train_seq_len": 24})
    command = (f"--config={config_file}", f"--init={model}")
    said = refused(capsys, *command, f"--workdir={tmp_path / 'a'}")
    assert "keys / 24 where there are more keys" in said and "--config.model.alibi_scaling=2" in said
    assert run(*command, f"--workdir={tmp_path / 'a'}", "--config.model.alibi_scaling=2") == 0
    assert begun[0][0].model.alibi_scaling == 2 and "init-not-kept" not in notices.counts()
    shorter = ("--config.curriculum.seq_len=12,24", "--config.curriculum.batch_size=32,16")
    assert run(*command, f"--workdir={tmp_path / 'b'}", *shorter) == 0
    assert begun[1][0].model.alibi_scaling == 1 and notices.counts()["init-not-kept"] == 1


def test_a_run_behind_a_url_is_fetched_and_removed_when_it_is_read(source, begun, config_file, tmp_path):
    system = fsspec.filesystem("memory")
    system.put(f"{source}/", "/bucket/run/", recursive=True)
    command = (f"--config={config_file}", f"--workdir={tmp_path / 'new'}")
    try:
        assert run(*command, "--init=memory://bucket/run/checkpoints/3") == 0
        assert run(f"--config={config_file}", f"--workdir={tmp_path / 'last'}", "--init=memory://bucket/run") == 0
        assert main(["train", *command, "--init=memory://bucket/run", "--dry_run"]) == 2
    finally:
        system.rm("/bucket", recursive=True)
    (config, beginning), (_, last) = begun
    assert "memory://bucket/run/checkpoints/3 (run, step 3)" in beginning.events[0] and "step 7" in last.events[0]
    assert (tmp_path / "new" / ".init-0" / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "new" / ".init-0" / "checkpoints" / "7").exists()
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    state = beginning.make_state(program)  # which has what is read of a Run
    jax.tree.map(np.testing.assert_array_equal, state.params, read_checkpoint(source, 3, program))
    assert not (tmp_path / "new" / ".init-0").exists()
    system.put(f"{source}/", "/bucket/run/", recursive=True)
    try:
        assert beginning.why_not_again() == ""  # as where the same process goes back to its beginning
        jax.tree.map(np.testing.assert_array_equal, beginning.make_state(program).params, state.params)
        assert not (tmp_path / "new" / ".init-0").exists()
    finally:
        system.rm("/bucket", recursive=True)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of 70 kB of text, to be trained on by a machine of known speed."""
    times = RunTimes(prepare=1.0, compile=3.0, steps=(0.4, 0.6), evaluation=0.1)
    monkeypatch.setattr(size_run, "measure_run", lambda config, **named: times)
    monkeypatch.setattr(size_run, "peak_flops", lambda device: Peak(flops=1e11, source="made up"))
    monkeypatch.setattr(train_data, "seconds_since_start", lambda: 10.0)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "book.txt").write_text("\n".join(made_up_text(seed=seed, num_words=200) for seed in range(52)))
    return folder


def test_text_continues_a_model_with_its_tokenizer(source, begun, texts, tmp_path, capsys):
    model, workdir = tmp_path / "model", tmp_path / "new"
    shutil.copytree(source, model)
    command = (f"--data={texts}", f"--init={model}", f"--workdir={workdir}", "--minutes=1")
    assert run(*command) == 0
    ((config, beginning),) = begun
    assert (config.model.num_layers, config.model.d_model, config.mup.preset) == (3, 56, "sp")
    assert "config-keys-replaced" not in notices.counts() and f"{model} (run, step 7)" in beginning.events[0]
    assert config.curriculum.seq_len == (8, 32)  # the largest power of two that is at most the 48 of the model
    assert config.optimizer.peak_learning_rate == pytest.approx(0.006 / 2) and config.data.max_epochs <= 4
    kept = [read_manifest(workdir / "store").tokenizer, read_tokenizer_info(model / "tokenizer")]
    assert kept[0] == kept[1]
    said = capsys.readouterr().out
    assert "as given; peak learning rate 0.003" in said and "400 ids, as given" in said
    write_run(
        workdir,
        dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(workdir / "store"))),
        steps=(4,),
    )
    shutil.rmtree(model)
    assert run(*command) == 0
    assert begun[1][0] == config and not begun[1][1].events
    said = refused(capsys, f"--data={texts}", f"--init={source}", f"--workdir={workdir}")
    assert f"--init was {model}, is now {source}" in said and f"--init={model}" in said
    assert "--init was" in refused(capsys, f"--data={texts}", f"--workdir={workdir}")


def test_text_for_a_model_of_another_tokenizer_is_refused_before_it_is_read(
    byte_level, texts, source, tmp_path, capsys
):
    folder, model, _ = byte_level
    said = refused(
        capsys, f"--data={texts}", f"--init={model}", f"--workdir={tmp_path / 'new'}", f"--tokenizer={source}/tokenizer"
    )
    assert f"--tokenizer={source}/tokenizer has another tokenizer than {model}" in said
    assert "leave --tokenizer out, to take the model's" in said
    assert not (tmp_path / "new" / "corpus").exists()
    published_model = published(tmp_path / "hf", folder / "store")
    said = refused(capsys, f"--data={texts}", f"--init={published_model}", f"--workdir={tmp_path / 'new'}")
    assert "comes without a tokenizer: give --tokenizer=DIR" in said


@pytest.mark.slow
def test_a_run_continues_another_on_its_own_schedule(source, token_store, tmp_path, monkeypatch, capfd):
    """The held-out loss before its first step is the model's; what is frozen stays, and what is not does not."""
    monkeypatch.setattr(loop, "finish_run", lambda *arguments, **named: None)  # plots and a sample
    changes = {
        "evaluation__blocks_per_source": 1000,
        "optimizer__freeze": "embedding,ln_*",
    }
    config = write_config(tmp_path / "config.py", store=token_store, **{**ONE_PHASE, **changes})
    command = ["train", f"--config={config}", f"--init={source}", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, "--init_optimizer=kept"]) == 0, capfd.readouterr().err
    events = [row["message"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "event"]
    assert "optimizer kept" in events[0]
    said = float(re.fullmatch(r"held-out before the first step: loss ([\d.]+) nats/token: .*", events[1])[1])
    assert said == pytest.approx(heldout_loss(source, token_store), abs=1e-4)
    program = make_program(
        train_config_from(json.loads((tmp_path / "run" / "config.json").read_text())),
        make_mesh(devices=jax.devices()[:1], tensor=1),
    )
    before, after = (read_checkpoint(*place, program) for place in ((source, 7), (tmp_path / "run", 3)))
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path)
        is_fixed = "embedding" in name or "ln_" in name or name.endswith("['key']['bias']")
        assert (old.tobytes() == new.tobytes()) == is_fixed, name
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert not any(row["grad_norm/embedding"] or row["update_norm/norm_scale"] for row in rows)
    of_classes = [[value for name, value in row.items() if name.startswith("grad_norm/")] for row in rows]
    assert [row["grad_norm"] for row in rows] == pytest.approx(np.linalg.norm(of_classes, axis=1), rel=1e-5)


def heldout_loss(workdir, token_store):
    """The mean loss of a run's model on the whole held-out split, by its logits."""
    native, reader = read_native(workdir), open_store(token_store, expected_fingerprint="").split(HELDOUT)
    nats, count = 0.0, 0
    for block in reader.read_many(range(len(reader))):
        ids_T = block.tokens.astype(np.int64)
        logits_TV = native_logits(native, ids_T[:-1]).astype(np.float64)
        losses_T = np.log(np.exp(logits_TV).sum(1)) - logits_TV[np.arange(len(ids_T) - 1), ids_T[1:]]
        nats, count = nats + losses_T[: block.num_targets].sum(), count + block.num_targets
    return nats / count


def read_checkpoint(workdir, step, program):
    checkpointer = Checkpointer(workdir, config=program.config.checkpoint)
    try:
        return jax.device_get(checkpointer.restore_params(step, abstract=program.state.params))
    finally:
        checkpointer.close()
