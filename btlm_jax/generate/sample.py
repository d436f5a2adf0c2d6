"""The sample at the end of a training run; apart from text.py, whose imports a training run does not need."""

from __future__ import annotations

from btlm_jax.decode.batch import continue_tokens
from btlm_jax.decode.sampling import Sampling
from btlm_jax.display.progress import printable
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.tokenizer import load_tokenizer
from btlm_jax.train.setup import Run

SAMPLING = Sampling(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def continue_prompt(run: Run, params: dict) -> str:
    """Return the trained model's continuation of log.sample_prompt, without control characters."""
    tokenizer = load_tokenizer(run.token_store.directory, run.token_store.manifest.tokenizer)
    ids = continue_tokens(
        run.model,
        params,
        run.mesh,
        prompt=prompt_ids(run.config.log.sample_prompt, tokenizer=tokenizer, bos_id=None),
        num_tokens=run.config.log.sample_tokens,
        sampling=SAMPLING,
        seed=run.config.seed,
        num_ids=tokenizer.vocab_size,
        stop_id=tokenizer.eos_id,
    )
    return printable(tokenizer.decode(ids))
