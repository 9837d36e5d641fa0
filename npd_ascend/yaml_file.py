"""A YAML file as a validated object; what is wrong with it in one line."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from npd_ascend.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(file: Path, model: type[Model], example: str) -> Model:
    """UserError names the file and the key. example: a file of this kind that comes with the project."""
    try:
        return model.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; see {example} for one") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a text file that can be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file as a whole"
        raise UserError(f"{file}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
