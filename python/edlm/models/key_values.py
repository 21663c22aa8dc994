"""KeyValues: what a causal stack has computed of the positions that it has read, so that reading on does not compute it again."""

from __future__ import annotations

import torch


class KeyValues:
    """Keys (already turned) and values of ``length`` positions of N rows, of every layer. Made by ``CausalLM.extend``.

    A value: extending one gives another, and the old one stays what it was. Room is allocated ahead and shared, so that reading on
    token by token writes in place; a cache that is extended a second time (a branch), was cut, or had rows taken, is copied then.
    """

    def __init__(self, layers: list[torch.Tensor], length: int, taken: list[int], index: torch.Tensor | None = None) -> None:
        self.length = length
        self._layers = layers  # [2, rows, heads, room, head_dim] each
        self._taken = taken  # one number, which all caches with these layers share: positions that somebody has written
        self._index = index  # int64 [N], rows of the layers; None: all of them

    @property
    def num_rows(self) -> int:
        return len(self._index) if self._index is not None else self._layers[0].shape[1]

    def rows(self, index: torch.Tensor) -> KeyValues:
        """The rows ``index``, int64 [M] on the cache's device, in any order and as often as wanted; copied when it is extended."""
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"index: expected int64 rows [M], got {index.dtype} {list(index.shape)}")
        return KeyValues(self._layers, self.length, self._taken, index if self._index is None else self._index[index])

    def truncate(self, length: int) -> KeyValues:
        """The first ``length`` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected a number in 0 .. {self.length}, the cache's length, got {length}")
        return KeyValues(self._layers, length, self._taken, self._index)


class Extension:
    """One pass of a stack behind ``past``: each layer hands in its new keys and values, and gets all of them back."""

    def __init__(self, past: KeyValues | None, count: int, keep: bool) -> None:
        self.start = 0 if past is None else past.length
        self._past, self._end, self._keep = past, self.start + count, keep
        self._layers: list[torch.Tensor] = []
        self._in_place = (
            keep
            and past is not None
            and past._index is None
            and past._taken[0] == past.length
            and past._layers[0].shape[3] >= self._end
        )

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values [N, heads, count, head_dim] of a layer -> those of all positions, [N, heads, end, head_dim]."""
        if not self._keep and not self.start:
            return k, v
        if self._in_place:
            whole = self._past._layers[layer]
        else:
            # Half as much again, once a cache grows: copies then cost as much as all steps together, not as much as each.
            room = self._end + self._end // 2 if self._keep and self.start else self._end
            whole = k.new_empty(2, *k.shape[:2], room, k.shape[3])
            for part in range(2 if self.start else 0):
                old, index = self._past._layers[layer][part, :, :, : self.start], self._past._index
                whole[part, :, :, : self.start] = old if index is None else old[index]
        whole[0, :, :, self.start : self._end] = k
        whole[1, :, :, self.start : self._end] = v
        if self._keep:
            self._layers.append(whole)
        return whole[0, :, :, : self._end], whole[1, :, :, : self._end]

    def result(self) -> KeyValues | None:
        """The longer cache; None where nothing was to be kept."""
        if not self._keep:
            return None
        if self._in_place:
            self._past._taken[0] = self._end
        return KeyValues(self._layers, self._end, self._past._taken if self._in_place else [self._end])
