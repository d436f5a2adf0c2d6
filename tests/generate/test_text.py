"""`btlm generate`: over a real run's checkpoint, and many texts of a model with random weights."""

import itertools
import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from support.published_files import ORACLES
from support.tiny import tiny_config
from support.tiny_tokenizers import TEXTS

from btlm_jax.cli import main
from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.decode import batch as generation
from btlm_jax.decode import cpu_cache as cache
from btlm_jax.decode.batch import continue_tokens
from btlm_jax.decode.cpu_decoder import CpuDecoder
from btlm_jax.decode.sampling import GREEDY
from btlm_jax.display.progress import printable
from btlm_jax.generate import loading
from btlm_jax.generate import text as text_module
from btlm_jax.generate.text import load_with_tokenizer
from btlm_jax.hub import native
from btlm_jax.hub.native import ModelMetadata, one_device_mesh, write_model_directory
from btlm_jax.model import init_params
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.tokenizer import tokenizer_info


def continued(capsys, workdir, *flags) -> str:
    assert main(["generate", f"--checkpoint={workdir}", "--prompt=def f", "--num_tokens=12", *flags]) == 0
    return capsys.readouterr().out


def test_the_stream_is_the_prompt_and_its_continuation(capsys, tiny_run):
    _, workdir = tiny_run
    model = load_with_tokenizer(workdir, as_int4=False)
    assert model.metadata.notes["steps"] == "10"
    tokenizer = model.tokenizer
    options = {"num_tokens": 12, "sampling": GREEDY, "seed": 0, "num_ids": 400, "stop_id": tokenizer.eos_id}
    options["prompt"] = tokenizer.encode("def f")
    ids = continue_tokens(model.metadata.network(), model.params, model.mesh, **options)
    expected = "def f" + printable(tokenizer.decode(ids)) + "\n"
    assert continued(capsys, workdir, "--temperature=0") == expected


def test_a_seed_gives_the_same_text(capsys, tiny_run):
    _, workdir = tiny_run
    first, again, other = (continued(capsys, workdir, "--temperature=2", f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_a_save_in_progress_is_left_alone(capsys, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[1], workdir, symlinks=True)
    unfinished = workdir / "checkpoints" / "11.orbax-checkpoint-tmp"
    unfinished.mkdir()
    continued(capsys, workdir)
    assert unfinished.is_dir()


@pytest.mark.slow
def test_every_form_of_a_model_writes_the_same(capsys, monkeypatch, tiny_run, tmp_path):
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)  # its proof is another test's
    _, workdir = tiny_run
    expected = continued(capsys, workdir, "--temperature=0")
    for target, format in ((tmp_path / "hf", "hf"), (tmp_path / "native", "native")):
        options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9}
        options |= {"method": "rtn", "calibration": None}
        convert(Conversion(source=workdir, target=target, format=format, **options), log=lambda line: None)
        assert continued(capsys, target, "--temperature=0") == expected


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", "holds no model: looked for"),
        ("starts", "a run without a checkpoint yet"),
        ("checkpoints", "is no checkpoint in"),
    ],
)
def test_a_directory_without_a_model(capsys, tmp_path, folder, message):
    (tmp_path / folder).mkdir(exist_ok=True)
    assert main(["generate", f"--checkpoint={tmp_path}"]) == 1
    assert message in capsys.readouterr().err
    if folder == "checkpoints":
        for name in ("5", "\u00b2"):  # neither is a directory of a step
            (tmp_path / folder / name).write_text("")
        assert main(["generate", f"--checkpoint={tmp_path}"]) == 1
        assert message in capsys.readouterr().err
        (tmp_path / folder / "7").mkdir()
        assert main(["generate", f"--checkpoint={tmp_path / folder / '7'}"]) == 1
        said = f"7 is a checkpoint of a run, of which the last is taken here: give {tmp_path} ("
        assert said in capsys.readouterr().err


