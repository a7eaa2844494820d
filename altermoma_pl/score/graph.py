"""Walks over the graph that autograd records."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import Node


def upstream(nodes: Iterable[Node | None]) -> set[Node]:
    """All that the nodes were computed from; a node itself only if another of them needs it."""
    found: set[Node] = set()
    pending = [parent for node in nodes for parent in _parents(node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += _parents(node)
    return found


def _parents(node: Node | None) -> list[Node]:
    return [] if node is None else [parent for parent, _ in node.next_functions if parent is not None]
