"""Answers to lm-evaluation-harness, against its own `hf` model of the export; and tasks from their names to results."""

import dataclasses
import functools
import json
import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
pytest.importorskip("torch")
from lm_eval.api.group import Group  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from support.harness_tasks import TASKS, write_tasks, write_tiny_model  # noqa: E402
from support.hub_data import write_published_tasks  # noqa: E402
from support.real_store import made_up_documents  # noqa: E402

from btlm_jax import notices  # noqa: E402
from btlm_jax.cli import main  # noqa: E402
from btlm_jax.evaluate import shared_prefix  # noqa: E402
from btlm_jax.evaluate import tasks as task_module  # noqa: E402
from btlm_jax.evaluate.checkpoint import opened_checkpoint  # noqa: E402
from btlm_jax.evaluate.harness import BtlmLM, HarnessSettings  # noqa: E402
from btlm_jax.evaluate.results import Results  # noqa: E402
from btlm_jax.evaluate.scorer import Scores  # noqa: E402
from btlm_jax.evaluate.task_identity import digest_of  # noqa: E402
from btlm_jax.evaluate.tasks import TaskSettings, load_tasks, measure_tasks, part_of  # noqa: E402
from btlm_jax.evaluate.texts import load_to_generate  # noqa: E402

MAX_LENGTH = 320


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Have the harness fetch nothing, and keep what it prepares in a folder of the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(shared_prefix, "NARROWEST", 64)  # few shapes are compiled; test_shared_prefix.py has them all
        patch.setattr(task_module, "NUM_RESAMPLES", 20)
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder / "tasks")
    write_published_tasks(folder / "published", Path(lm_eval_tasks.__file__).parent)
    write_tiny_model(folder)
    return folder


def settings_of(folder, *names, **changes):
    values = {"names": names or tuple(TASKS), "include_paths": (folder / "tasks",), "num_fewshot": -1, "limit": 0}
    return TaskSettings(**values | {"metadata": {}, "run_code": False} | changes)


def load(folder, *, as_int4=False, on_mesh=False, **changes):
    values = {"batch_tokens": 256, "batch_size": 8, "max_length": MAX_LENGTH, "seed": 0} | changes
    with opened_checkpoint(str(folder / "export"), log=print) as checkpoint, pytest.MonkeyPatch.context() as patch:
        if on_mesh:
            patch.setattr("btlm_jax.evaluate.texts.has_kernels", lambda: False)
        model = load_to_generate(checkpoint, dtype="model", as_int4=as_int4)
    return BtlmLM(model, name="tiny", settings=HarnessSettings(**values))


@pytest.fixture(scope="module")
def ours(folder):
    return load(folder)


@pytest.fixture(scope="module")
def measured(folder, ours):
    results = Results(folder / "results", identity={"model": "tiny"})
    return measure_tasks(ours, settings_of(folder), results), results


def samples_of(results, name):
    (file,) = results.folder.glob(f"task-{name}-*.json")
    return json.loads(file.read_text())["result"]["of_cases"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(TASKS), ("btlm",)], ids=["local tasks", "the published list"])
