"""Files of settings: YAML with overrides from the command line, validated; what is wrong is one line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from npd_ascend.errors import UserError

_Kind = TypeVar("_Kind", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets a second key of a name take the place of the first."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def override(key: str, value: Path | str) -> str:
    """key=value that reads back as this very text, whatever YAML would see in it."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def load_yaml(kind: type[_Kind], path: Path, overrides: Sequence[str]) -> _Kind:
    """Read, override, validate. overrides: dotted `key=value`, values as YAML; UserError names file, key and reason."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; see configs/ for the ones that come with the project") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: want a mapping of sections at the top; see configs/addition_cpu.yaml")
    for text in overrides:
        _override(raw, text)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(error, kind)}") from None


def _override(raw: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r} is not key=value; for example npd.epochs=4")
    *parents, leaf = key.split(".")
    section: Any = raw
    for name in parents:
        if section.get(name) is None:  # not there, or null as in a saved configuration
            section[name] = {}
        if not isinstance(section[name], dict):
            raise UserError(f"override {text!r}: {name} is a value, not a section")
        section = section[name]
    try:
        section[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def _first_error(error: ValidationError, kind: type[BaseModel]) -> str:
    """`key: reason`, and for a typo the keys that exist there."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location) or "the file as a whole"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; known keys there: {', '.join(known_keys(location[:-1], kind))}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}" + (
        f" (got {first['input']!r})" if not isinstance(first["input"], dict | BaseModel) else ""
    )


def known_keys(location: list[str], kind: type[BaseModel]) -> list[str]:
    """Keys of the section at `location` of `kind`; members of a union appear there by their own `kind`."""
    section, options = kind, [kind]
    for part in location:
        if part.isdecimal():  # the place in a list
            continue
        if part not in section.model_fields:
            section = next(one for one in options if part in get_args(one.model_fields["kind"].annotation))
            continue
        options = list(_models(section.model_fields[part].annotation)) or [section]
        section = options[0]
    return [field.alias or name for name, field in section.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
