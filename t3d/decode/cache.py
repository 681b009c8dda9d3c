"""The KV cache of the local engine: preallocated, one slot per absolute position, written where a forward says."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3Model
from transformers.cache_utils import Cache, CacheLayerMixin

CACHE_NAMES = ("cache", "past_key_values")  # transformers from 5.24 on, and before; the old name goes in 5.40


def cache_name(forward: Callable) -> str:
    """The name under which a model's ``forward`` takes its cache: one of ``CACHE_NAMES``."""
    parameters = inspect.signature(forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


CACHE_NAME = cache_name(Qwen3Model.forward)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: (lanes, kv heads, slots, head dim), written by scatter at ``Slots.write``."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: "Slots", shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.slots = slots
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        lanes, write, length = self.slots.lanes, self.slots.write, self.slots.length
        if write is None:  # a verification reads the cache of its lanes and leaves nothing behind
            keys, values = self.keys[lanes, :, :length], self.values[lanes, :, :length]
            return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        # under autocast values are in half precision, whatever the weights are in
        self.keys[lanes.unsqueeze(-1), :, write] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[lanes.unsqueeze(-1), :, write] = value_states.transpose(1, 2).to(self.values.dtype)
        if length is None:  # a prefill reads nothing but what it has just written
            return key_states, value_states
        return self.keys[:, :, :length], self.values[:, :, :length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.is_initialized

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12, where it is abstract


class Slots(Cache):
    """The cache, and where the coming forward writes and reads.

    Set before each forward: ``lanes`` (rows,), ``write`` (rows, width) slots (None: nothing is written, and a row reads
    its own tokens behind the slots), ``length`` of the slots read (None in a prefill).
    """

    layers: list[SlotLayer]  # type: ignore[assignment]  # a Cache may hold layers of any kind, this one does not

    def __init__(self, config, lanes: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (lanes, config.num_key_value_heads, capacity, config.head_dim)
        super().__init__(layers=[SlotLayer(self, shape, dtype, device) for _ in range(config.num_hidden_layers)])
        self.lanes = torch.arange(lanes, device=device)
        self.write: Tensor | None = None
        self.length: int | None = None

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give the lanes ``target`` the first ``length`` slots of the lanes ``source``, (n,) both."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def keep(self, lanes: Tensor) -> None:
        """Drop all lanes but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[lanes], layer.values[lanes]

    @staticmethod
    def bytes_per_slot(config, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
