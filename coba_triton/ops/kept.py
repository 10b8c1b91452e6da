"""What was made of tensors, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .tensors import as_in_memory, is_watched, may_be_kept

T = TypeVar("T")
# Of a tensor of more bytes, the checksum is compared and not the numbers.
COPIED_AT_MOST = 2**16


_all: WeakSet[Kept[Any]] = WeakSet()


class Kept(Generic[T]):
    """One thing for each tensor, as long as that tensor lives.

    It is found again for the same tensors, unless PyTorch counted a change of one of them, and for the same use, which an
    equal ``fits`` says. PyTorch does not count all changes: where numbers are learned, their :func:`contents_of` belong to
    ``fits``. It counts no changes of tensors that were made in inference mode, so nothing is kept for these.
    """

    def __init__(self) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        _all.add(self)

    def find(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable) -> T | None:
        """What :meth:`keep` was given, or None."""
        found = self._made.get(tensor)
        if found is None or found[0] != (fits, _versions(tensor, *others)):
            return None
        same = all(a is b for a, b in zip(found[1], others, strict=True))
        made: T | None = found[2] if same else None
        return made

    def keep(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable, made: T) -> T:
        """Keep ``made`` in place of what was kept for the tensor before; returns it. On a GPU, the host waits for it."""
        versions = _versions(tensor, *others)
        if versions is not None and may_be_kept(tensor.device):
            self._made[tensor] = (fits, versions), tuple(others), made
        return made

    def get(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable, make: Callable[[], T]) -> T:
        """What was made, or what ``make`` makes now."""
        found = self.find(tensor, others, fits)
        return self.keep(tensor, others, fits, make()) if found is None else found


def forget(tensors: Iterable[Tensor]) -> None:
    """Give up what was made of these tensors, and the weak references to them, as PyTorch swaps no tensor that has one."""
    for tensor in tensors:
        for kept in _all:
            kept._made.pop(tensor, None)


def _versions(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """How often each of the tensors was changed in place, and where its numbers are; None if one does not tell."""
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    watched = is_watched()  # by a transform, whose tensors do not say where their numbers are
    return tuple(None if t is None else (t._version, watched or t.data_ptr(), t.dtype, t.device) for t in tensors)


def contents_of(tensor: Tensor) -> Hashable:
    """What equals that of another time only if all numbers in the tensor are the same.

    An optimizer with ``fused=True``, ``tensor.data`` and NumPy change numbers without PyTorch's counting it. So the numbers
    themselves are looked at, on the CPU. On a GPU, for which the host would have to wait, those of a tensor that is learned
    are taken to be new every time, and those of others never.
    """
    if not tensor.is_cpu or is_watched():
        return object() if tensor.requires_grad or is_watched() else None
    numbers = as_in_memory(tensor.detach()).contiguous().view(-1).numpy()
    if numbers.nbytes <= COPIED_AT_MOST:
        return numbers.tobytes()
    from ..backend.cpu.checksums import checksum_of

    return checksum_of(numbers)
