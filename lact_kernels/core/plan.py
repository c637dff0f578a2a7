"""`Plan`: which keys update the fast weights of a sequence, and which queries see each version of them."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The chunks of N sequences, as ranges of tokens in the one row of keys, and of queries.

    The fast weights of a sequence begin as version 0, and each update makes the next one. The update of
    version c of sequence n reads the keys `range(*keys[n][c])`. These ranges may lie anywhere, but no key is
    in two of them. Version c is applied to the queries `queries[n][c]:queries[n][c + 1]`, so that together
    the versions of all sequences have all queries, in order. There is one range of queries more than of
    keys. Any range may be empty.
    """

    keys: list[list[tuple[int, int]]]
    queries: list[list[int]]

    @classmethod
    def block_causal(
        cls, keys: list[int], queries: list[int], chunk_size: int, return_end: bool
    ) -> "Plan":
        """Every `chunk_size` keys, after the queries of the same tokens.

        Sequence n has the keys `keys[n]:keys[n + 1]` and the queries `queries[n]:queries[n + 1]`, which are
        those of its last tokens. With `return_end` every full chunk is followed by an update.
        """
        plan = cls([], [])
        for n, (start, stop) in enumerate(itertools.pairwise(keys)):
            updates = num_updates(stop - start, chunk_size, return_end)
            borders = [start + c * chunk_size for c in range(updates + 1)]
            first, ahead = queries[n], stop - queries[n + 1]  # of a query's place, its key's
            plan.keys.append(list(itertools.pairwise(borders)))
            plan.queries.append([max(b - ahead, first) for b in (*borders, stop)])
        return plan

    def to_tensor(self, rows: int | None = None) -> Tensor:
        """What the registered op takes: int32 `[rows, 6]` on the host, a row for each version.

        A row is sequence, version, first and last key, first and last query, each last one exclusive. No
        update follows a sequence's last version, whose keys are `0, 0`. Rows are in the order of computation:
        version 0 of all sequences, then version 1, and so on. Those with more updates come first. Rows that
        are not needed are -1.
        """
        order = sorted(range(len(self.keys)), key=lambda n: -len(self.keys[n]))
        table = []
        for version in range(max(map(len, self.keys)) + 1):
            for n in order:
                if version > len(self.keys[n]):
                    break
                keys = (*self.keys[n], (0, 0))[version]
                table.append((n, version, *keys, *self.queries[n][version : version + 2]))
        table += [(-1,) * 6] * ((rows or 0) - len(table))
        return torch.tensor(table, dtype=torch.int32)

    @classmethod
    def from_tensor(cls, table: Tensor) -> "Plan":
        """The plan that gave this `to_tensor()`."""
        rows = [row for row in table.tolist() if row[0] >= 0]
        N = max(row[0] for row in rows) + 1
        plan = cls([[] for _ in range(N)], [[] for _ in range(N)])
        for n, _, *keys, first_query, stop_query in rows:
            plan.keys[n].append(tuple(keys))
            plan.queries[n] = [*plan.queries[n][:-1], first_query, stop_query]
        return cls([keys[:-1] for keys in plan.keys], plan.queries)


def num_updates(num_keys: int, chunk_size: int, return_end: bool) -> int:
    """All full chunks, or without an end: the last chunk's update would change no output."""
    return num_keys // chunk_size if return_end else max(num_keys - 1, 0) // chunk_size
