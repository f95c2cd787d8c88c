r"""How text is cut before byte-level BPE, for every accepted value of GGUF's `tokenizer.ggml.pre`.

A GGUF file stores merges but not the regular expression that cuts the text first; it only names it.
The wrong cut gives valid but wrong ids, so a name that isn't in `PRE_TOKENIZERS` is refused.
Expressions are those of the models' own `tokenizer.json`; names that share one cut follow
llama.cpp's `llama-vocab.cpp`. Read `gguf_tokenizer.py` next.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from lepton_jax.text.pieces import TokenizerError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_TAIL}"
_SEED = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = r"[^\r\n\p{L}\p{N}]?"  # a word is capitals then small letters, so camelCase comes apart
_TEKKEN = (
    rf"{_CAMEL}{_UPPER}*{_LOWER}+|{_CAMEL}{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"{_CAMEL}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_CAMEL}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions that isolate their matches one after the other, and what else the name
    implies.

    `ignore_merges`: a whole piece that is in the vocabulary is taken as it is, whatever the merges
    say. `add_bos`: what holds if the file doesn't say. `nfc`: the text is composed (Unicode NFC)
    first.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The step for a `tokenizers.Tokenizer`, ending in the byte-level alphabet."""
        splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in self.cuts]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_LLAMA3_CUT = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_TIKTOKEN_CUT = PreTokenizer((_LLAMA3,))
_QWEN2_CUT = PreTokenizer((_QWEN2,), nfc=True)
_GPT2_CUT = PreTokenizer((_GPT2,))
_SINGLE_DIGITS_CUT = PreTokenizer((r"\p{N}", _GPT2))
_GPT4O_CUT = PreTokenizer((_GPT4O,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "midm-2.0"), _LLAMA3_CUT),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _TIKTOKEN_CUT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_CUT),
    "megrez": PreTokenizer((_QWEN2,)),
    "seed-coder": PreTokenizer((_SEED,)),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "trillion", "gigachat", "a.x-4.0"), _GPT2_CUT),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _SINGLE_DIGITS_CUT,
    ),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O_CUT),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
}


def pre_tokenizer(name: object) -> PreTokenizer:
    """The cut called `name`; raises `TokenizerError` with the list of known names for any other."""
    if isinstance(name, str) and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    known = ", ".join(sorted(PRE_TOKENIZERS))
    found = "is missing" if name is None else f"is {name!r}"
    raise TokenizerError(
        f"tokenizer.ggml.pre {found}: how this model cuts text isn't known, and a guess would give "
        f"wrong ids. Known: {known}. Point model.tokenizer to the model's tokenizer.json instead."
    )