def test_scores_and_answers_are_those_of_the_harness_s_own_model_of_the_export(
    folder, ours, hf, measured, names, tmp_path
):
    paths = (folder / ("published" if names == ("btlm",) else "tasks"),)
    settings, (report, results) = settings_of(folder, *names, include_paths=paths), measured
    if names == ("btlm",):
        results = Results(tmp_path, identity={})
        report = measure_tasks(ours, settings, results)
    loaded = load_tasks(settings, metadata={})
    tasks = [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]
    found = evaluate(hf, {"tasks": {task.task_name: task for task in tasks}}, bootstrap_iters=0)
    theirs = json.loads(task_module._json(found))
    for name, scores in theirs["results"].items():
        for key, value in scores.items():
            if "stderr" not in key:
                is_sum = any(word in key for word in ("perplexity", "bits", "diff")) or name == "truthfulqa_mc2"
                close = pytest.approx(value, rel=1e-4) if is_sum and isinstance(value, float) else value
                assert report["results"][name][key] == close, (name, key)
        for mine, its in zip(samples_of(results, name), theirs["samples"][name], strict=True):
            assert mine["arguments"] == its["arguments"]
            for (answer,), (expected,) in zip(mine["resps"], its["resps"], strict=True):
                if isinstance(answer, str):
                    assert answer == expected
                    continue
                answer, expected = (one if isinstance(one, list) else [one] for one in (answer, expected))
                longest = len(tokenizer_of(folder / "export").encode(mine["arguments"][0][-1]))
                assert answer[0] == pytest.approx(expected[0], abs=max(1e-4, 1e-6 * longest))
                assert answer[1:] == expected[1:]
    if names == ("btlm",):
        assert report["groups"]["mmlu"]["acc,none"] == report["results"]["mmlu_anatomy"]["acc,none"]
        assert {name for name, number in report["n-shot"].items() if number} == {"mmlu", "mmlu_anatomy"}
        assert report["n-shot"]["mmlu"] == 5
        (mmlu,) = samples_of(results, "mmlu_anatomy")[0]["arguments"][:1]
        assert mmlu[0].count("Answer:") == 6
    else:
        assert any(sample["resps"][0][0] for sample in samples_of(results, "local_answer"))


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder / "export"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=4,
        max_length=MAX_LENGTH,
    )  # fmt: skip


@pytest.mark.slow
def test_a_texts_loss_is_the_harness_s_rolling_one(folder, hf, tmp_path):
    documents = [document.text for document in made_up_documents(None)]
    lines = ["".join(documents)[:4000], documents[1][:90], documents[2][:1]]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
        for number, text in enumerate(lines)
    ]
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    counts = [len(hf.tok_encode(text, add_special_tokens=False)) for text in lines]
    assert max(counts) > 3 * MAX_LENGTH
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    arguments = [f"--checkpoint={folder / 'export'}", f"--text={tmp_path / 'texts.jsonl'}", f"--length={MAX_LENGTH}"]
    assert main(["evaluate", *arguments, f"--output={tmp_path / 'results'}"]) == 0
    (path,) = (tmp_path / "results").glob("heldout-*.json")
    (found,) = json.loads(path.read_text())["result"]["of_documents"].values()
    assert found["tokens"] == counts
    for nats, count, log_p in zip(found["nats"], counts, expected, strict=True):
        assert nats == pytest.approx(-log_p, abs=1e-5 * count)


@functools.cache
def tokenizer_of(directory):
    from btlm_jax.tokenizers.tokenizer import find_tokenizer

    return find_tokenizer(directory)


def test_finished_tasks_are_not_done_again_and_others_go_on(folder, measured, monkeypatch, capsys, tmp_path):
    report, results = measured
    again, asked = load(folder), []
    whole = again._scorer.score

    def interrupted(rows):
        for number, found in enumerate(whole(rows)):
            if number == 10:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(again._scorer, "score", interrupted)
    notices.begin(strict=())
    assert measure_tasks(again, settings_of(folder), results)["results"] == report["results"]
    said = capsys.readouterr().err
    assert "local_choice: done already" in said and "task local_few_shot: 24 contexts are longer" in said
    assert notices.counts() == {"context-cut": 24}
    header, *rows = part_of(report)["tables"]["results"]
    assert header[-1] == "contexts cut" and {row[0]: row[-1] for row in rows if row[-1] != "0"} == {
        "local_few_shot": "24"
    }
    elsewhere = Results(tmp_path, identity={"model": "tiny"})
    with pytest.raises(KeyboardInterrupt):
        measure_tasks(again, settings_of(folder, "local_choice"), elsewhere)

    def counting(rows):
        asked.extend(rows)
        return whole(rows)

    monkeypatch.setattr(again._scorer, "score", counting)
    went_on = measure_tasks(again, settings_of(folder, "local_choice"), elsewhere)
    assert len(asked) == 24 - 10
    assert went_on["results"]["local_choice"] == report["results"]["local_choice"]
    assert json.loads((tmp_path / task_module.RESULTS_FILE).read_text())["results"] == went_on["results"]


