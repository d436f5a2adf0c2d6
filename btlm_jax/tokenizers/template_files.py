"""Where chat templates are: in a Hugging Face directory, in a file, or by a name here. They are rendered elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from btlm_jax.data.store import TEMPLATE_FILE
from btlm_jax.storage.files import read_json_object
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.prompt_bos import CONFIG_FILE

TEMPLATE_FOLDER, TEMPLATE_KEY = "additional_chat_templates", "chat_template"
DEFAULT = "default"  # the usual one of several


def read_chat_templates(directory: Path) -> dict[str, str]:
    """Return a directory's templates by name; files have priority over tokenizer_config.json, as in transformers.

    Raises:
      ValueError: a file is damaged.
    """
    path = directory / CONFIG_FILE
    in_config = read_json_object(path).get(TEMPLATE_KEY) if path.is_file() else None
    templates: dict[str, str] = {}
    if isinstance(in_config, str):
        templates[DEFAULT] = in_config
    elif isinstance(in_config, list):
        for entry in in_config:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
                raise ValueError(f"{path}: {TEMPLATE_KEY} must be a text, or a list of name and template")
            templates[entry["name"]] = entry["template"]
    elif in_config is not None:
        raise ValueError(f"{path}: {TEMPLATE_KEY}={in_config!r} must be a text")
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        files[DEFAULT] = directory / TEMPLATE_FILE
    return templates | {name: _read_text(path) for name, path in files.items()}


def template_value(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Return templates by name as `chat_template` of a tokenizer_config.json has them, and GGUF's writer takes them."""
    if list(templates) == [DEFAULT]:
        return templates[DEFAULT]
    return [{"name": name, "template": template} for name, template in templates.items()]


def find_template(given: str, *, directory: Path) -> tuple[str, str]:
    """Return the source of a chat template, and what it is called.

    `given` is one of NAMED_TEMPLATES or the path of a file; if it is "", the template is that of `directory`, where a
    tokenizer is, or "" if that has none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged.
    """
    if given in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[given], given
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"--template={given} is neither a file nor one of the templates {', '.join(NAMED_TEMPLATES)}"
            )
        return _read_text(path), given
    templates = read_chat_templates(directory)
    return templates.get(DEFAULT, ""), f"of {directory}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
