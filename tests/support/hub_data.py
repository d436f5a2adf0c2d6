"""Tiny data sets with the columns and the layout of those on the hub, and the tasks of the published list on them."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml


def _choices(*texts):
    return {"text": list(texts), "label": ["A", "B", "C", "D"][: len(texts)]}


def _targets(*texts):
    return {"choices": list(texts), "labels": [1] + [0] * (len(texts) - 1)}


_RACE = {
    "article": "tar net rain",
    "problems": str([
        {"question": "one  _  .", "options": ["it", "no", "or", "as"], "answer": "B"},
        {"question": "who", "options": ["tea", "rat", "net", "hat"], "answer": "C"},
    ]),
}  # fmt: skip
_RAW = {"question": "how it sat", "choices": ["tea", "rat", "net", "hat"], "subject": "anatomy"}
_GENDERED = [
    {"sentence": f"the one said {pronoun}", "pronoun": pronoun, "occupation": "one", "participant": "rider",
     "gender": gender, "label": number % 2}
    for number, (gender, pronoun) in enumerate((("female", "her"), ("male", "his"), ("neutral", "their")))
]  # fmt: skip
# task's file below lm_eval/tasks -> configuration of the data set, split, rows
DATA = {
    "hellaswag/hellaswag.yaml": ("", "validation", [
        {"activity_label": "Tarts", "ctx_a": "a hat is red.", "ctx_b": "it [title] is", "label": "1",
         "endings": ["in [step] tea", "on a net", "as it"]},
    ]),
    "piqa/piqa.yaml": ("", "validation", [{"goal": "tie a net", "sol1": "use tea", "sol2": "use a hat", "label": 1}]),
    "siqa/siqa.yaml": ("", "validation", [
        {"context": "he sat.", "question": "why?", "answerA": "tea", "answerB": "rain", "answerC": "so", "label": "2"},
    ]),
    "winogrande/default.yaml": ("winogrande_xl", "validation", [
        {"sentence": "the rat hit the hat as _ had tea.", "option1": "rat", "option2": "hat", "answer": "2"},
    ]),
    "openbookqa/openbookqa.yaml": ("main", "test", [
        {"question_stem": "rain is", "choices": _choices("tea", "wet", "on"), "answerKey": "B"},
    ]),
    "race/race.yaml": ("high", "test", [_RACE]),
    "super_glue/boolq/default.yaml": ("boolq", "validation", [
        {"passage": "tea is red", "question": "is tea red", "idx": 0, "label": 1},
    ]),
    "arc/arc_easy.yaml": ("ARC-Easy", "test", [
        {"question": "what is it", "choices": _choices("tea", "rat"), "answerKey": "A"},
    ]),
    "arc/arc_challenge.yaml": ("ARC-Challenge", "test", [
        {"question": "what was it", "choices": _choices("tea", "rat", "a net"), "answerKey": "C"},
    ]),
    "nq_open/nq_open.yaml": ("", "validation", [{"question": "who sat", "answer": ["he", "she"]}]),
    "triviaqa/default.yaml": ("rc.nocontext", "validation", [{"question": "who ran", "answer": {"aliases": ["he"]}}]),
    "mmlu/default/mmlu_anatomy.yaml": ("anatomy", "test", [_RAW | {"answer": 2}, _RAW | {"answer": 0}]),
    "truthfulqa/truthfulqa_mc1.yaml": ("multiple_choice", "validation", [
        {"question": "is it so", "mc1_targets": _targets("no", "it is"), "mc2_targets": _targets("no", "it is", "so")},
    ]),
    "truthfulqa/truthfulqa_mc2.yaml": ("multiple_choice", "validation", [
        {"question": "is it so", "mc1_targets": _targets("no", "it is"), "mc2_targets": _targets("no", "it is", "so")},
    ]),
    "winogender/winogender.yaml": ("all", "test", _GENDERED),
    "winogender/winogender_female.yaml": ("all", "test", _GENDERED),
    "winogender/winogender_male.yaml": ("all", "test", _GENDERED),
    "winogender/winogender_neutral.yaml": ("all", "test", _GENDERED),
    "winogender/winogender_gotcha.yaml": ("gotcha", "test", _GENDERED),
    "crows_pairs/crows_pairs_english.yaml": ("english", "test", [
        {"sent_more": "he had tea", "sent_less": "she had tea", "bias_type": "gender"},
    ]),
    "toxigen/toxigen.yaml": ("annotated", "test", [{"text": "he is a rat", "toxicity_ai": 3.0, "toxicity_human": 4.0}]),
}  # fmt: skip
MORE_SPLITS = {"mmlu/default/mmlu_anatomy.yaml": ("dev", [_RAW | {"answer": number % 4} for number in range(6)])}
MORE_CONFIGURATIONS = {"race/race.yaml": ("middle", [_RACE | {"article": "a tea net"}])}


def write_published_tasks(folder: Path, harness: Path) -> Path:
    """Write every data set, and the harness's tasks of the list with these in place of the hub's; return the folder.

    MMLU has one of its 57 subjects.
    """
    folder.mkdir()
    for file, (configuration, split, rows) in DATA.items():
        data = folder / "data" / file.replace("/", "-").removesuffix(".yaml")
        configurations = {configuration or "default": {"train": rows, split: rows}}  # examples would be of train
        if file in MORE_SPLITS:
            configurations[configuration][MORE_SPLITS[file][0]] = MORE_SPLITS[file][1]
        if file in MORE_CONFIGURATIONS:
            configurations[MORE_CONFIGURATIONS[file][0]] = {split: MORE_CONFIGURATIONS[file][1]}
        _write_data_set(data, configurations)
        name = yaml.load((harness / file).read_text(), Loader=_AnyTag)["task"]
        task = {"include": str(harness / file), "task": name, "dataset_path": str(data)}
        if name in ("nq_open", "triviaqa"):  # the harness's own, but of 256 tokens
            task["generation_kwargs"] = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 9}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    group = {"group": "mmlu", "task": ["mmlu_anatomy"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group))
    return folder


def _write_data_set(folder: Path, configurations: dict[str, dict[str, list[dict]]]) -> None:
    """Write parquet files and the README.md whose head says which file is which split, as on the hub."""
    listed = []
    for configuration, splits in configurations.items():
        (folder / configuration).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            path = f"{configuration}/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / path)
            files.append({"split": split, "path": path})
        listed.append({"config_name": configuration, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


class _AnyTag(yaml.SafeLoader):
    """Reads the harness's files without the functions that they name."""


_AnyTag.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
