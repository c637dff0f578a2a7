"""Which of two accesses comes first: vector clocks of the warps of a program.

Each agent (a warp, or the engine that copies tiles) has a clock, which ticks when the agent lets go of
something: arrives at a barrier, or completes a copy. `seen[a, b]` is the last tick of b that a has waited
for, directly or through others. What b did at tick t comes before what a does now if `seen[a, b] >= t`; two
accesses of which neither comes first are a race. The programs of a batch run in lockstep and share clocks.
"""

import copy

import numpy as np

AGENT_BITS = 7  # a stamp is `tick << AGENT_BITS | agent`
_EVERYTHING = 1 << (30 - AGENT_BITS)


def agent_of(stamps: np.ndarray) -> np.ndarray:
    return stamps & ((1 << AGENT_BITS) - 1)


class Clocks:
    """Of the warps of a program, and behind them of the engine, which is `engine`."""

    def __init__(self, num_warps: int):
        self.engine = num_warps
        self.seen = np.zeros((num_warps + 1, num_warps + 1), np.int32)
        self.now = np.ones(num_warps + 1, np.int32)
        self.seen[:, self.engine] = _EVERYTHING  # until it does something

    def start_engine(self) -> None:
        if self.now[self.engine] == 1:
            self.seen[:, self.engine] = 0

    def copy(self) -> "Clocks":
        return copy.deepcopy(self)

    def release(self, agents: np.ndarray) -> np.ndarray:
        """What has happened up to here for `agents`: to be given to those that wait for them."""
        self.seen[agents, agents] = self.now[agents]
        known = self.seen[agents].max(0)
        self.now[agents] += 1
        return known

    def acquire(self, agents: np.ndarray, known: np.ndarray) -> None:
        """From here on `agents` come after all that is `known`."""
        self.seen[agents] = np.maximum(self.seen[agents], known)

    def stamps(self, agents: np.ndarray) -> np.ndarray:
        """Of accesses that these agents make now."""
        return self.now[agents] << AGENT_BITS | agents

    def unordered(self, agents: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Where an access of `agents` is in a race with the one that was stamped."""
        other = agent_of(stamps)
        return (other != agents) & (stamps >> AGENT_BITS > self.seen[agents, other])

    def settled(self, agents: np.ndarray) -> int:
        """Every stamp below this comes before what any of these agents does now."""
        return (int(self.seen[agents].min()) + 1) << AGENT_BITS
