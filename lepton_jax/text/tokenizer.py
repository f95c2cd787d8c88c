"""The one face of every tokenizer: text and messages to ids, ids to text. `load` picks the source.

    tokenizer = load("model.gguf")  # or a Hugging Face directory, a tokenizer.json, a .model
    ids = tokenizer.encode("Hello")  # with bos where the model wants one
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hello"}])
    tokenizer.decode(ids)

Sources: `hf_tokenizer.py`, `gguf_tokenizer.py`; how ids spell bytes: `pieces.py`; for text that
grows token by token use `detokenizer.py`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lepton_jax.text import chat_template
from lepton_jax.text.detokenizer import Detokenizer
from lepton_jax.text.gguf_metadata import read_metadata
from lepton_jax.text.gguf_tokenizer import parts_from_metadata
from lepton_jax.text.hf_tokenizer import parts_from_json, parts_from_model
from lepton_jax.text.pieces import TokenizerError, TokenizerParts


class Tokenizer:
    """Strings to ids and back, whatever the source; built by `load`.

    `vocab_size` counts the tokenizer's own ids (a model may have more rows). `eos_ids` are all ids
    that end an answer. `control_ids` spell nothing in decoded text. `leading_space`: decoding drops
    the space that encoding adds in front. `now`: what chat templates take for the time; None: the
    clock's. `chat_variables`: what else they get with each chat (`set_chat_variables`).
    """

    def __init__(self, parts: TokenizerParts, *, source: str):
        self._parts = parts
        self.source = source
        self.vocab_size: int = parts.pieces.size
        self.bos_id: int | None = parts.special.bos_id
        self.eos_ids: tuple[int, ...] = parts.special.eos_ids
        self.control_ids: frozenset[int] = parts.pieces.control
        self.leading_space: bool = parts.pieces.leading_space
        self.chat_template: str | None = parts.templates.get("default")
        self.now: datetime.datetime | None = None
        self.chat_variables: dict[str, object] = {}

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; with `add_special` the ids around it that the model expects (usually bos
        in front, unless the text begins with it, as a rendered chat does).

        Special tokens written in the text become their ids. Raises `TypeError` for anything but a
        string and `TokenizerError` for half of a surrogate pair, which isn't text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; a string is needed")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text's character {error.start} is half of a surrogate pair "
                f"({text[error.start]!a}); replace it or give both halves"
            ) from error
        ids = self._parts.encode(text)
        if not add_special:
            return ids
        prefix, suffix = self._parts.special.prefix, self._parts.special.suffix
        begun = tuple(ids[: len(prefix)]) == tuple(prefix)
        return [*(() if begun else prefix), *ids, *suffix]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens; bytes that aren't UTF-8 become U+FFFD."""
        whole = Detokenizer(self)
        delta, _ = whole.add(ids)
        return delta + whole.finish()

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that one id spells, control tokens by their name; b"" for ids that the
        tokenizer doesn't have.
        """
        return self._parts.pieces.bytes_of(token_id)

    def id_to_text(self, token_id: int) -> str:
        """One id for people to read, control tokens too; a partial character shows as U+FFFD."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    def set_chat_variables(self, variables: Mapping[str, object]) -> None:
        """Gives all chats from now on these variables, as in {"enable_thinking": False}.

        Raises `ChatTemplateError` for one that no chat template reads.
        """
        for name in variables:
            templates = self._parts.templates.values()
            read = sorted(set().union(*map(chat_template.variables_of, templates)))
            if name not in read:
                raise chat_template.ChatTemplateError(
                    f"the tokenizer of {self.source} has no chat template that reads {name!r}: "
                    f"leave it out of model.chat_variables (read: {', '.join(read) or 'nothing'})"
                )
        self.chat_variables = dict(variables)

    def render_chat(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, **variables
    ) -> str:
        """The prompt string that the chat template makes of `messages`; see `chat_template.render`.

        With `tools` a template named "tool_use" is taken where there is one. Raises
        `ChatTemplateError`.
        """
        templates = self._parts.templates
        name = "tool_use" if tools and "tool_use" in templates else "default"
        if name not in templates:
            raise chat_template.ChatTemplateError(
                f"the tokenizer of {self.source} has no chat template: give a prompt instead of "
                "messages, or take an instruction-tuned model, which has one"
            )
        if tools and name == "default" and "tools" not in templates[name]:
            raise chat_template.ChatTemplateError(
                f"the chat template of {self.source} has no place for tools: leave them out, or "
                "take a model whose template offers them"
            )
        values = dict(self._parts.special.names) | self.chat_variables | variables
        if self.now:
            values["strftime_now"] = self.now.strftime
        return chat_template.render(templates[name], messages, tools=tools, **values)

    def apply_chat(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, **variables
    ) -> list[int]:
        """Ids of the prompt for `messages`; the template writes bos itself, so none is added."""
        return self.encode(self.render_chat(messages, tools, **variables), add_special=False)


def load(source: str | os.PathLike | Mapping[str, object]) -> Tokenizer:
    """The tokenizer in `source`: a directory with tokenizer.json or tokenizer.model, one of these
    files, a `.gguf` file, or the metadata of one as a dict. Raises `TokenizerError`, or `GgufError`
    for a damaged GGUF.
    """
    if isinstance(source, Mapping):
        return Tokenizer(parts_from_metadata(source), source="the given metadata")
    path = Path(source)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise TokenizerError(
            f"{path} doesn't exist: give a directory, a tokenizer.json, a .model or a .gguf"
        )
    if path.suffix == ".gguf":
        parts = parts_from_metadata(read_metadata(path))
    elif path.suffix == ".json":
        parts = parts_from_json(path)
    elif path.suffix == ".model":
        parts = parts_from_model(path)
    else:
        raise TokenizerError(
            f"{path} is no tokenizer by its name: .json, .model and .gguf are known"
        )
    return Tokenizer(parts, source=str(path))


def _file_in(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    there = ", ".join(sorted(p.name for p in directory.iterdir())[:20]) or "nothing"
    raise TokenizerError(
        f"{directory} holds neither tokenizer.json nor tokenizer.model, but: {there}"
    )
