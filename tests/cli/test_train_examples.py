"""`btlm train --data` of prompts and completions, and of chats; and a whole run on a store of them."""

import dataclasses
import json
import shutil

import pytest
from support.corpus_files import made_up_text
from support.made_up_run import run_config, write_run
from support.published_files import oracle_weights, write_published
from support.real_store import write_config
from support.run_command import ONE_PHASE
from support.tiny_tokenizers import tiny_byte_level

from btlm_jax import notices
from btlm_jax.cli import main, train_data
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.corpus.own_examples import first_prompt
from btlm_jax.data import store
from btlm_jax.data.reader import open_store
from btlm_jax.hub.client_files import ClientSettings
from btlm_jax.hub.given_model import open_given_model
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.tokenizer import find_tokenizer
from btlm_jax.train import size_run
from btlm_jax.train.flops import Peak
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.step_time import RunTimes

LONG = {"curriculum__seq_len": (64, 256), "curriculum__batch_size": (8, 2), "curriculum__num_tokens": (1024, 512)}


@pytest.fixture(scope="module")
def model(token_store, tmp_path_factory):
    """The workdir of a run that was trained to 256 positions."""
    workdir = tmp_path_factory.mktemp("model") / "run"
    write_run(workdir, run_config(token_store, **LONG, optimizer__warmup_tokens=512), steps=(3,))
    return workdir


@pytest.fixture
def begun(begun, monkeypatch):
    """The same on a machine of known speed."""
    times = RunTimes(prepare=1.0, compile=3.0, steps=(0.4, 0.6), evaluation=0.1)
    monkeypatch.setattr(size_run, "measure_run", lambda config, **named: times)
    monkeypatch.setattr(size_run, "peak_flops", lambda device: Peak(flops=1e11, source="made up"))
    monkeypatch.setattr(train_data, "seconds_since_start", lambda: 10.0)
    return begun


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count):
    return [{"prompt": f"eta {number}", "completion": f" oin {number}"} for number in range(count)]


def chats(count):
    return [
        {"messages": [{"role": "user", "content": f"eta {number}"}, {"role": "assistant", "content": f"oin {number}"}]}
        for number in range(count)
    ]


def run(*arguments):
    return main(["train", *map(str, arguments)])


def refused(capsys, *arguments, code=2):
    assert run(*arguments) == code
    return capsys.readouterr().err


def test_chats_tune_a_model_with_its_tokenizer_and_the_template_given(model, begun, tmp_path, capsys):
    data, workdir = write(tmp_path / "chats.jsonl", chats(60)), tmp_path / "tuned"
    command = (f"--data={data}", f"--init={model}", f"--workdir={workdir}", "--minutes=1", "--template=zephyr")
    assert run(*command, "--dry_run") == 0
    assert "Data: 1 files, " in (said := capsys.readouterr().out) and "bytes of examples to fine-tune on" in said
    assert run(*command) == 0
    ((config, beginning),) = begun
    assert config.data.document_mask and config.curriculum.seq_len == (256, 256)
    assert config.log.sample_prompt.startswith("<|user|>\neta ") and config.log.sample_prompt.endswith("|assistant|>\n")
    assert f"{model} (run, step 3)" in beginning.events[0]
    manifest = store.read_manifest(workdir / "store")
    assert store.EXAMPLES in manifest.features and manifest.window == manifest.block_len == 256
    assert manifest.tokenizer == store.read_tokenizer_info(model / "tokenizer")
    assert manifest.made_by["template"] == NAMED_TEMPLATES["zephyr"]
    said = capsys.readouterr().out
    assert "Examples to fine-tune on: 60 read, 0 exact duplicates dropped; 3 held out by prompt" in said
    assert "at length 256\n" in said and notices.counts() == {}
    shutil.rmtree(workdir / "corpus")
    assert run(*command) == 0 and begun[1][0] == config
    assert "--template was zephyr, is now chatml" in refused(capsys, *command[:-1], "--template=chatml")


def test_a_template_that_a_model_was_tuned_with_is_kept_and_serves_again(model, begun, tmp_path):
    """It is written beside the run's tokenizer, is part of the model, and is the one of the next chats."""
    tuned = shutil.copytree(model, tmp_path / "tuned")
    write(tmp_path / "chats.jsonl", chats(20))
    assert main(
        ["corpus", "examples", f"--input={tmp_path / 'chats.jsonl'}", f"--output={tmp_path / 'store'}",
         f"--tokenizer={model / 'tokenizer'}", "--template=mistral", "--block_len=256", "--workers=1"]
    ) == 0  # fmt: skip
    manifest = store.read_manifest(tmp_path / "store")
    store.keep_settings(manifest, directory=tuned / "tokenizer")
    assert open_given_model(tuned, step=0).metadata.clients.chat_templates == {"default": NAMED_TEMPLATES["mistral"]}
    assert exported_text(tuned, tmp_path / "export") == "</s>[INST] eta 0 [/INST]oin 0</s>"
    assert first_prompt(tmp_path / "store").startswith("</s>[INST] eta ")
    older = dataclasses.replace(manifest, made_by=manifest.made_by | {"variables": {"eos_token": "</s>"}})
    store.keep_settings(older, directory=shutil.copytree(model, tmp_path / "older") / "tokenizer")
    assert exported_text(tmp_path / "older", tmp_path / "export of it") == "[INST] eta 0 [/INST]oin 0</s>"
    (tmp_path / "older/tokenizer/tokenizer_config.json").write_text('{"eos_token": "</s>"}')  # as it wrote it
    assert exported_text(tmp_path / "older", tmp_path / "again of it") == "[INST] eta 0 [/INST]oin 0</s>"
    assert run(f"--data={tmp_path / 'chats.jsonl'}", f"--init={tuned}", f"--workdir={tmp_path / 'again'}") == 0
    again, once = (store.read_manifest(tmp_path / name).splits for name in ("again/store", "store"))
    assert again == once
    bare = (f"--data={tmp_path / 'chats.jsonl'}", f"--init={model}", f"--workdir={tmp_path / 'bare'}")
    assert run(*bare) == 1 and run(*bare, "--template=zephir") == 1
    assert run(*bare, "--template=mistral") == 0  # nothing was made yet, so that a mistake can be mended there
    assert store.read_manifest(tmp_path / "bare/store").splits == once
    assert run(*bare, "--template=chatml") == 2


def exported_text(run, target):
    """The text that the clients of a run's export make of the first chat."""
    metadata, tokenizer = open_given_model(run, step=0).metadata, find_tokenizer(run / "tokenizer")
    target.mkdir()
    write_tokenizer_files(target, tokenizer, model_max_length=64, clients=metadata.clients)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(target, local_files_only=True)
    return auto.apply_chat_template(chats(1)[0]["messages"], tokenize=False)


def test_what_belongs_to_a_model_beside_its_weights_is_kept_in_a_run(begun, tmp_path, capsys):
    """Of a model of other programs: what stands before its prompts, on pairs; the rest on text too."""
    made = tiny_byte_level()
    made.add_special_tokens(["<s>", "<|im_end|>"])
    model, tokenizer = tmp_path / "model", ByteLevelTokenizer(made.to_str().encode(), eos_id=299)
    write_published(model, oracle_weights(), eos_token_id=299, bos_token_id=300, n_positions=256)
    settings = ClientSettings(
        tokenizer_config={"padding_side": "left", "pad_token": "<|im_end|>"},
        chat_templates={"default": "own", "rag": "2"},
    )
    write_tokenizer_files(model, tokenizer, model_max_length=256, prompt_bos_id=300, clients=settings)
    (model / "generation_config.json").write_text('{"eos_token_id": [299, 301], "temperature": 0.5}')
    write(tmp_path / "pairs.jsonl", pairs(60))
    (tmp_path / "book.txt").write_text("\n".join(made_up_text(seed=seed, num_words=200) for seed in range(52)))
    for name, bos_id, said in (("pairs.jsonl", 300, {}), ("book.txt", None, {"init-not-kept": 1})):
        workdir = tmp_path / f"run on {name}"
        assert run(f"--data={tmp_path / name}", f"--init={model}", f"--workdir={workdir}", "--minutes=1") == 0
        assert {key: count for key, count in notices.counts().items() if key == "init-not-kept"} == said
        config = begun.pop()[0]
        write_run(
            workdir,
            dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(workdir / "store"))),
            steps=(1,),
        )
        store.keep_settings(store.read_manifest(workdir / "store"), directory=workdir / "tokenizer")
        metadata = open_given_model(workdir, step=0).metadata
        assert metadata.prompt_bos_id == bos_id and metadata.clients.bos_id == 300
        assert metadata.clients.generation_config == {"eos_token_id": [299, 301], "temperature": 0.5}
        assert metadata.clients.chat_templates == {"default": "own", "rag": "2"}
        kept = metadata.clients.tokenizer_config
        assert (kept["padding_side"], kept["pad_token"], kept["bos_token"]) == ("left", "<|im_end|>", "<s>")
    workdir = tmp_path / "run on pairs.jsonl"
    path = workdir / "corpus/tokenizer-of-the-model/tokenizer_config.json"  # of an earlier version
    path.write_text(path.read_text().replace('"prompt_bos_id": 300', '"add_bos_token": true'))
    assert run(f"--data={tmp_path / 'pairs.jsonl'}", f"--init={model}", f"--workdir={workdir}", "--minutes=1") == 0
    block = open_store(tmp_path / "run on pairs.jsonl/store", expected_fingerprint="").split(store.TRAIN).read(0)
    prompt = block.tokens[: int((block.marks & store.TRAINED > 0).argmax())].tolist()
    assert prompt == prompt_ids(tokenizer.decode(prompt), tokenizer=tokenizer, bos_id=300)


