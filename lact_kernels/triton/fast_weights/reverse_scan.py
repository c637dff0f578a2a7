"""The backward of test-time training in Triton.

apply backward  dq, and the weights' gradients by apply, of all chunks at once
reverse scan    the weights' gradients by the updates, step by step, the last first
deferred        dk, dv and the gradients of rates and momentum, of all chunks at once
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import phase
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.tokens import Tokens
from lact_kernels.triton.fast_weights.activations import (
    num_rate_tiles,
    ttt_hidden,
    ttt_hidden_bwd,
)
from lact_kernels.triton.fast_weights.history import Segment
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.scan import Scan, own
from lact_kernels.triton.fast_weights.update_bwd import ttt_rates_bwd, ttt_update_bwd
from lact_kernels.triton.launch import readable_in_place


class Deferred(NamedTuple):
    """What the reverse scan leaves for the gradients per token, of the chunks of a batch."""

    acts: Tensor  # [3, H, rows, Dh]
    dacts: Tensor  # [3, H, rows, Dh]
    dsteps: Tensor  # [chunks, H, SIZE]
    units: Tensor | None  # [chunks, H, 4]: where dsteps and dacts have any
    dlr: Tensor  # [tiles, 3, H, rows]
    dbetas: Tensor | None  # [chunks, H, ROWS]


class Gradients:
    """The results of the backward, and what it carries from step to step, in the order of `layout`."""

    def __init__(self, scan: Scan):
        self.scan = scan
        chunks, dims, H = scan.chunks, scan.dims, scan.H
        self.dq = scan.q.new_empty(scan.q.shape)
        self.dk, self.dv = scan.k.new_zeros(scan.k.shape), scan.v.new_zeros(scan.v.shape)
        self.dlr = torch.zeros_like(scan.lr)
        self.dmomentum = None if scan.momentum is None else torch.zeros_like(scan.lr[0])

        splits = num_outer_splits(scan.k, chunks.counts[chunks.steps // 2], chunks.max_length, dims)
        zeros = scan.lr.new_zeros
        self.dweights = zeros(splits, chunks.N, H, dims.size)
        self.carry = zeros(chunks.N, H, dims.size)
        self.dbuffers = zeros(chunks.N, H, dims.size) if scan.start.buffers else None
        self.dnorms = zeros(chunks.N * H, dims.rows)

    def begin(self, dend: FastWeights | None) -> None:
        """The gradients of the last weights, which the reverse scan starts from."""
        scan = self.scan
        dend = scan.ranks.receive_gradients(dend)
        if dend is None:
            return
        scan.write(self.dweights[0], tuple(map(scan.ranks.part, dend.weights)))
        scan.write(self.carry, dend.masters)
        scan.write(self.dbuffers, dend.buffers)
        self.dnorms.copy_(scan.chunks.sorted(torch.cat(dend.norms, dim=-1)).flatten(0, 1))

    def finish(self) -> None:
        """What the reverse scan has left, as the gradients `dstart` of the first weights."""
        scan, part = self.scan, self.scan.ranks.part
        dweights = self.dweights.sum(dim=0)
        if not scan.start.masters:
            dweights += part(self.carry)
        dmasters = scan.unpack(part(self.carry)) if scan.start.masters else ()
        dbuffers = scan.unpack(part(self.dbuffers)) if scan.start.buffers else ()
        dnorms = scan.chunks.unsorted(part(self.dnorms).unflatten(0, (scan.chunks.N, scan.H)))
        dnorms = tuple(map(own, scan.dims.unpack_rows(dnorms)))
        self.dstart = FastWeights(scan.unpack(dweights), dnorms, dmasters, dbuffers)

    def dtokens(self) -> Tokens:
        dmomentum = None if self.dmomentum is None else own(self.dmomentum.mT)
        return Tokens(self.dk, self.dv, *map(own, self.dlr.mT), dmomentum)


class ReverseScan(Scan):
    """The backward of a scan, of which it repeats what the history has not kept."""

    @functools.cached_property
    def reach(self) -> Tensor | None:
        """`[N, H, 3]`, see `activations`. None where gradients need no units."""
        if not self.has_units:
            return None
        if not self.k.numel():
            return self.lr.new_zeros(self.chunks.N, self.H, 3)
        w, k, v = self.lengths
        reach = w * k * (k + v + w * k * v) * self.lr
        reach = torch.linalg.vector_norm(reach, ord=torch.inf, dim=-1)  # [3, B, H]
        return reach.movedim(0, -1).expand(self.chunks.N, -1, -1).contiguous()

    def backward(self, do: Tensor, dend: FastWeights | None) -> tuple[Tensor, Tokens, FastWeights]:
        (do,) = readable_in_place(do)
        grads = Gradients(self)
        for number, steps in reversed(list(enumerate(self.segments()))):
            segment = self.segment(steps)
            if self.options.checkpoint_interval > 1:
                segment.at(steps.start).copy_(self.checkpoint(number))
                with phase("scan"):
                    self.scan(segment)
            for batch in reversed(self.batches(steps, planes=6)):
                self.batch_backward(segment, batch, do, dend, grads)
        return grads.dq, grads.dtokens(), grads.dstart

    def batch_backward(
        self,
        segment: Segment,
        batch: range,
        do: Tensor,
        dend: FastWeights | None,
        grads: Gradients,
    ) -> None:
        """The backward of some steps, given what the later ones leave in `grads`."""
        chunks, dims = self.chunks, self.dims
        weights = segment.weights(batch)
        acts = self.activations(3, batch)
        with phase("apply backward"):
            run = chunks.queries(batch)
            ttt_hidden(self.q, do, None, weights, acts, run, dims)
            splits = num_outer_splits(self.q, run.num_chunks, run.width, dims)
            dapply = self.floats(splits, run.num_chunks, self.H, dims.size)
            ttt_outer(self.q, do, acts, dapply, run, dims)
            ttt_project(acts, weights, grads.dq, run, dims, to_values=False)
        if batch.stop == chunks.steps:
            grads.begin(dend)

        updating = range(batch.start, min(batch.stop, chunks.updates))
        number = chunks.num_chunks(updating)
        deferred = Deferred(
            acts,
            dacts=self.activations(3, batch),
            dsteps=self.k.new_empty(number, self.H, dims.size),
            units=None if self.reach is None else self.floats(number, self.H, 4),
            dlr=self.floats(num_rate_tiles(self.k, dims), *acts.shape[:3]),
            dbetas=None if self.betas is None else self.floats(number, self.H, dims.rows),
        )
        with phase("reverse scan"):
            for step in reversed(updating):
                self.update_backward(segment, batch, step, dapply, deferred, grads)
            first = chunks.counts[batch.start]
            grads.dweights[0, :first] += dapply[:, :first].sum(dim=0)
            if batch.start == 0:
                grads.finish()
                self.ranks.send_gradients(grads.dstart)
        if updating:
            with phase("deferred"):
                run, dsteps = chunks.keys(updating, batch), deferred.dsteps
                second = (deferred.dacts, weights)
                to_keys = {"to_values": False, "second": second, "units": deferred.units}
                ttt_project(acts, dsteps, grads.dk, run, dims, **to_keys)
                second = (deferred.dacts[1:2], weights)
                to_values = {"to_values": True, "second": second, "units": deferred.units}
                ttt_project(acts[1:2], dsteps, grads.dv, run, dims, lr=self.lr[1], **to_values)
                ttt_rates_bwd(deferred.dlr, deferred.dbetas, grads.dlr, grads.dmomentum, run, dims)

    def update_backward(
        self,
        segment: Segment,
        batch: range,
        step: int,
        dapply: Tensor,
        deferred: Deferred,
        grads: Gradients,
    ) -> None:
        """From the gradients of the next step's weights to those of this step's, and of its dG."""
        chunks, dims = self.chunks, self.dims
        number = chunks.active(step)
        heads = number * self.H
        run = chunks.keys(range(step, step + 1), batch, number)
        now, then = segment.at(step, number), segment.at(step + 1, number).heads()
        place = chunks.firsts[step] - chunks.firsts[batch.start]
        mine = slice(place, place + number)
        next_ = slice(place + chunks.counts[step], place + chunks.counts[step] + number)

        dapply = dapply[:, next_] if step + 1 in batch else None
        if self.ranks.share_chunks:
            total = grads.dweights[:, :number].sum(dim=0)
            if dapply is not None:
                total += dapply.sum(dim=0)
            self.ranks.sum_(total)
            grads.dweights[0, :number], grads.dweights[1:, :number] = total, 0
            dapply = None

        places = (
            grads.dweights.flatten(1, 2),
            None if dapply is None else dapply.flatten(1, 2),
            grads.carry.flatten(0, 1), then.sums, self.norms[:heads], grads.dnorms, dims,
        )  # fmt: skip
        dsteps = deferred.dsteps[mine]
        units = None if deferred.units is None else deferred.units[mine]
        momentum = {"prenorm": self.options.prenorm, "dsteps": dsteps.flatten(0, 1), "units": units}
        if self.betas is not None:
            momentum |= {
                "betas": self.betas_of(step, number),
                "steps": now.steps.flatten(0, 1),
                "dbuffers": grads.dbuffers.flatten(0, 1),
                "dbetas": deferred.dbetas[mine].flatten(0, 1),
            }
        muon = {}
        if self.options.muon:
            squares = (self.floats(heads, dims.rows), self.floats(heads, dims.rows))
            muon = {"next_steps": then.steps, "squares": squares}
            ttt_update_bwd(*places, prenorm=self.options.prenorm, **muon)
            dx = grads.carry.flatten(0, 1)[:heads]
            muon["iteration"] = self.newton_schulz(number).backward(
                dx, then.steps, *squares, momentum.get("dbuffers"), with_sizes=units is not None
            )
        ttt_update_bwd(*places, **momentum, **muon)

        ttt_hidden_bwd(
            self.k, self.v, self.lr, now.weights, dsteps, deferred.acts, deferred.dacts,
            deferred.dlr, run, dims, units, self.reach,
        )  # fmt: skip
        ttt_outer(self.k, self.v, deferred.dacts, grads.dweights, run, dims, units)
