"""The command line: wrong input gets one clear line and the right exit code; the plan of the 3B holds its numbers."""

import dataclasses
import shutil

import pytest
from support.real_store import write_config
from support.run_command import checkpoint_steps, train_arguments
from support.tiny import REPOSITORY

from btlm_jax.cli import main
from btlm_jax.data import store

LOCAL = f"--config={REPOSITORY / 'configs' / 'local_cpu.py'}"


def refused(capsys, *arguments, code: int, said: str) -> None:
    """Run in this process and assert the exit code and a one-paragraph message."""
    assert main([str(argument) for argument in arguments]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["trian"],
            "unknown verb 'trian'; verbs are new, train, generate, evaluate, lm-eval, convert, corpus, status, ",
        ),
        (["train"], "--config=NAME or FILE is needed"),
        (["train", LOCAL], "--workdir=DIR is needed"),
        (["train", LOCAL, "extra"], "unexpected argument 'extra'"),
        (["train", "--confg=x"], "unknown flag --confg; did you mean --config?"),
        (["train", LOCAL, "--config.model.d_modl=3"], "unknown config key model.d_modl; did you mean model.d_model?"),
        (["train", LOCAL, "--config.modle.d_model=3"], "unknown config key modle.d_model; did you mean model.d_model?"),
        (["train", LOCAL, "--config.model.d_model=wide"], "--config.model.d_model=wide must be a whole number"),
        (["train", LOCAL, "--config.seed=" + "9" * 400], "is too large for a whole number of 64 bits"),
        (["train", LOCAL, "--config.model.num_heads=3"], "model.d_model=256 is not divisible by model.num_heads=3"),
        (["train", LOCAL, "--config.curriculum.batch_size=(8, 4)"], "tokens per step must be equal in all phases"),
        (["train", "--config=/nowhere.py"], "--config=/nowhere.py is neither a file nor one of btlm_3b_8k, "),
        (["generate"], "--checkpoint=DIR is needed"),
        (["generate", "--checkpoint=x", "--top_p=2"], "top_p=2.0 is not allowed; it must be above 0 and up to 1"),
        (
            ["convert", "--from=x", "--to=y", "--max_shard_gb=1e300"],
            "--max_shard_gb=1e+300 must be above 0 and at most 1e9",
        ),
        (["train", LOCAL, "--num_processes=2"], "--num_processes has no effect without --coordinator=HOST:PORT"),
        (["train", LOCAL, "--process_id=1"], "--process_id has no effect without --coordinator=HOST:PORT"),
        (["train", LOCAL, "--coordinator=x", "--num_processes=2"], "--coordinator=x must be HOST:PORT"),
        (["train", LOCAL, "--coordinator=x:1", "--process_id=1"], "--process_id=1 must be from 0 to"),
        (["train", LOCAL, "--coordinator=x:1", "--distributed"], "--coordinator and --distributed are both given"),
        (["corpus", "clen"], "got clen; did you mean clean?"),
        (["trian", "--help"], "did you mean train?"),
        (["tune", "coord"], "did you mean coord-check?"),
        (["convert", "--from=x", "--to=y", "--format=gufg"], "did you mean gguf?"),
        (["corpus", "dedup", "--preset=strikt"], "did you mean strict?"),
        (["corpus", "clean", "--executor=slrum"], "did you mean slurm?"),
        (["corpus"], "needs one of build, clean, dedup, "),
        (["corpus", "verify"], "--store=DIR is needed"),
        (["tune", "scale"], "got scale; did you mean scaling?"),
        (["tune", "coord-check"], "--directory=DIR is needed"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(capsys, arguments, said):
    refused(capsys, *arguments, code=2, said=said)


@pytest.mark.parametrize(
    "arguments, example",
    [
        (["--help"], "btlm train --config="),
        (["train", "--help"], "btlm train --config="),
        (["generate", "-h"], "btlm generate --checkpoint="),
        (["corpus", "build", "--help"], "btlm corpus build --config="),
        (["tune", "-h"], "btlm tune coord-check --directory="),
    ],
)
def test_help_teaches_with_an_example(capsys, arguments, example):
    assert main(arguments) == 0
    assert example in capsys.readouterr().out


def test_the_plan_of_the_3b_holds_its_numbers(capsys):
    assert main(["train", f"--config={REPOSITORY / 'configs' / 'btlm_3b_8k.py'}", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for part in (
        "2,646,255,744 parameters",
        "159,636 steps of 3,932,160 tokens, 627.71 B tokens",
        "119,727 steps of 1,920 x 2,048",
        "39,909 steps of 480 x 8,192",
        "warm-up 95 steps",
        "0.00010198 at the end",
        "step 119,728): 0.0030781",
    ):
        assert part in plan
    rows = [line.split() for line in plan.splitlines() if line.startswith(("  blocks/", "  embedding/", "  ln_f/"))]
    assert len(rows) == 21
    values = {row[0]: " ".join(row) for row in rows}
    assert "attention_in 0.0230846 0.1 0.0012 0.1 1e-08 0.0522" in values["blocks/attention/query/kernel"]
    assert "mlp_out 0.00288558 0.1 0.0012 0.1" in values["blocks/mlp/down/kernel"]
    assert "embedding 0.073 1 0.012 0.1 1e-08 0.0052" in values["embedding/embedding"]
    assert "norm_scale = 1 1 0.012 0 1e-08 -" in values["ln_f/scale"]


def test_a_batch_that_the_mesh_does_not_divide(capsys, token_store, tmp_path):
    config = write_config(tmp_path / "config.py", store=token_store, evaluation__batch_size=4)
    said = "evaluation.batch_size=4 is not divisible by 8"
    refused(capsys, *train_arguments(config, tmp_path / "run"), code=1, said=said)
    refused(capsys, *train_arguments(config, tmp_path / "run"), "--config.mesh.tensor=3", code=1, said="8 devices")


def test_a_damaged_store(capsys, token_store, tmp_path):
    directory = tmp_path / "store"
    shutil.copytree(token_store, directory)
    config = write_config(tmp_path / "config.py", store=directory)
    arguments = train_arguments(config, tmp_path / "run")
    shard = next(directory.glob("tokens-train*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(capsys, *arguments, code=1, said="truncated or replaced; restore or rebuild it")
    shard.unlink()
    refused(capsys, *arguments, code=1, said=f"lacks shard {shard.name}")
    shard.write_bytes(content)
    manifest = directory / store.MANIFEST_FILE
    text = manifest.read_text()
    manifest.write_text(text.replace('"num_blocks": ', '"num_blocks": 1', 1))
    refused(capsys, *arguments, code=1, said="is corrupt: its contents hash to")
    manifest.write_text(text[:200])
    refused(capsys, *arguments, code=1, said="manifest.json is not valid JSON: ")
    manifest.unlink()
    refused(capsys, *arguments, code=1, said="there is no token store in")


def test_a_workdir_that_cannot_be_written(capsys, token_store, tmp_path):
    config = write_config(tmp_path / "config.py", store=token_store)
    (tmp_path / "file").write_text("in the way")
    refused(capsys, *train_arguments(config, tmp_path / "file" / "run"), code=1, said="cannot be written")


def test_a_checkpoint_of_another_architecture_or_store(capsys, unfinished_run, token_store, tmp_path):
    config, workdir = unfinished_run
    said = "model.d_ff: checkpoint 54, config 64"
    refused(capsys, *train_arguments(config, workdir), "--config.model.d_ff=64", code=1, said=said)
    other = tmp_path / "other"
    shutil.copytree(token_store, other)
    manifest = store.read_manifest(other)
    store.write_manifest(other, dataclasses.replace(manifest, made_by={"other": True}))
    said = f"but the run was started on a store with fingerprint {manifest.fingerprint}"
    refused(capsys, *train_arguments(config, workdir), f"--config.data.store={other}", code=1, said=said)
    assert checkpoint_steps(workdir) == [3]


def test_a_finished_run_says_so_and_a_longer_one_may_not_change_its_past(capsys, tiny_run):
    config, workdir = tiny_run
    assert main(train_arguments(config, workdir)) == 0
    assert "Already done" in capsys.readouterr().out
    said = "curriculum.num_tokens before the last phase"
    longer = "--config.curriculum.num_tokens=(2688, 1536)"
    refused(capsys, *train_arguments(config, workdir), longer, code=1, said=said)


def test_the_extras_of_a_run_are_those_of_its_config_workdir_trackers_and_cache(tmp_path, monkeypatch, capsys):
    arguments = ["train", "--print_extras", "--distributed", "--workdir=/run"]
    in_file = tmp_path / "in_bucket.py"
    text = (REPOSITORY / "configs" / "local_cpu.py").read_text()
    in_file.write_text(text.replace('store="store"', 'store="gs://bucket/store"'))
    for words, extras in (
        ([LOCAL], ""),
        ([LOCAL, "--config.log.trackers=wandb"], "wandb"),
        ([f"--config={in_file}", "--config.log.trackers", "wandb,mlflow"], "gcs,wandb,mlflow"),
        ([LOCAL, "--workdir=s3://bucket/run", "--init=gs://bucket/model"], "gcs,s3"),
    ):
        assert main([*arguments, *words]) == 0
        assert capsys.readouterr().out == f"{extras}\n"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert main([*arguments, LOCAL]) == 0
    assert capsys.readouterr().out == "gcs\n"
