"""transformers as a contender of `compare_scoring.py`.

Texts: sorted by length, padded on the right, in the best of several batch sizes, cross entropy of
the logits of real places. Rows with labels: "row", one forward a row that looks at the labels'
first ids after it; "label", one forward a label, a batch of a row's labels or one by one, whatever
is faster.
"""

import time

import torch
from peer_transformers import _folder as folder_of
from transformers import AutoModelForCausalLM

BATCHES = (1, 4, 8, 16, 32)


class Contender:
    """A model in one dtype."""

    def __init__(self, spec: dict):
        torch.set_num_threads(spec["threads"])
        self._labels, self._way = spec["labels"], spec["way"]
        dtype = getattr(torch, spec["type"])
        self._model = AutoModelForCausalLM.from_pretrained(folder_of(spec), dtype=dtype).eval()
        self._batch = 1

    def warm_up(self, rows: list[list[int]]) -> None:
        """Tries each batch size on some rows and keeps the fastest."""
        sizes = (1, len(self._labels)) if self._way == "label" else BATCHES
        seconds = {}
        for size in sizes:
            self._batch = size
            seconds[size] = self.run(rows)[1]
        self._batch = min(seconds, key=seconds.get)

    @torch.inference_mode()
    def run(self, rows: list[list[int]]) -> tuple[int, float]:
        """(rows, or tokens of texts, seconds) for the scores of all."""
        begun = time.perf_counter()
        if self._way == "label":
            for row in rows:
                self._texts([row + label for label in self._labels], len(row))
        elif self._way == "row":
            self._first_ids(rows)
        else:
            self._texts(rows, 1)
        seconds = time.perf_counter() - begun
        return (len(rows) if self._labels else sum(map(len, rows))), seconds

    def _texts(self, rows: list[list[int]], first: int) -> list[float]:
        """Sums of log-probabilities from place `first` of each row."""
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        for start in range(0, len(order), self._batch):
            batch = order[start : start + self._batch]
            ids, mask = padded([rows[n] for n in batch])
            logits = self._model(input_ids=ids, attention_mask=mask).logits
            wanted = mask[:, 1:] == 1
            wanted[:, : first - 1] = False
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="none"
            )
            sums = torch.zeros(len(batch)).index_add(0, wanted.nonzero()[:, 0], losses)
            for n, loss in zip(batch, sums.tolist(), strict=True):
                scores[n] = -loss
        return scores

    def _first_ids(self, rows: list[list[int]]) -> list[list[float]]:
        scores: list[list[float]] = []
        wanted = [label[0] for label in self._labels]
        for start in range(0, len(rows), self._batch):
            batch = rows[start : start + self._batch]
            ids, mask = padded(batch, left=True)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
            ).logits[:, -1]
            scores += torch.log_softmax(logits.float(), -1)[:, wanted].tolist()
        return scores


def padded(rows: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[B, T]`."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask
