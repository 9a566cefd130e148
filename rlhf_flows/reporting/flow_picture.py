"""The flows of an engine as an SVG picture: a box a call, in columns by what they wait for.

Written by hand as the curves are: no library of graphs, no browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rlhf_flows.graph import BATCH, Graph

__all__ = ["draw_flows"]

_BOX, _ROW, _GAP = 168, 34, 40
_HEAD, _PAD = 34, 16
_INK, _RULE = "#4a5568", "#94a9c9"
_FILL = {"environment": "#eef3fb", "trainer": "#fdf3e7", "evaluator": "#eef8f0"}
_BATCH, _RETURNED = "batch", "returned"

Place = tuple[int, int]


def draw_flows(graphs: Mapping[str, Graph], syncs: Sequence[tuple[str, str]] = ()) -> str:
    """An SVG with one panel a flow, one below the other.

    Args:
        graphs: By name, such as "environment".
        syncs: (trained module, module that takes its weights), in words below.
    """
    panels, top, width = [], 0, 0
    for title, graph in graphs.items():
        panel, size = _panel(title, graph, top)
        panels.append(panel)
        top, width = top + size[1], max(width, size[0])
    for source, target in syncs:
        panels.append(
            f'<text x="{_PAD}" y="{top + 18}">weights: <tspan font-weight="bold">'
            f"{escape(source)}</tspan> → {escape(target)}</text>"
        )
        top += 20
    height = top + _PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif"'
        f' font-size="12" fill="{_INK}"><defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4"'
        f' markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{_RULE}"/>'
        f'</marker></defs><rect width="{width}" height="{height}" fill="#fff"/>'
        f"{''.join(panels)}</svg>"
    )


def _panel(title: str, graph: Graph, top: int) -> tuple[str, tuple[int, int]]:
    """One flow, and the room that it takes."""
    columns = _columns(graph)
    places = {
        name: (_PAD + i * (_BOX + _GAP), top + _HEAD + j * (_ROW + 14))
        for i, column in enumerate(columns)
        for j, name in enumerate(column)
    }
    lines = [
        (i, node.id, name)
        for node in graph.nodes
        for name, inputs in (("", node.inputs), ("4 3", node.after))
        for i in inputs
    ]
    parts = [
        f'<text x="{_PAD}" y="{top + 20}" font-size="14" font-weight="bold">{escape(title)}</text>'
    ]
    parts += [_line(places[_key(i)], places[_key(j)], dashes) for i, j, dashes in lines]
    parts += [_line(places[_key(i)], places[_RETURNED], "") for i in graph.outputs]
    fill = _FILL.get(title, "#f4f5f7")
    labels = {_BATCH: "batch", _RETURNED: "returned"}
    labels |= {_key(n.id): n.label for n in graph.nodes}
    parts += [
        f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_ROW}" rx="{_round(name)}" fill="{fill}"'
        f' stroke="{_RULE}"/><text x="{x + _BOX // 2}" y="{y + 21}" text-anchor="middle">'
        f"{escape(_shortened(labels[name]))}</text>"
        for name, (x, y) in places.items()
    ]
    rows = max(len(column) for column in columns)
    size = (2 * _PAD + len(columns) * (_BOX + _GAP) - _GAP, _HEAD + rows * (_ROW + 14) + 10)
    return "".join(parts), size


def _columns(graph: Graph) -> list[list[str]]:
    """The batch, the calls by how many others come before them, and what is returned."""
    depth: dict[int, int] = {BATCH: 0}
    for node in graph.nodes:
        depth[node.id] = 1 + max(depth[i] for i in (*node.inputs, *node.after))
    columns = [[_key(i) for i in depth if depth[i] == d] for d in range(max(depth.values()) + 1)]
    return [*columns, [_RETURNED]] if graph.outputs else columns


def _key(node_id: int) -> str:
    return _BATCH if node_id == BATCH else f"n{node_id}"


def _line(start: Place, end: Place, dashes: str) -> str:
    x0, y0 = start[0] + _BOX, start[1] + _ROW // 2
    x1, y1 = end[0], end[1] + _ROW // 2
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<path d="M{x0} {y0}C{x0 + _GAP} {y0} {x1 - _GAP} {y1} {x1} {y1}" fill="none"'
        f' stroke="{_RULE}" marker-end="url(#end)"{dashed}/>'
    )


def _round(name: str) -> int:
    return _ROW // 2 if name in (_BATCH, _RETURNED) else 5


def _shortened(label: str) -> str:
    return label if len(label) <= 26 else f"{label[:25]}…"
