"""What a backend must offer, on the CPU: launches of the kernels, whose neurons or batch rows are split over threads.

``feed_forward``, ``recurrent``, ``sparse`` and ``sparse_backward`` launch the kernels of the modules that have these names.
"""

from .feed_forward import ForwardStream, feed_forward_backward, feed_forward_forward, lanes, row_sums
from .recurrent import (
    add_products,
    fires_often,
    is_sparse,
    project_events,
    recurrent_backward_block,
    recurrent_block,
    recurrent_step,
    synapses,
    unpack,
)
from .shared import heuristic
from .sparse import sparse_block, sparse_ring, sparse_send
from .sparse_backward import sparse_backward_block, sparse_history_gradient

__all__ = [
    "ForwardStream",
    "add_products",
    "feed_forward_backward",
    "feed_forward_forward",
    "fires_often",
    "heuristic",
    "is_sparse",
    "lanes",
    "project_events",
    "recurrent_backward_block",
    "recurrent_block",
    "recurrent_step",
    "row_sums",
    "sparse_backward_block",
    "sparse_block",
    "sparse_history_gradient",
    "sparse_ring",
    "sparse_send",
    "synapses",
    "unpack",
]
