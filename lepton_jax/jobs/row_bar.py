"""The bar of rows that jobs, `LeptonEngine` and the evaluation show: tqdm's, on stderr, or a widget
of a notebook.
"""

import time

from tqdm.auto import tqdm


class RowBar:
    """A bar of rows with their ETA, tokens per second, how many rows are errors, and how many are
    answered ahead: they wait until an earlier one is written.
    """

    def __init__(self, total: int | None, *, done: int = 0, errors: int = 0, shown: bool = True):
        """`done` of `total` rows, `errors` of them, were there before; None: nobody knows how many
        there are.
        """
        total = None if total is None else max(total, done)
        # Drawn also where no row was written since, which a smoothed rate would take for speed.
        how = dict(miniters=0, mininterval=0.5, smoothing=0)
        how |= dict(initial=done, unit="row", dynamic_ncols=True)
        self._bar = tqdm(total=total, disable=not shown, **how)
        self._started = time.perf_counter()
        self._tokens, self._errors, self._ahead = 0, errors, 0

    def __enter__(self) -> "RowBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add_beat(self, tokens: int, ahead: int = 0) -> None:
        """Tokens that came; `ahead` rows wait."""
        self._tokens += tokens
        self._ahead = ahead
        self._show(0)

    def add_row(self, errors: int = 0) -> None:
        """One more row; `errors` of all so far."""
        self._errors = errors
        self._show(1)

    def _show(self, new_rows: int) -> None:
        if self._bar.disable:
            return
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        ahead = f", {self._ahead} answered ahead" if self._ahead else ""
        text = f"{rate:.0f} tokens/s, {self._errors} errors{ahead}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(new_rows)
