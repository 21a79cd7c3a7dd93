"""Moving the rows of a cache, and leaving room behind them for the tokens to come."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Chosen rows of a layer's keys and values, (rows, heads, tokens, D), with room for more tokens behind them.

    A DynamicLayer copies all it has at every token: 33 % of a step of 32 rows and 128 tokens (21.6 M Llama, 2 CPU
    threads, 2026-11).
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._keys, self._values = (_with_room(states, rows, room) for states in (layer.keys, layer.values))
        self._show(layer.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens into the room; they must fit."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        assert end <= self._keys.shape[-2], "more tokens than there is room for"
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self._keys[:, :, :tokens], self._values[:, :, :tokens]


def move_rows(cache: Cache, rows: Tensor, room: int) -> None:
    """Make the cache that of these of its rows, in place: fewer, more or repeated. `room` tokens may be added then."""
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, RoomyLayer) and layer.get_seq_length() > 0:
            cache.layers[index] = RoomyLayer(layer, rows, room)
        else:
            # What beam search uses: unlike batch_select_indices it also moves the states of linear attention.
            layer.reorder_cache(rows)


def _with_room(states: Tensor, rows: Tensor, room: int) -> Tensor:
    heads, tokens, size = states.shape[1:]
    roomy = states.new_empty(len(rows), heads, tokens + room, size)
    roomy[:, :, :tokens] = states.index_select(0, rows)
    return roomy
