"""Many recipes on one model: a receipt of each, one table, one page with the Pareto fronts.

    DIR/sweep.json         what is compared, so that a rerun goes on where it was interrupted
    DIR/<recipe>/          receipt.json, receipt.html, and the checkpoint where weights are kept
    DIR/table.json table.md pareto.html

The dense model is measured once. A recipe whose receipt is there is not tried again. Read next:
`compress.py` (one recipe), `compression/receipt_page.py` (the page).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.locate import local_path
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.receipt_page import pareto_page
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, RecoverySection, RunConfig, recipe_sections
from lepton_jax.jobs.compress import compress, measure_dense, write, write_receipt
from lepton_jax.jobs.compress_inputs import (
    Progress,
    describe,
    require_alone,
    require_fit,
    require_texts,
    silent,
)
from lepton_jax.jobs.recovery import folder_of
from lepton_jax.whole_file import write_whole

_PLAN, _TABLE, _TEXT, _PAGE = "sweep.json", "table.json", "table.md", "pareto.html"
COLUMNS = (
    "recipe", "MiB", "of dense", "k/N", "KL, nats a token", "perplexity", "times dense's", "top-1",
    "top-5", "gap closed", "greedy prefix", "decode, times dense", "prefill, times dense",
)  # fmt: skip


class SweepJob:
    """The recipes of `sweep.recipes`, in their order."""

    def __init__(self, config: RunConfig):
        """Raises ValueError on a recipe that can't be, or an output that is something else."""
        require_alone(config)
        if not config.output:
            raise ValueError("output is empty: name the directory to write, --config.output=DIR")
        if not config.receipt.compare:
            raise ValueError("receipt.compare is false: a sweep has nothing to compare then")
        if config.compression != CompressionSection():
            raise ValueError("compression and sweep.recipes are both given: drop one")
        if config.recovery != RecoverySection():
            raise ValueError(
                "recovery and sweep.recipes are both given: put its fields into the recipes that "
                "are to recover, under recovery"
            )
        self.config = config
        self.output = local_path(config.output).absolute()
        self._configs = {}
        for name, fields in config.sweep.recipes.items():
            compression, recovery = recipe_sections(name, fields)
            self._configs[name] = dataclasses.replace(
                config,
                compression=compression,
                recovery=recovery,
                output=str(self.output / name),  # beside which a recovery is kept
            )
        self._recipes = {n: Recipe.from_config(c.compression) for n, c in self._configs.items()}
        self._receipts: dict[str, receipts.Receipt] = {}

    def run(self, progress: Progress = silent) -> dict[str, receipts.Receipt]:
        """Tries what isn't there yet, writes the table and the page; receipts by recipe."""
        self._require_sense()
        self._begin()
        dense = None
        for number, (name, recipe) in enumerate(self._recipes.items(), 1):
            if (self.output / name / receipts.NAME).is_file():
                self._receipts[name] = receipts.read(self.output / name)
                continue
            if dense is None:
                dense = measure_dense(self.config, progress)
            told = _titled(progress, f"{number}/{len(self._recipes)} {name}")
            made = compress(self._configs[name], self._informed(recipe), dense, progress=told)
            self._receipts[name] = self._write(name, made)
            shutil.rmtree(folder_of(self.output / name), ignore_errors=True)
            self._write_results()
        self._write_results()
        return self._receipts

    def _require_sense(self) -> None:
        """Raises ValueError, naming the recipe, for what can be known before hours of work."""
        model = describe(self.config)
        for name, config in self._configs.items():
            try:
                require_fit(config, self._recipes[name], model)
            except ValueError as error:
                raise ValueError(f"sweep.recipes[{name!r}]: {error}") from error
        calibrated = any(recipe.calibrated for recipe in self._recipes.values())
        require_texts(self.config, model, calibrated=calibrated)
        for config in self._configs.values():
            if config.recovery.train != "none":
                require_texts(config, model, calibrated=False)

    def table(self) -> str:
        """Markdown, without the columns that nothing was measured for."""
        rows = self._rows()
        shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
        rows = [COLUMNS, ("",) * len(COLUMNS), *rows]
        widths = {i: max(len(row[i]) for row in rows) for i in shown}
        lines = [[row[i].ljust(widths[i]) for i in shown] for row in rows]
        lines[1] = ["-" * widths[i] for i in shown]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _begin(self) -> None:
        """A new directory, or one of the same sweep. Raises ValueError on any other."""
        plan = {
            "source": checkpoints.identify(self.config.model.path),
            "model": dataclasses.asdict(self.config.model),
            "calibration": dataclasses.asdict(self.config.calibration),
            "engine": dataclasses.asdict(self.config.engine),
            "receipt": dataclasses.asdict(self.config.receipt),
            "recipes": {name: self._recipe_dict(name) for name in self._recipes},
            "keep": self.config.sweep.keep,
        }
        plan = json.loads(json.dumps(plan))
        place = self.output / _PLAN
        if not self.output.exists():
            self.output.mkdir(parents=True)
            write_whole(place, json.dumps(plan, indent=1) + "\n")
            return
        if not place.is_file():
            raise ValueError(f"{self.output} exists and is no sweep's: name a new directory")
        found = json.loads(place.read_text(encoding="utf-8"))
        other = [key for key in plan if key != "recipes" and found.get(key) != plan[key]]
        other += [
            f"recipe {name}"
            for name, recipe in found["recipes"].items()
            if plan["recipes"].get(name, recipe) != recipe
        ]
        if other:
            raise ValueError(
                f"{self.output} holds a sweep of another {', '.join(other)}: name a new directory "
                "or remove it"
            )
        write_whole(place, json.dumps(plan, indent=1) + "\n")

    def _informed(self, recipe: Recipe) -> Recipe:
        """With the sensitivities that another recipe's budget was met by, which are the same."""
        for name, receipt in self._receipts.items():
            other = self._recipes[name]
            same = (other.structure, other.automatic.candidates) == (
                recipe.structure,
                recipe.automatic.candidates,
            )
            if recipe.automatic and receipt["sensitivity"] and same:
                known = receipts.read_sensitivity(receipt["sensitivity"])
                automatic = dataclasses.replace(recipe.automatic, known=known)
                return dataclasses.replace(recipe, automatic=automatic)
        return recipe

    def _recipe_dict(self, name: str) -> dict[str, Any]:
        recovery = dataclasses.asdict(self._configs[name].recovery)
        return self._recipes[name].as_dict() | {"recovery": recovery}

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
        write_whole(self.output / _TABLE, json.dumps(table, indent=1) + "\n")
        write_whole(self.output / _TEXT, self.table() + "\n")
        title = f"Recipes on {self.config.model.path}"
        page = pareto_page(self._receipts, title=title, columns=COLUMNS, rows=rows)
        write_whole(self.output / _PAGE, page)

    def _rows(self) -> list[tuple[str, ...]]:
        if not self._receipts:
            return []
        first = next(iter(self._receipts.values()))
        size, dense = first["size"]["dense_bytes"], first["quality"]["dense_perplexity"]["value"]
        top = {"recipe": "dense", "MiB": f"{size / 2**20:.1f}", "perplexity": f"{dense:.3f}"}
        return [
            tuple(top.get(name, "") for name in COLUMNS),
            *(_row(name, receipt) for name, receipt in self._receipts.items()),
        ]


