"""Which of two accesses comes first: vector clocks of the warps of a program.

Each agent has a clock, which ticks when the agent lets go of something. Agents are the warps, which let go
where they arrive at a barrier, and the engines that copy tiles, one for each mbarrier that announces such
copies: they come in any order, and waiting for one says nothing of another. `seen[a, b]` is the last tick of
b that a has waited for, directly or through others. What b did at tick t comes before what a does now if
`seen[a, b] >= t`; two accesses of which neither comes first are a race. The programs of a batch run in
lockstep and share clocks.
"""

import copy

import numpy as np

AGENT_BITS = 7  # a stamp is `tick << AGENT_BITS | agent`
MAX_AGENTS = 1 << AGENT_BITS


def agent_of(stamps: np.ndarray) -> np.ndarray:
    return stamps & ((1 << AGENT_BITS) - 1)


class Clocks:
    """Of the warps of a program, and behind them of the engines, by the place of their mbarriers."""

    def __init__(self, num_warps: int):
        self.num_agents = num_warps
        self.engines: dict[int, int] = {}
        self.seen = np.zeros((MAX_AGENTS, MAX_AGENTS), np.int32)
        self.now = np.ones(MAX_AGENTS, np.int32)

    def engine(self, place: int) -> int | None:
        """The agent that copies for the mbarrier at a place; None if there are too many."""
        if place not in self.engines and self.num_agents < MAX_AGENTS:
            self.engines[place] = self.num_agents
            self.num_agents += 1
        return self.engines.get(place)

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
        return (int(self.seen[agents, : self.num_agents].min()) + 1) << AGENT_BITS
