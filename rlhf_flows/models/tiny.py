"""A small Qwen2-shaped model and its tokenizer, built locally: for the quickstart and for tests.

About one million parameters by default, one token per character, nothing downloaded. Two decisions
shaped it. Heads are 32 wide, the narrowest that vLLM's attention takes, so the very folder that
transformers trains is the one vLLM samples from. And the tokenizer is Qwen2's own kind (byte-level
pairs, with no pair merged), because loaders pick the class by the type of the model, whatever the
folder says. Built twice, the files are equal byte for byte: weights come from a seed of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Tokenizer

from rlhf_flows.errors import ConfigError

__all__ = ["build_tiny_qwen2", "character_tokenizer", "word_tokenizer"]

_UNTYPED: Any = transformers
"""Its models and its logging have no annotations."""

HEAD_DIM = 32
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def character_tokenizer(
    characters: str | None = None, *, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per character, after `<pad>` (0), `<eos>` (1) and `<unk>` (2).

    Without `characters` there is a token for each byte, so that any text has its tokens (one per
    character of ASCII). With them, text may hold no others: they have no token and are left out.
    """
    if characters is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = [byte_level.pre_tokenize_str(c)[0][0] for c in characters]
        odd = sorted({c for c in characters if not c.isascii() or characters.count(c) > 1})
        if odd:
            raise ConfigError(
                f"characters of a tokenizer must be ASCII and all different, found {odd}: leave"
                " `characters` out for a tokenizer of every text"
            )
    return _qwen2_tokenizer((*SPECIAL_TOKENS, *alphabet), [], chat_template)


def word_tokenizer(
    texts: Iterable[str], *, most_tokens: int = 1024, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level pairs merged where `texts` has them: of a small language, one token per word.

    Any other text has tokens as well, more of them. The special tokens are those of
    `character_tokenizer`.
    """
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(texts, most_tokens, 2, False, list(SPECIAL_TOKENS))
    made = json.loads(bpe._tokenizer.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].__getitem__)
    return _qwen2_tokenizer(tokens, [tuple(pair) for pair in made["merges"]], chat_template)


def _qwen2_tokenizer(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], chat_template: str | None
) -> PreTrainedTokenizerFast:
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=cast("Any", list(merges)),  # its annotation asks for what it refuses
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_tiny_qwen2(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 4,
    characters: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_position_embeddings: int = 512,
    chat_template: str | None = None,
) -> Path:
    """Writes a Hugging Face folder (model, tokenizer, configuration) and returns its path.

    With a `tokenizer` of one's own, such as `word_tokenizer` makes, `characters` and
    `chat_template` are not asked.

    Raises:
        ConfigError: `hidden_size` is no multiple of 32, the width of a head.
    """
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise ConfigError(
            f"hidden_size is {hidden_size}, but a head is {HEAD_DIM} wide (the narrowest that vLLM"
            f" takes): choose a multiple of {HEAD_DIM}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = character_tokenizer(characters, chat_template=chat_template)
    num_heads = hidden_size // HEAD_DIM
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _UNTYPED.Qwen2ForCausalLM(config)
    with _no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging = _UNTYPED.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
