"""What a GPU and its links are assumed to do, and how long messages and collectives take on them."""

import dataclasses
import math

from benchmarks.scaling.counts import ring_bytes

PEAK = 989e12  # FLOP/s of an H100 SXM in bfloat16, dense


@dataclasses.dataclass(frozen=True)
class Hardware:
    """H100 SXM in nodes of eight. docs/scaling.md has the sources; shares of a peak are assumptions."""

    linear_rate: float = 0.6 * PEAK  # projections, MLP and head
    attention_rate: float = 0.5 * PEAK  # window_attn, of the FLOPs that it is credited with
    ttt_rate: float = 0.4 * PEAK  # apply and the deferred gradients, all chunks at once
    scan_rate: float = 0.25 * PEAK  # the scan, one chunk at a time
    launch_seconds: float = 3e-6  # at least, for one of the scan's launches
    gpus_per_node: int = 8
    nvlink: float = 0.8 * 450e9  # bytes per second, per GPU and direction
    infiniband: float = 0.8 * 50e9  # the same; each GPU has a card of its own
    call_seconds: float = 8.4e-6  # of any message or collective
    nvlink_seconds: float = 3.4e-6  # of each hop
    infiniband_seconds: float = 9.6e-6
    room: float = 40e9  # bytes for the inputs of layers, half of the memory


def message_seconds(size: float, sender: int, receiver: int, hardware: Hardware) -> float:
    """Call + hop + bytes / rate, of NVLink inside a node and of InfiniBand between two."""
    inside = sender // hardware.gpus_per_node == receiver // hardware.gpus_per_node
    rate = hardware.nvlink if inside else hardware.infiniband
    hop = hardware.nvlink_seconds if inside else hardware.infiniband_seconds
    return hardware.call_seconds + hop + size / rate


def _nodes(n: int, hardware: Hardware) -> tuple[int, int, float]:
    """Nodes, GPUs of one, and the rate of a rank: NVLink's, or that of all cards of a node if it is less."""
    local = min(n, hardware.gpus_per_node)
    nodes = math.ceil(n / local)
    rate = hardware.nvlink if nodes == 1 else min(hardware.nvlink, local * hardware.infiniband)
    return nodes, local, rate


def gather_seconds(size: float, n: int, hardware: Hardware) -> float:
    """Ring all-gather or reduce-scatter of a buffer: call + n − 1 hops + (n − 1) / n bytes / rate."""
    if n == 1:
        return 0.0
    nodes, _, rate = _nodes(n, hardware)
    hops = (nodes - 1) * hardware.infiniband_seconds + (n - nodes) * hardware.nvlink_seconds
    return hardware.call_seconds + hops + ring_bytes(size, n) / rate


def allreduce_seconds(size: float, n: int, hardware: Hardware) -> float:
    """The faster of a ring and a tree.

    Ring: call + 2 (n − 1) hops + 2 (n − 1) / n bytes / rate. Tree: call + 2 (g − 1 hops in the node of g GPUs
    + ⌈log2 nodes⌉ between nodes) + 2 bytes / rate.
    """
    if n == 1:
        return 0.0
    nodes, local, rate = _nodes(n, hardware)
    depth = math.ceil(math.log2(nodes))
    hops = (local - 1) * hardware.nvlink_seconds + depth * hardware.infiniband_seconds
    tree = hardware.call_seconds + 2 * hops + 2 * size / rate
    ring = 2 * gather_seconds(size, n, hardware) - hardware.call_seconds
    return min(ring, tree)
