"""Attributes that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, Self, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):
    """A method that is called once, and whose answer is the attribute from then on.

    `functools.cached_property` holds a lock meanwhile up to CPython 3.11, one for every object of
    the class: a child that is forked at that moment would wait for it for ever. So there is none,
    and of two threads that ask first at once each makes an answer; one of them stays.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make: Final = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        made = instance.__dict__[self._name] = self._make(instance)
        return made
