"""Small tokenizers of each kind, and texts that break careless ones."""

import io
import json
from collections import Counter
from pathlib import Path

import sentencepiece
import tokenizers
from hypothesis import strategies
from support.real_store import made_up_documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer

TEXTS = [document.text for document in made_up_documents(Counter())]
NASTY = [
    "",
    " ",
    "  two leading spaces\n\n\n\ttabs\t\tand trailing  ",
    "emoji \U0001f600, accents é e\u0301, Greek αβγ, CJK 漢字, ligature ﬁ, full width Ａ",
    "</s><unk><0x41><|endoftext|> control pieces as text",
    "carriage\r\nreturns\rand \x0b\x1f controls",
    "x" * 20_000,
]
# SentencePiece keeps U+2581 for itself and writes it as a space; UTF-8 has no surrogates
ANY_TEXT = strategies.text(strategies.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
EOS = "<|endoftext|>"


def tiny_byte_level(**changes) -> Tokenizer:
    """A byte-level BPE of 300 tokens by the tokenizers library, with parts of it set to something else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def write_gpt2_files(folder: Path) -> None:
    """Make a folder of the tiny byte-level BPE's vocab.json and merges.txt, which is what GPT-2's tokenizer has."""
    folder.mkdir()
    tiny_byte_level().model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text()) | {EOS: 299}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def trained(**settings) -> SentencePieceTokenizer:
    """A SentencePiece model of the library's own defaults, but for the given settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.split("\n")),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 400, "hard_vocab_limit": False, "normalization_rule_name": "identity"} | settings,
    )
    return SentencePieceTokenizer(model.getvalue())


def own_pattern() -> tokenizers.Tokenizer:
    cut = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]+"), "isolated")
    steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return tiny_byte_level(pre_tokenizer=pre_tokenizers.Sequence(steps))
