"""model.json of our own directories, edited by hand: every value is checked before it is used."""

import json

import pytest
from support.published_files import ORACLES

from btlm_jax import notices
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.generate.text import check_tokenizer
from btlm_jax.hub import native


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    target = tmp_path_factory.mktemp("model") / "native"
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9, "method": "rtn"}
    convert(Conversion(source=ORACLES / "tiny", target=target, format="native", calibration=None, **options), log=str)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": float("inf")}, "max_length=inf must be a whole number, 0 or more and below 2"),
        ({"max_length": True}, "max_length=True must be a whole number"),
        ({"eos_id": -1}, "eos_id=-1 must be a whole number"),
        ({"prompt_bos_id": 10**30}, "prompt_bos_id=1000000000000000000000000000000 must be a whole number"),
        ({"alibi_train_len": 2.5}, "alibi_train_len=2.5 must be a whole number"),
        ({"notes": ["x"]}, r"notes=\['x'\] must be a table of texts"),
        ({"notes": {"steps": 5}}, "must be a table of texts"),
        ({"clients": 5}, "must be a mapping, not int"),
        ({"clients": {"tokenizer_config": 5}}, "clients.tokenizer_config is a int"),
        ({"clients": {"bos_id": "x"}}, "clients.bos_id is a str"),
        ({"clients": {"chat_templates": {"default": 1}}}, "the chat template 'default' is a int"),
    ],
)
def test_a_value_of_another_kind_is_named(directory, tmp_path, changes, message):
    values = json.loads((directory / "model.json").read_text()) | changes
    (tmp_path / "model.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"model.json cannot be used: .*{message}"):
        native.read_metadata(tmp_path)


def test_an_edited_file_is_said_once(directory, tmp_path):
    values = json.loads((directory / "model.json").read_text()) | {"notes": {"steps": "5"}, "tokenizer": None}
    (tmp_path / "model.json").write_text(json.dumps(values))
    notices.begin(strict=())
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        check_tokenizer(tmp_path)
    native.read_metadata(tmp_path)
    assert notices.counts() == {"changed-since-export": 1}
