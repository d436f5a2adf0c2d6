"""Tokenizers; and training one in a process of its own, which ends at once when the command is interrupted."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterable

from btlm_jax import ending_of, module_command

MAX_VOCAB_SIZE = 1 << 22  # of a tokenizer that is trained; libraries take memory for all of it at once
_PROGRAM = "btlm_jax.tokenizers.train_process"


def train_in_process(kind: str, texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a tokenizer of a kind (store.TokenizerInfo.kind) on texts and return its file's contents.

    The libraries that train do not look at signals, so a process of its own does it, which is killed if this one is
    interrupted. It is no child of multiprocessing, which would need scripts that call this to be written for it.

    Raises:
      ValueError: the vocabulary is too small, or too large for these texts.
      OSError: the process ended without a result.
    """
    with subprocess.Popen(
        [*module_command(_PROGRAM), kind, str(vocab_size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                with process.stdin as stream:
                    for text in texts:
                        pickle.dump(text, stream)
            except BrokenPipeError:  # the result says why
                pass
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise OSError(
            f"the process that trained the tokenizer ended: {ending_of(process.returncode)}; what it said is above"
        )
    result = pickle.loads(answer)
    if isinstance(result, str):
        raise ValueError(result)
    return result