def test_pairs_train_a_new_model_with_a_given_tokenizer(begun, tmp_path):
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    data = write(tmp_path / "pairs.jsonl", pairs(200))
    assert run(f"--data={data}", f"--tokenizer={tmp_path}", f"--workdir={tmp_path / 'run'}", "--minutes=1") == 0
    ((config, _),) = begun
    assert config.data.document_mask and config.curriculum.seq_len == (256, 256) and config.model.vocab_size == 300
    assert notices.counts()["add-bos-token-ignored"] == 1  # its files are read several times


def test_a_config_beside_examples_has_windows_of_its_shortest_phase(begun, tmp_path, capsys):
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    data = write(tmp_path / "pairs.jsonl", pairs(60))
    config = write_config(
        tmp_path / "config.py", store="store", corpus__source="installed_python", model__vocab_size=300
    )
    command = (f"--data={data}", f"--tokenizer={tmp_path}", f"--config={config}")
    said = refused(capsys, *command, f"--workdir={tmp_path / 'no'}")
    assert "which must not see each other: give --config.data.document_mask=true" in said
    assert run(*command, f"--workdir={tmp_path / 'run'}", "--config.data.document_mask=true") == 0
    manifest = store.read_manifest(tmp_path / "run" / "store")
    assert (manifest.window, manifest.block_len) == (24, 48) == begun[0][0].curriculum.seq_len
    assert begun[0][0].data.document_mask


def test_what_does_not_go_with_examples_is_refused(model, begun, tmp_path, capsys):
    data, workdir = write(tmp_path / "pairs.jsonl", pairs(9)), f"--workdir={tmp_path / 'run'}"
    said = refused(capsys, f"--data={data}", workdir)
    assert "pairs.jsonl has examples to fine-tune on" in said and "give --init=MODEL" in said
    book = tmp_path / "book.txt"
    book.write_text("\n".join(made_up_text(seed=seed, num_words=200) for seed in range(52)))
    said = refused(capsys, f"--data={book}", f"--init={model}", workdir, "--template=zephyr")
    assert "--template=zephyr is for examples to fine-tune on" in said and "book.txt has none" in said
    assert "goes with --data=PATH" in refused(capsys, "--config=local_cpu", workdir, "--template=zephyr")
    write(tmp_path / "documents.jsonl", [{"text": "a document"}])
    said = refused(capsys, "--data", data, tmp_path / "documents.jsonl", f"--init={model}", workdir, code=1)
    assert "both examples to fine-tune on (pairs.jsonl) and documents (documents.jsonl)" in said
    write(data, [*pairs(9), {"prompt": "without an answer"}])
    said = refused(capsys, f"--data={data}", f"--init={model}", workdir, code=1)
    assert "pairs.jsonl, line 10: there is no completion" in said
    assert begun == []


@pytest.mark.slow
def test_a_run_on_examples_evaluates_completions_only(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("btlm_jax.cli.train.continue_prompt", lambda run, params: "")  # compiles a decoder
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    data = write(tmp_path / "pairs.jsonl", pairs(200))
    make = ["corpus", "examples", f"--input={data}", f"--output={tmp_path / 'store'}", f"--tokenizer={tmp_path}"]
    assert main([*make, "--block_len=48", "--window=24", "--workers=1"]) == 0
    changes = {**ONE_PHASE, "model__vocab_size": 300, "log__sample_prompt": "eta"}
    config = write_config(tmp_path / "config.py", store=tmp_path / "store", **changes)
    command = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert main(command) == 1
    assert "must not see each other: give --config.data.document_mask=true" in capfd.readouterr().err
    command += ["--config.data.document_mask=true"]
    assert main([*command, "--config.curriculum.seq_len=16", "--config.curriculum.batch_size=24"]) == 1
    assert "whole in windows of 24 tokens, and curriculum.seq_len=16 of phase 1" in capfd.readouterr().err
    assert main(command) == 0
    assert (tmp_path / "run/tokenizer/tokenizer_config.json").read_text() == '{\n "prompt_bos_id": null\n}'
    train, heldout = (store.read_manifest(tmp_path / "store").splits[name] for name in (store.TRAIN, store.HELDOUT))
    said = capfd.readouterr().out
    assert "Examples: train: 190 examples; of " in said and f"the loss is on {train.num_tokens:,} (" in said
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert last["heldout_tokens"] == heldout.num_tokens < 0.7 * heldout.num_blocks * 48