def test_a_changed_document_or_setting_is_measured_anew(folder, ours, measured):
    report, results = measured
    before = set(results.folder.iterdir())
    few = measure_tasks(ours, settings_of(folder, "local_letter", limit=3), results)
    assert few["results"]["local_letter"]["sample_len"] == 3
    assert len(set(results.folder.iterdir()) - before) == 1


def test_examples_and_documents_are_facts_of_a_task(ours, tmp_path):
    paths, found = write_tasks(tmp_path / "tasks"), []
    settings = settings_of(tmp_path, "local_few_shot")
    for file in ("", "few", "test"):
        if file:
            lines = (paths / f"{file}.jsonl").read_text().splitlines()
            (paths / f"{file}.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
        (task,) = load_tasks(settings, metadata={})
        found.append(task_module._facts(task, settings, ours))
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["examples"]
    assert [key for key in found[1] if found[1][key] != found[2][key]] == ["documents"]


UTILS = """
import functools, random
def asked(doc): return doc["question"]
def text(doc): return f"{asked(doc)} {random.random()}"
def same(documents, number): return documents
process = functools.partial(same, number=1)
"""


def write_task_of_functions(paths):
    (paths / "utils.py").write_text(UTILS)
    lines = [f"include: {paths}/local_letter.yaml", "task: local_functions", "doc_to_text: !function utils.text"]
    (paths / "local_functions.yaml").write_text("\n".join([*lines, "process_docs: !function utils.process"]))
    return settings_of(paths.parent, "local_functions", limit=2)


def test_functions_are_facts_of_a_task_by_their_file_and_not_their_address(ours, tmp_path):
    paths, found = write_tasks(tmp_path / "tasks"), []
    settings = write_task_of_functions(paths)
    for text in (UTILS, UTILS + "#", UTILS):  # each time other functions
        (paths / "utils.py").write_text(text)
        os.utime(paths / "utils.py", ns=(0, len(found)))
        (task,) = load_tasks(settings, metadata={})
        found.append(task_module._facts(task, settings, ours))
    assert found[0] == found[2] and " at 0x" not in json.dumps(found)
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["config"]
    assert digest_of([{0, 8}], limit=0) == digest_of([{8, 0}], limit=0) != digest_of([{8}], limit=0)


def test_what_a_task_draws_does_not_depend_on_the_tasks_before_it(ours, tmp_path):
    settings, prompts = write_task_of_functions(write_tasks(tmp_path / "tasks")), []
    for names in (("local_functions",), ("local_letter", "local_functions")):
        random.seed(len(names))
        results = Results(tmp_path / str(len(names)), identity={})
        measure_tasks(ours, dataclasses.replace(settings, names=names), results)
        prompts.append([sample["arguments"] for sample in samples_of(results, "local_functions")])
    assert prompts[0] == prompts[1]


def test_a_name_has_one_task_and_what_cannot_run_is_said_before_any_is_measured(ours, tmp_path):
    paths, results = write_tasks(tmp_path / "tasks"), Results(tmp_path / "results", identity={})
    of_one = (paths / "local_few_shot.yaml").read_text().replace("num_fewshot: 3", "num_fewshot: 1")
    (tmp_path / "one.yaml").write_text(of_one)
    with pytest.raises(ValueError, match="tasks has local_few_shot twice, with 3 and 1 examples"):
        measure_tasks(ours, settings_of(tmp_path, "local_few_shot", str(tmp_path / "one.yaml")), results)
    tasks = load_tasks(settings_of(tmp_path, "local_few_shot", str(paths / "local_few_shot.yaml")), metadata={})
    assert len(tasks) == 2 and task_module._each_once(tasks) == tasks[:1]
    (paths / "unsafe.yaml").write_text(f"include: {paths}/local_answer.yaml\ntask: local_unsafe\nunsafe_code: true\n")
    with pytest.raises(ValueError, match="task local_unsafe runs what the model writes.*--run_code allows it"):
        measure_tasks(ours, settings_of(tmp_path, "local_letter", "local_unsafe"), results)
    assert not results.folder.exists()


def test_groups_and_patterns_have_the_harness_s_own_tasks_too(tmp_path, monkeypatch):
    theirs, paths = write_tasks(tmp_path / "harness"), tmp_path / "tasks"
    paths.mkdir()
    (theirs / "local_letter.yaml").rename(paths / "local_letter.yaml")
    (paths / "group.yaml").write_text("group: my_group\ntask: [local_letter, local_choice]\n")

    def manager(*, include_path, metadata, include_defaults=True):
        made.append(include_defaults)
        include = [*include_path, str(theirs)] if include_defaults else include_path
        return lm_eval_tasks.TaskManager(include_path=include, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(task_module, "TaskManager", manager)
    for name, expected, has_defaults in (
        ("local_letter", {"local_letter"}, [False]),
        ("my_group", {"local_letter", "local_choice"}, [False, True]),
        ("local_l*", {"local_letter", "local_last_word"}, [True]),
    ):
        made = []
        found = load_tasks(settings_of(tmp_path, name), metadata={})
        tasks = [task for item in found for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]
        assert ({task.task_name for task in tasks}, made) == (expected, has_defaults)


def test_a_task_without_examples_stays_so_and_says_it(tmp_path):
    file = write_tasks(tmp_path / "tasks") / "local_few_shot.yaml"
    for own, count, notes in ((3, 2, 0), (0, 0, 1)):
        file.write_text(file.read_text().replace("num_fewshot: 3", f"num_fewshot: {own}"))
        notices.begin(strict=())
        (task,) = load_tasks(settings_of(tmp_path, "local_few_shot", num_fewshot=2), metadata={})
        assert (task.get_config("num_fewshot"), notices.counts().get("num-fewshot-kept", 0)) == (count, notes)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "tolerance"), [("mesh", 1e-4), ("int4", 2.0)])
