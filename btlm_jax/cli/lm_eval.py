"""`btlm lm-eval`: the command line of lm-evaluation-harness, which has our models here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from btlm_jax import install_command
from btlm_jax.cli import DONE

LM_EVAL_HELP = """btlm lm-eval: the command line of lm-evaluation-harness with --model=btlm, which is the default here.

examples:
  btlm lm-eval run --model_args checkpoint=runs/local --tasks hellaswag,piqa --output_path results
  btlm lm-eval run --model_args checkpoint=btlm-3b-8k-base,int4=True --tasks mmlu --num_fewshot 5 --use_cache answers
  btlm lm-eval run --model_args checkpoint=local_hf,max_length=2048 --include_path my_tasks --tasks my_task
  btlm lm-eval ls tasks
      the harness's tasks; btlm lm-eval run --help has all flags

The keys of --model_args of this model:
  checkpoint=MODEL    a run, one of its checkpoints, a converted, 4-bit or Hugging Face model, or a URL of one
  int4=True           quantize the weights to 4 bits on the way
  dtype=float32       or bfloat16, in which it computes; by default the model's own
  max_length=N        of context and continuation; by default the length that the model was trained at
  batch_tokens=N      tokens that are scored at a time (default 2048); --batch_size says how many texts are generated
                      (by default, and of the harness's own default 1, 16)
  seed=N              of texts that are sampled

Everything else is the harness's: other models, groups, samples, loggers; but --apply_chat_template is not for this
model: its export has it, with --model hf. Tasks that make texts of given lengths (RULER) get the model's tokenizer.
btlm evaluate --tasks does the same with kept results that an interrupted command goes on from. The package lm_eval is
in the extra evaluate.
"""


def lm_eval(arguments: Sequence[str]) -> int:
    """Run `btlm lm-eval`; return the exit code.

    Raises:
      ValueError: the harness refuses the command, or it fails.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(LM_EVAL_HELP)
        return DONE
    try:
        from btlm_jax.evaluate import harness_command
    except ModuleNotFoundError as error:
        raise ImportError(f"btlm lm-eval needs the package {error.name}: {install_command('evaluate')}") from error

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given, sys.argv = sys.argv, ["btlm lm-eval", *arguments]
    try:
        harness_command.run(arguments)
    except SystemExit as end:  # of its parser, which has printed help or what is wrong
        return end.code if isinstance(end.code, int) else DONE
    finally:
        sys.argv = given
    return DONE
