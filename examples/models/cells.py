"""From metres to cells of the bird's-eye view."""

from torch import Tensor

from examples.grid import BEVGrid


def to_cells(xy: Tensor, grid: BEVGrid, per_cell: int = 1) -> Tensor:
    """Continuous cell coordinates of positions (..., 2); cell i covers [i, i + 1)."""
    return (xy - xy.new_tensor([grid.x_min, grid.y_min])) * (per_cell / grid.cell)


def to_metres(cells: Tensor, grid: BEVGrid, per_cell: int = 1) -> Tensor:
    """Inverse of `to_cells`."""
    return cells * (grid.cell / per_cell) + cells.new_tensor([grid.x_min, grid.y_min])


def flat_index(cells: Tensor, frame: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Index into maps flattened over (B, nx, ny).

    Args:
        cells: (..., 2), from `to_cells`.
        frame: (...) or broadcastable to it, in [0, B).
        shape: (nx, ny).

    Returns:
        The index (...), meaningful where the second tensor, inside (...), is true.
    """
    ix, iy = cells.floor().long().unbind(-1)
    inside = (ix >= 0) & (ix < shape[0]) & (iy >= 0) & (iy < shape[1])
    return (frame * shape[0] + ix) * shape[1] + iy, inside
