"""Unusual but legal uses give the same numbers; what cannot be right is refused, on all ranks."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import Tensor

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.transport import RingError

BOUND_S = 20.0  # a third of the timeout of the ranks' groups
SHAPE = (2, 2, 8, 16)


def inputs(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def attend(cp: CPContext, *tensors: Tensor, **options: Any) -> Tensor:
    o = ring_attention(*(tensors or inputs(cp.rank)), cp=cp, **options)
    assert isinstance(o, Tensor)
    return o


# Tensors that lie in memory in another way


def every_other(x: Tensor) -> Tensor:
    """The same numbers, between NaN in every dim."""
    memory = torch.full([2 * size for size in x.shape], torch.nan)
    view = memory[::2, ::2, ::2, ::2]
    return view.copy_(x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every other element": every_other,
    "behind an offset": lambda x: torch.cat([x.new_full((16,), torch.nan), x.flatten()])[16:].view(
        x.shape
    ),
    "flipped twice": lambda x: x.flip(2).contiguous().flip(2),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS)
def test_how_a_tensor_lies_in_memory_changes_no_bit(view: str) -> None:
    def work(cp: CPContext) -> bool:
        results = []
        for make in (torch.clone, VIEWS[view]):
            given = [make(x).detach().requires_grad_() for x in inputs(cp.rank)]
            o = attend(cp, *given)
            results.append([o, *torch.autograd.grad(o.square().sum(), given)])
        return all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    assert CPContext.local(2).run(work) == [True, True]


def test_heads_that_are_expanded_get_the_sum_of_their_gradients() -> None:
    """Keys of one head, shown as two by a stride of zero, against keys of one head."""

    def work(cp: CPContext) -> bool:
        q, k, v = inputs(cp.rank)
        found = []
        for heads in (1, 2):
            one = [x[:, :1].clone().requires_grad_() for x in (k, v)]
            o = attend(cp, q, *(x.expand(-1, heads, -1, -1) for x in one))
            found.append([o, *torch.autograd.grad(o.square().sum(), one)])
        # One addition of two heads is done in another place.
        return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(*found, strict=True))

    assert CPContext.local(2).run(work) == [True, True]


# Modes of autograd


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd_the_bits_are_the_same(mode: Callable[[], Any]) -> None:
    def work(cp: CPContext) -> bool:
        given = [x.requires_grad_() for x in inputs(cp.rank)]
        with mode():
            o = attend(cp, *given)
        assert not o.requires_grad
        return torch.equal(o, attend(cp))

    assert CPContext.local(2).run(work) == [True, True]


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    def work(cp: CPContext) -> bool:
        given = [x.requires_grad_() for x in inputs(cp.rank)]
        loss = attend(cp, *given).square().sum()
        first, second = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
        return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    assert CPContext.local(2).run(work) == [True, True]


def test_backwards_in_the_order_of_forwards_are_each_its_own() -> None:
    """All ranks go backward through the first call first; autograd itself would take the last."""

    def gradients(cp: CPContext, order: tuple[int, int]) -> list[Tensor]:
        given = [[x * (1 + n) for x in inputs(cp.rank)] for n in range(2)]
        leaves = [[x.detach().requires_grad_() for x in one] for one in given]
        losses = [attend(cp, *one).square().sum() for one in leaves]
        for index in order:
            losses[index].backward()
        return [x.grad for one in leaves for x in one if x.grad is not None]

    def work(cp: CPContext) -> bool:
        one, other = gradients(cp, (0, 1)), gradients(cp, (1, 0))
        assert len(one) == 6
        return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))

    assert CPContext.local(2).run(work) == [True, True]


def test_a_tensor_that_autograd_cannot_keep_is_refused_on_all() -> None:
    def work(cp: CPContext) -> str:
        q, k, v = inputs(cp.rank)
        if cp.rank == 1:
            with torch.inference_mode():
                k = k.clone()
        with pytest.raises(ValueError, match="made in inference_mode beside one") as caught:
            attend(cp, q.requires_grad_(), k, v)
        return str(caught.value)

    first, second = CPContext.local(2, timeout_s=20).run(work)
    assert "rank 1 refuses: " in first
    assert "rank 1 refuses: " not in second


def test_a_batch_of_calls_by_vmap_is_that_many_calls() -> None:
    def work(cp: CPContext) -> bool:
        q, k, v = inputs(cp.rank)
        batch = torch.stack([q, 2 * q])
        found = torch.vmap(lambda one: attend(cp, one, k, v))(batch)
        return torch.equal(found, torch.stack([attend(cp, one, k, v) for one in batch]))

    assert CPContext.local(2).run(work) == [True, True]


def test_function_transforms_that_need_another_derivative_raise() -> None:
    def work(cp: CPContext) -> None:
        q, k, v = inputs(cp.rank)
        with pytest.raises(ValueError, match="without forward-mode derivatives"):
            torch.func.jvp(lambda x: attend(cp, x, k, v), (q,), (q,))
        for transform in (torch.func.grad, torch.func.hessian):
            with pytest.raises(RuntimeError, match="functorch transforms"):
                transform(lambda x: attend(cp, x, k, v).sum())(q)

    CPContext.local(1).run(work)  # torch counts levels of forward AD for all threads together


# What changes between forward and backward


def change_key(given: list[Tensor], **_: Any) -> None:
    given[1].mul_(2)


def change_ids(given: list[Tensor], *, ids: Tensor) -> None:
    ids.add_(1)


def backward_after(group: dist.ProcessGroup, change: Callable[..., None]) -> str:
    """Rank 1 changes an input in place; what its backward and those of others say."""
    cp = CPContext.from_group(group)
    leaves = [x.requires_grad_() for x in inputs(cp.rank)]
    given, ids = [x * 1 for x in leaves], torch.zeros(SHAPE[0], SHAPE[2]).long()
    o = attend(cp, *given, segment_ids=ids)
    if cp.rank == 1:
        change(given, ids=ids)
    with pytest.raises((RuntimeError, ValueError), match="modified by an inplace") as caught:
        o.sum().backward()
    attend(cp, *leaves).sum().backward()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("change", [change_key, change_ids])
def test_an_input_that_one_rank_changes_in_place_ends_the_backward_of_all(
    ranks: RankGroup, change: Callable[..., None]
) -> None:
    started = monotonic()
    first, second, third = ranks.run(backward_after, change, num_ranks=3)
    assert second.startswith("RuntimeError: one of the variables needed for gradient")
    for text in (first, third):
        assert text.startswith("RankMismatchError: ring call 2 (backward): rank 1 refuses: one of")
    assert monotonic() - started < BOUND_S


def test_a_graph_that_one_rank_has_freed_ends_the_backward_of_all() -> None:
    def work(cp: CPContext) -> str:
        given = [x.requires_grad_() for x in inputs(cp.rank)]
        loss = attend(cp, *given).sum()
        loss.backward(retain_graph=cp.rank == 0)
        with pytest.raises((RuntimeError, ValueError), match="backward through the gr") as caught:
            loss.backward()
        return str(caught.value)

    first, second = CPContext.local(2, timeout_s=20).run(work)
    assert "(backward): rank 1 refuses: Trying to backward through the graph" in first
    assert second.startswith("Trying to backward through the graph a second time")


# Copies, and threads


def test_a_copy_of_a_context_is_the_context_and_a_pickle_is_refused() -> None:
    cp = CPContext.local(2).contexts[1]
    model = torch.nn.Linear(2, 2)
    model.cp = cp
    assert copy.deepcopy(model).cp is cp
    assert copy.copy(cp) is cp
    with pytest.raises(TypeError, match=r"rank=1, size=2.*: expected not to be pickled"):
        pickle.dumps(model)


def test_a_context_stays_as_it_was_made() -> None:
    """A forward and its backward would follow different plans, and no check would see it."""
    cp = CPContext.local(2).contexts[0]
    for name in ("layout", "ring_order", "strategy", "check_ranks", "rank", "size", "transport"):
        before = getattr(cp, name)
        with pytest.raises(AttributeError, match=f"{name}: expected the context as it was made"):
            setattr(cp, name, "striped")
        assert getattr(cp, name) is before


def test_two_threads_in_one_context_at_once_are_refused() -> None:
    def work(cp: CPContext) -> str:
        said: list[str] = []

        def other() -> None:
            with pytest.raises(RingError) as caught:
                attend(cp)
            said.append(str(caught.value))

        with cp.transport.call("test"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        attend(cp)  # one after the other is well
        thread = threading.Thread(target=attend, args=(cp,))
        thread.start()
        thread.join()
        assert cp.transport.num_calls == 3
        return said[0]

    for rank, text in enumerate(CPContext.local(2).run(work)):
        assert text.startswith(f"rank {rank}: another thread is in a call of this context")


def test_a_context_in_a_forked_worker_says_so_at_once_and_the_group_goes_on(
    ranks: RankGroup,
) -> None:
    started = monotonic()
    for text, total in ranks.run(call_in_a_fork, num_ranks=2):
        assert "expected a call from the process that made this context" in text
        assert total == 2.0
    assert monotonic() - started < BOUND_S


def call_in_a_fork(group: dist.ProcessGroup) -> tuple[str, float]:
    """What a collective says in a forked child, and its result here afterwards."""
    cp = CPContext.from_group(group)
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            cp.all_reduce(torch.ones(()))
        except RingError as error:
            os.write(writes, str(error).encode())
        os._exit(0)
    os.close(writes)
    text = os.read(reads, 1000).decode()
    os.wait()
    return text, float(cp.all_reduce(torch.ones(())))


def test_without_agreement_a_refused_call_does_not_meet_a_later_one() -> None:
    """The others' second call would take the keys of rank 1's third, and nobody would notice."""
    seen: dict[int, list[str]] = {}

    def work(cp: CPContext) -> None:
        seen[cp.rank] = []
        for wrong in (False, True, False):
            try:
                attend(cp, scale=-1.0 if wrong and cp.rank == 1 else None)
                seen[cp.rank].append("")
            except (RingError, ValueError) as error:
                seen[cp.rank].append(str(error))

    CPContext.local(3, check_ranks=False, timeout_s=5).run(work)
    assert "scale: expected a number" in seen[1][1]
    for rank in (0, 2):
        assert seen[rank][0] == ""
        assert "call 2" in seen[rank][1]
        assert "cannot be used any more" in seen[rank][2]


def test_a_local_group_raises_the_error_of_the_rank_that_refused_first_of_all() -> None:
    """And not what the others, which may be quicker, heard from it."""

    def work(cp: CPContext) -> None:
        attend(cp, window=(1, "far") if cp.rank == 2 else None)

    for _ in range(10):
        with pytest.raises(ValueError, match="window: expected") as caught:
            CPContext.local(3).run(work)
        assert "refuses" not in str(caught.value)
