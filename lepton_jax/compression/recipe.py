"""`Recipe`: what becomes of a whole model, as a config says it and a receipt repeats it.

    Recipe.of(preset="int8")
    Recipe.of(rules=("embed|head -> weights=int8", r"layers\\.\\d+\\..* -> weights=int4 group=128"))

A rule is `PATTERN -> FIELD=VALUE ...`: a regular expression that must match a whole parameter path,
and fields of `Scheme`; `PATTERN -> keep` leaves those weights as they are. Rules are tried in their
order (`rules.py`). Read next: `scheme.py` (the fields), `presets.py` (recipes with a name).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.compression.automatic import Automatic
from lepton_jax.compression.calibrated_leaf import Options, clips, kinds_for
from lepton_jax.compression.presets import preset_rules
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.smooth import PAIRS, pairs_for
from lepton_jax.compression.structure import Structure
from lepton_jax.config import CompressionSection

KEEP = "keep"  # in place of fields
_FIELDS = {field.name: field for field in dataclasses.fields(Scheme)}
_TRUTHS = {"true": True, "false": False}
_PURPOSES = {
    "smooth": "layers with quantized weights (awq) or activations (smoothquant)",
    "alpha": "smooth=smoothquant",
    "ranges": "activations=static",
    "percentile": "ranges=percentile of activations=static",
    "damp": "rounding=gptq, prune=sparsegpt, keep_ffn and keep_kv_heads",
    "act_order": "rounding=gptq",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules for a model.

    Attributes:
      rules: first match wins.
      preset: the name of the rules; "" where they are a user's own.
      options: of calibrated methods.
      structure: what is left of the model before the rules come to its weights.
      automatic: a budget that the rules shall be found for; there are none then.
    """

    rules: tuple[Rule[Scheme], ...]
    preset: str = ""
    options: Options = dataclasses.field(default_factory=Options)
    structure: Structure = dataclasses.field(default_factory=Structure)
    automatic: Automatic = dataclasses.field(default_factory=Automatic)

    @classmethod
    def of(cls, *, preset: str = "none", rules: Sequence[str] = ()) -> Recipe:
        """A preset's rules, or those of rule texts. Raises ValueError naming what is wrong."""
        if not rules:
            return cls(tuple(preset_rules(preset)), preset)
        if preset != "none":
            raise ValueError(
                f"compression.preset={preset!r} and compression.rules are both given: drop one "
                "(the rules of a preset are in lepton_jax/compression/presets.py)"
            )
        return cls(tuple(parse_rule(text) for text in rules))

    @classmethod
    def from_config(cls, section: CompressionSection) -> Recipe:
        """What a config's `compression` asks for."""
        recipe = cls.of(preset=section.preset, rules=section.rules)
        options, structure = (
            cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})
            for cls in (Options, Structure)
        )
        automatic = Automatic(
            section.auto_bytes,
            section.auto_kl,
            tuple(parse_scheme(text, "compression.candidates") for text in section.candidates),
        )
        if automatic and recipe.rules:
            raise ValueError(
                f"compression.{automatic} finds the rules itself: drop compression.preset and rules"
            )
        if not automatic and section.candidates != CompressionSection().candidates:
            raise ValueError(
                f"compression.candidates={section.candidates} changes nothing here, it is for "
                "auto_bytes and auto_kl: give one of them, or leave it out"
            )
        return dataclasses.replace(
            recipe, options=options, structure=structure, automatic=automatic
        )

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.rules or self.structure or self.automatic)

    def require_no_calibration(self, path: str) -> None:
        """Raises ValueError, with the command to use, where loading `path` so isn't possible."""
        if self.calibrated:
            raise ValueError(
                f"compression: {self.calibrated[0]} needs calibration, which loading doesn't do: "
                "compress once, python -m lepton_jax.compress --config=CONFIG "
                f"--config.model.path={path} --config.output=DIR, and load DIR with "
                "compression.preset=none and no rules"
            )

    @property
    def calibrated(self) -> list[str]:
        """What must see activations first: structured pruning, sensitivities, smoothing, rules of
        such schemes.
        """
        found = [str(part) for part in (self.structure, self.automatic) if part]
        found += [f"smooth={self.options.smooth}"] if self.options.smooth != "none" else []
        return found + [f"rule '{rule_text(r)}'" for r in self.rules if self._needs_tokens(r)]

    def require_use(self, schemes: Mapping[str, Scheme]) -> None:
        """Raises ValueError on an option that changes nothing of weights with these schemes."""
        options, structure = self.options, self.structure
        named = [(path.rpartition(".")[2], scheme) for path, scheme in schemes.items()]
        if self.automatic:
            named += [(pair.target, s) for pair in PAIRS for s in self.automatic.candidates]
        found = [scheme for _, scheme in named]
        static = any(scheme.activations == "static" for scheme in found)
        solved = any("hessian" in kinds_for(scheme, options) for scheme in found)
        used = {
            "smooth": any(
                pairs_for(options.smooth, {name: scheme}) or clips(scheme, options)
                for name, scheme in named
            ),
            "alpha": options.smooth == "smoothquant",
            "ranges": static,
            "percentile": static and options.ranges == "percentile",
            "damp": solved or structure.keep_ffn < 1 or structure.keep_kv_heads > 0,
            "act_order": any(s.rounding == "gptq" and s.prune != "sparsegpt" for s in found),
        }
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value != field.default and not used[field.name]:
                raise ValueError(
                    f"compression.{field.name}={value!r} changes nothing here, it is for "
                    f"{_PURPOSES[field.name]}: leave it out"
                )

    def _needs_tokens(self, rule: Rule[Scheme]) -> bool:
        return bool(kinds_for(rule.action, self.options))

    def as_dict(self) -> dict[str, Any]:
        """For receipts: preset, rule texts, and options and structure where they matter."""
        options = dataclasses.asdict(self.options) if self.calibrated else None
        rules = [rule_text(rule) for rule in self.rules]
        structure = dataclasses.asdict(self.structure) if self.structure else None
        return {
            "preset": self.preset,
            "rules": rules,
            "options": options,
            "structure": structure,
            "automatic": self._automatic_dict(),
        }

    def _automatic_dict(self) -> dict[str, Any] | None:
        if not self.automatic:
            return None
        candidates = [scheme_text(scheme) for scheme in self.automatic.candidates]
        return {"bytes": self.automatic.bytes, "kl": self.automatic.kl, "candidates": candidates}

    @property
    def title(self) -> str:
        """In a few words, for tables: the preset, or what the schemes are; "none" of nothing."""
        schemes = dict.fromkeys(scheme_text(rule.action) for rule in self.rules)
        smooth = [self.options.smooth] if self.options.smooth != "none" else []
        preset = [self.preset] if self.preset not in ("", "none") else []
        parts = [str(part) for part in (self.structure, self.automatic) if part]
        named = preset or ([] if self.automatic else schemes)
        return "; ".join([*parts, *named, *smooth]) or "none"


