"""Windows of tokens from a text file, for calibration and for measuring quality.

    drawn = draw_windows(CALIBRATION_TEXT, tokenizer, windows=64, length=512, seed=0)
    drawn.tokens   # int32 [windows, length]
    drawn.receipt  # which file, and where in it each window begins

A file is JSONL with a field "text" or "messages" in each row, or plain text; it may be of any size,
because it is read once, row by row, and only the drawn windows are held. Two texts in the public
domain ship in `data/` (its SOURCES.md says which): one to calibrate on, and another to measure on.
"""

import copy
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.text import ChatTemplateError, Tokenizer

CALIBRATION_TEXT = Path(__file__).parent / "data" / "calibration.txt"
HELD_OUT_TEXT = Path(__file__).parent / "data" / "heldout.txt"
_NOW = datetime.datetime(2026, 1, 1)  # for chat templates: windows are the same on each day
_PIECE = 4096  # characters of plain text that are tokenized at once
_RUN = 32  # tokens in a row that two texts hardly have in common by chance


@dataclasses.dataclass(frozen=True)
class Windows:
    """Tokens and where they are from.

    Attributes:
      tokens: int32 `[windows, length]`.
      receipt: in JSON types: path, sha256 (of the file's bytes), unit ("line" or "row" of JSONL),
        seed, length, tokens_in_file and starts: [number of the line or row, token in what was read
        from there] of each window. Lines and rows count from 1.
    """

    tokens: np.ndarray
    receipt: dict[str, Any]


class _Piece(NamedTuple):
    """Some text and the number of the line or row where it begins."""

    start: int
    text: str


def draw_windows(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    windows: int,
    length: int,
    seed: int = 0,
) -> Windows:
    """`windows` windows of `length` tokens that don't overlap, each as likely as any other.

    Args:
      path: `.jsonl` (a row is an object with a string "text", or with "messages" and perhaps
        "tools", which the chat template renders), anything else is plain text, UTF-8.
      tokenizer: what it puts in front of a text (bos) stands at the beginning of every window, as
        it would in a prompt.
      windows: how many.
      length: tokens of each, with what stands in front.
      seed: of the draw.

    Raises ValueError naming the file where it is too short or a row is none, OSError where it
    can't be read.
    """
    if windows < 1 or length < 2:
        raise ValueError(f"windows={windows} of length={length}: want at least 1 of 2 tokens")
    path, tokenizer = Path(path), copy.copy(tokenizer)
    tokenizer.now, encode = _NOW, tokenizer.encode
    front = _front(encode)
    generator, digest = np.random.default_rng(seed), hashlib.sha256()
    drawn: dict[int, tuple[int, list, list[int]]] = {}
    count = total = 0
    for start, ids in _spans(_pieces(path, digest, tokenizer), encode, length - len(front)):
        total += len(ids)
        if len(ids) < length - len(front):
            continue
        place = count if count < windows else int(generator.integers(count + 1))
        if place < windows:  # reservoir sampling (Vitter, 1985, algorithm R)
            drawn[place] = (count, start, [*front, *ids])
        count += 1
    if count < windows:
        raise ValueError(
            f"{path}: {windows} windows of {length} tokens need {windows * length} tokens, and the "
            f"text has {total} ({count} windows): give a longer text, fewer or shorter windows"
        )
    chosen = [drawn[place] for place in sorted(drawn, key=lambda place: drawn[place][0])]
    return Windows(
        np.asarray([ids for _, _, ids in chosen], np.int32),
        dict(
            path=str(path),
            sha256=digest.hexdigest(),
            unit="row" if path.suffix == ".jsonl" else "line",
            seed=seed,
            length=length,
            tokens_in_file=total,
            starts=[start for _, start, _ in chosen],
        ),
    )


def share_seen(held_out: np.ndarray, seen: np.ndarray) -> float:
    """The part of the tokens `[windows, T]` that stand in runs of 32 which other windows
    `[windows, U]` have too. 0 where windows are shorter than such a run.

    Runs that come again in `held_out` itself don't count: those are instructions or boilerplate,
    and windows of a text don't overlap.
    """
    if min(held_out.shape[1], seen.shape[1]) < _RUN:
        return 0.0
    runs = _runs(held_out)  # [windows, T - 31]
    _, place, counts = np.unique(runs, return_inverse=True, return_counts=True)
    found = np.isin(runs, _runs(seen)) & (counts[place].reshape(runs.shape) == 1)
    covered = np.zeros(held_out.shape, bool)
    for offset in range(_RUN):
        covered[:, offset : offset + found.shape[1]] |= found
    return float(covered.mean())


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A number for each run of 32 tokens, the same for the same run: uint64 `[windows, T - 31]`."""
    ids, size = tokens.astype(np.uint64), tokens.shape[1] - _RUN + 1
    numbers = np.zeros((len(ids), size), np.uint64)
    for offset in range(_RUN):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + size]
    return numbers


def _front(encode: Callable[..., Sequence[int]]) -> list[int]:
    """The ids that come before any text."""
    whole, bare = list(encode("a")), list(encode("a", add_special=False))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def _spans(
    pieces: Iterator[_Piece], encode: Callable[..., Sequence[int]], size: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Consecutive ([line or row, token in it], ids): `size` ids each, fewer in the last one."""
    ids: list[int] = []
    start = [1, 0]
    for piece in pieces:
        fresh = encode(piece.text, add_special=False)
        used = 0
        while len(ids) + len(fresh) - used >= size:
            if not ids:
                start = [piece.start, used]
            taken = size - len(ids)
            yield start, [*ids, *fresh[used : used + taken]]
            ids, used = [], used + taken
        if used < len(fresh):
            if not ids:
                start = [piece.start, used]
            ids.extend(fresh[used:])
    if ids:
        yield start, ids


def _pieces(path: Path, digest, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """Rows of JSONL, or lines of plain text some thousand characters at a time."""
    start, lines, size = 1, [], 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            line = _decoded(raw, path, number)
            if path.suffix == ".jsonl":
                if line.strip():
                    yield _Piece(number, _text_of(line, f"{path}: row {number}", tokenizer))
                continue
            start = number if not lines else start
            lines.append(line)
            size += len(line)
            if size >= _PIECE:
                yield _Piece(start, "".join(lines))
                lines, size = [], 0
    if lines:
        yield _Piece(start, "".join(lines))


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason})") from None


def _text_of(line: str, where: str, tokenizer: Tokenizer) -> str:
    """A row's; of a conversation as the chat template writes it, but without a bos of its own."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("text"), str):
        return row["text"] + "\n"
    if "messages" not in row:
        raise ValueError(
            f'{where} has no string "text" and no "messages": want {{"text": "..."}}, or '
            '{"messages": [{"role": "user", "content": "..."}, ...]} for the chat template'
        )
    try:
        return tokenizer.render_chat(
            row["messages"], row.get("tools"), add_generation_prompt=False, bos_token=""
        )
    except ChatTemplateError as error:
        raise ValueError(f"{where}: {error}") from error
