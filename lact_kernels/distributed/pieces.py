"""`SequencePieces`: which tokens of a sequence each rank of a mesh dimension holds."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh

from lact_kernels.core.offsets import packed_offsets
from lact_kernels.distributed.agreement import Agreement, attempt, check_mesh, compare, gathered
from lact_kernels.ops import checks

Range = tuple[int, int]  # from, up to
Function = TypeVar("Function", bound=Callable[..., Any])


def _uncompiled(fn: Function) -> Function:
    """`torch.compiler.disable`, which itself takes the types of what it decorates away."""
    return torch.compiler.disable(fn)


class SequencePieces:
    """How the ranks of a 1-D `DeviceMesh` share the T tokens of every row: the ranks agree on it once.

        mesh = init_device_mesh("cuda", (data, n), mesh_dim_names=("data", "sequence"))
        pieces = SequencePieces.even(mesh["sequence"], T)
        x = pieces.take(tokens)                     # [B, T, ...] -> [B, t, ...] of this rank

    Making one is a collective call, as are the operations that take it: every rank of the mesh takes part.
    Where the ranks give different arguments, or one a wrong one, every rank raises. What they have agreed
    on is remembered here, so one object should serve all layers of a model, and all batches of the same
    lengths.

    Attributes:
        mesh: the 1-D mesh.
        rank, size: of this process in it, and the number of ranks n.
        num_tokens: T.
        borders: borders of the packed sequences in the row, `[0, T]` if there is one.
        packed: whether `cu_seqlens` were given.
        ranges: for each rank, the ranges of positions that it holds, ascending.
        chunk_size: of pieces of every chunk, None for contiguous pieces.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        ranges: Sequence[Sequence[Range]],
        borders: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ):
        self.mesh = mesh
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.ranges = [[r for r in rank if r[0] < r[1]] for rank in ranges]
        self.num_tokens = sum(stop - start for rank in ranges for start, stop in rank)
        self.packed = borders is not None
        self.borders = [0, self.num_tokens] if borders is None else list(borders)
        self.chunk_size = chunk_size
        # From the first to the last position of each rank; of an empty piece, where it would be.
        self.spans = [(rank[0][0], rank[-1][1]) if rank else (0, 0) for rank in ranges]
        self.start, self.stop = self.spans[self.rank]
        self._counts = [
            [0, *itertools.accumulate(stop - start for start, stop in rank)] for rank in self.ranges
        ]
        self._layout = f"{self.ranges}" + f", borders {self.borders}" * self.packed
        self._agreement = Agreement(self.group, mesh.device_type == "cpu")
        self._memo: dict[Any, Any] = {}

    @classmethod
    @_uncompiled
    def of(
        cls, mesh: DeviceMesh, num_tokens: int, cu_seqlens: Tensor | None = None
    ) -> "SequencePieces":
        """Contiguous pieces of any lengths, in the order of the ranks.

        Args:
            mesh: 1-D.
            num_tokens: how many tokens of every row this rank has; others may have other numbers, or 0.
            cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in the whole row, the same
                on every rank; None if each row is one sequence.

        Raises:
            TypeError, ValueError: a wrong argument on any rank, or ranks that disagree.
        """

        def facts():
            return _checked_length(num_tokens), _on_host(cu_seqlens)

        answers = gathered(check_mesh("mesh", mesh).get_group(), *attempt(facts))
        lengths, borders = zip(*answers)
        compare("SequencePieces.of", [{"cu_seqlens": b} for b in borders])
        stops = list(itertools.accumulate(lengths))
        _check_borders(borders[0], stops[-1])
        return cls(mesh, [[(stop - n, stop)] for n, stop in zip(lengths, stops)], borders[0])

    @classmethod
    @_uncompiled
    def even(
        cls,
        mesh: DeviceMesh,
        num_tokens: int,
        cu_seqlens: Tensor | None = None,
        *,
        multiple_of: int = 1,
    ) -> "SequencePieces":
        """Contiguous pieces of T = `num_tokens` tokens, of as nearly the same length as can be.

        All begin at multiples of `multiple_of` tokens: of the chunk size, where no tokens are to travel for
        chunks that two ranks share, or of a layer's `temporal_reduction`.

        Raises:
            TypeError, ValueError: as `of`.
        """
        num_tokens, borders, multiple_of = _agreed_total(
            mesh, num_tokens, cu_seqlens, multiple_of=multiple_of
        )
        groups = -(-num_tokens // multiple_of)
        cuts = [min(cut * multiple_of, num_tokens) for cut in _cuts(0, groups, mesh.size())]
        return cls(mesh, [[piece] for piece in itertools.pairwise(cuts)], borders)

    @classmethod
    @_uncompiled
    def of_chunks(
        cls, mesh: DeviceMesh, num_tokens: int, chunk_size: int, cu_seqlens: Tensor | None = None
    ) -> "SequencePieces":
        """An even piece of every chunk of `chunk_size` tokens, for `block_causal_ttt` within chunks.

        Every rank then has the same share of each update. `window_attn` takes contiguous pieces only.

        Raises:
            TypeError, ValueError: as `of`.
        """
        num_tokens, borders, chunk_size = _agreed_total(
            mesh, num_tokens, cu_seqlens, chunk_size=chunk_size
        )
        ranges = [[] for _ in range(mesh.size())]
        for start, stop in itertools.pairwise(borders or [0, num_tokens]):
            for first in range(start, stop, chunk_size):
                cuts = _cuts(first, min(first + chunk_size, stop), mesh.size())
                for rank, piece in zip(ranges, itertools.pairwise(cuts)):
                    rank.append(piece)
        return cls(mesh, ranges, borders, chunk_size)

    def __repr__(self) -> str:
        layout = "contiguous" if self.chunk_size is None else f"of chunks of {self.chunk_size}"
        return (
            f"SequencePieces(rank {self.rank} of {self.size}: {self.num_local_tokens} of"
            f" {self.num_tokens} tokens, {layout})"
        )

    @property
    def num_local_tokens(self) -> int:
        return self._counts[self.rank][-1]

    @property
    @_uncompiled
    def cu_seqlens(self) -> Tensor | None:
        """The borders `[N+1]` of the packed sequences among this rank's tokens, on the host."""
        if not self.packed:
            return None
        return self.once("cu_seqlens", self._local_borders)

    def _local_borders(self) -> Tensor:
        return torch.tensor([self.local_index(b) for b in self.borders], dtype=torch.int32)

    def local_index(self, position: int) -> int:
        """How many of this rank's tokens stand before this position of the row."""
        ranges = self.ranges[self.rank]
        n = bisect.bisect_left(ranges, (position,))
        if not n:
            return 0
        start, stop = ranges[n - 1]
        return self._counts[self.rank][n - 1] + min(position, stop) - start

    @_uncompiled
    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """The position of each of this rank's tokens in its sequence, int64 `[t]`."""

        def compute():
            ranges = [torch.arange(*r) for r in self.ranges[self.rank]]
            places = torch.cat([torch.arange(0), *ranges])
            borders = torch.tensor(self.borders)
            starts = borders[torch.bucketize(places, borders[1:], right=True)]
            return (places - starts).to(device)

        return self.once(("positions", device), compute)

    @_uncompiled
    def of_groups(self, size: int) -> "SequencePieces":
        """The pieces of tokens each of which stands for `size` of these, counted from its sequence's start.

        Raises:
            ValueError: a piece begins within a group.
        """
        return self.once(("groups", size), lambda: self._grouped(size))

    def _grouped(self, size: int) -> "SequencePieces":
        lengths = (-(-(stop - start) // size) for start, stop in itertools.pairwise(self.borders))
        borders = [0, *itertools.accumulate(lengths)]

        def group(position: int) -> int:
            n = bisect.bisect_right(self.borders, position, hi=len(self.borders) - 1) - 1
            groups, rest = divmod(position - self.borders[n], size)
            if rest and position < self.num_tokens:
                raise ValueError(
                    f"pieces must begin at multiples of temporal_reduction = {size} tokens of a"
                    f" sequence, got one that begins at token {position - self.borders[n]}"
                )
            return borders[n] + groups + (rest > 0)

        ranges = [[(group(start), group(stop))] for start, stop in self.spans]
        return SequencePieces(self.mesh, ranges, borders if self.packed else None)

    def check_tokens(self, name: str, x: Tensor) -> None:
        """`x [B, t, ...]` has the tokens of this rank's piece, and one row if they are packed."""
        if x.shape[1] != self.num_local_tokens:
            raise ValueError(
                f"{name} must have the {self.num_local_tokens} tokens of this rank's piece, got"
                f" {tuple(x.shape)}"
            )
        if self.packed and x.shape[0] != 1:
            raise ValueError(f"packed sequences need B = 1, got {name} with B = {x.shape[0]}")

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor that has all T of them in the axis `dim`."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"x must have all {self.num_tokens} tokens in axis {dim}, got {tuple(x.shape)}"
            )
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges[self.rank]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    @_uncompiled
    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """All T tokens, on every rank, of a tensor that has this rank's in the axis `dim`. Collective.

        The gradient of a rank's tokens is the sum of what all ranks have for them.
        """
        if x.shape[dim] != self.num_local_tokens:
            raise ValueError(
                f"x must have this rank's {self.num_local_tokens} tokens in axis {dim}, got"
                f" {tuple(x.shape)}"
            )
        longest = max(counts[-1] for counts in self._counts)
        x = x.movedim(dim, 0)
        padded = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
        whole = all_gather_tensor_autograd(padded.contiguous(), 0, self.group)
        rows = whole.unflatten(0, (self.size, longest))
        rows = torch.cat([row[: counts[-1]] for row, counts in zip(rows, self._counts)])
        if self.chunk_size is not None:
            places = [torch.arange(*r) for rank in self.ranges for r in rank]
            rows = rows.index_select(
                0, torch.cat([torch.arange(0), *places]).argsort().to(x.device)
            )
        return rows.movedim(0, dim)

    def agree(self, operation: str, facts: Callable[[], dict[str, Any]]) -> None:
        """Check arguments on every rank, and that they are alike: `facts` raises, or says what they are.

        Facts that the ranks have agreed on before are not exchanged again. On a mesh of CPUs, where nothing
        waits for a device, each call still compares a number that stands for them: a rank that comes with
        others of those is an error at once.

        Raises:
            ValueError: the ranks have different facts. Each is named, with what every rank has.
            RuntimeError: `facts` raised on another rank.
        """
        self._agreement.agree(operation, lambda: facts() | {"pieces": self._layout})

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for all layers."""
        if key not in self._memo:
            with torch.inference_mode(False):  # what an evaluation has made, a training may use
                self._memo[key] = make()
        return self._memo[key]

    def send(self, x: Tensor, rank: int) -> None:
        """Send to a rank of the mesh, without waiting for it: only for what was sent before."""
        if self.group in _SENT:
            _SENT[self.group][0].wait()
        _SENT[self.group] = dist.isend(x, group=self.group, group_dst=rank), x

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """Fill `x` with what that rank sends."""
        dist.recv(x, group=self.group, group_src=rank)
        return x


# The last message of each group, on its way perhaps. It must outlive the pieces: who drops it calls it back.
_SENT: dict[dist.ProcessGroup, tuple[dist.Work, Tensor]] = {}


def intersections(ranges: Sequence[Range], others: Sequence[Range]) -> Iterator[Range]:
    """The ranges that two ascending lists of ranges have in common, ascending."""
    for start, stop in others:
        n = max(bisect.bisect_right(ranges, (start,)) - 1, 0)
        while n < len(ranges) and ranges[n][0] < stop:
            common = max(start, ranges[n][0]), min(stop, ranges[n][1])
            if common[0] < common[1]:
                yield common
            n += 1


def _agreed_total(mesh, num_tokens, cu_seqlens, **size: int) -> tuple[int, list[int] | None, int]:
    """Tokens, borders of packed sequences and the one size, when all ranks have said the same."""

    def facts():
        total, borders = _checked_length(num_tokens), _on_host(cu_seqlens)
        _check_borders(borders, total)
        sizes = {name: checks.check_count(name, value) for name, value in size.items()}
        return {"num_tokens": total, "cu_seqlens": borders} | sizes

    answers = gathered(check_mesh("mesh", mesh).get_group(), *attempt(facts))
    compare("SequencePieces", answers)
    return tuple(answers[0].values())


def _checked_length(num_tokens: int) -> int:
    num_tokens = checks.check_int("num_tokens", num_tokens)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    return num_tokens


def _on_host(cu_seqlens: Tensor | None) -> list[int] | None:
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens must be an int32 tensor [N+1], got {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have the dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have the shape [N+1] with N >= 1, got {tuple(cu_seqlens.shape)}"
        )
    return cu_seqlens.tolist()


def _check_borders(borders: list[int] | None, T: int) -> None:
    if borders is not None:
        packed_offsets(torch.tensor(borders, dtype=torch.int32), T)


def _cuts(start: int, stop: int, n: int) -> list[int]:
    """Borders of n pieces of nearly the same length."""
    length, more = divmod(stop - start, n)
    return [start + r * length + min(r, more) for r in range(n + 1)]
