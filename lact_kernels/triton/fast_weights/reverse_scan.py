"""The backward of test-time training in Triton.

apply backward  dq, and the weights' gradients by apply, of all chunks at once
reverse scan    the weights' gradients by the updates, step by step, the last first
deferred        dk, dv and the gradients of rates and momentum, of all chunks at once
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import phase
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.tokens import Tokens
from lact_kernels.triton.fast_weights.activations import ttt_hidden
from lact_kernels.triton.fast_weights.activations_bwd import num_rate_tiles, ttt_hidden_bwd
from lact_kernels.triton.fast_weights.history import Segment
from lact_kernels.triton.fast_weights.layout import Dims, Heads
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.scan import Scan
from lact_kernels.triton.fast_weights.start import ttt_start_bwd
from lact_kernels.triton.fast_weights.update_bwd import ttt_rates_bwd, ttt_update_bwd
from lact_kernels.triton.launch import readable_in_place


class Applied(NamedTuple):
    """The weights' gradients by a run of steps, all of which have queries."""

    steps: range
    parts: Tensor  # [splits, chunks, H, SIZE]


class Deferred(NamedTuple):
    """What the reverse scan leaves for the gradients per token, of the chunks of a batch."""

    acts: Tensor  # [3, H, rows, Dh]
    dacts: Tensor  # [3, H, rows, Dh]
    dsteps: Tensor  # [chunks, H, SIZE]
    units: Tensor | None  # [chunks, H, 4]: where dsteps and dacts have any, else 0
    dlr: Tensor  # [tiles, 3, H, rows]
    dbetas: Tensor | None  # [chunks, H, ROWS]


class Gradients:
    """The results of the backward, and what it carries from step to step, in the order of `layout`."""

    def __init__(self, scan: Scan, dend: FastWeights | None):
        self.scan = scan
        chunks, dims, H, tokens = scan.chunks, scan.dims, scan.H, scan.tokens
        self.dq = scan.q.new_empty(scan.q.shape)
        # Not laid out like the tokens, whose strides may be any.
        self.dtokens = tokens.map(lambda x: chunks.zero_unread(x.new_empty(x.shape)))

        # Mostly a sequence's gradients begin with its last weights, and what is here then holds nothing.
        self.held = (
            dend is not None or scan.ranks.share_chunks or scan.has_untrained or scan.has_units
        )
        room = functools.partial(
            scan.k.new_zeros if self.held else scan.k.new_empty, dtype=torch.float32
        )
        shape = chunks.N, H, dims.size
        self.dweights, self.carry = room((scan.splits, *shape)), room(shape)
        self.kept = None  # with matrices that are not trained
        if scan.has_untrained:
            self.kept = torch.zeros_like(self.carry) if scan.options.prenorm else self.carry
        self.dbuffers = room(shape) if scan.options.momentum else None
        self.dnorms = room((chunks.N, H, dims.rows))
        self.later: Applied | None = None  # of the first step of a later batch

    def begun(self, step: int) -> int:
        """Heads of which there are gradients of the weights after the next step."""
        chunks = self.scan.chunks
        return (chunks.N if self.held else chunks.counts[step + 2]) * self.scan.H

    def begin(self, dend: FastWeights | None) -> None:
        """The gradients of the last weights, which the reverse scan starts from."""
        scan = self.scan
        dend = scan.ranks.receive_gradients(dend)
        if dend is None:
            return
        scan.write(self.dweights[0], tuple(map(scan.ranks.part, dend.weights)))
        scan.write(self.carry, dend.masters)
        scan.write(self.dbuffers, dend.buffers)
        self.dnorms.copy_(scan.chunks.sorted(torch.cat(dend.norms, dim=-1)))

    def of_start(self, dapply: Tensor | None, place: int) -> FastWeights:
        """The gradients of the fast weights before the first update, the last of which are those by apply."""
        scan, part = self.scan, self.scan.ranks.part
        kept = None if self.kept is self.carry or self.kept is None else part(self.kept)
        dbuffers = None if self.dbuffers is None else part(self.dbuffers)
        dnorms = part(self.dnorms) if self.held or scan.options.weight_norm else None
        return ttt_start_bwd(
            self.dweights, dapply, place * scan.H, self.begun(-1), part(self.carry), kept, dbuffers,
            dnorms, scan.start, scan.chunks.order, scan.dims, scan.options.prenorm,
        )  # fmt: skip


