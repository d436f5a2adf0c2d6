"""A `btlm` command that writes down which modules of ours are loaded, for a process of its own.

    python loaded_modules.py FILE ARGUMENTS...

writes JSON to FILE: the modules after the first logged step, after the last one, and at the end. With --made_up as the
last argument the corpus is made of made-up documents instead of the installed packages'.
"""

import json
import sys
from pathlib import Path
from unittest import mock

from btlm_jax.cli import main
from btlm_jax.train.metric_writer import MetricWriter

LIBRARIES_FOR_OTHERS = ("ftfy", "matplotlib", "sentencepiece", "tiktoken", "tokenizers", "torch", "transformers")


def noted_modules() -> list[str]:
    """Return the package's modules that are loaded, and the libraries that a step of training has no use for."""
    noted = {"btlm_jax", *LIBRARIES_FOR_OTHERS}
    names = (name for name in sys.modules if name.split(".")[0] in noted)
    return sorted(name for name in names if name.startswith("btlm_jax") or "." not in name)


def run(arguments: list[str]) -> dict[str, list[str]]:
    """Run the command; return the modules by moment."""
    moments: dict[str, list[str]] = {}
    write_train = MetricWriter.train

    def train(self, *values, **named):
        write_train(self, *values, **named)
        moments.setdefault("first step", noted_modules())
        moments["last step"] = noted_modules()

    with mock.patch.object(MetricWriter, "train", train):
        assert main(arguments) == 0
    return {**moments, "end": noted_modules()}


if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    if arguments[-1] == "--made_up":
        arguments.pop()
        from support.real_store import made_up_documents

        from btlm_jax.corpus.installed import build

        build.installed_documents = made_up_documents
    Path(file).write_text(json.dumps(run(arguments)))
