"""`btlm convert`: a model in another format, proven to compute the same."""

from __future__ import annotations

from collections.abc import Sequence

from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.parse import Flags

CONVERT_HELP = """btlm convert: make a model of another form, and prove that it computes the same.

examples:  btlm convert --from=runs/local --to=local_hf                    a run -> Hugging Face
           btlm convert --from=btlm-3b-8k-base --to=btlm_native --format=native    Hugging Face -> ours
           btlm convert --from=local_hf --to=local.gguf --format=gguf --file_type=Q4_0    -> llama.cpp
           btlm convert --from=local_hf --to=local_jais --format=jais      -> vLLM up to 0.22, llama.cpp's converter
           btlm convert --from=runs/local --to=local_int4 --format=int4    -> 4 bits for btlm generate

--from is a training run, a directory that this verb wrote as hf or native, or a Hugging Face BTLM directory of any
generation (safetensors or .bin, sharded or not). The logits of both are compared on real tokens before the target gets
its name; if they differ by more than rounding, or anything is wrong with the source, nothing is kept.
"""

# What conversion.py, ggml.py and quantize_model.py know, whose imports take seconds that --help has not.
FORMATS = ("hf", "native", "jais", "gguf", "int4")
FILE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
METHODS = ("gptq", "awq", "awq+gptq", "hqq", "rtn")
# flag -> the formats on which it has an effect
FORMATS_OF_FLAG = {
    "dtype": ("hf", "jais"),
    "max_shard_gb": ("hf", "jais"),
    "pad_ffn": ("hf", "jais", "gguf"),
    "file_type": ("gguf",),
    "context_length": ("gguf",),
    "name": ("gguf",),
    "method": ("int4",),
    "calibration": ("int4",),
}


def convert(arguments: Sequence[str]) -> int:
    """Run `btlm convert`; return the exit code."""
    flags = convert_flags()
    if not flags.parse(arguments):
        return DONE
    source = flags.run_path("from")
    target = flags.path("to")
    from btlm_jax.convert import conversion

    target_format = flags.string("format")
    for name, formats in FORMATS_OF_FLAG.items():
        if flags.is_given(name) and target_format in conversion.FORMATS and target_format not in formats:
            raise UsageError(f"--{name} has no effect on --format={target_format}; it is for {' and '.join(formats)}")
    if not 1e-9 <= flags.number("max_shard_gb") <= 1e9:
        raise UsageError(f"--max_shard_gb={flags.number('max_shard_gb'):g} must be above 0 and at most 1e9")
    default_padding = conversion.PAD_FFN.get(target_format, 1)
    try:
        settings = conversion.Conversion(
            source=source,
            target=target,
            format=target_format,
            dtype=flags.string("dtype"),
            file_type=flags.string("file_type"),
            pad_ffn=flags.integer("pad_ffn") if flags.is_given("pad_ffn") else default_padding,
            max_shard_bytes=int(flags.number("max_shard_gb") * 1e9),
            context_length=flags.integer("context_length"),
            name=flags.string("name"),
            method=flags.string("method"),
            calibration=flags.optional_path("calibration"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    conversion.convert(settings, log=print)
    return DONE


def convert_flags() -> Flags:
    """Define the flags of `btlm convert`."""
    flags = Flags(CONVERT_HELP)
    flags.define_string("from", "", "a run, RUN/average, a model directory or a Hugging Face directory")
    flags.define_string("to", "", "directory, or .gguf file, to make; it must not exist")
    flags.define_string(
        "format", "hf", "hf is Hugging Face's, native and int4 are ours, jais is for vLLM", choices=FORMATS
    )
    flags.define_string("dtype", "float32", "of hf and jais", choices=("float32", "bfloat16", "float16"))
    flags.define_string("file_type", "F16", "of gguf", choices=FILE_TYPES)
    flags.define_integer(
        "pad_ffn", 0, "zero-pad the feed-forward width to a multiple; 256 for jais and gguf, otherwise 1"
    )
    flags.define_string("method", "gptq", "of int4; hqq and rtn need no text", choices=METHODS)
    flags.define_string("calibration", "", "of int4: a text file, 16,384 tokens are enough; a run has its own data")
    flags.define_integer("context_length", 0, "of gguf: tokens that clients allow; by default the trained length")
    flags.define_string("name", "", "of gguf: the model's name; by default the file's")
    flags.define_float("max_shard_gb", 5.0, "size of a weights file, in 1e9 bytes")
    return flags