def _titled(progress: Progress, title: str) -> Progress:
    return lambda stage, *rest: progress(f"{title}: {stage}", *rest)


def _row(name: str, receipt: receipts.Receipt) -> tuple[str, ...]:
    size, quality = receipt["size"], receipt["quality"]
    prefix, speed, recovery = receipt["greedy_prefix"], receipt["speed"], receipt["recovery"]
    closed = recovery and recovery["gap_closed"]
    return (
        name,
        f"{size['device_bytes'] / 2**20:.1f}",
        f"{size['device_bytes'] / size['dense_bytes']:.3f}",
        f"{size['kept_fraction']:.3f}",
        _with_ends(quality["kl"], 2),
        f"{quality['perplexity']['value']:.2f}",
        _with_ends(quality["perplexity_ratio"], 4),
        f"{quality['top1']['value']:.3f}",
        f"{quality['top5']['value']:.3f}",
        f"{closed:.0%}" if closed else "",
        f"{prefix['value']:.1f} of {prefix['of']}" if prefix else "",
        f"{speed['decode']['ratio']:.2f}" if speed else "",
        f"{speed['prefill']['ratio']:.2f}" if speed else "",
    )


def _with_ends(estimate: dict[str, float], digits: int) -> str:
    """A value and the ends of its interval, with so many significant digits."""
    value, low, high = (f"{estimate[name]:#.{digits}g}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
