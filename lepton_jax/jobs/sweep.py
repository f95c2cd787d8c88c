"""Many recipes on one model: a receipt of each, one table, one page with the Pareto fronts.

    DIR/sweep.json         what is compared, so that a rerun goes on where it was interrupted
    DIR/<recipe>/          receipt.json, receipt.html, and the checkpoint where weights are kept
    DIR/table.json table.md pareto.html

The dense model's predictions and answers are measured once, its speed in turns with each recipe's.
A recipe whose receipt is there is not tried again; one that fails is told in the table, and the
others go on. Read next: `compress.py` (one recipe), `compression/receipt_page.py` (the page).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.errors import is_out_of_memory
from lepton_jax.checkpoints.locate import local_path
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.receipt_page import pareto_page
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, RecoverySection, RunConfig, recipe_sections
from lepton_jax.jobs.compress import Dense, compress, measure_dense, write, write_receipt
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
    "recipe", "MiB", "of dense", "k/N", "KL, nats a token", "KL with its cache", "perplexity",
    "times dense's", "top-1", "top-5", "gap closed", "greedy prefix", "ideal time", "decode time",
    "prefill time", "saves", "failed",
)  # fmt: skip


class SweepJob:
    """The recipes of `sweep.recipes`, in their order.

    Attributes:
      failed: why, of each recipe that turned out to be impossible.
    """

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
            compression, recovery, engine = recipe_sections(name, fields, engine=config.engine)
            self._configs[name] = dataclasses.replace(
                config,
                compression=compression,
                recovery=recovery,
                engine=engine,
                output=str(self.output / name),  # beside which a recovery is kept
            )
        self._recipes = {n: Recipe.from_config(c.compression) for n, c in self._configs.items()}
        only = config.sweep.only or self._recipes
        self._tried = [name for name in self._recipes if name in only]
        self._receipts: dict[str, receipts.Receipt] = {}
        self.failed: dict[str, str] = {}

    def run(self, progress: Progress = silent) -> dict[str, receipts.Receipt]:
        """Tries what isn't there yet, writes the table and the page; receipts by recipe, also of
        those that are there and weren't asked for this time.
        """
        self._require_sense()
        self._begin()
        places = {name: self.output / name for name in self._recipes}
        there = {n: place for n, place in places.items() if (place / receipts.NAME).is_file()}
        self._receipts = {name: receipts.read(place) for name, place in there.items()}
        left = [name for name in self._tried if name not in there]
        dense = measure_dense(self.config, progress) if left else None
        for number, name in enumerate(left, 1):
            self._try(name, dense, _titled(progress, f"{number}/{len(left)} {name}"))
            self._write_results()
        self._write_results()
        return self._receipts

    def _try(self, name: str, dense: Dense, progress: Progress) -> None:
        recipe = self._informed(self._recipes[name])
        try:
            made = compress(self._configs[name], recipe, dense, progress=progress)
        except Exception as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            self.failed[name] = " ".join(str(error).split())
            return
        self._receipts[name] = self._write(name, made)
        shutil.rmtree(folder_of(self.output / name), ignore_errors=True)

    def _require_sense(self) -> None:
        """Raises ValueError, naming the recipe, for what can be known before hours of work."""
        model = describe(self.config)
        tried = {name: self._configs[name] for name in self._tried}
        for name, config in tried.items():
            try:
                require_fit(config, self._recipes[name], model)
            except ValueError as error:
                raise ValueError(f"sweep.recipes[{name!r}]: {error}") from error
        calibrated = any(self._recipes[name].calibrated for name in tried)
        swept = any(recipe.calibrated for recipe in self._recipes.values()) or any(
            config.recovery.train != "none" for config in self._configs.values()
        )
        require_texts(self.config, model, calibrated=calibrated, swept=swept)
        for config in tried.values():
            if config.recovery.train != "none":
                require_texts(config, model, calibrated=False)

    def table(self) -> str:
        """Markdown, without the columns that nothing was measured for."""
        rows = self._rows()
        shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
        rows = [tuple(cell.replace("|", r"\|") for cell in row) for row in rows]
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
        done = {
            name: recipe
            for name, recipe in found["recipes"].items()
            if (self.output / name / receipts.NAME).is_file()
        }
        other += [
            f"recipe {name}"
            for name, recipe in done.items()
            if plan["recipes"].get(name, recipe) != recipe
        ]
        if other:
            raise ValueError(
                f"{self.output} holds a sweep of another {', '.join(other)}: name a new directory "
                "or remove it"
            )
        plan["recipes"] = done | plan["recipes"]  # also those that this run leaves out
        write_whole(place, json.dumps(plan, indent=1) + "\n")

    def _informed(self, recipe: Recipe) -> Recipe:
        """With the sensitivities that another recipe's budget was met by, which are the same."""
        for name, receipt in self._receipts.items():
            other = self._recipes[name]
            same = (other.structure, other.automatic.tried) == (
                recipe.structure,
                recipe.automatic.tried,
            )
            if recipe.automatic and receipt["sensitivity"] and same:
                known = receipts.read_sensitivity(receipt["sensitivity"])
                automatic = dataclasses.replace(recipe.automatic, known=known)
                return dataclasses.replace(recipe, automatic=automatic)
        return recipe

    def _recipe_dict(self, name: str) -> dict[str, Any]:
        config = self._configs[name]
        recovery, cache = dataclasses.asdict(config.recovery), config.engine.kv_dtype
        return self._recipes[name].as_dict() | {"recovery": recovery, "kv_dtype": cache}

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
        rows = [_dense_row(receipt) for receipt in [*self._receipts.values()][:1]]
        for name in self._recipes:
            if name in self._receipts:
                rows.append({"recipe": name} | _row(self._receipts[name]))
            elif name in self.failed:
                rows.append({"recipe": name, "failed": self.failed[name]})
        return [tuple(row.get(column, "") for column in COLUMNS) for row in rows]