def parse_rule(text: str) -> Rule[Scheme]:
    """A rule from `PATTERN -> FIELD=VALUE ...`. Raises ValueError naming rule, field and value."""
    pattern, arrow, action = (part.strip() for part in text.rpartition("->"))
    if not (pattern and arrow and action):
        raise ValueError(
            f"compression rule {text!r}: want PATTERN -> FIELD=VALUE ..., or PATTERN -> {KEEP}"
        )
    return Rule(pattern, _scheme(action, f"compression rule {text!r}"))


def parse_scheme(text: str, where: str = "scheme") -> Scheme:
    """What `scheme_text` gives, read back. Raises ValueError that begins with `where`."""
    return _scheme(text.strip(), f"{where} {text!r}")


def _scheme(action: str, where: str) -> Scheme:
    if action == KEEP:
        return Scheme(weights="keep")
    values: dict[str, Any] = {}
    for word in action.split() or [""]:
        name, equals, value = word.partition("=")
        if name not in _FIELDS or not equals:
            raise ValueError(
                f"{where}: {word!r} is no FIELD=VALUE; fields are {', '.join(_FIELDS)}"
            )
        if name in values:
            raise ValueError(f"{where}: {name} is given twice")
        values[name] = _value(where, name, value)
    try:
        return Scheme(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def rule_text(rule: Rule[Scheme]) -> str:
    """What `parse_rule` reads back."""
    return f"{rule.pattern} -> {scheme_text(rule.action)}"


def scheme_text(scheme: Scheme) -> str:
    """The fields that aren't the defaults, and always `weights`."""
    if scheme == Scheme(weights="keep"):
        return KEEP
    words = [f"weights={scheme.weights}"]
    for name, field in _FIELDS.items():
        value = getattr(scheme, name)
        if name != "weights" and value != field.default:
            words.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def _value(where: str, name: str, value: str) -> Any:
    """A field's value in the type of its default."""
    default = _FIELDS[name].default
    if isinstance(default, bool):
        if value.lower() not in _TRUTHS:
            raise ValueError(f"{where}: {name}={value!r}: want true or false")
        return _TRUTHS[value.lower()]
    if isinstance(default, str):
        return value
    try:
        return type(default)(value)
    except ValueError:
        wanted = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{where}: {name}={value!r}: want {wanted}") from None
