"""The verb that makes text: generate."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import DONE, UsageError, parse_flags

GENERATE_HELP = """btlm generate: continue texts with a trained model.

examples:
  btlm generate --checkpoint=runs/local --prompt="Return the" --num_tokens=200
      writes on, each character as soon as it is certain
  btlm generate --checkpoint=runs/local --prompt="def " --temperature=0 --stop=$'\\n\\n' --stop="def "
      the likeliest text, up to an empty line or the next "def ", whichever is complete first; neither is shown
  btlm generate --checkpoint=local_hf --prompt="Once" --temperature=0.8 --top_p=0.95 --num_samples=5 --seed=3
      five samples of one prompt
  btlm generate --checkpoint=runs/local --prompts_file=prompts.jsonl --batch_size=16 --output=texts.jsonl
      every prompt of a file (one a line, or {"prompt": ...} a line where it ends in .jsonl), with its text, number of
      tokens, and why it ended: length, end of document or stop string
  btlm generate --checkpoint=local_int4 --prompt="def "
      a 4-bit model (btlm convert --format=int4); --int4 does the same to any other model on the way

--checkpoint is a training run, a converted model or a Hugging Face BTLM directory. Text goes to the output; progress
and speed go to the error stream. A sample depends on its prompt, --seed and its number, not on the batch or its place.
"""

SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generate(arguments: Sequence[str]) -> int:
    """Run `btlm generate`; return the exit code."""
    values = _flags()
    if not parse_flags(values, arguments, help_text=GENERATE_HELP):
        return DONE
    if not values["checkpoint"].value:
        raise UsageError("btlm generate needs --checkpoint=DIR: a run, a converted model or a Hugging Face directory")
    if values["prompt"].present and values["prompts_file"].present:
        raise UsageError("--prompt and --prompts_file are both given; give one of them")
    for name in ("prompts_file", "output"):
        if values[name].present and not values[name].value:
            raise UsageError(f"--{name}= is empty; give the name of a file")
    prompts = importlib.import_module("btlm_jax.generate.prompts")
    sampling = importlib.import_module("btlm_jax.decode.sampling")
    serve = importlib.import_module("btlm_jax.generate.text")
    try:
        prompts.check_text(values["prompt"].value, name="--prompt")
        how = serve.GenerationConfig(
            sampling=sampling.Sampling(**{name: values[name].value for name in SAMPLING_FLAGS}),
            stops=tuple(values["stop"].value),
            **{name: values[name].value for name in ("num_tokens", "num_samples", "batch_size", "seed", "cache_dtype")},
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if values["prompts_file"].value:
        asked = prompts.read_prompts(Path(values["prompts_file"].value))
    else:
        asked = [prompts.Prompt(text=values["prompt"].value, beside={})]
    output = values["output"].value
    if output:
        serve.check_output(Path(output))
    native = serve.load_with_tokenizer(Path(values["checkpoint"].value), as_int4=values["int4"].value)
    if output:
        serve.save_completions(native, asked, how=how, path=Path(output))
    elif values["prompts_file"].value or how.num_samples > 1:
        serve.print_completions(native, asked, how=how)
    else:
        serve.stream_completion(native, asked[0], how=how)
    return DONE


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", "", "a run, a converted model or a Hugging Face directory", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue; empty: begin a document", flag_values=values)
    flags.DEFINE_string("prompts_file", "", "file of prompts, one a line or JSON lines (.jsonl)", flag_values=values)
    flags.DEFINE_string("output", "", "file for the texts as JSON lines, instead of printing them", flag_values=values)
    flags.DEFINE_integer("num_tokens", 200, "at most so many new tokens of each text", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "end before this string; may be given several times", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "texts of each prompt", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "texts made at a time, where there are several", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the drawing", flag_values=values)
    flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw from so many likeliest tokens; 0: from all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens with this much probability", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "draw from tokens this share as likely as the likeliest", flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen less likely", flag_values=values)
    flags.DEFINE_string(
        "cache_dtype",
        "model",
        "of keys and values: float32, bfloat16, int8; model: as it computes, at 4 bits int8",
        flag_values=values,
    )
    flags.DEFINE_boolean("int4", False, "round the weights to 4 bits first", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values
