"""The configuration engine. Dataclasses are the schema, with defaults, help and limits; OmegaConf merges the values.

    config = load(TrainConfig, sys.argv[1:], default="configs/ddo_sdar_full_self.yaml")

Later values win: defaults <- preset <- YAML file (``config=FILE``) <- command line (``a.b=c``). A file with
``base: OTHER`` builds on another file and wins over it. Every mistake is a one-line ``UserError`` before any model
loads. A schema may have:
- ``PRESETS``: key of the preset's name -> name -> values of other keys of the section;
- ``USUAL``: the keys that ``--help`` explains;
- ``check()``: checks that values go together;
- ``composed(given)``, a class method: the schema for the given values (dotted key -> value); it may have more keys;
- ``RELEASED``: key -> ``Released``, for keys of the paper's release that change nothing here.
"""

import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t3d.common import paths
from t3d.common.errors import UserError, fault, written
from t3d.common.jsonfiles import atomic_write

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    several: bool = False,
    own: bool = False,
) -> Any:
    """A dataclass field with its help and its limits. The limits of a list hold for every item.

    ``several`` marks a text that may be given as a list; the items are joined by commas. ``own`` marks a choice that
    may also be the user's ``module:Object``. The reader of the key loads it.
    """
    limits = {"choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt}
    limits |= {"several": several or None, "own": own or None}
    metadata = {"help": help} | {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Released:
    """A key of the release that changes nothing here. It is no key of the schema, so ``--help`` only names it.

    Attributes:
        values: accepted values; they ask for the behaviour that this package has anyway.
        remedy: the error's text for any other value.
        accepts: (value, configuration) -> whether that value is accepted as well.
    """

    values: tuple[Any, ...]
    remedy: str
    accepts: Callable[[Any, Any], bool] | None = None


def load(schema: type[Config], argv: Sequence[str] | None = None, default: str | None = None) -> Config:
    """The configuration of one run, checked.

    Args:
        schema: a dataclass of dataclasses, such as TrainConfig.
        argv: ``config=FILE`` and dotted overrides ``a.b=c``; None = the process's own. ``--help`` and
            ``--help-all`` print and exit 0.
        default: the YAML file to read without ``config=``; None = only the dataclasses' defaults.

    Raises:
        UserError: unknown key, wrong type, impossible value, missing or malformed file, malformed override.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help-all"} & set(argv):
        assignments = [token for token in argv if "=" in token]
        print(help_text(_composed(schema, assignments, default), default, everything="--help-all" in argv))
        raise SystemExit(0)

    schema = _composed(schema, argv, default)
    known, released = _items(schema()), getattr(schema, "RELEASED", {})
    layers = _layers(argv, default, known)
    given: dict[str, Any] = {}
    for values, place in layers:
        for key, value in _flatten(values, known):
            given[key] = value
            if key not in known and key not in released:
                raise fault(key, value, _unknown(key, known) + place)
    without_effect = {key: given.pop(key) for key in released if key in given}

    preset: dict[str, Any] = {}
    for chooser, choices in getattr(schema, "PRESETS", {}).items():
        section = chooser.rpartition(".")[0]
        preset |= {f"{section}.{name}": value for name, value in choices.get(str(given.get(chooser)), {}).items()}
    merged = OmegaConf.structured(schema())
    for key, value in (preset | given).items():
        try:
            OmegaConf.update(merged, key, _accept(key, value, known[key]))
        except OmegaConfBaseException:
            raise _type_fault(key, value, known[key]) from None
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to a wrong type
        key = (error.full_key or "").partition("[")[0]
        reason = str(error).splitlines()[0]
        raise fault(key, given.get(key), f"{reason}; write the value itself, or ${{section.key}} of another") from None
    validate(config)
    for key, value in without_effect.items():
        _check_released(key, value, released[key], config)
    return config


def validate(config: Any) -> None:
    """Check the limits of every value, and that the values go together. Raises UserError at the first mistake."""
    for key, item in _items(config).items():
        for value in item.value if isinstance(item.value, list) else [item.value]:
            if value is not None and (remedy := _violation(value, item.limits)):
                raise fault(key, value, remedy)
    if hasattr(config, "check"):
        config.check()


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"section.key": value}."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def save(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically; ``config=<path>`` reads it back."""
    with atomic_write(path) as file:
        OmegaConf.save(OmegaConf.create(to_dict(config)), file)


def help_text(schema: type, default: str | None = None, everything: bool = True) -> str:
    """Usage, then the keys by section, the usual ones (``schema.USUAL``) first, each with default, type, limits, help.

    Args:
        everything: False = if the schema has usual keys, list only the names of the others.
    """
    lines = [
        f"usage: {_program()} [config=FILE] [section.key=value ...]",
        "",
        inspect.cleandoc(schema.__doc__ or ""),
        "",
        f"config=FILE: a YAML file of yours or one that ships with T3D; default {default or 'none'}",
        "In a file, `base: FILE` names another file to build on.",
        "Values: null, true, numbers, text, [lists], ${other.key}. Later values win:",
        "defaults <- preset (training only) <- FILE <- command line.",
    ]
    items = _items(schema())
    usual = getattr(schema, "USUAL", None) or tuple(items)
    if len(usual) < len(items):
        lines += [f"{len(usual)} usual keys of {len(items)}; --help-all explains all of them."] * (not everything)
    for section in dict.fromkeys(key.rpartition(".")[0] for key in (*usual, *items)):
        keys = [key for key in items if key.rpartition(".")[0] == section]
        first = [key for key in usual if key in keys]
        others = [key for key in keys if key not in first]
        lines += ["", f"{section or 'top'}:"]
        for key in [*first, *others] if everything else first:
            lines += _explained(key, items[key])
        if others and not everything:
            names = "also: " + ", ".join(key.rpartition(".")[2] for key in others)
            lines += textwrap.wrap(names, 116, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    for chooser, choices in getattr(schema, "PRESETS", {}).items():
        lines += ["", f"presets ({chooser}):"]
        lines += [
            f"  {name}: " + (", ".join(f"{k}={written(v)}" for k, v in values.items()) or "the defaults")
            for name, values in choices.items()
        ]
    if released := getattr(schema, "RELEASED", {}):
        text = f"also accepted, without effect (the release's): {', '.join(released)}"
        lines += ["", *textwrap.wrap(text, 116, subsequent_indent="  ")]
    return "\n".join(lines)


class Key(NamedTuple):
    """A key of a schema, in words: its dotted name, its default, its type and limits, and its help."""

    name: str
    default: str
    values: str
    help: str


def keys_of(schema: type) -> list[Key]:
    """Every key of a schema, in its order."""
    return [_in_words(name, item) for name, item in _items(schema()).items()]


def _in_words(name: str, item: "_Item") -> Key:
    values = ", ".join(filter(None, [_type_name(item.hint), _limits_text(item.limits)]))
    return Key(name, written(item.value), values, item.limits.get("help", ""))


def _explained(key: str, item: "_Item") -> list[str]:
    """A key's lines of the help."""
    name, default, values, text = _in_words(key, item)
    indents = ((f"{name}={default}  ({values})", "  "), (text, " " * 6))
    return [
        line
        for part, indent in indents
        for line in textwrap.wrap(part, 116, initial_indent=indent, subsequent_indent=" " * 6, break_on_hyphens=False)
    ]


def _program() -> str:
    """The command, as the user started it."""
    program = sys.argv[0] or "script"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.parent}" if spec and program.endswith("__main__.py") else program


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@dataclass(frozen=True)
class _Item:
    value: Any
    hint: Any
    limits: Any  # the field's metadata: help, choices, ge, gt, le, lt, several, own


def _items(config: Any, prefix: str = "") -> dict[str, _Item]:
    """Dotted key -> item, for every leaf of a configuration object."""
    hints = get_type_hints(type(config))
    items: dict[str, _Item] = {}
    for f in fields(config):
        key, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            items |= _items(value, key + ".")
        else:
            items[key] = _Item(value, hints[f.name], f.metadata)
    return items


def _layers(argv: Sequence[str], default: str | None, known: dict[str, _Item]) -> list[tuple[dict[Any, Any], str]]:
    """The given values of the YAML files and the overrides, each with its place; later values win."""
    file, overrides = _split(argv)
    file = file or default
    layers = _yaml_layers(file) if file else []
    return layers + [({key: _value(key, text, known.get(key))}, "") for key, text in overrides]


def _composed(schema: type[Config], argv: Sequence[str], default: str | None) -> type[Config]:
    """The schema for the given values: the result of its own ``composed`` if it has that method."""
    composed = getattr(schema, "composed", None)
    if composed is None:
        return schema
    known = _items(schema())
    layers = _layers(argv, default, known)
    return composed({key: value for values, _ in layers for key, value in _flatten(values, known)})


def _check_released(key: str, value: Any, released: Released, config: Any) -> None:
    """``value`` may be ${another.key}. Raises UserError if the key asks for a behaviour that this package lacks."""
    if isinstance(value, str) and value.startswith("${"):
        other = _items(config).get(value[2:-1])
        value = other.value if other else value
    if value not in released.values and not (released.accepts and released.accepts(value, config)):
        raise fault(key, value, released.remedy)


LOCAL_RANK = re.compile(r"--local[_-]rank(=.*)?")


def _split(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """The tokens of a command line -> (the config file or None, the overrides as written).

    Some launchers add ``--local_rank=N`` or ``--local_rank N``, which the environment holds too.
    """
    file, overrides = None, []
    tokens = iter(argv)
    for token in tokens:
        if rank := LOCAL_RANK.fullmatch(token):
            if rank[1] is None:
                next(tokens, None)
            continue
        key, equals, text = token.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(
                f"{token}: not understood; write key=value, for example rollout.block_size=4, or --help", token
            )
        if key == "config":
            if file is not None:
                raise UserError(f"{token}: config= is given twice; give one file", "config")
            if not text:
                raise UserError(f"{token}: no file; write config=FILE", "config")
            file = text
            continue
        overrides.append((key, text))
    return file, overrides


def _value(key: str, text: str, item: "_Item | None") -> Any:
    """A value of the command line: as written if its key takes text, else parsed as YAML.

    For a key that takes text, quotes, a list and null keep their meaning.
    """
    if item and _plain(item.hint) is str and text[:1] not in ("", "'", '"', "[") and text.lower() not in ("null", "~"):
        return text
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"{key}={text}: the value is malformed; check its brackets and quotes", key) from None


def _yaml_layers(file: str, above: tuple[str, ...] = ()) -> list[tuple[dict[Any, Any], str]]:
    """The values of a YAML file, each with its place. The values of its ``base`` file come first."""
    if file in above:
        raise UserError(f"config={above[0]}: base: {file} leads back to itself; leave it out", "config")
    values = _read_yaml(file)
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise fault("base", base, f"expected the name of a YAML file (in {file})")
    return [*(_yaml_layers(base, (*above, file)) if base else []), (values, f" (in {file})")]


def _read_yaml(file: str) -> dict[Any, Any]:
    path = paths.resolve(file)
    if not path.is_file():
        looked = ", ".join(map(str, dict.fromkeys((Path.cwd(), paths.workspace(), paths.shipped()))))
        raise UserError(f"config={file}: no such file (looked in {looked})", key="config")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"config={file}: not valid YAML{line}: {getattr(error, 'problem', error)}", "config") from None
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={file}: cannot be read: {str(error).splitlines()[0]}", "config") from None
    if not isinstance(values, dict):
        raise UserError(f"config={file}: holds a list; write `section:` and below it `key: value`", "config")
    return values


def _flatten(values: dict[Any, Any], known: dict[str, _Item], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values -> (dotted key, value) pairs. A section without keys reads as null in YAML: nothing is set."""
    pairs = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        section = any(other.startswith(key + ".") for other in known)
        if isinstance(value, dict) and key not in known and (value or section):
            pairs += _flatten(value, known, key + ".")
        elif section and value is not None:
            below = ", ".join(k.removeprefix(key + ".") for k in known if k.startswith(key + "."))
            raise fault(key, value, f"is a section; set one of its keys: {below}")
        elif not section:
            pairs.append((key, value))
    return pairs


def _unknown(key: str, known: dict[str, _Item]) -> str:
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    guess = close[0] if close else same_name[0] if len(same_name) == 1 else None
    return f"unknown key; did you mean {guess}?" if guess else "unknown key; --help lists all keys"


def _accept(key: str, value: Any, item: _Item) -> Any:
    """The value for OmegaConf, checked: OmegaConf accepts mistakes such as `???`, nested lists, true and false as text.

    YAML reads a bare `no` as false. If "no" is a choice, the user meant "no".
    """
    if value is False and "no" in item.limits.get("choices", ()):
        return "no"
    if "several" in item.limits and isinstance(value, list) and value:
        value = value if any(not isinstance(part, str) for part in value) else ",".join(value)
    nested = isinstance(value, list) and any(isinstance(part, list | dict) for part in value)
    if value == "???" or nested or (isinstance(value, bool) and _plain(item.hint) is str):
        raise _type_fault(key, value, item)
    return value


def _type_fault(key: str, value: Any, item: _Item) -> UserError:
    example = f", for example {key}={written(item.value)}" if item.value is not None else ""
    return fault(key, value, f"expected {_type_name(item.hint)}{example}")


def _violation(value: Any, limits: Any) -> str | None:
    """The limits that a value violates, as an error text; None if the value is allowed."""
    choices = limits.get("choices")
    if choices is not None and value not in choices and not (limits.get("own") and ":" in str(value)):
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"must be {_limits_text(limits)}" + (f"; did you mean {close[0]}?" if close else "")
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    inside = (
        ("ge" not in limits or value >= limits["ge"])
        and ("gt" not in limits or value > limits["gt"])
        and ("le" not in limits or value <= limits["le"])
        and ("lt" not in limits or value < limits["lt"])
    )
    return None if inside else f"must be {_limits_text(limits)}"


def _limits_text(limits: Any) -> str:
    if choices := limits.get("choices"):
        own = ", or module:Object" if limits.get("own") else ""
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices) + own
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{word} {limits[name]}" for name, word in words.items() if name in limits)


def _plain(hint: Any) -> Any:
    """The type without its `| None`."""
    return next(arg for arg in get_args(hint) if arg is not NoneType) if NoneType in get_args(hint) else hint


def _type_name(hint: Any) -> str:
    plain = _plain(hint)
    if get_origin(plain) is list:
        name = "a list of names" if get_args(plain) == (str,) else "a list of numbers"
    else:
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[plain]
    return name if plain is hint else name + " or null"