def _titled(progress: Progress, title: str) -> Progress:
    return lambda stage, *rest: progress(f"{title}: {stage}", *rest)


def _dense_row(receipt: receipts.Receipt) -> dict[str, str]:
    size, perplexity = receipt["size"]["dense_bytes"], receipt["quality"]["dense_perplexity"]
    return {
        "recipe": "dense",
        "MiB": f"{size / 2**20:.1f}",
        "perplexity": f"{perplexity['value']:.3f}",
    }


def _row(receipt: receipts.Receipt) -> dict[str, str]:
    """Cells by column; times are those of the dense model's."""
    size, quality = receipt["size"], receipt["quality"]
    prefix, speed, recovery = receipt["greedy_prefix"], receipt["speed"], receipt["recovery"]
    row = {
        "MiB": f"{size['device_bytes'] / 2**20:.1f}",
        "of dense": f"{size['device_bytes'] / size['dense_bytes']:.3f}",
        "k/N": f"{size['kept_fraction']:.3f}",
        "KL, nats a token": _with_ends(quality["kl"], 2),
        "perplexity": f"{quality['perplexity']['value']:.2f}",
        "times dense's": _with_ends(quality["perplexity_ratio"], 4),
        "top-1": f"{quality['top1']['value']:.3f}",
        "top-5": f"{quality['top5']['value']:.3f}",
        "ideal time": f"{size['compute_fraction']:.3f}",
    }
    if receipt["kv"]:
        row["KL with its cache"] = _with_ends(receipt["kv"]["kl"], 2)
    if recovery and recovery["gap_closed"]:
        row["gap closed"] = f"{recovery['gap_closed']:.0%}"
    if prefix:
        row["greedy prefix"] = f"{prefix['value']:.1f} of {prefix['of']}"
    if speed:
        for name in receipts.PHASES:
            row[f"{name} time"] = f"{speed[name]['measured_time_ratio']:.3f}"
        saved = [name for name, told in speed["saved"].items() if told != receipts.NONE_SAVED]
        row["saves"] = ", ".join(saved) or "nothing"
    return row


def _with_ends(estimate: dict[str, float], digits: int) -> str:
    """A value and the ends of its interval, with so many significant digits."""
    value, low, high = (f"{estimate[name]:#.{digits}g}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
