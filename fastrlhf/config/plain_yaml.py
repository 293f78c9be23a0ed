"""YAML of plain data: no objects, no aliases (a few lines of them can stand for millions of nodes), bounded depth."""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 20


class Loader(yaml.SafeLoader):
    """Raises yaml.MarkedYAMLError for an alias, and for what is nested deeper than MAX_DEPTH."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed; write the value out", problem_mark=mark
            )
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def construct(loader: Loader, node: yaml.Node) -> Any:
    """The value of a node. ValueError where its tag and its text do not fit (`!!bool 5`, a date that cannot be)."""
    try:
        return loader.construct_object(node, deep=True)
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{node.tag.rpartition(':')[2]} {str(node.value)[:40]!r}") from error


def parse_value(text: str) -> Any:
    """The value that a short text stands for, as in `lora={r: 8}`. ValueError where it is no YAML of plain data."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return None if node is None else construct(loader, node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
