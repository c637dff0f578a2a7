"""What the ranks of a group have to give alike is compared before anything is computed."""

import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Agreement:
    """What the ranks of a group have agreed on, which is not exchanged again.

    Where nothing waits for a device (`on_cpu`), each call still compares a number that stands for it: a rank
    that comes with something else is an error at once.
    """

    def __init__(self, group: dist.ProcessGroup, on_cpu: bool, agreed: set[Any] | None = None):
        self.group, self.on_cpu = group, on_cpu
        self._agreed = set() if agreed is None else agreed

    @classmethod
    def of(cls, group: dist.ProcessGroup | DeviceMesh) -> "Agreement":
        """That of all calls with a process group, or with a 1-D mesh."""
        if isinstance(group, DeviceMesh):
            on_cpu = group.device_type == "cpu"
            group = check_mesh("group", group).get_group()
        elif isinstance(group, dist.ProcessGroup):
            on_cpu = dist.get_backend(group) == "gloo" or not torch.accelerator.is_available()
        else:
            raise TypeError(
                f"group must be a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}"
            )
        return cls(group, on_cpu, _AGREED.setdefault(group, set()))

    def agree(self, operation: str, facts: Callable[[], dict[str, Any]]) -> None:
        """Check arguments on every rank, and that they are alike: `facts` raises, or says what they are.

        Raises:
            ValueError: the ranks have different facts. Each is named, with what every rank has.
            RuntimeError: `facts` raised on another rank.
        """
        mine, error = attempt(facts)
        key = None if error else (operation, *mine.items())
        known = key in self._agreed
        if self.on_cpu:
            known = self._have_all(key if known else None)
        if known:
            return
        compare(operation, gathered(self.group, mine, error))
        self._agreed.add(key)

    def _have_all(self, key: Any) -> bool:
        """Whether all ranks have this key, None for none. They come to the same answer."""
        mine = torch.tensor([-1 if key is None else zlib.crc32(repr(key).encode())])
        numbers = mine.new_empty(self.group.size())
        dist.all_gather_into_tensor(numbers, mine, group=self.group)
        return bool((numbers == mine).all()) and key is not None


# Of groups themselves. They live as long as the groups.
_AGREED: weakref.WeakKeyDictionary[dist.ProcessGroup, set[Any]] = weakref.WeakKeyDictionary()


def check_mesh(name: str, mesh: DeviceMesh) -> DeviceMesh:
    """`mesh` is a `DeviceMesh` of one dimension."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name} must be a 1-D DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got {mesh.mesh_dim_names or mesh.ndim}: choose one, as in"
            ' mesh["sequence"]'
        )
    return mesh


def attempt(facts: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return facts(), None
    except Exception as error:
        return None, error


def gathered(group: dist.ProcessGroup, mine: Any, error: Exception | None) -> list[Any]:
    """`mine` of each rank; if there was an error on one, every rank raises."""
    answers = [None] * group.size()
    text = error and f"{type(error).__name__}: {error}"
    dist.all_gather_object(answers, (mine, text), group=group)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(answers):
        if text is not None:
            raise RuntimeError(f"rank {rank} of {group.size()} failed: {text}")
    return [answer for answer, _ in answers]


def compare(operation: str, answers: Sequence[dict[str, Any]]) -> None:
    for name in dict.fromkeys(name for answer in answers for name in answer):
        values = [answer.get(name) for answer in answers]
        if any(value != values[0] for value in values):
            each = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"the ranks call {operation} with different {name}: {each}")