def test_other_forms_answer_alike(folder, ours, form, tolerance):
    other = load(folder, as_int4=form == "int4", on_mesh=form == "mesh")
    assert other.get_model_info()["model_dtype"] == {"mesh": "float32", "int4": "int4"}[form]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)
        for arguments in (("one two", " three"), ("one two", " four five"), ("", "six"))
    ]
    for (log_p, _), (expected, _) in zip(other.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert log_p == pytest.approx(expected, abs=tolerance)
    until = Instance(request_type="generate_until", doc={}, arguments=("one", {"max_gen_toks": 3}), idx=0)
    assert form == "int4" or other.generate_until([until]) == ours.generate_until([until])


def request_of(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("some_task", 7, 1))


def test_sampled_texts_of_equal_requests_differ_and_are_the_same_again(ours):
    request = request_of("generate_until", "one two", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 6})
    texts = ours.generate_until([request] * 3)
    assert len(set(texts)) == 3 and ours.generate_until([request] * 3) == texts


def test_out_of_memory_halves_the_batch_of_texts(ours, monkeypatch, capsys):
    whole, sizes = ours.writer._write_batch, []

    def of_little_memory(jobs):
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return whole(jobs)

    monkeypatch.setattr(ours.writer, "_write_batch", of_little_memory)
    monkeypatch.setattr(ours.writer, "batch_size", 4)
    notices.begin(strict=())
    requests = [request_of("generate_until", text, {"max_gen_toks": 2}) for text in ("a", "b", "c")]
    assert len(ours.generate_until(requests)) == 3
    assert sizes == [3, 1, 1, 1] and notices.counts()["batch-halved"] == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of("loglikelihood", "context", ""), "task some_task, document 7: the text to score is empty"),
        (request_of("loglikelihood", "context", " word" * 400), "task some_task, document 7: a continuation of"),
        (request_of("generate_until", "a", {"max_gen_toks": MAX_LENGTH}), "leaves no room for a context"),
        (request_of("generate_until", "a", {"num_beams": 4}), "generation_kwargs has num_beams; known are until"),
    ],
)
def test_requests_that_cannot_be_answered(ours, request_, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, request_.request_type)([request_])


