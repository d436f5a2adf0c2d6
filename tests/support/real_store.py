"""A small real token store, built by the real corpus code from made-up documents, and a config that trains on it."""

import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from support.tiny import TINY, config_dict

from btlm_jax.corpus.installed import build
from btlm_jax.corpus.installed.documents import SOURCES, Document
from btlm_jax.data.store import Manifest
from btlm_jax.display.progress import Log

VOCAB_SIZE = 400
BLOCK_LEN = 48
CONFIG_FILE = """from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


def made_up_documents(skipped: object) -> Iterator[Document]:
    """Yield 240 documents of made-up words, of three sources; the same every time."""
    del skipped
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(600)]
    for number in range(240):
        text = "\n".join(" ".join(rng.choices(words, k=rng.randint(5, 12))) for _ in range(rng.randint(5, 40)))
        yield Document(id=f"document {number}", source=SOURCES[number % len(SOURCES)], blocks=(text,))


def build_real_store(directory: Path, *, log: Log = lambda line: None) -> Manifest:
    """Build the store; two of them are equal byte for byte."""
    config = build.CorpusConfig(
        source="installed_python", max_bytes=10**6, heldout_fraction=0.1, heldout_bytes_per_source=2_000
    )
    with (
        mock.patch.object(build, "installed_documents", made_up_documents),
        mock.patch.object(build, "describe_installation", lambda: {"python": "made up", "packages": {}}),
    ):
        return build.build_store(
            config, vocab_size=VOCAB_SIZE, block_len=BLOCK_LEN, seed=1, directory=directory, log=log
        )


def write_config(path: Path, *, store: Path | str, **changes) -> Path:
    """Write a config file: the tiny config on that store; a change is written model__d_model=80."""
    values = config_dict("local_cpu")
    dotted = {**TINY, "model.vocab_size": VOCAB_SIZE, "data.store": str(store), "corpus.source": "prepared"}
    dotted["log.sample_tokens"] = 1
    for key, value in {**dotted, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        assert name in target, key
        target[name] = value
    path.write_text(CONFIG_FILE.format(values=values))
    return path
