"""What the drivers share: `--config=FILE.py[:arg] --config.section.field=value` to a `RunConfig`.

A config file defines `get_config(arg=None)` and returns only what differs from the defaults, as
nested dicts; here the rest is filled in from the sections of `config.py`, so that every field can
be overridden and `--helpfull` documents all of them. A user's mistake ends in one line on stderr
and exit code 2, never in a traceback. Read next: `config.py`, `run.py`.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_dict, config_flags
from tqdm.auto import tqdm

from lepton_jax.config import RunConfig, from_mapping, refuse_unknown
from lepton_jax.config_fields import A_LIST

SET_UP_FAILED = 2  # exit code
_BY_SIGNAL = 128  # plus a signal's number: exit codes of those that one has ended, as in a shell
_NO_CONFIG = "--config is missing: give a config file, --config=FILE.py, before its overrides"

_SINGLE = {f.name: f for f in dataclasses.fields(RunConfig) if f.default is not dataclasses.MISSING}
_SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}
_SECTIONS = {name: section for name, section in _SECTIONS.items() if name not in _SINGLE}


def define_config() -> None:
    """Defines the flag --config and its overrides."""
    config_flags.DEFINE_config_file("config", help_string=describe_fields())
    flag = flags.FLAGS["config"]
    flag.parser = _WholeConfigParser(flag.parser)


def describe_fields() -> str:
    """All fields as flags: type, default and meaning."""
    lines = [
        "FILE.py[:arg] with get_config(arg=None). Any field of it can be overridden; none stands "
        f"for no value where that may be, () for an empty list; a list of texts is {A_LIST}:"
    ]
    for name, section in _SECTIONS.items():
        lines.append("")
        for field in dataclasses.fields(section):
            default = _default(field)
            kind = field.type.__name__ if isinstance(field.type, type) else f"{field.type}"
            kind = kind.replace("collections.abc.", "").replace("typing.", "")
            meaning = field.metadata["doc"]
            lines.append(f"--config.{name}.{field.name} ({kind}, default {default!r}): {meaning}")
    for name, field in _SINGLE.items():
        meaning = field.metadata["doc"]
        lines.append(
            f"--config.{name} ({field.type.__name__}, default {field.default!r}): {meaning}"
        )
    return "\n".join(lines)


def whole_config(overrides: Mapping[str, Any]) -> config_dict.ConfigDict:
    """All sections with their defaults and these overrides; typed and locked.

    Raises ValueError on an unknown section or field, with the nearest known one, and on a value of
    another type.
    """
    if not isinstance(overrides, Mapping | config_dict.ConfigDict):
        raise ValueError(f"get_config returned {overrides!r}: want a dict of sections")
    refuse_unknown(overrides, [*_SECTIONS, *_SINGLE], where="config")
    config = config_dict.ConfigDict({name: field.default for name, field in _SINGLE.items()})
    for name in _SINGLE:
        if name in overrides:
            _set(config, name, overrides[name], where="config")
    for name, section in _SECTIONS.items():
        fields = dataclasses.fields(section)
        mine = overrides.get(name, {})
        if not isinstance(mine, Mapping | config_dict.ConfigDict):
            raise ValueError(f"config.{name} is {mine!r}: want a dict of its fields")
        refuse_unknown(mine, [field.name for field in fields], where=f"config.{name}")
        config[name] = config_dict.ConfigDict({f.name: _typed(f) for f in fields})
        for key, value in mine.items():
            _set(config[name], key, value, where=f"config.{name}")
    return config.lock()


def run_config(config: config_dict.ConfigDict) -> RunConfig:
    """The frozen sections. Raises ValueError naming the field whose value is not allowed."""
    sections = {}
    for name, section in _SECTIONS.items():
        values = {key: _value(config[name], key) for key in config[name]}
        values = {key: value for key, value in values.items() if value is not None}
        sections[name] = from_mapping(section, values, where=f"config.{name}")
    return RunConfig(**sections, **{name: config[name] for name in _SINGLE})


def run_driver(
    main: Callable[[RunConfig], int], *, instead: Callable[[], int | None] = lambda: None
) -> None:
    """Parses the flags, calls `main` with the config, and exits with what it returns.

    `instead` may do without a config what a driver's own flags ask for: its exit code, or None
    where they ask for nothing. It is called first.
    """
    define_config()

    def run(_: Sequence[str]) -> None:
        if not absl_logging.level_debug():
            absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells of each of its steps
        with _ends_in_order():
            code = instead()
            if code is None:
                with user_errors(ValueError):
                    if flags.FLAGS["config"].value is None:
                        raise ValueError(_NO_CONFIG)
                code = main(_parsed_config())
            sys.stdout.flush()
        sys.exit(code)

    app.run(run, flags_parser=_parse_flags)


@contextlib.contextmanager
def user_errors(*types: type[Exception]) -> Iterator[None]:
    """Errors of these types, and a device without memory, become a line on stderr and exit code 2.

    `--v=1` shows where they came from.
    """
    try:
        yield
    except BrokenPipeError:  # is no mistake
        raise
    except (*types, MemoryError) as error:
        _fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line = str(error).partition("\n")[0]
        _fail(
            f"the device has too little memory: lower config.engine.rows, config.engine.max_len or "
            f"config.engine.num_pages, or take a smaller config.compression.preset ({first_line})"
        )


def given_fields() -> frozenset[str]:
    """Fields ("section.field") that the config file or the command line named."""
    flag = flags.FLAGS["config"]
    return frozenset([*flag.parser.in_file, *config_flags.get_override_values(flag)])


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a reader that has closed our output end the program like an error would:
    what is held is given back and stored, and there is no traceback.
    """

    def on_term(number: int, frame: FrameType | None) -> None:
        sys.exit(_BY_SIGNAL + number)

    signal.signal(signal.SIGTERM, on_term)
    try:
        yield
    except KeyboardInterrupt:
        logging.getLogger(__name__).debug("interrupted", exc_info=True)
        print("interrupted", file=sys.stderr)
        sys.exit(_BY_SIGNAL + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(_BY_SIGNAL + signal.SIGPIPE)


class _WholeConfigParser(flags.ArgumentParser):
    """Reads the file as config_flags does, then fills in the defaults.

    `in_file`: the fields that it named.
    """

    def __init__(self, file_parser: flags.ArgumentParser):
        super().__init__()
        self._file_parser = file_parser
        self.in_file: list[str] = []

    def parse(self, path: str) -> config_dict.ConfigDict:
        file = Path(path.partition(":")[0])
        if not file.is_file():
            raise ValueError(f"there is no such file in {Path.cwd()}")
        try:
            overrides = self._file_parser.parse(path)
        except Exception as error:  # the file is a program: it may raise anything
            raise ValueError(f"get_config fails: {type(error).__name__}: {error}") from error
        config = whole_config(overrides)
        self.in_file = [f"{s}.{name}" for s in _SECTIONS for name in overrides.get(s, {})]
        return config

    def flag_type(self) -> str:
        return self._file_parser.flag_type()


@contextlib.contextmanager
def interrupts(first: Callable[[], None] | None) -> Iterator[None]:
    """The first Ctrl-C calls `first`, the next one ends the program as usual. None: as usual."""
    if first is None:
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before)
        first()

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Bars:
    """A progress bar on stderr for the stage that is under way."""

    def __init__(self):
        self._bar, self._stage = None, ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int, what: str) -> None:
        """`done` of `total` in a stage; bytes are large numbers."""
        if stage != self._stage:
            self.__exit__()
            large = total > 1 << 16
            self._bar = tqdm(
                total=total,
                desc=f"{stage:<30}",
                unit="B" if large else "",
                unit_scale=large,
                dynamic_ncols=True,
            )
            self._stage = stage
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)


