"""Sizes that know whose channels they count, and tell what the code does with them.

``if x.shape == y.shape: y = y + x`` takes another branch as soon as a cut makes two widths equal,
and no single trial shows all widths. ``y.view(b, c, -1)`` with the ``c`` of another tensor fits
only as long as both are cut alike. ``if x.shape[2] % 2: x = F.pad(x, (0, 0, 0, 1))`` pads images of
other sizes than the example's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from slimcli.network.structure import user_line
from slimcli.network.structure.planes import NONE, Labels
from slimcli.network.structure.record import Least, Record
from slimcli.network.structure.trace import Planes


def _heard(compare: Callable[[int, Any], bool]) -> Any:
    def method(self: Length, other: object) -> bool:
        self.met(other)
        return compare(self, other)

    return method


def _divided(divide: Callable[[int, Any], Any]) -> Any:
    def method(self: Length, *others: object) -> Any:
        self.told_apart()
        return self.derived(divide(self, *others))

    return method


def _reduced(divide: Callable[[int, Any], Any]) -> Any:
    def method(self: Length, other: object) -> Any:
        self.told_apart()
        if type(other) is int and other > 1 and self.is_full:
            self.record.divisors.append((self.labels, other))
        return self.derived(divide(self, other))

    return method


def _subtracted(subtract: Callable[[int, Any], Any]) -> Any:
    def method(self: Length, other: object) -> Any:
        if isinstance(other, Length) or not len(self.labels):
            self.met(other)
        return self.derived(subtract(self, other))

    return method


def _multiplied(multiply: Callable[[int, Any], Any]) -> Any:
    def method(self: Length, other: object) -> Any:
        self.record.counts_sizes |= not len(self.labels)
        return self.derived(multiply(self, other))

    return method


def _compared(compare: Callable[[int, Any], bool]) -> Any:
    def method(self: Derived, other: object) -> bool:
        if not user_line.is_of_torch(sys._getframe(1)):
            self.record.tell(self.labels)
            if isinstance(other, (Derived, Length)):
                self.record.tell(other.labels)
        return compare(self, other)

    return method


def _told(say: Callable[..., Any]) -> Any:
    """As a key, or in a text, it is compared where nobody hears."""

    def method(self: Length, *args: Any) -> Any:
        caller = sys._getframe(1)
        if not (user_line.is_of_torch(caller) or user_line.is_of_slim(caller)):
            self.record.tell(self.labels)
        return say(self, *args)

    return method


def _carried(operate: Callable[..., Any]) -> Any:
    def method(self: Derived, *others: object) -> Any:
        return _derived(operate(self, *others), self.record, self.labels)

    return method


class Derived(int):
    """A number made of a width: what it is compared with, no trial may have met.

    Attributes:
        record: Where comparisons go.
        labels: Of the channels that were counted.
    """

    record: Record
    labels: Labels = NONE

    __eq__ = _compared(int.__eq__)
    __ne__ = _compared(int.__ne__)
    __lt__ = _compared(int.__lt__)
    __le__ = _compared(int.__le__)
    __gt__ = _compared(int.__gt__)
    __ge__ = _compared(int.__ge__)

    def __bool__(self) -> bool:
        """``if channels % 16``."""
        self.record.ask(self.labels)
        return int.__bool__(self)

    __hash__ = int.__hash__

    __add__ = _carried(int.__add__)
    __radd__ = _carried(int.__radd__)
    __sub__ = _carried(int.__sub__)
    __rsub__ = _carried(int.__rsub__)
    __mul__ = _carried(int.__mul__)
    __rmul__ = _carried(int.__rmul__)
    __mod__ = _carried(int.__mod__)
    __floordiv__ = _carried(int.__floordiv__)
    __neg__ = _carried(int.__neg__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are plain numbers."""
        return int, (int.__int__(self),)


def _derived(number: Any, record: Record, labels: Labels) -> Any:
    if type(number) is not int:  # not implemented, or a fraction: it tells nothing from here on
        record.tell(labels)
        return number
    derived = Derived(number)
    derived.record, derived.labels = record, labels
    return derived


