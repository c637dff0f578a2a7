"""What a launch did wrong without having to stop: kinds, how often, and where first."""

import dataclasses

READ_TOO_EARLY = "read of shared memory whose asynchronous copy is in flight"
READ_NEVER_WRITTEN = "read of shared memory that was never written"
WRITE_IN_FLIGHT = "write to shared memory whose asynchronous copy is in flight"
READ_AFTER_WRITE = "race: read of what another warp wrote, with no barrier between them"
WRITE_AFTER_READ = "race: write to what another warp read, with no barrier between them"
WRITE_AFTER_WRITE = "race: write to what another warp wrote, with no barrier between them"
LANES_DIFFER = "race: one instruction stores different values to one address"
OPERAND_CHANGED = "race: shared memory changed while an asynchronous instruction read it"
STORE_AT_END = "the program ends while an asynchronous store still reads its shared memory"
NO_WGMMA_FENCE = "no wgmma.fence between a write to a register and the wgmma that takes it"
NO_PROXY_FENCE = "no fence.proxy.async between a store and an asynchronous access"
NO_TENSORMAP_FENCE = "no fence.proxy.tensormap between a descriptor's publication and its use"
LOAD_IN_FLIGHT = "nobody has waited for an asynchronous load when its mbarrier or the program ends"
MBARRIER_OVERWRITTEN = "an mbarrier is overwritten, or made again, without mbarrier.inval"
OUT_OF_BOUNDS = "access outside of every tensor"
OUTSIDE_ARGUMENT = "access outside of the elements of every argument"
FOREIGN_READ = "race: read of global memory that another program wrote"
FOREIGN_WRITE = "race: write of another value to global memory that another program wrote or read"
GLOBAL_READ_AFTER_WRITE = (
    "race: read of global memory that another warp wrote, with no barrier between"
)


@dataclasses.dataclass
class Report:
    """One kind of fault at one line: how many instructions had it, and the first one in words."""

    kernel: str
    kind: str
    line: int  # of the PTX
    source: str  # file and line of the Python kernel, "" where unknown
    instruction: str
    example: str
    count: int = 1

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        times = f", {self.count} times" if self.count > 1 else ""
        example = f"; {self.example}" if self.example else ""
        return (
            f"{self.kernel}: {self.kind}{times}, line {self.line}{source}:"
            f" {self.instruction}{example}"
        )
