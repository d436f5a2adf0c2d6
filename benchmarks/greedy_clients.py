"""Greedy texts of 20 prompts in btlm_jax, in transformers on its export and in llama.cpp on its GGUF: ids, texts.

Command: python benchmarks/greedy_clients.py [--checkpoint=DIR] [--transformers=PYTHON] [--num_tokens=48]
Needs pip install -e '.[hf,gguf]' and xllamacpp (llama.cpp's C library). Without --checkpoint the model is random, with
a tokenizer that has added symbols. --transformers names the Python of another environment, as one with an older
transformers, to run the same comparison in; only PyTorch and transformers are needed there.

Each client makes the ids of a prompt by itself; llama.cpp, which takes no empty prompt, begins that one with the first
id. Two continuations are compared up to the first token that differs. If the client's two best logits there are less
than NEAR_TIE apart, that is a near tie, in which another order of sums decides; otherwise it is a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

NEAR_TIE = 1e-4
LONG = "the quick brown fox jumps over the lazy dog; " * 12
PROMPTS = (
    "", " ", "\n", "def f(x):\n    return", "Return the", "Once upon a time", "  two spaces", "trailing space ",
    "\t\ttabs", "1234567890 + 1 =", "naïve Straße, Łódź", "Где книга?", "数学は、美しい。", "الرياضيات",
    "\U0001f600\U0001f469\u200d\U0001f4bb", "e\u0301 and é", LONG, "<tag>one<tag><|im_start|>two\n", "a</s>b", "</s>",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a client made of a prompt."""

    prompt: list[int]
    ids: list[int]  # up to the end of text, which is not among them
    margins: list[float]  # of the best logit above the second, at each step
    text: str


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """How a client's continuations differ from ours."""

    same_prompts: int = 0
    same_texts: int = 0
    broken: int = 0  # of the same ids, whose bytes are no UTF-8: the tokenizers library replaces each byte of the run
    near_ties: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.same_prompts} prompts with the same ids; continued: {self.same_texts} with the same ids and text, "
            f"{self.broken} with the same ids, with broken characters, {self.near_ties} up to a near tie, "
            f"{len(self.differences)} different"
        )


def compare(prompts: Sequence[str], ours: Sequence[Continuation], theirs: Sequence[Continuation]) -> Comparison:
    """Compare a client's continuations with ours."""
    found = Comparison()
    for text, mine, other in zip(prompts, ours, theirs, strict=True):
        found.same_prompts += mine.prompt == other.prompt
        if mine.prompt != other.prompt:
            found.differences.append(f"{text[:40]!r}: ids {mine.prompt[:12]} here, {other.prompt[:12]} there")
        elif (mine.ids, mine.text) == (other.ids, other.text):
            found.same_texts += 1
        elif mine.ids == other.ids and "\N{REPLACEMENT CHARACTER}" in mine.text and mine.text != other.text:
            found.broken += 1
        elif mine.ids == other.ids:
            found.differences.append(f"{text[:40]!r}: of the same ids {mine.text!r} here, {other.text!r} there")
        else:
            pairs = enumerate(zip(mine.ids, other.ids, strict=False))
            at = next((at for at, (a, b) in pairs if a != b), min(len(mine.ids), len(other.ids)))
            margin = min(one.margins[at] for one in (mine, other) if at < len(one.margins))
            if margin < NEAR_TIE:
                found.near_ties += 1
            else:
                found.differences.append(f"{text[:40]!r}: token {at} differs by a margin of {margin:.2g}")
    return found


def ours(directory: Path, prompts: Sequence[str], *, num_tokens: int) -> list[Continuation]:
    """Continue the prompts with this package, as `btlm generate --temperature=0` does."""
    import numpy as np

    from btlm_jax.decode import batch as decoding
    from btlm_jax.decode.sampling import GREEDY
    from btlm_jax.generate.text import load_with_tokenizer
    from btlm_jax.tokenizers.prompt_bos import prompt_ids

    model, draw, made = load_with_tokenizer(directory, as_int4=False), decoding.draw, []
    tokenizer, network, margins = model.tokenizer, model.metadata.network(), []

    def recording(logits_V, **options):
        second, best = np.sort(logits_V)[-2:]
        margins.append(float(best - second))
        return draw(logits_V, **options)

    decoding.draw = recording
    try:
        for text in prompts:
            margins.clear()
            prompt = prompt_ids(text, tokenizer=tokenizer, bos_id=model.metadata.prompt_bos_id)
            ids = decoding.continue_tokens(
                network,
                model.params,
                model.mesh,
                prompt=prompt,
                num_tokens=num_tokens,
                sampling=GREEDY,
                seed=0,
                num_ids=tokenizer.vocab_size,
                stop_id=tokenizer.eos_id,
            )
            made.append(Continuation(prompt=prompt, ids=ids, margins=list(margins), text=tokenizer.decode(ids)))
    finally:
        decoding.draw = draw
    return made


