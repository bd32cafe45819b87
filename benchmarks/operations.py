"""What a step has to do at the least, counted from a checkpoint's configuration.

Operations are those of matrix products and convolutions, a multiplication and an addition each one;
bytes are the weights, each read once, and the keys and values of the context. Norms, activations
and rotations are left out: they work on little, so that time spent in them is time lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.limits import Limits
from server.model.config import CheckpointInfo, ProjectorConfig, TextConfig, VisionTowerConfig
from server.model.projector import SQUEEZE_RATIO, STAGE_DEPTH
from server.model.tensors import DTYPE_BYTES

DEPTHWISE_KERNEL = 3 * 3


@dataclass(frozen=True, slots=True)
class Work:
    """The least that has to be computed, and the least that has to be read from memory.

    No bytes where the products alone are the measure.
    """

    operations: int
    num_bytes: int

    def least_s(self, limits: Limits, dtype: str) -> float:
        """The time it cannot take less than: of the two, what the machine is slower at."""
        return max(
            self.operations / limits.operations_per_s[dtype],
            self.num_bytes / limits.read_bytes_per_s,
        )


def decode_work(info: CheckpointInfo, dtype: str, *, num_rows: int, context: int) -> Work:
    """One step in which each of `num_rows` sequences of `context` positions gets its next token.

    Its own position is one of the context.
    """
    text = info.text
    matrices = text.num_layers * layer_matrix_elements(text) + head_elements(text)
    operations = num_rows * (2 * matrices + attention_operations(text, num_pairs=context))
    keys_and_values = num_rows * context * info.kv_bytes_per_token(dtype)
    return Work(operations, text_weight_bytes(text, dtype) + keys_and_values)


def prefill_work(info: CheckpointInfo, *, num_tokens: int) -> Work:
    """A prompt of `num_tokens` from nothing to its first token.

    Each position attends to itself and those before it. Of all but the last position the last layer
    has to make keys and values only, and nobody needs their logits.
    """
    text = info.text
    layer, keys_and_values = layer_matrix_elements(text), key_value_elements(text)
    last_layer = num_tokens * keys_and_values + (layer - keys_and_values)
    matrices = num_tokens * (text.num_layers - 1) * layer + last_layer + head_elements(text)
    num_pairs = num_tokens * (num_tokens + 1) // 2
    pairs = (text.num_layers - 1) * num_pairs + num_tokens
    operations = 2 * matrices + 4 * text.num_heads * text.head_dim * pairs
    return Work(operations, num_bytes=0)


def vision_work(info: CheckpointInfo, *, num_tiles: int, num_queries: int) -> Work:
    """Tiles through tower and projector to `num_queries` features each."""
    return Work(num_tiles * tile_operations(info, num_queries=num_queries), num_bytes=0)


def layer_matrix_elements(text: TextConfig) -> int:
    """Elements of the matrices of one decoder layer, each multiplied once for every token."""
    query_size = text.num_heads * text.head_dim
    kv_size = text.num_kv_heads * text.head_dim
    attention = text.hidden_size * (2 * query_size + 2 * kv_size)
    return attention + 3 * text.hidden_size * text.intermediate_size


def key_value_elements(text: TextConfig) -> int:
    """Of these, the elements of the matrices that make keys and values."""
    return 2 * text.hidden_size * text.num_kv_heads * text.head_dim


def head_elements(text: TextConfig) -> int:
    return text.logits_rows * text.hidden_size


def attention_operations(text: TextConfig, *, num_pairs: int) -> int:
    """Of all layers, for that many pairs of a query and a key it sees: scores and weighted sum."""
    return text.num_layers * 4 * text.num_heads * text.head_dim * num_pairs


def text_weight_bytes(text: TextConfig, dtype: str) -> int:
    """What a decode step reads of the weights. Of an untied embedding it is a few rows: none."""
    query_size = text.num_heads * text.head_dim
    kv_size = text.num_kv_heads * text.head_dim
    norms = 2 * text.hidden_size
    biases = text.attention_bias * (query_size + 2 * kv_size + text.hidden_size)
    biases += text.mlp_bias * (2 * text.intermediate_size + text.hidden_size)
    layers = text.num_layers * (layer_matrix_elements(text) + norms + biases)
    return (layers + text.hidden_size + head_elements(text)) * DTYPE_BYTES[dtype]


def tile_operations(info: CheckpointInfo, *, num_queries: int) -> int:
    """One tile through tower and projector to `num_queries` features."""
    if info.tower is None or info.projector is None:
        raise ValueError("a text checkpoint has no tiles")
    projector = PROJECTOR_OPERATIONS[info.projector.kind](info.projector, num_queries)
    return tower_operations(info.tower) + projector


def tower_operations(tower: VisionTowerConfig) -> int:
    """One tile; every patch sees every patch."""
    patches, hidden = tower.num_patches, tower.hidden_size
    embedding = 2 * patches * tower.num_channels * tower.patch_size**2 * hidden
    matrices = 4 * hidden**2 + 2 * hidden * tower.intermediate_size
    attention = 4 * patches**2 * hidden
    return embedding + tower.num_layers_used * (2 * patches * matrices + attention)


def _abstractor(projector: ProjectorConfig, num_queries: int) -> int:
    channels, hidden = projector.channels, projector.hidden_size
    for_each_place = 2 * channels**2 + DEPTHWISE_KERNEL * channels
    for_each_map = 2 * channels * (channels // SQUEEZE_RATIO)

    def stage(num_places: int) -> int:
        return STAGE_DEPTH * 2 * (num_places * for_each_place + for_each_map)

    readout = 2 * num_queries * (channels * hidden + hidden**2)
    return stage(projector.num_patches) + stage(num_queries) + readout


def _mlp(projector: ProjectorConfig, inner: int) -> int:
    elements = projector.channels * inner + inner * projector.hidden_size
    return 2 * projector.num_patches * elements


PROJECTOR_OPERATIONS: Mapping[str, Callable[[ProjectorConfig, int], int]] = {
    "cabstractor": _abstractor,
    "linear": lambda projector, _: (
        2 * projector.num_patches * projector.channels * projector.hidden_size
    ),
    "mlp": lambda projector, _: _mlp(projector, projector.channels),
    "inverted_mlp": lambda projector, _: _mlp(projector, 2 * projector.channels),
}
"""By the checkpoint's own name: (projector, queries) -> operations for one tile."""
