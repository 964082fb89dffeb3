"""Tokenizers of every kind, trained on a few lines; each has <eot>, which ends, and <tool>."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LINES = ["The sky is blue and the soup was great.", "hello world , I say . yes", "a0(.", "playing"]
SPECIAL = ["<unk>", "<pad>", "<tool>", "<eot>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"
CHAT = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eot>\n{% else %}<tool>{% endif %}{% endfor %}"  # fmt: skip


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    values = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eot>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<tool>"], **values
    )
    made.chat_template = CHAT
    return made


def byte_level(*, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, or RoBERTa's, which puts a space before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return fast(made)


def sentencepiece(scheme: str | None, *, strips: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's with a scheme of its own; None: by a normalizer, as the oldest files have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = [*SPECIAL, *BYTES]
    made.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    made = without_special_bytes(made)
    if scheme is None:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        made.pre_tokenizer = None  # type: ignore[assignment]  # the stub knows no removal
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return fast(made)


def without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer makes the bytes special tokens; in a published tokenizer they are not."""
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(values))


def unigram(*, collapses: bool = False) -> PreTrainedTokenizerFast:
    """As T5's, whose normalizer collapses spaces, or one that keeps them and all bytes."""
    letters = sorted({letter for line in LINES for letter in line if letter != " "})
    scored = [(word, -4.0) for word in (SPACE + "blue", SPACE + "yes", "ue", "lo", "play", "ing")]
    pieces: list[tuple[str, float]] = [(token, 0.0) for token in SPECIAL]
    pieces += [(byte, -20.0) for byte in BYTES]
    pieces += [(letter, -6.0) for letter in [SPACE, *letters]] + scored
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    if collapses:
        made.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(SPECIAL)
    return fast(made)


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: small letters, words joined by spaces, and a token at the end of every text."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = [*SPECIAL, "[CLS]", "[SEP]"]
    made.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False),
    )
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(one, made.token_to_id(one)) for one in ("[CLS]", "[SEP]")],
    )
    return fast(made)


EXACT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, with a space before": lambda: byte_level(add_prefix_space=True),
    "sentencepiece, first": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "sentencepiece, never": lambda: sentencepiece("never", strips=False),
    "sentencepiece, by a normalizer": lambda: sentencepiece(None),
    "unigram": unigram,
}
"""Those that can reproduce every text."""
CHANGING: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "word pieces": word_pieces,
    "collapsing spaces": lambda: unigram(collapses=True),
}
"""Those that cannot."""


def ids_after(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """Tokens of a text after a prompt that ends where a token ends."""
    before, whole = (tokenizer(one)["input_ids"] for one in (prompt, prompt + text))
    assert whole[: len(before)] == before
    return whole[len(before) :]
