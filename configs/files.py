"""Text files: read in bounded memory, with a UserError for what is damaged or made to harm; written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError

LARGEST_JSON, LARGEST_YAML = 64 << 20, 256 << 10  # bytes; far above any that this project writes
DEEPEST_YAML = 20


def read_text(path: str | Path, largest: int = LARGEST_JSON) -> str:
    """A UTF-8 file. Raises FileNotFoundError, and UserError for one that cannot be read or has more bytes than `largest`."""
    try:
        with open(path, "rb") as file:
            raw = file.read(largest + 1)
        if len(raw) > largest:
            raise UserError(f"{path} cannot be read: expected at most {largest >> 10} KiB")
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read: it is not UTF-8 text") from None


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that `path` holds either what it held before or all of `text`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """A file that is one JSON object. Raises as `read_text`, and UserError for what is no JSON object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line (metrics.jsonl). Raises as `read_json`."""
    lines = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: line {number} cannot be read: {error}") from None
        if not isinstance(value, dict):
            found = type(value).__name__
            raise UserError(f"{path} is damaged: expected one JSON object a line, got a {found} in line {number}")
        lines.append(value)
    return lines


def _repeated(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that a mapping has twice, of which YAML takes the last without a word."""
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    return key
                seen.add(key.value)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _repeated(child))), None)


def read_plain_yaml(path: str | Path) -> Any:
    """A YAML file of plain values, lists and mappings. Raises as `read_text`, and UserError for what is no such YAML.

    Anchors and tags, which no setting needs, are refused: a few nested anchors stand for more values than memory holds.
    """
    text, depth = read_text(path, LARGEST_YAML), 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) or getattr(event, "tag", None) or depth > DEEPEST_YAML:
                raise UserError(f"{path}: expected plain values, without anchors (&, *), tags (!) or deep nesting")
        if repeated := _repeated(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path}:{repeated.start_mark.line + 1}: {repeated.value} stands there for the second time")
        return yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date of month 13, a number of 5,000 digits
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
