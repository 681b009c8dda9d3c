"""The KV cache of the local engine: preallocated, with one slot per absolute position."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Model
from transformers.cache_utils import Cache, CacheLayerMixin

CACHE_NAMES = ("cache", "past_key_values")  # transformers from 5.24 on, and before; the old name goes in 5.40


def cache_name(forward: Callable) -> str:
    """The name under which a model's ``forward`` takes its cache: one of ``CACHE_NAMES``."""
    parameters = inspect.signature(forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


CACHE_NAME = cache_name(Qwen3Model.forward)  # all models changed it in the same release


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: (lanes, kv heads, slots, head dim), written by scatter at ``Slots.write``.

    They are allocated with the first keys, which have the model's own shape.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, slots: "Slots"):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.slots
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (slots.lane_count, states.shape[1], slots.capacity, states.shape[3])
            filled = torch.zeros(shape, dtype=slots.dtype, device=states.device)
            torch._dynamo.mark_static_address(filled, guard=False)  # a CUDA graph may write it in place
            setattr(self, name, filled)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        lanes, write, length = self.slots.lanes, self.slots.write, self.slots.length
        if write is None:  # a verification reads the cache of its lanes and writes nothing
            keys, values = self.keys[lanes, :, :length], self.values[lanes, :, :length]
            return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        # under autocast values are in half precision for any dtype of the weights
        self.keys[lanes.unsqueeze(-1), :, write] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[lanes.unsqueeze(-1), :, write] = value_states.transpose(1, 2).to(self.values.dtype)
        if length is None:  # a prefill reads only its own keys and values
            return key_states, value_states
        return self.keys[:, :, :length], self.values[:, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.capacity, 0

    def get_seq_length(self) -> int:
        return self.slots.capacity

    def get_max_length(self) -> int:
        return self.slots.capacity

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12, where it is abstract


class Slots(Cache):
    """The cache, and the slots that the next forward writes and reads.

    Set these before each forward:
    - ``lanes``: (rows,).
    - ``write``: (rows, width) slots; None = nothing is written, and a row reads its own tokens after the slots.
    - ``length``: number of slots to read; None in a prefill.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]  # a Cache may hold layers of any kind, this one does not

    def __init__(self, config: Any, lanes: int, capacity: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[SlotLayer(self) for _ in range(config.num_hidden_layers)])
        self.lane_count, self.capacity, self.dtype = lanes, capacity, dtype
        self.lanes = torch.arange(lanes, device=device)
        self.write: Tensor | None = None
        self.length: int | None = None

    @property
    def ready(self) -> list[SlotLayer]:
        """The layers that have received keys."""
        return [layer for layer in self.layers if layer.is_initialized]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give the lanes ``target`` the first ``length`` slots of the lanes ``source``, (n,) both."""
        for layer in self.ready:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def keep(self, lanes: Tensor) -> None:
        """Keep only these lanes."""
        self.lane_count = len(lanes)
        for layer in self.ready:
            layer.keys, layer.values = layer.keys[lanes], layer.values[lanes]