def test_what_the_harness_s_command_line_asks_of_the_model_is_checked(ours):
    with pytest.raises(ValueError, match="--apply_chat_template is not for this model"):
        ours.apply_chat_template([])
    for given, message in (("int4=no", "int4=no; it must be True or False"), ("max_length=1.5", "a whole number")):
        with pytest.raises(ValueError, match=message):
            BtlmLM.create_from_arg_string(f"checkpoint=model,{given}")


@pytest.mark.parametrize("arguments", [("a", " b"), ("a text",)])
def test_a_log_p_that_is_no_number_is_no_score(ours, monkeypatch, arguments):
    scores = Scores(log_p_T=np.array([-1.0, np.nan]), is_greedy_T=np.ones(2, bool))
    monkeypatch.setattr(ours._scorer, "score", lambda rows: ((number, scores) for number in range(len(rows))))
    request_ = request_of("loglikelihood" if len(arguments) == 2 else "loglikelihood_rolling", *arguments)
    with pytest.raises(FloatingPointError, match="task some_task, document 7: log p is nan"):
        getattr(ours, request_.request_type)([request_])


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("local_chioce",), {}, "did you mean local_choice"),
        (("broken",), {}, "task broken cannot be loaded: .*there_is_no_such_data.*docs/guide/lm-eval.md"),
        (("missing.yaml",), {}, "missing.yaml is no file"),
    ],
)
def test_tasks_that_cannot_be_had(folder, names, changes, message, monkeypatch):
    monkeypatch.setattr(task_module, "TaskManager", functools.partial(task_module.TaskManager, include_defaults=False))
    broken = "task: broken\ndataset_path: there_is_no_such_data\ntest_split: test\n"
    (folder / "tasks" / "broken.yaml").write_text(broken)
    with pytest.raises(ValueError, match=message):
        load_tasks(settings_of(folder, *names, **changes), metadata={})


RULER = ("niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe")


class FewWords:
    """The package wonderwords' class with 18 words of each kind."""

    def __init__(self):
        names = {"noun": "cat", "nouns": "cat", "adjective": "red", "adjectives": "red", "verb": "go", "verbs": "go"}
        self._categories = {kind: [f"{stem}{chr(97 + n)}" for n in range(18)] for kind, stem in names.items()}