def test_a_model_without_a_tokenizer(capsys):
    assert main(["generate", f"--checkpoint={ORACLES / 'tiny'}"]) == 1
    assert "holds no tokenizer, which text needs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The directory of a model with random weights, whose texts are all sorts of tokens."""
    return write_untrained(tmp_path_factory.mktemp("untrained"), vocab_size=400, beyond=1)


def write_untrained(directory, *, vocab_size, beyond):
    """Write a model of random weights, `beyond` times as large for ids from 400 on, which its tokenizer lacks."""
    config = tiny_config(model__vocab_size=vocab_size)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400))
    facts = {"max_length": 48, "eos_id": 1, "tokenizer": tokenizer_info(tokenizer), "prompt_bos_id": None, "notes": {}}
    metadata = ModelMetadata(model=config.model, mup=config.mup, **facts)
    params = init_params(metadata.network(), one_device_mesh(), seed=5)
    table_VD = params["embedding"]["embedding"]
    params["embedding"]["embedding"] = table_VD.at[400:].multiply(beyond)
    write_model_directory(directory, metadata=metadata, params=params, tokenizer=tokenizer)
    return directory


def written(directory, tmp_path, prompts, *flags) -> list[dict]:
    """The rows of the output for a file of prompts."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    files = [f"--prompts_file={source}", f"--output={output}"]
    assert main(["generate", f"--checkpoint={directory}", "--temperature=1.7", *files, *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


PROMPTS = [{"prompt": "eta"}, {"prompt": "", "id": 7}, {"prompt": "oin shr dlu " * 3}]


@pytest.mark.slow
def test_texts_do_not_depend_on_their_batch(capsys, untrained, tmp_path, monkeypatch):
    flags = ("--num_tokens=11", "--num_samples=2", "--seed=3")
    expected = written(untrained, tmp_path, PROMPTS, *flags, "--batch_size=2")
    assert [(row["prompt"], row["sample"]) for row in expected] == [(p["prompt"], n) for p in PROMPTS for n in (0, 1)]
    assert [row.get("id") for row in expected] == [None, None, 7, 7, None, None]
    assert len({row["text"] for row in expected}) == 6
    assert all(row["num_tokens"] == 11 and row["ended_by"] == "length" for row in expected)
    monkeypatch.setattr(text_module, "PROGRESS_SECONDS", 0.0)
    capsys.readouterr()
    assert written(untrained, tmp_path, PROMPTS, *flags, "--batch_size=4") == expected
    output = capsys.readouterr().err
    for part in ("0 of 6 texts, 1 tokens, ", "4 of 6 texts, 44 tokens, ", "tokens/s, ETA at most 0:", "66 new tokens"):
        assert part in output
    assert f"wrote 6 texts to {tmp_path / 'texts.jsonl'}" in output
    assert written(untrained, tmp_path, PROMPTS[::-1], *flags, "--batch_size=2")[4:] == expected[:2]
    arguments = ["generate", f"--checkpoint={untrained}", "--temperature=1.7", "--prompt=eta", *flags]
    assert main([*arguments, "--num_samples=1"]) == 0
    assert capsys.readouterr().out == "eta" + printable(expected[0]["text"]) + "\n"
    assert main(arguments) == 0
    assert capsys.readouterr().out == "".join(
        f"--- prompt 1, sample {n + 1}: 11 tokens, ended by length\neta{printable(expected[n]['text'])}\n"
        for n in (0, 1)
    )


def test_stop_strings_end_texts_before_they_begin(capsys, untrained, tmp_path):
    free = written(untrained, tmp_path, PROMPTS, "--num_tokens=30")
    stop, other = free[0]["text"][9:13], free[2]["text"][20:23]
    assert stop not in free[1]["text"] + free[2]["text"] and other not in free[0]["text"] + free[1]["text"]
    stopped = written(untrained, tmp_path, PROMPTS, "--num_tokens=30", f"--stop={stop}", f"--stop={other}")
    for row, stop_string in ((0, stop), (2, other)):
        assert stopped[row]["text"] == free[row]["text"][: free[row]["text"].index(stop_string)]
        assert (stopped[row]["ended_by"], stopped[row]["stop_string"]) == ("stop string", stop_string)
        assert stopped[row]["num_tokens"] < 30
    assert stopped[1] == free[1]
    capsys.readouterr()
    flags = ["--prompt=eta", "--num_tokens=30", "--temperature=1.7", f"--stop={stop}"]
    assert main(["generate", f"--checkpoint={untrained}", *flags]) == 0
    assert capsys.readouterr().out == "eta" + printable(stopped[0]["text"]) + "\n"


def test_the_end_of_a_document_ends_a_text(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "draw", lambda logits_V, *, history, **_: 1 if len(history) == 6 else 70)
    (row,) = written(untrained, tmp_path, [{"prompt": ""}])
    assert (row["ended_by"], row["num_tokens"]) == ("end of document", 5)


def test_a_special_token_ends_a_text_as_a_stop_string(capsys, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "draw", lambda logits_V, *, history, **_: 0 if len(history) == 6 else 70)
    (free,) = written(untrained, tmp_path, [{"prompt": ""}], "--num_tokens=5")
    (row,) = written(untrained, tmp_path, [{"prompt": ""}], "--stop=<unk>", "--stop=<unk>\n")
    assert (row["ended_by"], row["stop_string"], row["num_tokens"]) == ("stop string", "<unk>", 6)
    assert row["text"] == free["text"]
    assert "--stop='<unk>\\n': <unk> in it has no text; give --stop='<unk>'" in capsys.readouterr().err


def test_texts_that_end_at_once_are_written(capsys, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(generation, "draw", lambda logits_V, **_: 1)
    rows = written(untrained, tmp_path, PROMPTS, "--batch_size=2")
    assert [(row["ended_by"], row["text"]) for row in rows] == [("end of document", "")] * 3
    output = capsys.readouterr().err
    assert "2 of 3 texts, 0 tokens, 0.0 tokens/s\n" in output and "ETA" not in output


@pytest.mark.slow
def test_the_speed_leaves_out_compilation_and_long_texts_are_noted(capsys, untrained, monkeypatch):
    monkeypatch.setattr(generation, "draw", lambda logits_V, **_: 70)
    jax.clear_caches()
    assert main(["generate", f"--checkpoint={untrained}", "--prompt=", "--num_tokens=50"]) == 0
    output = capsys.readouterr().err
    assert "note: up to 51 tokens, past the 48 this model was trained at" in output
    for part in ("50 new tokens", "compile  ", "prefill  1 prompt tokens in ", "decode   48 new tokens in "):
        assert part in output


def test_attention_that_the_cache_lost_is_said(capsys, untrained, monkeypatch):
    arguments = ["generate", f"--checkpoint={untrained}", "--prompt=eta", "--num_tokens=50"]
    assert main(arguments) == 0
    assert "attention may have fallen" not in capsys.readouterr().err
    monkeypatch.setattr(cache, "SPREAD", -12.0)
    assert main(arguments) == 0
    assert "of a head's attention may have fallen on keys outside its window of the cache" in capsys.readouterr().err


def test_a_failure_leaves_the_output_as_it_was(capsys, untrained, tmp_path, monkeypatch):
    written(untrained, tmp_path, PROMPTS[:1], "--num_tokens=1")
    before = (tmp_path / "texts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("eta\n")

    draw = generation.draw
    monkeypatch.setattr(generation, "draw", lambda logits_V, **options: draw(logits_V * np.nan, **options))
    files = [f"--prompts_file={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'texts.jsonl'}"]
    assert main(["generate", f"--checkpoint={untrained}", *files]) == 1
    assert "btlm generate: error: the model's logits after 2 tokens are not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "texts.jsonl"]
    assert (tmp_path / "texts.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--num_tokens=0"], 2, "num_tokens=0 is not allowed; it must be 1 or more"),
        (["--num_samples=0"], 2, "num_samples=0 is not allowed; it must be 1 or more"),
        (["--batch_size=-1"], 2, "batch_size=-1 is not allowed; it must be 1 or more"),
        (["--seed=-1"], 2, "seed=-1 is not allowed; it must be 0 or more"),
        (["--temperature=-0.5"], 2, "temperature=-0.5 is not allowed; it must be 0 or more"),
        (["--temperature=nan"], 2, "--temperature=nan must be a finite number"),
        (["--stop=a", "--stop="], 2, "stop='' is not allowed; a stop string needs a character"),
        (["--stop=\udcff"], 2, "stop='\\udcff' is not valid Unicode"),
        (["--prompt=\udcff"], 2, "--prompt is not valid Unicode"),
        (["--cache_dtype=int3"], 2, "--cache_dtype=int3 is not known; it may be model, float32, bfloat16, int8"),
        (["--prompt=", "--prompts_file=x"], 2, "--prompt and --prompts_file are both given; give one of them"),
        (["--output="], 2, "--output= is empty; give the name of a file"),
        (["--prompts_file="], 2, "--prompts_file= is empty; give the name of a file"),
        (["--prompts_file=nowhere.txt"], 1, "there is no file of prompts nowhere.txt"),
        (["--output=nowhere/x.jsonl"], 1, "output=nowhere/x.jsonl cannot be written: there is no directory nowhere"),
        (["--output=."], 1, "output=. is a directory; give the name of a file"),
        (["--output=/dev/null"], 1, "output=/dev/null is no regular file and is not replaced; without"),
        (["--bos=yes"], 2, "bos=yes is not allowed; it must be model, none, eos or an id's number"),
        (["--bos=-1"], 2, "bos=-1 is not allowed"),
        (["--bos=" + "9" * 5000], 2, "99 is not allowed; it must be model, none, eos or an id's number"),
        (["--num_samples=10000000000"], 2, "num_samples=10000000000 is not allowed; it must be 1,000,000 or less"),
    ],
)  # fmt: skip
def test_a_wrong_command_says_what_is_right(capsys, flags, code, message):
    assert main(["generate", "--checkpoint=never loaded", *flags]) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_cache_is_of_the_dtype_asked_for(untrained, monkeypatch, dtype, tmp_path):
    cache_dtypes = []
    make = CpuDecoder.__init__

    def spy(*arguments, cache_dtype, **options):
        cache_dtypes.append(cache_dtype)
        make(*arguments, cache_dtype=cache_dtype, **options)

    monkeypatch.setattr(CpuDecoder, "__init__", spy)
    written(untrained, tmp_path, PROMPTS[:1], "--num_tokens=1", f"--cache_dtype={dtype}")
    written(untrained, tmp_path, PROMPTS[:1], "--num_tokens=1", "--int4")
    assert cache_dtypes == [dtype, "int8"]  # 4-bit models have a cache of 8 bits unless another is asked for


def test_a_terminal_gets_no_control_characters():
    assert printable("a\tb\n\x1b[2Jc\x07\r é") == "a\tb\n\ufffd[2Jc\ufffd\ufffd é"
    assert printable("12\u00a0%\u202f!\u3000\u2028\u202e") == "12\u00a0%\u202f!\u3000\ufffd\ufffd"


def interrupted_after(num_draws, monkeypatch) -> None:
    """Interrupt generation at a token, as Ctrl-C does."""
    count, draw = itertools.count(), generation.draw

    def drawn(*arguments, **options):
        if next(count) == num_draws:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(generation, "draw", drawn)


@pytest.mark.slow
def test_an_interrupted_job_goes_on_and_ends_with_the_same_file(capsys, untrained, tmp_path, monkeypatch):
    flags = ("--num_tokens=7", "--num_samples=2", "--seed=3", "--batch_size=2", "--stop=t")
    expected = written(untrained, tmp_path, PROMPTS, *flags)
    output, partial = tmp_path / "texts.jsonl", tmp_path / "texts.jsonl.partial"
    expected_bytes = output.read_bytes()
    output.unlink()
    command = ["generate", f"--checkpoint={untrained}", "--temperature=1.7", *flags]
    command += [f"--prompts_file={tmp_path / 'prompts.jsonl'}", f"--output={output}"]
    for num_draws in (0, 17, 3):
        with monkeypatch.context() as patch:
            interrupted_after(num_draws, patch)
            assert main(command) == 130
        assert not output.exists() and not list(tmp_path.glob(".*"))
    kept = partial.read_bytes().splitlines()[1:]
    assert 2 <= len(kept) < 6 and all(json.loads(line.split(b"\t")[1]) in expected for line in kept)
    partial.write_bytes(partial.read_bytes()[:-9])  # as a kill in the middle of a line leaves it
    capsys.readouterr()
    assert main([*command, "--seed=4"]) == 1
    assert "texts of another command (seed: 3 there, 4 now)" in capsys.readouterr().err
    assert main(command) == 0
    assert f"going on: {len(kept) - 1} of 6 texts are in {partial}" in capsys.readouterr().err
    assert output.read_bytes() == expected_bytes and not partial.exists()
    assert main(command) == 0
    assert "(output-replaced)" in capsys.readouterr().err and output.read_bytes() == expected_bytes


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of 448 ids, the likeliest of which are beyond the 400 of its tokenizer."""
    return write_untrained(tmp_path_factory.mktemp("padded"), vocab_size=448, beyond=40)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kernels", "int4", "jax"])
