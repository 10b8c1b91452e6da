"""What was made of tensors, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Kept(Generic[T]):
    """One thing for each tensor, as long as that tensor lives.

    It is found again for the same tensors with the same numbers in them, and for the same use, which an equal ``fits`` says.
    A tensor that was made in inference mode does not tell whether it has changed, so nothing is kept for it.
    """

    def __init__(self) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._made

    def find(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable) -> T | None:
        """What :meth:`keep` was given, or None."""
        found = self._made.get(tensor)
        if found is None or found[0] != (fits, _versions(tensor, *others)):
            return None
        same = all(a is b for a, b in zip(found[1], others, strict=True))
        made: T | None = found[2] if same else None
        return made

    def keep(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable, made: T) -> T:
        """Keep ``made`` in place of what was kept for the tensor before; returns it."""
        versions = _versions(tensor, *others)
        if versions is not None:
            self._made[tensor] = (fits, versions), tuple(others), made
        return made

    def get(self, tensor: Tensor, others: Sequence[Tensor | None], fits: Hashable, make: Callable[[], T]) -> T:
        """What was made, or what ``make`` makes now."""
        found = self.find(tensor, others, fits)
        return self.keep(tensor, others, fits, make()) if found is None else found


def _versions(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """How often each of the tensors was changed in place; None if one does not tell."""
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    return tuple(None if tensor is None else tensor._version for tensor in tensors)
