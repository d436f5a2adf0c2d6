"""The verb that makes a model of another form: convert."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import DONE, UsageError, parse_flags

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

# flag -> the formats that it says something about
FORMATS_OF_FLAG = {
    "dtype": ("hf", "jais"),
    "max_shard_gb": ("hf", "jais"),
    "pad_ffn": ("hf", "jais", "gguf"),
    "file_type": ("gguf",),
    "method": ("int4",),
    "calibration": ("int4",),
}


def convert(arguments: Sequence[str]) -> int:
    """Run `btlm convert`; return the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("from", "", "a run, a model directory or a Hugging Face directory", flag_values=values)
    flags.DEFINE_string("to", "", "directory, or .gguf file, to make; it must not exist", flag_values=values)
    flags.DEFINE_string(
        "format", "hf", "hf (Hugging Face), native (ours), jais (for vLLM), gguf, or int4 (ours)", flag_values=values
    )
    flags.DEFINE_string("dtype", "float32", "of hf and jais: float32, bfloat16 or float16", flag_values=values)
    flags.DEFINE_string(
        "file_type", "F16", "of gguf: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or Q4_0", flag_values=values
    )
    flags.DEFINE_integer(
        "pad_ffn", None, "zero-pad the feed-forward width to a multiple; 256 for jais and gguf, otherwise 1",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("method", "gptq", "of int4: gptq, awq, awq+gptq; without a text hqq, rtn", flag_values=values)
    flags.DEFINE_string(
        "calibration", "", "of int4: a text file, 16,384 tokens are enough; a run has its own data", flag_values=values
    )
    flags.DEFINE_float("max_shard_gb", 5.0, "size of a weights file, in 1e9 bytes", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not parse_flags(values, arguments, help_text=CONVERT_HELP):
        return DONE
    for name in ("from", "to"):
        if not values[name].value:
            raise UsageError(f"btlm convert needs --{name}=DIR")
    conversion = importlib.import_module("btlm_jax.convert.conversion")
    target_format = values["format"].value
    for name, formats in FORMATS_OF_FLAG.items():
        if values[name].present and target_format in conversion.FORMATS and target_format not in formats:
            raise UsageError(f"--{name} says nothing about --format={target_format}; it is for {' and '.join(formats)}")
    pad_ffn = values["pad_ffn"].value if values["pad_ffn"].present else conversion.PAD_FFN.get(target_format, 1)
    try:
        asked = conversion.Conversion(
            source=Path(values["from"].value),
            target=Path(values["to"].value),
            format=target_format,
            dtype=values["dtype"].value,
            file_type=values["file_type"].value,
            pad_ffn=pad_ffn,
            max_shard_bytes=int(values["max_shard_gb"].value * 1e9),
            method=values["method"].value,
            calibration=Path(values["calibration"].value) if values["calibration"].value else None,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    conversion.convert(asked, say=print)
    return DONE
