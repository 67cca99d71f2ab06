"""A place in a context-parallel group: rank, size, layout, and the means to reach the other ranks.

Does: wrap a process group, a mesh axis, or N threads of this process. Does not: create process
groups, or know masks and shapes. Chunk index = group rank; the ring order is a separate list.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.local_group import LocalGroup
from nxd_cp.nxd_place import find_place
from nxd_cp.schedule import LAYOUTS
from nxd_cp.strategies.plan import STRATEGIES, Strategy
from nxd_cp.transport import (
    Call,
    CollectiveTransport,
    DistributedTransport,
    LocalSession,
    LocalTransport,
    RingError,
    Transport,
    XlaTransport,
    probe,
)
from nxd_cp.transport.agreement import Description, announce_refusal, check_agreement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_handles = itertools.count(1)
_contexts: weakref.WeakValueDictionary[str, CPContext] = weakref.WeakValueDictionary()
_contexts_lock = threading.Lock()
_SHOWN_RANKS = 16
_FIXED = ("transport", "rank", "size", "layout", "ring_order", "check_ranks", "strategy", "handle")


class CPContext:
    """One rank's place in a context-parallel group. Make it once and keep it.

    rank, size: place in the group, and its size. layout: "zigzag" (balanced, the default),
    "striped" or "contiguous". ring_order: group ranks in the order in which messages travel.
    check_ranks: agree on arguments before every call; if not, before the first only.
    transport: carries the messages. handle: the name under which dispatcher ops find this context.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        layout: str = "zigzag",
        ring_order: Sequence[int] | None = None,
        strategy: str | Strategy = "ring",
        check_ranks: bool = True,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        order = _checked_order(ring_order, transport.size)
        validation.validate_flag("check_ranks", check_ranks)
        strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
        if not isinstance(strategy, Strategy):
            raise ValueError(
                f"strategy: expected a name or a Strategy, got {strategy!r}; the names are "
                f"{', '.join(STRATEGIES)}"
            )
        self.transport = transport
        self.rank, self.size = transport.rank, transport.size
        self.layout, self.ring_order, self.check_ranks = layout, order, check_ranks
        self.strategy = strategy
        self._has_agreed = not transport.can_agree
        with _contexts_lock:
            self.handle = f"cp{next(_handles)}"
            _contexts[self.handle] = self

    @classmethod
    def from_group(
        cls,
        group: ProcessGroup,
        *,
        layout: str = "zigzag",
        ring_order: Sequence[int] | None = None,
        strategy: str | Strategy = "ring",
        check_ranks: bool = True,
        messages: str = "p2p",
    ) -> CPContext:
        """The context of this process in `group`. Every member calls it, with equal arguments, and
        members that make several contexts of one group make them in the same order.

        messages: how hops travel. "p2p" is send and receive; "all_to_all" is for backends without;
        "probe" tries which of them works on every rank of the job, all of which must call this.
        Raises ValueError for a bad layout or order, and when this process is not in the group.
        """
        import torch.distributed as dist

        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"group: expected a process group that this process is in, got {group!r}; "
                "pass dist.group.WORLD or the result of dist.new_group"
            )
        transport = _transport(group, messages)
        return cls(
            transport,
            layout=layout,
            ring_order=ring_order,
            strategy=strategy,
            check_ranks=check_ranks,
        )

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        axis: str = "cp",
        *,
        layout: str = "zigzag",
        ring_order: Sequence[int] | None = None,
        strategy: str | Strategy = "ring",
        check_ranks: bool = True,
        messages: str = "p2p",
    ) -> CPContext:
        """The context of this process along one axis of a device mesh.

        ring_order: default the order of the ranks in the mesh, which need not ascend.
        """
        import torch.distributed as dist

        names = mesh.mesh_dim_names or ()
        if axis not in names:
            raise ValueError(f"axis: expected one of the mesh's axes {names}, got {axis!r}")
        group = mesh.get_group(axis)
        if ring_order is None:
            ranks = dist.get_process_group_ranks(group)
            ring_order = [ranks.index(rank) for rank in mesh[axis].mesh.tolist()]
        return cls.from_group(
            group,
            layout=layout,
            ring_order=ring_order,
            strategy=strategy,
            check_ranks=check_ranks,
            messages=messages,
        )

    @classmethod
    def from_nxd(
        cls,
        *,
        layout: str = "zigzag",
        strategy: str | Strategy = "ring",
        check_ranks: bool = True,
        parallel_state: Any = None,
    ) -> CPContext:
        """The context of this process in NxD's context-parallel group, its ring in NxD's order.

        Call it after `initialize_model_parallel`, on all ranks. On XLA devices hops are permutes of
        the graph, as in `from_xla`: strategy "ring" only, no check of ranks, untested on a device.
        parallel_state: NxD's module of that name (the default) or a stand-in. Raises ValueError
        where NxD is not installed or has not made its groups.
        """
        place = find_place(parallel_state)
        if not place.on_xla:
            return cls.from_group(
                place.group,
                layout=layout,
                ring_order=place.ring_order,
                strategy=strategy,
                check_ranks=check_ranks,
            )
        if strategy != "ring":
            raise ValueError(f'strategy: expected "ring" on an XLA device, got {strategy!r}')
        if layout == "contiguous" and list(place.ring_order) != sorted(place.ring_order):
            raise ValueError(
                "layout: expected zigzag or striped on an XLA device where NxD's ring does not "
                f"ascend, got contiguous with the ring {place.ring_order}: NxD would number the "
                "chunks by another order; use convert(model)"
            )
        return cls.from_xla(place.rings, place.rank, layout=layout)

    @classmethod
    def from_xla(
        cls, groups: Sequence[Sequence[int]], global_rank: int, *, layout: str = "zigzag"
    ) -> CPContext:
        """The context of an XLA process (torch-neuronx 2.9). Causal and full rings only; untested
        on a device.

        groups: the global ranks of every context-parallel group of the world, in ring order.
        """
        return cls(XlaTransport(groups, global_rank), layout=layout, check_ranks=False)

    @classmethod
    def local(
        cls,
        size: int,
        *,
        layout: str = "zigzag",
        ring_order: Sequence[int] | None = None,
        strategy: str | Strategy = "ring",
        check_ranks: bool = True,
        timeout_s: float = 120.0,
    ) -> LocalGroup:
        """A group of `size` threads of this process, for tests, simulation and small work."""
        validation.validate_count("size", size)
        validation.validate_seconds("timeout_s", timeout_s)
        session = LocalSession(size, timeout_s)
        session.close()
        contexts = [
            cls(
                LocalTransport(rank, session),
                layout=layout,
                ring_order=ring_order,
                strategy=strategy,
                check_ranks=check_ranks,
            )
            for rank in range(size)
        ]
        return LocalGroup(contexts, timeout_s)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor` in rank order. No gradient flows.

        Raises RankMismatchError on all ranks when shapes or dtypes differ.
        """
        self._agree_on("all_gather", tensor)
        return self.transport.all_gather(tensor.detach())

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """A new tensor: the sum over ranks, the same on every rank. No gradient flows.

        Raises RankMismatchError on all ranks when shapes or dtypes differ.
        """
        with self.refusing("all_reduce"):
            if op != "sum":
                raise ValueError(f'op: expected "sum", got {op!r}; divide by cp.size for a mean')
        self._agree_on("all_reduce", tensor)
        return self.transport.all_reduce_sum(tensor.detach())

    def _agree_on(self, collective: str, tensor: Tensor) -> None:
        """Collectives trust their arguments: gloo ends the process when lengths differ."""
        with self.refusing(collective):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{collective}: expected a tensor, got {type(tensor).__name__}")
        shape, dtype, device = tuple(tensor.shape), tensor.dtype, tensor.device.type
        self.agree_on(collective, {"shape": str(shape), "dtype": str(dtype), "device": device})

    def agree_on(self, helper: str, description: Description) -> None:
        """A call of its own, in which all ranks agree on the arguments of a helper."""
        if self.agrees:
            with self.transport.call(helper) as call:
                self.agree(call, {"helper": helper, **description})

    @contextlib.contextmanager
    def refusing(self, kind: str) -> Iterator[None]:
        """Around checks, before all ranks agree on a call: an error of one rank here is told to the
        others, so that all raise.
        """
        try:
            yield
        except Exception as error:
            self.refuse(kind, error)
            raise

    def refuse(self, kind: str, error: Exception) -> None:
        """Tell the other ranks, which are about to agree, that this one cannot begin, and why.

        When nobody listens there is nobody to tell, and the caller's own error is the one to raise.
        Where ranks do not agree the call is counted all the same: the others' keys of this call
        then meet no later call of this rank.
        """
        if torch.compiler.is_compiling():
            return
        with contextlib.suppress(RingError), self.transport.call(kind) as call:
            if self.agrees:
                announce_refusal(call, str(error) or type(error).__name__)

    @property
    def agrees(self) -> bool:
        """Whether ranks compare the arguments of the next call: with check_ranks always, else only
        in the first, so that ranks that differ in this too find out.
        """
        return self.size > 1 and (self.check_ranks or not self._has_agreed)

    def agree(self, call: Call, description: Description) -> None:
        """Raise RankMismatchError on all ranks unless all describe this call in the same way."""
        ring_order = str(self.ring_order)
        if self.size > _SHOWN_RANKS:  # a description has its size
            ring_order = f"crc {zlib.crc32(ring_order.encode()):08x}"
        common: Description = {
            "check_ranks": self.check_ranks,
            "layout": self.layout,
            "strategy": str(self.strategy),
            "ring order": ring_order,
        }
        check_agreement(call, {**description, **common})
        self._has_agreed = True

    def __setattr__(self, name: str, value: Any) -> None:
        """A backward reads the context that its forward read, so what that depends on is fixed."""
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name}: expected the context as it was made, with {self.__dict__[name]!r}, got "
                f"{value!r}; make another context"
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> CPContext:
        """The context itself: copies of a model share its place in the group."""
        return self

    def __copy__(self) -> CPContext:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self}: expected not to be pickled, since a process group cannot be; make a context "
            "in each process, and leave it out of what is saved"
        )

    def __repr__(self) -> str:
        return f"CPContext(rank={self.rank}, size={self.size}, layout={self.layout!r})"


def _checked_order(ring_order: Sequence[int] | None, size: int) -> tuple[int, ...]:
    order = tuple(range(size)) if ring_order is None else ring_order
    if (
        not isinstance(order, Sequence)
        or any(type(rank) is not int for rank in order)
        or sorted(order) != list(range(size))
    ):
        raise ValueError(
            f"ring_order: expected a permutation of 0..{size - 1} (group ranks), got {ring_order!r}"
        )
    return tuple(order)


def _transport(group: ProcessGroup, messages: str) -> Transport:
    if messages == "probe":
        messages = probe()
    if messages == "p2p":
        return DistributedTransport(group)
    if messages == "all_to_all":
        return CollectiveTransport(group)
    raise ValueError(f"messages: expected p2p, all_to_all or probe, got {messages!r}")


def refusing(cp: CPContext | None, kind: str) -> contextlib.AbstractContextManager[None]:
    """`CPContext.refusing`; without a context there is nobody to tell."""
    return contextlib.nullcontext() if cp is None else cp.refusing(kind)


def find_context(handle: str) -> CPContext:
    """The context with this handle. Raises ValueError when it is gone."""
    with _contexts_lock:
        context = _contexts.get(handle)
    if context is None:
        raise ValueError(
            f"expected the handle of a live CPContext, got {handle!r}; keep the context as long as "
            "tensors made with it"
        )
    return context
