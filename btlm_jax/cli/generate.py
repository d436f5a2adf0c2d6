"""`btlm generate`: continue texts with a trained model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.parse import Flags

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

A prompt has the ids that Hugging Face transformers makes of it from the model's export, and llama.cpp from its GGUF:
nothing is put in front unless the model's own tokenizer files say so (those of the published BTLM, and of models
trained here, do not); only an empty prompt begins with the end-of-text id. --bos=none, eos or an id's number changes
that. The name of a special token in a prompt, such as <|endoftext|>, stands for that token. Ids that no token has,
where the model has more of them than its tokenizer, are never drawn.

--output keeps each text in FILE.partial once it is finished; after Ctrl-C, a kill or a full disk the same command goes
on and ends with the same file. It replaces nothing but an empty file or earlier texts of btlm generate.

--checkpoint is a training run, a converted model or a Hugging Face BTLM directory, or the URL of one. Text goes to the
output; progress and speed go to the error stream. A sample depends on its prompt, --seed and its number, not on the
batch or its place.
"""


def generate(arguments: Sequence[str]) -> int:
    """Run `btlm generate`; return the exit code."""
    flags = generate_flags()
    if not flags.parse(arguments):
        return DONE
    checkpoint = flags.run_path("checkpoint")
    if flags.is_given("prompt") and flags.is_given("prompts_file"):
        raise UsageError("--prompt and --prompts_file are both given; give one of them")
    prompts_file, path = flags.optional_path("prompts_file"), flags.optional_path("output")
    from btlm_jax.decode import sampling
    from btlm_jax.generate import output, prompts, text
    from btlm_jax.storage import files

    try:
        prompts.check_text(flags.string("prompt"), name="--prompt")
        config = text.GenerationConfig(
            sampling=sampling.Sampling(
                temperature=flags.number("temperature"),
                top_k=flags.integer("top_k"),
                top_p=flags.number("top_p"),
                min_p=flags.number("min_p"),
                repetition_penalty=flags.number("repetition_penalty"),
            ),
            stops=tuple(flags.strings("stop")),
            num_tokens=flags.integer("num_tokens"),
            num_samples=flags.integer("num_samples"),
            batch_size=flags.integer("batch_size"),
            seed=flags.integer("seed"),
            cache_dtype=flags.string("cache_dtype"),
            bos=flags.string("bos"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if prompts_file is not None:
        given = prompts.read_prompts(prompts_file)
    else:
        given = [prompts.Prompt(text=flags.string("prompt"), extra={})]
    if path is not None:
        output.check_output(path, prompts_file=prompts_file)
    with contextlib.nullcontext() if path is None else files.only_writer(path):
        model = text.load_with_tokenizer(checkpoint, as_int4=flags.boolean("int4"))
        if path is not None:
            text.save_completions(model, given, config=config, path=path)
        elif prompts_file is not None or config.num_samples > 1:
            text.print_completions(model, given, config=config)
        else:
            text.stream_completion(model, given[0], config=config)
    return DONE


def generate_flags() -> Flags:
    """Define the flags of `btlm generate`."""
    flags = Flags(GENERATE_HELP)
    flags.define_string("checkpoint", "", "a run, RUN/average, a converted model or a Hugging Face directory, or a URL")
    flags.define_string("prompt", "", "text to continue; empty: begin a document")
    flags.define_string("prompts_file", "", "file of prompts, one a line or JSON lines (.jsonl)")
    flags.define_string("output", "", "file for the texts as JSON lines, instead of printing them")
    flags.define_string(
        "bos", "model", "put in front of each prompt: what the model's tokenizer files say (model), none, eos, or an id"
    )
    flags.define_integer("num_tokens", 200, "at most so many new tokens of each text")
    flags.define_strings("stop", "end before this string, or at the special token of this name")
    flags.define_integer("num_samples", 1, "texts of each prompt")
    flags.define_integer("batch_size", 8, "texts made at a time, where there are several")
    flags.define_integer("seed", 0, "of the drawing")
    flags.define_float("temperature", 0.7, "0 takes the likeliest token")
    flags.define_integer("top_k", 0, "draw from so many likeliest tokens; 0: from all")
    flags.define_float("top_p", 1.0, "draw from the fewest tokens with this much probability")
    flags.define_float("min_p", 0.0, "draw from tokens this share as likely as the likeliest")
    flags.define_float("repetition_penalty", 1.0, "above 1 makes tokens seen less likely")
    flags.define_string(
        "cache_dtype",
        "model",
        "of keys and values; model: as it computes, at 4 bits int8",
        choices=("model", "float32", "bfloat16", "int8"),
    )
    flags.define_boolean("int4", False, "round the weights to 4 bits first")
    return flags
