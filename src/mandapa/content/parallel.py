"""Many small requests at once, answers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["in_order"]

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(function: Callable[[In], Out], items: Iterable[In], *, threads: int) -> Iterator[Out]:
    """``function`` of each item, in the items' order, with up to ``threads`` calls under way.

    At most four answers a thread wait to be taken. ``threads=0`` calls in the caller's thread, one after the other. The
    first error is raised at its place; calls under way are waited for, later ones are not made.
    """
    rest = iter(items)
    first = list(islice(rest, 2))
    if threads < 2 or len(first) < 2:
        for item in first:
            yield function(item)
        for item in rest:
            yield function(item)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="mandapa") as pool:
        waiting: deque[Future[Out]] = deque()
        try:
            for item in first:
                waiting.append(pool.submit(function, item))
            for item in rest:
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
