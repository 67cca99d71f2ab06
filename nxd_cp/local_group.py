"""N ranks of a context-parallel group as N threads of one process.

Does: run a function once per rank, and raise the first error of any. Does not: make contexts
(`CPContext.local` does) or carry messages (`transport/local.py`).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nxd_cp.transport import LocalSession, LocalTransport, RankMismatchError, RingError

if TYPE_CHECKING:
    from nxd_cp.context import CPContext

Result = TypeVar("Result")


class LocalGroup:
    """N contexts in one process; made by `CPContext.local`."""

    def __init__(self, contexts: list[CPContext], timeout_s: float) -> None:
        self.contexts = contexts
        self.size = len(contexts)
        self._timeout_s = timeout_s
        self._running = threading.Lock()

    def run(self, fn: Callable[[CPContext], Result]) -> list[Result]:
        """Call `fn(ctx)` in one thread per rank; return the results in rank order.

        The first error of any rank is raised here (where others heard of it in an agreement, the
        error of the rank that told them); it ends the waits of all others. The group can be used
        again afterwards. PyTorch keeps grad mode and autocast per thread: enter them in `fn`.
        Raises RingError when another thread, or `fn` itself, runs it.
        """
        if not self._running.acquire(blocking=False):
            raise RingError(
                "this local group is running already; wait for that run, or make another group "
                "with CPContext.local"
            )
        try:
            return self._run(fn)
        finally:
            self._running.release()

    def _run(self, fn: Callable[[CPContext], Result]) -> list[Result]:
        session = LocalSession(self.size, self._timeout_s)
        num_calls = max(context.transport.num_calls for context in self.contexts)
        for context in self.contexts:
            assert isinstance(context.transport, LocalTransport), "a local group has local ranks"
            context.transport.enter(session, num_calls=num_calls)
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}

        def work(context: CPContext) -> None:
            try:
                results[context.rank] = fn(context)
                session.returned(context.rank)
            except BaseException as error:
                errors[context.rank] = error
                session.fail(context.rank, error)

        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(work, context),
                name=f"cp-rank-{context.rank}",
                daemon=True,
            )
            for context in self.contexts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session.close()
        if session.failed_rank is not None:
            first = errors[session.failed_rank]
            heard = (RankMismatchError, RingError)
            own = [error for _, error in sorted(errors.items()) if not isinstance(error, heard)]
            raise own[0] if own and isinstance(first, RankMismatchError) else first
        return [results[rank] for rank in range(self.size)]
