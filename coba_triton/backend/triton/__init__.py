"""The Triton backend: allocates what the kernels write, and chooses how they are launched.

``feed_forward``, ``recurrent`` and ``sparse`` launch the kernels of :mod:`coba_triton.kernels` that have these names.
"""

from .feed_forward import feed_forward_backward, feed_forward_forward
from .parameters import heuristic
from .projection import project_events
from .recurrent import (
    add_products,
    fires_often,
    is_sparse,
    recurrent_backward_block,
    recurrent_block,
    recurrent_step,
    sweep_back,
    synapses,
    unpack,
)
from .sparse import sparse_backward_block, sparse_block, sparse_history_gradient, sparse_ring, sparse_send

__all__ = [
    "add_products",
    "feed_forward_backward",
    "feed_forward_forward",
    "fires_often",
    "heuristic",
    "is_sparse",
    "project_events",
    "recurrent_backward_block",
    "recurrent_block",
    "recurrent_step",
    "sparse_backward_block",
    "sparse_block",
    "sparse_history_gradient",
    "sparse_ring",
    "sparse_send",
    "sweep_back",
    "synapses",
    "unpack",
]
