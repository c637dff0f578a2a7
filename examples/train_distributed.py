"""Train a LaCT language model on many processes: DDP or FSDP2, whole sequences or parts of them.

```
python -m examples.train_distributed
torchrun --nproc-per-node 4 -m examples.train_distributed --strategy fsdp2 --sequence-parallel 2
accelerate launch --multi_gpu -m examples.train_distributed --checkpoint DIR
```

The task is recall: random tokens are repeated at a distance longer than the attention window, so that only
fast weights can remember them. The loss starts at log(16) = 2.77, and is about 0.2 after 200 steps, 20
seconds on a core. Of P processes with `--sequence-parallel N`, N compute each sequence together, and P / N
such groups share the rows of a batch.

With `--checkpoint` the training can be killed at any moment. The same command continues from the last
checkpoint, on any number of processes, with either strategy, and with the same losses up to rounding. Ctrl-C
completes the step and saves. Exit status: 0, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from lact_kernels.compat.transformers import LaCTForCausalLM, LaCTSWIGLUConfig

WINDOW, CHUNK, LENGTH, TOKENS, BATCH = 8, 16, 64, 16, 16
LEARNING_RATE = 1e-2


class Recall(Dataset):
    """Row i: random tokens, and their repetition after LENGTH / 2, which alone has labels."""

    def __init__(self, rows: range):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.rows[i])
        ids = torch.randint(TOKENS, (LENGTH // 2,), generator=generator).repeat(2)
        labels = torch.where(torch.arange(LENGTH) < LENGTH // 2, -100, ids)
        return {"input_ids": ids, "labels": labels}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # On a CPU, Accelerate finds the other processes of torchrun only if it is told so.
    accelerator = Accelerator(cpu=options.device == "cpu")
    world, pieces = accelerator.num_processes, options.sequence_parallel
    if world % pieces or BATCH % (world // pieces):
        accelerator.print(
            f"error: --sequence-parallel must divide the number of processes, and their quotient the"
            f" batch of {BATCH} rows, got {pieces} and {world} processes",
            file=sys.stderr,
            flush=True,
        )
        accelerator.wait_for_everyone()  # the first process to exit would end the others
        return 2

    model = _model()
    if pieces > 1:
        shape, names = (world // pieces, pieces), ("data", "sequence")
        mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)
        model.sequence_mesh = mesh["sequence"]
    # Gradients are averaged over all ranks, those of a sequence included: each has the loss of its part.
    if options.strategy == "fsdp2" and world > 1:
        # PyTorch's own FSDP2: on a CPU, Accelerate would silently use DDP instead.
        everyone = init_device_mesh(accelerator.device.type, (world,))
        model.to(accelerator.device)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=everyone)
        optimizer = accelerator.prepare(AdamW(model.parameters(), LEARNING_RATE))
    else:
        model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), LEARNING_RATE))

    done = _load(options.checkpoint, model, optimizer) if options.checkpoint else 0
    accelerator.print(f"{options.strategy}, {world // pieces} x {pieces} ranks, {done} steps done")
    # `accelerator.prepare` would give each rank rows of its own; the ranks of a sequence share theirs.
    loader = prepare_data_loader(
        DataLoader(Recall(range(done * BATCH, options.steps * BATCH)), BATCH),
        accelerator.device,
        num_processes=world // pieces,
        process_index=accelerator.process_index // pieces,
        split_batches=True,
        put_on_device=True,
    )
    with _Interruption() as interruption:
        for step, batch in enumerate(loader, start=done + 1):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            # A signal may reach some ranks a step later than others, and they have to end together.
            mine = torch.stack((loss.detach(), torch.full_like(loss, interruption.asked)))
            mean_loss, asked = accelerator.reduce(mine, "mean").tolist()
            last = step == options.steps or asked > 0
            if step % options.log_every == 0 or last:
                accelerator.print(f"step {step:5d}  loss {mean_loss:.6f}", flush=True)
            if options.checkpoint and (step % options.save_every == 0 or last):
                _save(options.checkpoint, accelerator, model, optimizer, step)
            if asked:
                accelerator.print(f"stopped after step {step}", file=sys.stderr)
                break
    accelerator.end_training()
    return 130 if interruption.asked else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--sequence-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    for name in ("sequence_parallel", "steps", "log_every", "save_every"):
        if getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def _model() -> LaCTForCausalLM:
    torch.manual_seed(0)  # the same weights on every rank
    config = LaCTSWIGLUConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attn_heads=4,
        num_lact_heads=2,
        intermediate_size=128,
        vocab_size=TOKENS,
        window_size=WINDOW,
        lact_chunk_size=CHUNK,
        attn_qk_norm=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LaCTForCausalLM(config)
    # Learning rates of 1, not 0.001: a training as short as this one needs large ones.
    for layer in model.model.layers:
        nn.init.constant_(layer.attn.lr_proj.bias, 7.45)
    return model


def _save(folder: Path, accelerator, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write `folder/step-...`, which gets its name when it is complete, and remove older ones."""
    partial, whole = folder / "partial", folder / f"step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=partial)
    if accelerator.is_main_process:  # all ranks have written when `save` returns
        partial.rename(whole)
        for older in set(folder.glob("step-*")) - {whole}:
            shutil.rmtree(older)


def _load(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load the newest checkpoint, and return the number of its steps; 0 if there is none."""
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=newest)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"]


class _Interruption:
    """Within it, Ctrl-C and SIGTERM only set `asked`."""

    def __enter__(self) -> "_Interruption":
        self.asked = False
        self._handlers = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame) -> None:
        self.asked = True

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
