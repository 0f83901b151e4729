"""A YAML file as a plain tree that still knows its lines, so that every fault is told where it was written.

The dialect is YAML 1.2's core: `1e-3` is a number, `no` and `2025-05-05` are text. Keys are text without
dots, so that a dotted path names exactly one place; a key written twice is a fault, never a silent winner.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from models.trainer import Problem

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2; only its composer is used."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


@dataclass(frozen=True)
class Source:
    """Where a specification was written. Two sources always compare equal: the place of a text is no part
    of what it says."""

    file: str = field(default="stored specification", compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)

    def tell(self, problem: Problem) -> str:
        """One line for people: `configs/mvp13.yaml:31: space.optimizer.lr: low must be below high`."""
        path = problem.path
        above = [key for key in self.overrides if (path + ".").startswith(key + ".")]
        below = [key for key in self.overrides if key.startswith(path + ".")] if path else []
        if above or (below and path not in self.lines):
            key = max(above, key=len) if above else below[0]
            where = f"--set {key}"
            return f"{where}: {problem.message}" if key == path else f"{where}: {path}: {problem.message}"
        line = next((self.lines[p] for p in _ancestors(path) if p in self.lines), None)
        line = line if path else self.lines.get("")
        where = self.file if line is None else f"{self.file}:{line}"
        where += f" (with --set {below[0]})" if below else ""
        return f"{where}: {path}: {problem.message}" if path else f"{where}: {problem.message}"


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


class _Builder:
    """Plain values from a composed document; notes the line of every path and every fault."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: str) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            return self._fault(path, "an anchor cannot contain itself")
        self._open.add(id(node))
        try:
            if not node.tag.startswith(_TAG):
                return self._fault(path, f"the tag {node.tag} is not allowed: expected plain YAML")
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return [self.build(item, _join(path, str(i))) for i, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str" or not key:
                self._fault(path, f"expected keys that are text, got one that is not on line {line}")
                continue
            below = _join(path, key)
            if key in tree:
                self._fault(below, f"the key is there twice (lines {self.lines[below]} and {line}): remove one")
                continue
            # A condition names another place of the tree by its dotted path; everywhere else a dot misleads.
            if "." in key and path.rpartition(".")[2] != "when":
                self._fault(below, f"expected a key without a dot, got {key!r}: nest the keys instead")
            self.lines[below] = line
            tree[key] = self.build(value_node, below)
        return tree

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        text = node.value
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text)
            if kind == "float":
                number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
                return number if math.isfinite(number) else self._fault(path, f"expected a number, got {text}")
        except ValueError:
            return self._fault(path, f"expected {kind}, got {text!r}")
        if kind == "str":
            return text
        return self._fault(path, f"the tag {node.tag} is not allowed: expected plain YAML")

    def _fault(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def read_tree(
    content: bytes, label: str, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Source, list[Problem]]:
    """Parse a YAML document and lay `dotted.key=value` overrides over it.

    Args:
        content: the bytes of the file.
        label: how the file is called in messages.
        overrides: values are YAML themselves; missing mappings on the way are made.

    Returns:
        The tree (empty where the document is no mapping), its source, and every fault found.
    """
    builder = _Builder()
    tree: Any = None
    try:
        node = yaml.compose(content, Loader=_Loader)
        tree = None if node is None else builder.build(node, "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        builder.lines = {"": mark.line + 1} if mark else {}
        builder.problems = [Problem("", _syntax_fault(error))]
        tree = {}
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else type(tree).__name__
        if not builder.problems:
            builder.problems.append(Problem("", f"expected a mapping with the key `study`, got {got}"))
        tree = {}
    keys: list[str] = []
    for override in overrides:
        _apply(tree, override, builder, keys)
    return tree, Source(label, builder.lines, tuple(keys)), builder.problems


def _syntax_fault(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return f"not valid YAML: {' '.join(str(reason).split())}"


def _apply(tree: dict[str, Any], override: str, builder: _Builder, keys: list[str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    keys.append(key)
    parts = key.split(".")
    if not equals or not all(parts):
        builder.problems.append(Problem(key, f"expected dotted.key=value, got {override!r}"))
        return
    inner = _Builder()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        builder.problems.append(Problem(key, f"{_syntax_fault(error)} (got {text!r})"))
        return
    value = None if node is None else inner.build(node, key)
    builder.problems.extend(inner.problems)
    for i, part in enumerate(parts[:-1]):
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            above = ".".join(parts[: i + 1])
            builder.problems.append(Problem(key, f"{above} is {show(tree)}, no mapping: set {above} itself"))
            return
    tree[parts[-1]] = value


def show(value: Any) -> str:
    """A value as it would be written in the YAML, shortened to a line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, tuple) else repr(list(value))
    return text if len(text) <= 80 else text[:77] + "..."


def expected_one_of(got: Any, known: Iterable[str], what: str = "") -> str:
    """`expected one of a, b, got 'x'`, with the nearest of the known names where there is one."""
    names = sorted({str(name) for name in known})
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) if names else "none"
    return f"{what}expected one of {listed}, got {show(got)}{hint}"


_MESSAGES = {
    "missing": "is missing: expected a value here",
    "greater_than": "expected a number above {gt}, got {input}",
    "greater_than_equal": "expected a number of at least {ge}, got {input}",
    "less_than": "expected a number below {lt}, got {input}",
    "less_than_equal": "expected a number of at most {le}, got {input}",
    "literal_error": "expected {expected}, got {input}",
    "union_tag_invalid": "expected {expected_tags}, got {tag!r}",
    "union_tag_not_found": "is missing {discriminator}",
    "too_short": "expected at least {min_length} entries, got {actual_length}",
    "too_long": "expected at most {max_length} entries, got {actual_length}",
    "string_too_short": "expected text, got {input}",
    "string_pattern_mismatch": "expected text like {pattern}, got {input}",
}
_EXPECTED = {
    "float": "a number",
    "finite_number": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "path": "a path",
    "none_required": "nothing",
}


def problems_of(error: ValidationError, model: type[BaseModel], tree: Any, prefix: str) -> list[Problem]:
    """pydantic's errors in this project's words, each with its dotted path below `prefix`."""
    found = []
    for detail in error.errors(include_url=False):
        parts = _data_path(detail["loc"], tree)
        path = ".".join([*([prefix] if prefix else []), *parts])
        message = _message(detail, model, parts)
        if (
            detail["type"] == "extra_forbidden"
            and len(parts) == 1
            and (place := _only_place(parts[0], model, tree))
        ):
            message = f"{message.partition('; did you mean')[0]}; did you mean {_join(prefix, place)!r}?"
        if detail["type"] == "value_error":
            found.extend(_spread(path, message, _fields_at(model, parts)))
        else:
            found.append(Problem(path, message))
    return found


def _only_place(key: str, model: type[BaseModel], tree: Any) -> str | None:
    """The dotted place below a section of `tree` where `key` belongs, if there is one alone."""

    def below(path: str, part: Any) -> Iterator[str]:
        if isinstance(part, Mapping):
            for name, value in part.items():
                if name == key:
                    yield _join(path, name)
                yield from below(_join(path, str(name)), value)

    places = {f"{section}.{key}" for section in model.model_fields if key in _fields_at(model, [section])}
    for section in set(tree if isinstance(tree, Mapping) else ()) - {key, "arms", "space"}:
        places |= set(below(section, tree[section]))
    return places.pop() if len(places) == 1 else None


def _spread(path: str, message: str, fields: set[str]) -> list[Problem]:
    """A validator's `a.b: fault; c: fault` as one problem for each place below `path`."""
    found: list[Problem] = []
    for piece in message.split("; "):
        below, colon, rest = piece.partition(": ")
        if colon and below.partition(".")[0] in fields:
            found.append(Problem(_join(path, below), rest))
        elif found:
            found[-1] = Problem(found[-1].path, f"{found[-1].message}; {piece}")
        else:
            found.append(Problem(path, piece))
    return found


def _data_path(loc: tuple[int | str, ...], tree: Any) -> list[str]:
    """`loc` without the union tags and validator names that pydantic mixes into it."""
    parts: list[str] = []
    for i, element in enumerate(loc):
        known = tree if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ()
        if element in known:
            tree = tree[element]
        elif i < len(loc) - 1 or not isinstance(tree, Mapping):
            continue  # a tag; the last element of a mapping's location is a key that is missing there
        parts.append(str(element))
    return parts


def _message(detail: Mapping[str, Any], model: type[BaseModel], parts: list[str]) -> str:
    kind = detail["type"]
    got = show(detail["input"])
    limits = {k: f"{v:.15g}" if isinstance(v, float) else v for k, v in detail.get("ctx", {}).items()}
    context = {**limits, "input": got}
    if kind == "extra_forbidden":
        return expected_one_of(parts[-1], _fields_at(model, parts[:-1]), "unknown key: ")
    if kind in _MESSAGES:
        return _MESSAGES[kind].format(**context)
    if kind in {"value_error", "assertion_error"}:
        return str(detail["ctx"]["error"])
    for ending in ("_type", "_parsing", "_from_float", "_parsing_size", ""):
        stem = kind.removesuffix(ending) if ending else kind
        if stem in _EXPECTED:
            return f"expected {_EXPECTED[stem]}, got {got}"
    return f"{detail['msg']}, got {got}"


def _fields_at(model: type[BaseModel], parts: Sequence[str]) -> set[str]:
    """The keys that `model` knows below the path `parts`."""
    here: list[Any] = [model]
    for part in parts:
        here = [below for annotation in here for below in _step(annotation, part)]
    models = [m for annotation in here for m in _unwrap(annotation) if _is_model(m)]
    return {f.alias or name for m in models for name, f in m.model_fields.items()}


def _step(annotation: Any, part: str) -> Iterator[Any]:
    for inner in _unwrap(annotation):
        if _is_model(inner):
            if part in inner.model_fields:
                yield inner.model_fields[part].annotation
        elif (arguments := typing.get_args(inner)) and typing.get_origin(inner) is not typing.Literal:
            yield arguments[-1] if arguments[-1] is not Ellipsis else arguments[0]


def _unwrap(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _unwrap(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _unwrap(inner)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