def of_transformers(directory: Path, prompts: Sequence[str], *, num_tokens: int) -> list[Continuation]:
    """Continue the prompts with an export in transformers, with its tokenizer's and its `generate`'s own settings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32).eval()
    made = []
    for text in prompts:
        ids = tokenizer(text)["input_ids"] or [model.generation_config.bos_token_id]
        result = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.eos_token_id,
        )
        best = torch.stack(result.logits)[:, 0].topk(2).values
        new = result.sequences[0, len(ids) :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        made.append(
            Continuation(
                prompt=ids,
                ids=new,
                margins=(best[:, 0] - best[:, 1]).tolist(),
                text=tokenizer.decode(new, skip_special_tokens=True),
            )
        )
    return made


def of_llama_cpp(
    gguf: Path, prompts: Sequence[str], *, num_tokens: int, mine: Sequence[Continuation], eos_id: int, decode
) -> list[Continuation]:
    """Continue the prompts with a GGUF in llama.cpp; it has no decoder of ids here, so `decode` makes the texts."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support import llama_cpp

    ids = llama_cpp.prompt_ids(gguf, list(prompts))
    ids = [found or one.prompt[:1] for found, one in zip(ids, mine, strict=True)]
    made = []
    for prompt, (new, margins) in zip(ids, llama_cpp.greedy(gguf, ids, num_tokens=num_tokens), strict=True):
        new = new[: new.index(eos_id)] if eos_id in new else new
        made.append(Continuation(prompt=prompt, ids=new, margins=margins, text=decode(new)))
    return made


def export(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """Convert a model to a Hugging Face directory and to an F32 GGUF, in float32."""
    from btlm_jax.convert.conversion import Conversion, convert

    options = {"dtype": "float32", "file_type": "F32", "max_shard_bytes": 10**10, "method": "rtn", "calibration": None}
    hf, gguf = folder / "hf", folder / "model.gguf"
    for target, format, pad_ffn in ((hf, "hf", 1), (gguf, "gguf", 256)):
        one = Conversion(source=checkpoint, target=target, format=format, pad_ffn=pad_ffn, **options)
        convert(one, log=lambda line: None)
    return hf, gguf


def random_model(directory: Path) -> None:
    """Write a small random model with a SentencePiece tokenizer that has symbols of its own."""
    import io

    import jax
    import sentencepiece

    from btlm_jax.hub.native import ModelMetadata, one_device_mesh, write_model_directory
    from btlm_jax.model import init_params
    from btlm_jax.recipe.config import ModelConfig, MupConfig
    from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
    from btlm_jax.tokenizers.tokenizer import tokenizer_info

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=trained,
        vocab_size=500,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        user_defined_symbols=["\n", "<tag>", "<|im_start|>"],
        bos_id=-1,
        eos_id=1,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(trained.getvalue())
    sizes = {"vocab_size": 500, "num_layers": 2, "d_model": 60, "num_heads": 4, "d_ff": 88}
    model = ModelConfig(
        **sizes,
        layer_norm_eps=1e-5,
        qk_norm="none",
        alibi_scaling=1.0,
        dtype="float32",
        attention="auto",
        remat="full",
        loss_chunk=100,
    )
    mup = MupConfig(
        preset="btlm", base_d_model=30.0, base_d_ff=44.0, base_num_layers=2, init_std=0.2, embedding_multiplier=10.0,
        output_multiplier=2.0,
    )  # fmt: skip
    metadata = ModelMetadata(
        model=model,
        mup=mup,
        max_length=128,
        eos_id=1,
        tokenizer=tokenizer_info(tokenizer),
        prompt_bos_id=None,
        notes={},
    )
    params = jax.tree.map(lambda array: 2 * array, init_params(metadata.network(), one_device_mesh(), seed=5))
    write_model_directory(directory, metadata=metadata, params=params, tokenizer=tokenizer)


def run(
    checkpoint: Path, folder: Path, *, num_tokens: int, python: str, prompts: Sequence[str]
) -> dict[str, Comparison]:
    """Return the comparison with each client."""
    from btlm_jax.generate.text import load_with_tokenizer

    hf, gguf = export(checkpoint, folder)
    mine, tokenizer = ours(checkpoint, prompts, num_tokens=num_tokens), load_with_tokenizer(hf, as_int4=False).tokenizer
    found = {"transformers": compare(prompts, mine, of_transformers(hf, prompts, num_tokens=num_tokens))}
    if python:
        command = [python, __file__, f"--client={hf}", f"--num_tokens={num_tokens}"]
        done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        theirs = [Continuation(**row) for row in json.loads(done.stdout.splitlines()[-1])]
        found[f"transformers of {python}"] = compare(prompts, mine, theirs)
    theirs = of_llama_cpp(
        gguf, prompts, num_tokens=num_tokens, mine=mine, eos_id=tokenizer.eos_id, decode=tokenizer.decode
    )
    return found | {"llama.cpp": compare(prompts, mine, theirs)}


def main() -> None:
    """Print a line for each client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--transformers", default="")
    parser.add_argument("--num_tokens", type=int, default=48)
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        made = of_transformers(given.client, json.load(sys.stdin), num_tokens=given.num_tokens)
        print(json.dumps([dataclasses.asdict(one) for one in made]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = given.checkpoint or Path(scratch) / "random"
        if not given.checkpoint:
            random_model(checkpoint)
        options = {"num_tokens": given.num_tokens, "python": given.transformers, "prompts": PROMPTS}
        found = run(checkpoint, Path(scratch), **options)
    for client, comparison in found.items():
        print(f"{client}: {comparison}")
        for line in comparison.differences:
            print(f"  {line}")
    sys.exit(any(comparison.differences for comparison in found.values()))


if __name__ == "__main__":
    main()
