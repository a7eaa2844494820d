"""The best of very many weights: exact, without a copy or a gathered tensor, on one or several processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from altermoma_pl.mask.radix import (
    Order,
    blocks,
    common_dtype,
    count_equal,
    kth_largest,
    only,
    ordered,
    pieces,
)
from altermoma_pl.model.distributed import (
    check_division,
    gathered,
    is_sharded,
    like,
    local,
    rank,
    sharded_like,
    sums,
)


class Selection:
    """Weights that compete by score, then by tie breaker, then by position, of which the earlier wins.

    Positions are ordered by tensor, then row-major; the rows of a process come before those of the next.
    If scores are sharded, all processes must call the same methods.

    Args:
        scores: Parameter name -> score of each weight; all are sharded or none.
        within: Parameter name -> which weights compete; None for all.
        ties: Parameter name -> second score, read only if first ones are equal where it matters: it may
            be computed on access.

    Raises:
        ValueError: If only some scores are sharded.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        within: Mapping[str, Tensor] | None = None,
        ties: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._scores, self._within, self._ties = scores, within, ties
        check_division(scores.values())
        self._sharded = is_sharded(scores.values())
        whole = [name for name, score in scores.items() if not isinstance(score, DTensor)]
        if self._sharded and whole:
            raise ValueError(
                f"scores of {whole} are whole on each process, others are sharded: shard all or none"
            )
        # Not like the scores: masks lie row-major whatever the layout of those.
        self._kept = {
            name: torch.zeros(local(score).shape, dtype=torch.bool, device=score.device)
            for name, score in scores.items()
        }
        self._begun: set[str] = set()  # of which something is kept: only then must reading pass over it
        self.num_alive = {name: score.numel() for name, score in scores.items()}
        """Parameter name -> number of weights that compete, of all processes."""
        if within is not None:
            self.num_alive = self._of_all(
                {name: int(_own_rows(within[name], score).count_nonzero()) for name, score in scores.items()}
            )

    @property
    def kept(self) -> dict[str, Tensor]:
        """Parameter name -> boolean tensor of the score's shape, and sharded like it: what is kept."""
        return {name: like(self._kept[name], score) for name, score in self._scores.items()}

    def keep_(self, masks: Mapping[str, Tensor]) -> None:
        """Keep what these masks do, by parameter name, which are of competing weights and not sharded."""
        for name, mask in masks.items():
            self._kept[name] |= mask
        self._begun.update(masks)

    @torch.no_grad()
    def keep_best_(self, names: list[str], count: int) -> None:
        """Keep, of these parameters together, the `count` best weights beyond those that are kept already.

        Raises:
            ValueError: If the score of a weight that competes is not finite.
        """
        order = self._by_score(names)
        key, left, equal = kth_largest(order, count, lambda: self.check_finite(names))
        if left < equal and self._ties is not None:
            # Second scores are read here only: they may be computed, and most often nothing is tied.
            self._keep_(order, key + 1)
            order = self._by_tie(order, key)
            key, left, equal = kth_largest(order, left)
        self._keep_(order, key if left == equal else key + 1)
        if left < equal:
            self._keep_first_(order, key, left)

    def count_kept(self, names: list[str]) -> dict[str, int]:
        """Parameter name -> number of weights that are kept, of all processes."""
        return self._of_all({name: int(self._kept[name].count_nonzero()) for name in names})

    def forget_(self, names: list[str]) -> None:
        """Keep nothing of these parameters."""
        for name in names:
            self._kept[name].zero_()
        self._begun.difference_update(names)

    @torch.no_grad()
    def keep_best_in_rows_(self, name: str, count: int) -> None:
        """Keep the `count` best weights in each row of a parameter of two or more dimensions.

        Raises:
            ValueError: If the score of a weight that competes is not finite.
        """
        self.check_finite([name])
        dtype, ties = common_dtype([self._scores[name].dtype]), None
        for rows, (kept, score, *alive) in blocks(self._kept[name], *self._competing(name)):
            keys = only(ordered(score, dtype), alive)
            ranked, order = keys.sort(dim=1, descending=True, stable=True)
            inside, outside = ranked[:, max(count - 1, 0) : count], ranked[:, count : count + 1]
            if self._ties is not None and bool((inside == outside).any()):
                ties = self._tie(name) if ties is None else ties
                second = ordered(ties[rows].flatten(1), common_dtype([ties.dtype]))
                # A stable sort by the first key of what is sorted by the second one is by both.
                order = second.argsort(dim=1, descending=True, stable=True)
                order = order.gather(1, keys.gather(1, order).argsort(dim=1, descending=True, stable=True))
            kept.scatter_(1, order[:, :count], True)

    def fewest_in_a_row(self, name: str) -> int:
        """The smallest number of weights that compete in a row, of all processes."""
        score = self._scores[name]
        fewest = score.shape[1:].numel()
        if self._within is not None:
            for _, (alive,) in blocks(_own_rows(self._within[name], score)):
                fewest = min(fewest, int(alive.sum(1).min()))
        return min(gathered(fewest)) if self._sharded else fewest

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` with the name of the first parameter whose competing scores are not finite."""
        bad = dict.fromkeys(names, 0)
        for name in names:
            for score, *alive in pieces(*self._competing(name)):
                wrong = ~torch.isfinite(score)
                bad[name] += int((wrong & alive[0] if alive else wrong).count_nonzero())
        # Added up before the first is raised, so that all processes raise the same error.
        for name, count in self._of_all(bad).items():
            if count:
                raise ValueError(f"score of {name!r} is not finite at {count} weights")

    def _competing(self, name: str) -> list[Tensor]:
        """The rows of a score and, if not all weights compete, which do."""
        score = self._scores[name]
        rows = [local(score).detach()]
        return rows if self._within is None else [*rows, _own_rows(self._within[name], score)]

    def _of_all(self, counts: dict[str, int]) -> dict[str, int]:
        """The sums over processes."""
        return dict(zip(counts, sums(list(counts.values())), strict=True)) if self._sharded else counts

    def _tie(self, name: str) -> Tensor:
        score, tie = self._scores[name], self._ties[name]  # type: ignore[index]
        if tie.shape != score.shape:
            raise ValueError(
                f"score of {name!r} has shape {tuple(score.shape)}, its tie breaker {tuple(tie.shape)}"
            )
        return _own_rows(tie, score)

    def _by_score(self, names: list[str]) -> Order:
        dtype = common_dtype([self._scores[name].dtype for name in names])

        def read() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name in names:
                for kept, score, *alive in pieces(self._kept[name], *self._competing(name)):
                    yield name, kept, self._keys(name, dtype, kept, score, alive)

        return Order(read, names, dtype, self._scores[names[0]].device, self._sharded)

    def _by_tie(self, order: Order, threshold: int) -> Order:
        """Among the weights whose key in `order` is the threshold."""
        dtype = common_dtype([self._tie(name).dtype for name in order.names])
        equal = count_equal(order, threshold)

        def read() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name in filter(equal.get, order.names):
                competing = self._competing(name)
                for kept, tie, score, *alive in pieces(self._kept[name], self._tie(name), *competing):
                    first = self._keys(name, order.dtype, kept, score, alive)
                    yield name, kept, only(ordered(tie, dtype), [first == threshold])

        return replace(order, read=read, dtype=dtype)

    def _keys(
        self, name: str, dtype: torch.dtype, kept: Tensor, score: Tensor, alive: list[Tensor]
    ) -> Tensor:
        return only(ordered(score, dtype), [*alive, ~kept] if name in self._begun else alive)

    def _keep_(self, order: Order, least: int) -> None:
        """Keep what has at least this key."""
        for _, kept, keys in order.read():
            kept |= keys >= least
        self._begun.update(order.names)

    def _keep_first_(self, order: Order, key: int, count: int) -> None:
        """Keep the first `count` weights with this key."""
        own = list(count_equal(order, key).values())
        equal = gathered(own) if self._sharded else [own]
        process, left = rank() if self._sharded else 0, {}
        # Positions run through a tensor's rows on all processes before the next tensor's, so what a process
        # may keep of a tensor is what those before it leave of the count.
        for i, name in enumerate(order.names):
            each = [counts[i] for counts in equal]
            left[name] = min(max(count - sum(each[:process]), 0), own[i])
            count = max(count - sum(each), 0)
        for name, kept, keys in order.read():
            first = keys == key
            found = int(first.count_nonzero())
            if found > left[name]:
                first &= first.cumsum(0) <= left[name]
            left[name] = max(left[name] - found, 0)
            kept |= first


def _own_rows(tensor: Tensor, score: Tensor) -> Tensor:
    """What this process holds of a tensor, placed like the score."""
    return local(sharded_like(tensor, score)).detach()