class Length(int):
    """One size of a tensor.

    Attributes:
        record: Where comparisons go.
        tensor: Planes of the whole tensor.
        labels: Of the channels along this dimension; none where it has none.
        is_plain: One label an entry, in order.
        is_batch: It counts samples, as far as one can tell from the dimension.
    """

    record: Record
    tensor: Planes = ()
    labels: Labels = NONE
    is_plain: bool = True
    is_batch: bool = False

    @property
    def is_full(self) -> bool:
        """Is it the number of some channels, all of them known?"""
        return len(self.labels) > 1 and self.is_plain and bool(self.labels.all())

    def derived(self, number: Any) -> Any:
        """A number made of this one."""
        if type(number) is float:
            self.record.counts_sizes |= not len(self.labels)
        return _derived(number, self.record, self.labels) if len(self.labels) else number

    def met(self, other: object) -> None:
        """Compared with another number; a difference is a comparison, too.

        Equal widths must stay equal; of unequal ones the larger stays, so they never meet. A width
        stays above the number it is compared with. An image's size tells images apart.
        """
        is_other = isinstance(other, Length) and other.record is self.record
        for each in (self, other) if is_other else (self,):
            each.told_apart()  # type: ignore[attr-defined]
        if not is_other:  # a number, or kept by the user's code since another trace
            self._stay_above(other)
            return
        pair: tuple[Length, ...] = (self, other)  # type: ignore[assignment]
        if int.__ne__(self, other):
            pair = (max(pair, key=int.__int__),)
        elif all(each.is_plain and len(each.labels) and each.labels.all() for each in pair):
            self.record.join_labels(pair[0].labels, pair[1].labels)
            return
        for each in pair:
            if len(each.labels):
                reason = f"its width is compared with another at {user_line.current()}"
                each.record.freeze_labels(each.labels, reason)

    def _stay_above(self, number: object) -> None:
        """No trial cuts down to a few channels, so that it would not see another branch taken.

        What torch itself asks is no branch: norms warn of a number that is not theirs.
        """
        if type(number) is not int or not 0 < number < int.__int__(self):
            return
        if user_line.is_of_torch(sys._getframe(3)):
            return
        if len(self.labels) and not self.is_plain:  # entries: of other images there are others
            self.record.ask(self.labels)
        elif self.is_full:
            self.record.least.append(Least(self.labels, number + 1, user_line.current()))

    def told_apart(self) -> None:
        """Images may be padded, or not, for their size."""
        if not len(self.labels) and not self.is_batch and not user_line.is_of_einops():
            self.record.remainders += [(each, user_line.current()) for each in self.tensor]
            self.record.counts_sizes |= not self.tensor  # of the images themselves

    __eq__ = _heard(int.__eq__)
    __ne__ = _heard(int.__ne__)
    __lt__ = _heard(int.__lt__)
    __le__ = _heard(int.__le__)
    __gt__ = _heard(int.__gt__)
    __ge__ = _heard(int.__ge__)
    __hash__ = _told(int.__hash__)
    __str__ = _told(int.__repr__)
    __repr__ = _told(int.__repr__)
    __format__ = _told(int.__format__)

    __sub__ = _subtracted(int.__sub__)
    __rsub__ = _subtracted(int.__rsub__)
    __mul__ = _multiplied(int.__mul__)
    __rmul__ = _multiplied(int.__rmul__)
    __add__ = _multiplied(int.__add__)
    __radd__ = _multiplied(int.__radd__)

    __mod__ = _reduced(int.__mod__)
    __divmod__ = _divided(int.__divmod__)
    __floordiv__ = _divided(int.__floordiv__)
    __truediv__ = _divided(int.__truediv__)
    __rmod__ = _divided(int.__rmod__)
    __rfloordiv__ = _divided(int.__rfloordiv__)
    __rtruediv__ = _divided(int.__rtruediv__)
    __and__ = _divided(int.__and__)
    __rand__ = _divided(int.__rand__)
    __rshift__ = _divided(int.__rshift__)

    def _said(self) -> None:
        """From here on it is a number that tells nothing."""
        self.record.tell(self.labels)
        self.record.counts_sizes |= not len(self.labels)

    def __float__(self) -> float:
        """``math.sqrt(conv.in_channels)``."""
        self._said()
        return int.__float__(self)

    def __pow__(self, *others: Any) -> Any:
        """``conv.in_channels ** -0.5``."""
        self._said()
        return int.__pow__(self, *others)

    def __int__(self) -> int:
        """From here on it is a plain number that tells nothing."""
        self.told_apart()
        if len(self.labels):
            self.record.escaped.append(self.labels)
        return int.__int__(self)

    def __neg__(self) -> int:
        """``-height % 2`` is a remainder of the height."""
        negative = Length(int.__neg__(self))
        negative.record, negative.tensor, negative.labels = self.record, self.tensor, self.labels
        negative.is_batch = self.is_batch
        return negative

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are plain numbers."""
        return int, (int.__int__(self),)


def plain(value: Any) -> Any:
    """The same with sizes that don't tell."""
    if isinstance(value, Length):
        return int.__int__(value)
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value


def same(left: Length, right: Length) -> bool:
    """Do they count the same channels, perhaps in another order (a shuffle)?"""
    if np.array_equal(left.labels, right.labels):
        return True
    return np.array_equal(np.unique(left.labels), np.unique(right.labels))
