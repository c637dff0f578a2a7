"""What stops a kernel in the emulator. Whatever lets it go on is a report instead: see `reports.py`."""


class EmulatorError(RuntimeError):
    """The kernel cannot go on, or the emulator cannot follow it. Says the kernel, the line and why."""


class UnsupportedInstruction(EmulatorError):
    """An instruction that the emulator does not know, or a form of it that it does not."""


class InvalidAccess(EmulatorError):
    """An address in no tensor and not in shared memory, or one that its width does not divide."""


class Divergence(EmulatorError):
    """Threads of one warp that go different ways and do more there than compute, which is not followed."""


class Deadlock(EmulatorError):
    """Every warp that has not ended waits for another one."""


class StepLimit(EmulatorError):
    """A warp has run more basic blocks than allowed: as likely as not a loop without an end."""


class StoppedAtReport(EmulatorError):
    """Something was reported, and `Options.stop_at_report` asked for no more."""
