"""A text's loss with --overlap=1 is what lm-evaluation-harness has for it from the model's export by PyTorch."""

import json
import math
import os

import pytest
from support.made_up_run import run_config, write_run
from support.real_store import made_up_documents

from btlm_jax.cli import main
from btlm_jax.convert.conversion import Conversion, convert

TEXTS = [document.text[:size] for document, size in zip(made_up_documents(None), (700, 90, 1), strict=False)]


@pytest.mark.slow
def test_a_texts_loss_is_the_rolling_loglikelihood_of_the_harness(token_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    models = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    workdir, exported = tmp_path / "run", tmp_path / "hf"
    write_run(workdir, run_config(token_store, evaluation__batch_size=8), steps=(6,))
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9, "method": "rtn"}
    convert(
        Conversion(source=workdir, target=exported, format="hf", calibration=None, **options), log=lambda line: None
    )
    theirs = models.HFLM(pretrained=str(exported), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
    assert theirs.max_length == 48
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
        for number, text in enumerate(TEXTS)
    ]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    counts = [len(theirs.tok_encode(text, add_special_tokens=False)) for text in TEXTS]
    assert max(counts) > 3 * 48
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for model in (workdir, exported):
        output = tmp_path / f"of-{model.name}"
        assert main(["evaluate", f"--checkpoint={model}", f"--text={texts}", f"--output={output}"]) == 0
        (path,) = output.glob("heldout-*.json")
        (found,) = json.loads(path.read_text())["result"]["of_documents"].values()
        assert found["tokens"] == counts
        for nats, count, log_p in zip(found["nats"], counts, expected, strict=True):
            assert math.isclose(nats, -log_p, abs_tol=1e-5 * count), (nats, log_p)
    capsys.readouterr()