class ReverseScan(Scan):
    """The backward of a scan, of which it repeats what the history has not kept."""

    @functools.cached_property
    def reach(self) -> Tensor | None:
        """`[B, H, 3]`, see `activations`. None where gradients need no units."""
        if not self.has_units:
            return None
        if not self.k.numel():
            return self.lr.new_zeros(self.lr.shape[1], self.H, 3)
        w, k, v = self.lengths
        reach = w * k * (k + v + w * k * v) * self.lr
        reach = torch.linalg.vector_norm(reach, ord=torch.inf, dim=-1)  # [3, B, H]
        return reach.movedim(0, -1).contiguous()

    def backward(self, do: Tensor, dend: FastWeights | None) -> tuple[Tensor, Tokens, FastWeights]:
        (do,) = readable_in_place(do)
        grads = Gradients(self, dend)
        for number, steps in reversed(list(enumerate(self.segments()))):
            segment = self.segment(steps)
            if self.options.checkpoint_interval > 1:
                segment.at(steps.start).copy_(self.checkpoint(number))
                with phase("scan"):
                    self.scan(segment)
            for batch in reversed(self.batches(steps, planes=6)):
                dstart = self.batch_backward(segment.part(batch), do, dend, grads)
        return grads.dq, grads.dtokens, dstart

    def batch_backward(
        self, batch: Segment, do: Tensor, dend: FastWeights | None, grads: Gradients
    ) -> FastWeights | None:
        """The backward of some steps, given what the later ones leave in `grads`.

        Of the first steps the gradients of the fast weights that the scan starts from.
        """
        chunks, dims, steps = self.chunks, self.dims, batch.steps
        acts = self.activations(3, chunks.most_rows(steps))
        with phase("apply backward"):
            applied = [
                self.apply_backward(batch, s, acts, do, grads) for s in chunks.applied(steps)
            ]
        if grads.later is not None:
            applied.append(grads.later)
        if steps.stop == chunks.steps:
            grads.begin(dend)

        updating = range(steps.start, min(steps.stop, chunks.updates))
        number = chunks.num_chunks(updating)
        # What is not written of matrices that are not trained must not be NaN.
        floats = self.lr.new_zeros if self.has_untrained else self.lr.new_empty
        deferred = Deferred(
            acts,
            dacts=self.activations(3, acts.shape[2]),
            dsteps=self.k.new_empty(number, self.H, dims.size),
            units=None if self.reach is None else floats(number, self.H, 4),
            dlr=self.floats(num_rate_tiles(self.k, dims, self.describes_keys), *acts.shape[:3]),
            dbetas=None if self.betas is None else floats(number, self.H, dims.rows),
        )
        with phase("reverse scan"):
            if number:
                self.reverse(batch, updating, applied, deferred, grads)
            dapply, place = self.applied_to(steps.start, applied)
            dstart = None
            if steps.start == 0:
                dstart = grads.of_start(dapply, place)
                self.ranks.send_gradients(dstart)
            else:
                grads.later = None
                if dapply is not None:
                    mine = dapply[:, place : place + chunks.counts[steps.start]].clone()
                    grads.later = Applied(range(steps.start, steps.start + 1), mine)
        if updating:
            with phase("deferred"):
                self.tokens_backward(batch, updating, deferred, grads.dtokens)
        return dstart

    def apply_backward(
        self, batch: Segment, steps: range, acts: Tensor, do: Tensor, grads: Gradients
    ) -> Applied:
        """dq of some steps, all of which have queries, and what their weights get from them."""
        dims, weights = self.of_all, batch.arrays.weights
        run = self.chunks.queries(steps, batch.steps.start)
        described = self.describes_queries(do)
        ttt_hidden(self.q, do, None, weights, acts, dims, described)(run)
        splits = num_outer_splits(self.q, run.num_chunks, run.width, dims, described)
        parts = self.floats(splits, run.num_chunks, self.H, dims.size)
        ttt_outer(self.q, do, acts, parts, dims, described=described)(run)
        ttt_project(acts, weights, grads.dq, dims, False, described=described)(run)
        return Applied(steps, parts)

    def applied_to(self, step: int, applied: list[Applied]) -> tuple[Tensor | None, int]:
        """What the weights of a step get from its queries, and at which place, if it has any."""
        firsts = self.chunks.firsts
        for steps, parts in applied:
            if step in steps:
                return parts, firsts[step] - firsts[steps.start]
        return None, 0

    def tokens_backward(
        self, batch: Segment, updating: range, deferred: Deferred, dtokens: Tokens
    ) -> None:
        """The gradients of keys, values, rates and momentum, from what the reverse scan has left."""
        dims, weights, dsteps = self.dims, batch.arrays.weights, deferred.dsteps
        run = self.chunks.keys(updating, batch.steps.start, batch.steps.start)
        w0, w1, w2 = dims.matrices
        first = (deferred.acts, dsteps) if w0 or w2 else (None, None)
        second = (deferred.dacts, weights)
        units, described = deferred.units, self.describes_keys
        to_keys = {"to_values": False, "second": second, "units": units, "described": described}
        ttt_project(*first, dtokens.k, dims, **to_keys)(run)
        first = (deferred.acts[1:2], dsteps) if w1 else (None, None)
        second = (deferred.dacts[1:2], weights) if w0 or w2 else None
        to_values = {"to_values": True, "second": second, "units": units, "described": described}
        lr1 = self.lr[1] if w1 else None
        ttt_project(*first, dtokens.v, dims, lr=lr1, **to_values)(run)
        rates = dtokens.rates, dtokens.momentum
        ttt_rates_bwd(deferred.dlr, deferred.dbetas, *rates, dims)(run)

    def reverse(
        self,
        batch: Segment,
        updating: range,
        applied: list[Applied],
        deferred: Deferred,
        grads: Gradients,
    ) -> None:
        """From the gradients of the next step's weights to those of each step's, and of its dG."""
        chunks, dims, first = self.chunks, self.dims, batch.steps.start
        weights, units = batch.arrays.weights, deferred.units
        described = self.describes_keys
        update = self.update_backward(batch, deferred, grads)
        hidden = ttt_hidden_bwd(
            self.k, self.v, self.lr, weights, deferred.dsteps, deferred.acts, deferred.dacts,
            deferred.dlr, dims, units, self.reach, described,
        )  # fmt: skip
        outer = ttt_outer(
            self.k, self.v, deferred.dacts, grads.dweights, reached(dims), units, described
        )
        for step in reversed(updating):
            number = chunks.active(step)
            run = chunks.keys(range(step, step + 1), first, first, number)
            dapply, place = self.applied_to(step + 1, applied)
            if self.ranks.share_chunks:
                self.share(grads.dweights[:, :number], dapply, place)
                dapply = None
            heads, begun = chunks.heads(step, first, self.H), grads.begun(step)
            update(heads, begun, dapply, place * self.H)
            hidden(run)
            outer(run)

    def update_backward(
        self, batch: Segment, deferred: Deferred, grads: Gradients
    ) -> Callable[[Heads, int, Tensor | None, int], None]:
        """What `ttt_update_bwd` returns, which with Muon has two parts."""
        arrays, dims, options = batch.arrays, self.dims, self.options
        launch = functools.partial(
            ttt_update_bwd, grads.dweights, grads.carry, grads.kept, arrays.sums, self.target_norms,
            grads.dnorms, dims, prenorm=options.prenorm,
        )  # fmt: skip
        outputs, momentum = {"dsteps": deferred.dsteps, "units": deferred.units}, {}
        if self.betas is not None:
            momentum = {
                "betas": batch.betas,
                "steps": arrays.steps,
                "dbuffers": grads.dbuffers,
                "dbetas": deferred.dbetas,
            }
        if options.coefficients is None:
            return launch(**momentum, **outputs)

        heads = self.chunks.N * self.H
        dsquares, squares = self.floats(heads, dims.rows), self.floats(heads, dims.rows)
        muon = {"next_steps": arrays.muon, "squares": (dsquares, squares)}
        given, dgiven, dbuffers = arrays.muon.flatten(0, 1), grads.carry.flatten(0, 1), None
        if options.momentum_after_muon:
            dgiven = self.floats(heads, dims.size)
            before = launch(**muon, **momentum, dnext_steps=dgiven)
            after = launch(**muon, **outputs, second=True)
        else:
            before = launch(**muon)
            after = launch(**muon, **momentum, **outputs, second=True)
            if grads.dbuffers is not None:
                dbuffers = grads.dbuffers.flatten(0, 1)

        def update_backward(
            heads: Heads, begun: int, dapply: Tensor | None, apply_first: int
        ) -> None:
            before(heads, begun, dapply, apply_first)
            mine, then = (
                slice(heads.number),
                slice(heads.next_first, heads.next_first + heads.number),
            )
            iteration = self.newton_schulz(heads.number).backward(
                dgiven[mine], given[then], dsquares[mine], squares[mine],
                None if dbuffers is None else dbuffers[mine], with_sizes=deferred.units is not None,
            )  # fmt: skip
            after(heads, begun, iteration=iteration)

        return update_backward

    def share(self, dweights: Tensor, dapply: Tensor | None, place: int) -> None:
        """The gradients of some weights, in parts, by all ranks that share chunks, into the first part."""
        total = dweights.sum(dim=0)
        if dapply is not None:
            total += dapply[:, place : place + dweights.shape[1]].sum(dim=0)
        self.ranks.sum_(total)
        dweights[0], dweights[1:] = total, 0


def reached(dims: Dims) -> Dims:
    """The matrices that get a gradient from an update of those of `dims`."""
    w0, w1, w2 = dims.matrices
    return dims.having(True, w0 or w2, w0 or w1)