@pytest.fixture
def word_tokenizer(tmp_path):
    """The folder of a tokenizer whose tokens are words and signs, all the same one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tmp_path


def test_ruler_s_tasks_make_texts_of_a_length_and_are_answered(folder, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tqdm.tqdm", lambda items, **_: list(items)[:1])  # of 500 texts
    monkeypatch.setattr("nltk.download", lambda *_: None)
    monkeypatch.setattr("wonderwords.RandomWord", FewWords)  # all pairs of its words take a minute
    settings = settings_of(
        folder, *RULER, include_paths=(Path(lm_eval_tasks.__file__).parent / "ruler",),
        metadata={"max_seq_lengths": [900], "tokenizer": str(word_tokenizer)},
    )  # fmt: skip
    results, lm = Results(tmp_path / "results", identity={}), load(folder)
    report = measure_tasks(lm, settings, results)
    for name in RULER:
        ((sample,),) = [samples_of(results, name)]
        (prompt, _), ((answer,),) = sample["arguments"][0], sample["resps"]
        num_words = len(tokenizers.pre_tokenizers.Whitespace().pre_tokenize_str(prompt))
        assert 300 < num_words < 900, name
        outputs = sample["doc"]["outputs"]
        assert name == "ruler_vt" or all(word in prompt for word in outputs)
        share = sum(word.lower() in answer.lower() for word in outputs) / len(outputs)
        assert report["results"][name]["900,none"] == share
    table = task_module.table(report)
    assert table.count("| 900 |") == 4 and "| 4096 |" not in table
    with pytest.raises(ValueError, match="task ruler_vt has no texts of 300 tokens: the shortest take up to 8"):
        measure_tasks(
            lm, dataclasses.replace(settings, metadata=settings.metadata | {"max_seq_lengths": [300]}), results
        )
    own = dataclasses.replace(settings, metadata={"max_seq_lengths": [4096]})  # its ids are of few letters
    with pytest.raises(ValueError, match="task ruler_vt is not for this tokenizer"):
        measure_tasks(lm, own, results)


def test_the_harness_s_own_command_line_has_our_model(folder, measured, monkeypatch, tmp_path, capsys):
    local = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", local)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # it asks for all of the machine
    arguments = [
        "lm-eval", "--model_args", f"checkpoint={folder / 'export'},max_length={MAX_LENGTH}",
        "--tasks", "local_letter,local_answer", "--include_path", str(folder / "tasks"), "--output_path", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "| local_letter |" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    for name in ("local_letter", "local_answer"):
        assert found["results"][name] == measured[0]["results"][name]
    assert main([*arguments[:2], "checkpoint=x,colour=blue", *arguments[3:]]) == 1
    assert "model_args has colour; known are checkpoint" in capsys.readouterr().err


def test_btlm_evaluate_measures_tasks(folder, measured, tmp_path, capsys):
    arguments = ["evaluate", f"--checkpoint={folder / 'export'}", f"--output={tmp_path}", f"--length={MAX_LENGTH}"]
    tasks = ["--tasks=local_letter,local_answer", f"--include_path={folder / 'tasks'}"]
    assert main([*arguments, *tasks]) == 0
    assert "local_letter" in capsys.readouterr().out
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(report["parts"]) == ["tasks"]
    for name, scores in report["parts"]["tasks"]["scores"].items():
        assert scores == measured[0]["results"][name]
    assert "| local_letter |" in (tmp_path / "evaluation.md").read_text()
    assert main([*arguments, "--tasks=no_such_task", *tasks[1:], "--include_path=x"]) == 2
    assert "include_path=x is no folder" in capsys.readouterr().err
    assert main([*arguments, "--num_fewshot=3"]) == 2
    assert "--num_fewshot is for --tasks, which is not given" in capsys.readouterr().err


@pytest.mark.slow
def test_btlm_evaluate_measures_summaries_and_code(folder, tmp_path, capsys, monkeypatch):
    rows = [{"document": "one two three " * 200, "summary": "one two"}, {"document": "four", "summary": "four five"}]
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("btlm_jax.evaluate.summaries.TOKENS_OF_SUMMARY", 4)
    arguments = ["evaluate", f"--checkpoint={folder / 'export'}", f"--output={tmp_path}", "--summary_lengths=64,96"]
    arguments += ["--summaries", str(tmp_path / "reports.jsonl"), "--human_eval", "--limit=2", "--code_num_tokens=3"]
    assert main([*arguments, "--length=1024"]) == 0
    said = capsys.readouterr().out
    assert "ROUGE-1" in said and "were not run" in said
    parts = json.loads((tmp_path / "evaluation.json").read_text())["parts"]
    assert [(group["length"], group["cut_documents"]) for group in parts["summaries"]["groups"]] == [(64, 1), (96, 1)]
    assert (parts["human_eval"]["problems"], parts["human_eval"]["was_run"]) == (2, False)
    assert "HumanEval (at most 2 documents, length 1,024)" in said and notices.counts()["not-in-card"] == 1
    card = (tmp_path / "evaluation.md").read_text()
    assert "ROUGE-1" in card and "HumanEval" not in card
    assert len(list(tmp_path.glob("summaries-*.json"))) == 2
    monkeypatch.setattr("btlm_jax.evaluate.code_problems.run_program", lambda *_, **__: "failed")
    assert main([*arguments, "--length=1024", "--run_code"]) == 0
    said = capsys.readouterr()
    assert "pass@1" in said.out and "human_eval_completions: done already" in said.err and "loading" not in said.err
    for path in tmp_path.glob("human_eval_completions-*"):  # an earlier version kept none
        path.unlink()
    assert main([*arguments, "--length=1024", "--run_code"]) == 0 and "loading" not in capsys.readouterr().err
