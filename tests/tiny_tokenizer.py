"""A tokenizer of 100 words, for tiny checkpoints of every model type."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path) -> None:
    """Words w0 to w99 are tokens 0 to 99; there is no end token among them."""
    vocabulary = {f"w{i}": i for i in range(100)} | {"<end>": 100}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
