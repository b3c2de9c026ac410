"""Attributes that are made on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, Self, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):
    """A method that is called once; its result is the attribute from then on.

    Up to CPython 3.11 `functools.cached_property` holds one lock for all objects of the class
    during the call: a child that is forked at that moment would wait for it for ever. So there is
    no lock here. If two threads ask first at once, each calls the method, and one result stays.
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
