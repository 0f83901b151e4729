"""Configs as nested mappings whose places are named by dotted paths; arms are overlays on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_ABSENT = object()


def merge(config: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `config` under `overlay`: mappings merge, `null` deletes, all else replaces."""
    merged = copy.deepcopy(dict(config))
    for key, value in overlay.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def settles(overlay: Mapping[str, Any], path: str) -> bool:
    """Whether `overlay` sets or deletes the place `path` or one above it."""
    value: Any = overlay
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return True
        value = value.get(key, _ABSENT)
        if value is _ABSENT:
            return False
    return True


def find(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path (the tree itself for an empty one); None where there is none."""
    value: Any = tree
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path whose parents exist."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree[key]
    tree[last] = value


def leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Everything in a tree that is no mapping (or an empty one), by dotted path, in order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = f"{path}.{key}" if path else key
        flat |= leaves(value, below) if isinstance(value, Mapping) and value else {below: value}
    return flat


def same(a: Any, b: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
