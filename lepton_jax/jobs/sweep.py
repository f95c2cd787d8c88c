"""Many recipes on one model: a receipt of each, one table, one page with the Pareto fronts.

    DIR/sweep.json         what is compared, so that a rerun goes on where it was interrupted
    DIR/<recipe>/          receipt.json, receipt.html, and the checkpoint where weights are kept
    DIR/table.json table.txt pareto.html

The dense model is measured once. A recipe whose receipt is there is not tried again. Read next:
`compress.py` (one recipe), `compression/receipt_page.py` (the page).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.receipt_page import pareto_page
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, RunConfig
from lepton_jax.jobs.compress import compress, measure_dense, write, write_receipt
from lepton_jax.jobs.compress_inputs import Progress, require_sense, silent
from lepton_jax.jobs.recovery import folder_of

_PLAN, _TABLE, _TEXT, _PAGE = "sweep.json", "table.json", "table.txt", "pareto.html"
COLUMNS = (
    "recipe", "MiB", "k/N", "KL", "perplexity", "top-1", "top-5", "greedy prefix",
    "decode, times dense", "prefill, times dense",
)  # fmt: skip


class SweepJob:
    """The recipes of `sweep.recipes`, in their order."""

    def __init__(self, config: RunConfig):
        """Raises ValueError on a recipe that can't be, or an output that is something else."""
        if not config.output:
            raise ValueError("output is empty: name the directory to write, --config.output=DIR")
        if not config.receipt.compare:
            raise ValueError("receipt.compare is false: a sweep has nothing to compare then")
        if config.compression != CompressionSection():
            raise ValueError("compression and sweep.recipes are both given: drop one")
        self.config = config
        self.output = Path(config.output).expanduser().absolute()
        self._configs = {
            name: dataclasses.replace(
                config,
                compression=CompressionSection(**fields),
                output=str(self.output / name),  # beside which a recovery is kept
            )
            for name, fields in config.sweep.recipes.items()
        }
        self._recipes = {n: Recipe.from_config(c.compression) for n, c in self._configs.items()}
        self._receipts: dict[str, receipts.Receipt] = {}

    def run(self, progress: Progress = silent) -> dict[str, receipts.Receipt]:
        """Tries what isn't there yet, writes the table and the page; receipts by recipe."""
        require_sense(self.config, list(self._recipes.values()))
        self._begin()
        dense = None
        for number, (name, recipe) in enumerate(self._recipes.items(), 1):
            if (self.output / name / receipts.NAME).is_file():
                self._receipts[name] = receipts.read(self.output / name)
                continue
            if dense is None:
                dense = measure_dense(self.config, progress)
            told = _titled(progress, f"{number}/{len(self._recipes)} {name}")
            made = compress(self._configs[name], recipe, dense, progress=told)
            self._receipts[name] = self._write(name, made)
            shutil.rmtree(folder_of(self.output / name), ignore_errors=True)
            self._write_results()
        self._write_results()
        return self._receipts

    def table(self) -> str:
        """The rows in columns, for people."""
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _begin(self) -> None:
        """A new directory, or one of the same sweep. Raises ValueError on any other."""
        plan = {
            "source": checkpoints.identify(self.config.model.path),
            "model": dataclasses.asdict(self.config.model),
            "receipt": dataclasses.asdict(self.config.receipt),
            "recovery": dataclasses.asdict(self.config.recovery),
            "recipes": {name: recipe.as_dict() for name, recipe in self._recipes.items()},
            "keep": self.config.sweep.keep,
        }
        place = self.output / _PLAN
        if not self.output.exists():
            self.output.mkdir(parents=True)
            _replace(place, json.dumps(plan, indent=1) + "\n")
            return
        if not place.is_file():
            raise ValueError(f"{self.output} exists and is no sweep's: name a new directory")
        found = json.loads(place.read_text(encoding="utf-8"))
        other = [
            key
            for key in plan
            if key != "recipes" and found.get(key) != json.loads(_text(plan[key]))
        ]
        other += [
            f"recipe {name}"
            for name in found["recipes"]
            if name in plan["recipes"] and found["recipes"][name] != plan["recipes"][name]
        ]
        if other:
            raise ValueError(
                f"{self.output} holds a sweep of another {', '.join(other)}: name a new directory "
                "or remove it"
            )
        _replace(place, json.dumps(plan, indent=1) + "\n")

    def _write(self, name: str, made: Any) -> receipts.Receipt:
        folder = self.output / name
        if self.config.sweep.keep:
            return write(folder, made)
        scratch = self.output / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        final = made.receipt | {"size": made.receipt["size"] | {"disk_bytes": None}}
        write_receipt(scratch, final)
        os.replace(scratch, folder)
        return final

    def _write_results(self) -> None:
        rows = self._rows()
        table = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        _replace(self.output / _TABLE, json.dumps(table, indent=1) + "\n")
        _replace(self.output / _TEXT, self.table() + "\n")
        title = f"Recipes on {self.config.model.path}"
        page = pareto_page(self._receipts, title=title, columns=COLUMNS, rows=rows)
        _replace(self.output / _PAGE, page)

    def _rows(self) -> list[tuple[str, ...]]:
        if not self._receipts:
            return []
        first = next(iter(self._receipts.values()))
        size, dense = first["size"]["dense_bytes"], first["quality"]["dense_perplexity"]["value"]
        rows = [("dense", f"{size / 2**20:.1f}", "1", "0", f"{dense:.3f}", "1", "1", "", "1", "1")]
        return rows + [_row(name, receipt) for name, receipt in self._receipts.items()]


def _titled(progress: Progress, title: str) -> Progress:
    return lambda stage, *rest: progress(f"{title}: {stage}", *rest)


def _row(name: str, receipt: receipts.Receipt) -> tuple[str, ...]:
    size, quality = receipt["size"], receipt["quality"]
    prefix, speed = receipt["greedy_prefix"], receipt["speed"]
    return (
        name,
        f"{size['device_bytes'] / 2**20:.1f}",
        f"{size['kept_fraction']:.3f}",
        f"{quality['kl']['value']:.4g}",
        f"{quality['perplexity']['value']:.3f}",
        f"{quality['top1']['value']:.3f}",
        f"{quality['top5']['value']:.3f}",
        f"{prefix['value']:.1f} of {prefix['of']}" if prefix else "",
        f"{speed['decode']['ratio']:.2f}" if speed else "",
        f"{speed['prefill']['ratio']:.2f}" if speed else "",
    )


def _text(value: Any) -> str:
    return json.dumps(value)


def _replace(place: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = place.with_name(f".{place.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, place)
