"""A tiny model with a tokenizer in Hugging Face's form, and small local tasks of every kind of request."""

import json
import random
from pathlib import Path
from unittest import mock

import yaml
from support.published_files import oracle_weights, write_published
from support.tiny_tokenizers import TEXTS, tiny_byte_level

from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert

WORDS = sorted({word for text in TEXTS[:20] for word in text.split()})
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
TASKS = {
    "local_choice": MULTIPLE_CHOICE,
    "local_few_shot": MULTIPLE_CHOICE | {
        "num_fewshot": 3, "fewshot_split": "few", "fewshot_config": {"sampler": "first_n"},
    },
    "local_letter": MULTIPLE_CHOICE | {
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nAnswer:", "doc_to_choice": ["A", "B", "C"],
        "metric_list": [{"metric": "acc"}],
    },
    "local_no_context": MULTIPLE_CHOICE | {
        "doc_to_text": "", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    "local_last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}} ", "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{generated}}",
        "generation_kwargs": {"until": ["\n", "e "], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def write_tasks(folder: Path, *, num_documents: int = 8) -> Path:
    """Write TASKS and their documents; return the folder, which is for --include_path."""
    folder.mkdir()
    generator = random.Random(1)

    def some_words(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    documents = [
        {
            "question": some_words(2, 25), "choices": [some_words(1, 6) for _ in range(3)],
            "answer": generator.randrange(3), "text": some_words(1, 250) if number else "",
            "generated": some_words(1, 2),
        }
        for number in range(num_documents)
    ]  # fmt: skip
    files = {}
    for split, its in (("test", documents), ("few", documents[:3])):
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(document) + "\n" for document in its))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    return folder


def write_tiny_model(folder: Path) -> Path:
    """Write the tiny oracle with 300 ids and their tokenizer, as `btlm convert` exports it; return its directory."""
    weights = oracle_weights()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:300].copy()
    source = write_published(folder / "source", weights, vocab_size=300, eos_token_id=299, bos_token_id=299)
    tiny_byte_level().save(str(source / "tokenizer.json"))
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9, "method": "rtn"}
    with mock.patch.object(conversion, "has_transformers", lambda: False):
        convert(
            Conversion(source=source, target=folder / "export", format="hf", calibration=None, **options),
            log=lambda line: None,
        )
    return folder / "export"
