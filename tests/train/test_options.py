"""A whole run with every option beyond the recipe of 2023, and its resume, in one process."""

import json
import shutil

import pytest
from support.made_up_curve import write_curve
from support.real_store import write_config
from support.run_command import assert_same_run, recorded, train_arguments
from support.run_here import run_here
from support.tiny import tiny_config

from btlm_jax.hub.native import read_run
from btlm_jax.train import SUMMARY_FILE

NUM_STEPS = 6
CURRICULUM = {
    "curriculum__seq_len": (48,),
    "curriculum__batch_size": (8,),
    "curriculum__num_tokens": (NUM_STEPS * 384,),
}
OPTIONS = CURRICULUM | {
    "checkpoint__keep_last": 50,
    "mup__preset": "completep",
    "mup__base_num_layers": 1,
    "model__qk_norm": "rms_gain",
    "optimizer__weight_decay_convention": "coupled",
    "optimizer__z_loss": 1e-3,
    "optimizer__end_learning_rate": 0.0,
    "optimizer__hidden_optimizer": "muon",
    "optimizer__average": "last",
    "optimizer__average_share": 0.5,
}


@pytest.mark.slow
def test_a_run_with_all_of_them_resumes_to_the_bit(token_store, tmp_path, capfd):
    write_curve(tmp_path / "reference", tiny_config(**CURRICULUM), [6.0 - step / 10 for step in range(NUM_STEPS)])
    config = write_config(
        tmp_path / "config.py", store=str(token_store), log__reference=str(tmp_path / "reference"), **OPTIONS
    )
    assert run_here(*train_arguments(config, tmp_path / "run")) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    resumed = [*train_arguments(config, tmp_path / "again"), "--resume_step=3"]
    capfd.readouterr()
    assert run_here(*resumed) == 0
    assert_same_run(tmp_path / "again", tmp_path / "run", config)
    rows = recorded(tmp_path / "run", "train")
    assert "predicted_loss" not in rows[0] and rows[-1]["predicted_loss"] > 0
    summary = json.loads((tmp_path / "again" / SUMMARY_FILE).read_text())
    losses = [summary[key]["loss"] for key in ("heldout", "heldout_of_average")]
    assert losses[0] != losses[1]
    printed = capfd.readouterr()
    assert "Of the averaged weights (optimizer.average=last):" in printed.out + printed.err
    notes = read_run(tmp_path / "again" / "average").metadata.notes
    assert notes["weights"].startswith("average (last")
    for name, source in summary["heldout_of_average"]["sources"].items():
        assert notes[f"held-out bits/byte, {name}"] == f"{source['bits_per_byte']:.4f}"
