"""Strings to token ids and back: the only room that knows what text is.

`tokenizer.load(source)` is the door; `detokenizer.Detokenizer` turns the ids of one answer back
into text as they come; `chat_template` renders messages. Everything below this room sees ids only.
Read `tokenizer.py` next.
"""

from lepton_jax.text.chat_template import ChatTemplateError
from lepton_jax.text.detokenizer import Detokenizer
from lepton_jax.text.tokenizer import Tokenizer, load

__all__ = ["ChatTemplateError", "Detokenizer", "Tokenizer", "load"]
