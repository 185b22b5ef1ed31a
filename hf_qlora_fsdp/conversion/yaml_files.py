"""YAML in which no key is written twice with two values: a parser takes the last one, and says nothing of the first."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            first = seen.setdefault(key.value, value)
            if first is not value and yaml.serialize(first) != yaml.serialize(value):
                problem = f"the key {key.value!r} is there twice, with two values"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return what a text says.

    Raises:
        yaml.YAMLError: It is not YAML, or a key stands in one mapping with two values.
    """
    return yaml.load(text, _Loader)  # a SafeLoader