def _default(field: dataclasses.Field) -> Any:
    made = field.default is dataclasses.MISSING
    return field.default_factory() if made else field.default


def _typed(field: dataclasses.Field) -> Any:
    """The default; a field that may be None, or a dict whose keys are no fields, takes anything
    until its section checks it.
    """
    default = _default(field)
    is_open = default is None or isinstance(default, dict)
    return config_dict.placeholder(object) if is_open else default


def _value(section: config_dict.ConfigDict, name: str) -> Any:
    """Of a field; None: its default. The command line gives open fields as texts: none, or JSON."""
    value = section[name]
    if section.get_type(name) is object and isinstance(value, str):
        if value.lower() == "none":
            return None
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _set(section: config_dict.ConfigDict, name: str, value: Any, *, where: str) -> None:
    if isinstance(value, config_dict.ConfigDict):
        value = value.to_dict()
    if isinstance(section[name], tuple) and isinstance(value, str):
        value = (value,)
    try:
        section[name] = value
    except TypeError as error:
        wanted = type(section[name]).__name__
        raise ValueError(f"{where}.{name}={value!r} is not allowed: want {wanted}") from error


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing with our way of failing."""
    with user_errors(flags.Error, ValueError, OSError):
        _check_overrides(argv)
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            raise ValueError(_unknown_flag(error.flagname)) from error
        if rest[1:]:
            raise ValueError(f"unknown arguments {' '.join(rest[1:])!r}: want --flag=value")
        return rest
    raise AssertionError("unreachable")


def _check_overrides(argv: Sequence[str]) -> None:
    """config_flags would only say that it doesn't know a field; this names the nearest one."""
    names = [a.lstrip("-").partition("=")[0] for a in argv[1:] if a.startswith("-")]
    for name in names:
        name = name.removeprefix("no")
        if name.startswith("config."):
            if "config" not in names:
                raise ValueError(_NO_CONFIG)
            section, _, field = name.removeprefix("config.").partition(".")
            refuse_unknown([section], [*_SECTIONS, *_SINGLE], where="config")
            if section in _SINGLE:
                _refuse_parts(section, field)
                continue
            known = [known.name for known in dataclasses.fields(_SECTIONS[section])]
            refuse_unknown([field], known, where=f"config.{section}")


def _unknown_flag(name: str) -> str:
    """What is wrong, with the field of that name, or else the flag that is nearest in spelling."""
    fields = [f"config.{s}.{f.name}" for s, of in _SECTIONS.items() for f in dataclasses.fields(of)]
    last = name.rpartition(".")[2]
    near = [field for field in fields if field.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, [*flags.FLAGS, *fields], n=1)
    hint = f"; did you mean {' or '.join(f'--{n}' for n in near)}?" if near else ""
    return f"unknown flag --{name}{hint} (--helpfull lists all)"


def _refuse_parts(name: str, field: str) -> None:
    if field:
        raise ValueError(f"config.{name} is one value and has no field {field!r}")


def _parsed_config() -> RunConfig:
    with user_errors(ValueError):
        return run_config(flags.FLAGS["config"].value)
    raise AssertionError("unreachable")


def _fail(message: str) -> None:
    if absl_logging.level_debug():
        logging.getLogger(__name__).debug("set-up failed", exc_info=True)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(SET_UP_FAILED)
