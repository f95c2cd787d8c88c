"""Profiles: what a search found, kept for later runs on the same model, device and kind of
workload.

A profile is a JSON file in the user's cache directory (or wherever it is named) with the key that
it holds for, the fields it chose, and what was measured. It is refused, with the reason, for
anything that its key isn't.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lepton_jax.config import RunConfig
from lepton_jax.engine.knobs import Knobs
from lepton_jax.kept_programs import processor_name
from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.space import field_of, with_fields
from lepton_jax.whole_file import write_whole

_FORMAT = 4
_WHAT = {
    "model": "another model",
    "compression": "another compression",
    "device": "another device",
    "dtype": "another model.dtype",
    "mesh": "another mesh",
    "jax": "another version of jax",
    "workload": "another kind of workload",
    "objective": "another objective",
}
_FREE = " (free: for runs that give neither compression.preset nor compression.rules)"
# Fields that mean nothing beside another value of a second one.
_CHOSEN_FOR = {
    "engine.prefill_chunk": "engine.prefill_sizes",
    "engine.prefill_sizes": "engine.prefill_chunk",
    "engine.draft_preset": "engine.speculation",
    "engine.attention_block": "engine.page_size",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """What a profile holds for.

    Attributes:
      model: fingerprint of the weights as they are on disk.
      compression: that was asked for, with the cache's dtype where that was; "free" where the
        search could choose.
      device: kind of device, and of the host's CPU where that is the device.
      mesh: replicas x devices of a model / those over which experts are spread; the devices where
        the search could choose.
      jax: version.
      workload: its class (`sample.workload_class`).
      objective: what was made small.
    """

    model: str
    compression: str
    device: str
    dtype: str
    mesh: str
    jax: str
    workload: str
    objective: str

    @classmethod
    def here(cls, model: str, config: RunConfig, *, given: Collection[str], workload: str) -> "Key":
        """For a run on this machine."""
        section = config.compression
        chosen = {"compression.preset", "compression.rules"} & set(given) or section.rules
        asked = json.dumps([section.preset, *section.rules]) if chosen else "free"
        if "engine.kv_dtype" in given:
            asked += f", cache {config.engine.kv_dtype}"
        mesh, devices = f"{config.mesh.data}x{config.mesh.model}", jax.local_device_count()
        if config.mesh.expert > 1:
            mesh += f"/{config.mesh.expert}"
        if devices > 1 and not {"mesh.data", "mesh.model", "mesh.expert"} & set(given):
            mesh = f"free, of {devices}"
        objective = config.optimizer.objective
        device, dtype = device_name(), config.model.dtype
        return cls(model, asked, device, dtype, mesh, jax.__version__, workload, objective)

    def differences(self, other: "Key") -> list[str]:
        """In words, what of another key isn't this one's."""
        return [
            f"{text} ({getattr(other, name)!r}, here {getattr(self, name)!r})"
            for name, text in _WHAT.items()
            if getattr(self, name) != getattr(other, name)
        ]

    @property
    def file_name(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16] + ".json"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a search chose.

    Attributes:
      key: what it holds for.
      fields: of the config, "section.field" to the value.
      costs: of the engine's programs with them.
      knobs: that feedback begins with.
      numbers: seconds before and after, effect = the score before / after, KL of the compression,
        and so on.
      tried: of each candidate that was run its fields, predicted and measured seconds, seconds to a
        request's first and last token, and its score; in JSON types.
    """

    key: Key
    fields: Mapping[str, Any]
    costs: Costs
    knobs: Mapping[str, float]
    numbers: Mapping[str, float]
    tried: Sequence[Mapping[str, Any]] = ()

    def applied(self, config: RunConfig, given: Collection[str]) -> RunConfig:
        """The config with the profile's objective and fields, except those that the user gave."""
        objective = {"optimizer.objective": self.key.objective}
        return with_fields(config, objective | self.open_fields(given))

    def open_fields(self, given: Collection[str]) -> dict[str, Any]:
        """The profile's fields that the user left open, with those that they were chosen for."""
        return {
            name: value
            for name, value in self.fields.items()
            if not {name, _CHOSEN_FOR.get(name)} & set(given)
        }

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT} | dataclasses.asdict(self)
        write_whole(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Raises ValueError where the file isn't a profile, OSError where it can't be read."""
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            content = json.loads(text)
            if content.pop("format") != _FORMAT:
                raise ValueError(f"its format isn't {_FORMAT}")
            made = cls(
                Key(**content.pop("key")),
                {name: _frozen(value) for name, value in content.pop("fields").items()},
                Costs(**content.pop("costs")),
                {name: _known_knob(name, value) for name, value in content.pop("knobs").items()},
                dict(content.pop("numbers")),
                tuple(content.pop("tried")),
            )
            for name in made.fields:
                field_of(RunConfig(), name)
            return made
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no profile of this version ({type(error).__name__}: {error}): delete it"
                " and tune again, or set optimizer.profile=off"
            ) from error


def _known_knob(name: str, value: float) -> float:
    if name not in {field.name for field in dataclasses.fields(Knobs)}:
        raise ValueError(f"there is no knob {name!r}")
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def device_name() -> str:
    """The device's kind; a CPU's with its cores and name, because kinds say nothing there."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"cpu of {os.cpu_count()}, {processor_name()}"


def default_directory() -> Path:
    """Under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lepton_jax" / "profiles"


def has_any(key: Key, directory: Path) -> bool:
    """Whether some profile differs in the workload only; files that aren't profiles don't count."""
    return any(not _besides_workload(key, other) for other in _read(directory)[0].values())


def find(key: Key, directory: Path, asked: str = "auto") -> tuple[Profile | None, str]:
    """The profile of a key and where it lies, or None and why there is none; one that is asked for
    by its file has to fit.

    Raises ValueError where its file is damaged or of something else, OSError where a named one
    can't be read.
    """
    path = directory / key.file_name if asked == "auto" else Path(asked).expanduser()
    if asked != "auto" or path.exists():
        profile = Profile.read(path)
        _require_fit(profile, key, path)
        return profile, str(path)
    near = [k for k in _read(directory)[0].values() if not _besides_workload(key, k)]
    kinds = ", ".join(sorted({other.workload for other in near}))
    why = [f"none for workload {key.workload} on this model and device"]
    why += [f"there are some for {kinds}"] if kinds else []
    return None, "; ".join([*why, *others(key, directory)])


def others(key: Key, directory: Path) -> list[str]:
    """Of the profiles in a directory in what those of a key's model differ, besides the workload,
    each difference once; and why files there can't be read.
    """
    keys, refused = _read(directory)
    different: dict[str, Path] = {}
    for path, other in keys.items():
        found = _besides_workload(key, other)
        if found and other.model == key.model:
            free = _FREE if other.compression != key.compression else ""
            different.setdefault("; of ".join(found) + free, path)
    return [*(f"{path} is of {text}" for text, path in different.items()), *refused]


def require_profile(config: RunConfig, profile: Profile | None) -> None:
    """Raises ValueError where a config names a profile that its engine isn't given."""
    named = config.optimizer.profile
    if profile is None and named not in ("auto", "off"):
        raise ValueError(
            f"optimizer.profile={named!r} names a file, which start doesn't read: take "
            "profile = LeptonOptimizer.of(config).find(config, workload), load the model with "
            "config=profile.applied(config, given=()), and give start(profile=profile)"
        )


def _require_fit(profile: Profile, key: Key, path: Path) -> None:
    """Raises ValueError, with the reasons, where a profile is of something else."""
    found = key.differences(profile.key)
    if found:
        raise ValueError(
            f"{path} is of {'; of '.join(found)}: tune again here, or set optimizer.profile=off"
        )


def _besides_workload(key: Key, other: Key) -> list[str]:
    return key.differences(dataclasses.replace(other, workload=key.workload))


def _read(directory: Path) -> tuple[dict[Path, Key], list[str]]:
    """Keys of all profiles, and what is wrong with files that are none."""
    keys, refused = {}, []
    for path in sorted(directory.glob("*.json")):
        if path.name.startswith("kl-"):  # what `accuracy.py` remembers
            continue
        try:
            keys[path] = Profile.read(path).key
        except (ValueError, OSError) as error:
            refused.append(str(error))
    return keys, refused