def test_no_id_without_a_token_is_drawn(capsys, padded, tmp_path, monkeypatch, way):
    seen, drawn = [], []
    decode_logits, draw = CpuDecoder._run, generation.draw

    def spy(logits_V, **options):
        drawn.append(draw(logits_V, **options))
        return drawn[-1]

    def spy_run(self, *arguments):
        seen.append(decode_logits(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(generation, "draw", spy)
    monkeypatch.setattr(CpuDecoder, "_run", spy_run)
    if way == "jax":
        monkeypatch.setattr(loading, "has_kernels", lambda: False)
    int4 = ["--int4"] if way == "int4" else []
    for sampling in (["--temperature=0"], ["--temperature=3"], ["--temperature=3", "--top_k=30", "--top_p=0.99"]):
        written(padded, tmp_path, PROMPTS[:2], "--num_tokens=20", *sampling, *int4)
        (tmp_path / "texts.jsonl").unlink()
    assert max(drawn) < 400 and len(drawn) > 40
    assert way == "jax" or any(logits_BV.argmax() % 448 >= 400 for logits_BV in seen)  # they would have been
    said = capsys.readouterr().err
    assert "the model has 448 ids and its tokenizer 400; the others are never drawn (ids-without-token)" in said


def test_an_id_can_be_put_in_front(capsys, untrained):
    def ids_of(bos: str) -> list[int]:
        seen = []
        with mock.patch.object(
            text_module, "_make_batch", lambda model, network, rows, *_, **__: seen.append(rows) or 1 / 0
        ):
            main(["generate", f"--checkpoint={untrained}", "--prompt=eta", f"--bos={bos}"])
        return seen[0][0].ids if seen else []

    plain = ids_of("model")
    assert ids_of("none") == plain and ids_of("eos") == [1, *plain] and ids_of("7") == [7, *plain]
    capsys.readouterr()
    assert ids_of("400") == [] and "bos=400 is none of the tokenizer's 400 ids" in capsys.readouterr().err


def test_a_run_is_used_without_its_token_store(capsys, tiny_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[1], workdir, symlinks=True)
    expected = continued(capsys, workdir, "--temperature=0")
    monkeypatch.setattr(native, "resolve_location", lambda workdir, place: tmp_path / "gone")
    assert continued(capsys, workdir, "--temperature=0") == expected
    (workdir / "tokenizer" / "tokenizer_info.json").write_text('{"kind": "sentencepiece", "eos_id": true}')
    assert main(["generate", f"--checkpoint={workdir}"]) == 1
    assert "tokenizer_info.json is damaged" in capsys.readouterr().err
    shutil.rmtree(workdir / "tokenizer")  # as in runs of earlier versions
    assert main(["generate", f"--checkpoint={workdir}"]) == 1
    said = capsys.readouterr().err
    assert f"it keeps none in {workdir / 'tokenizer'}" in said and f"{tmp_path / 'gone'} is not a token store" in said
