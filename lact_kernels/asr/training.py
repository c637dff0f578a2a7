"""Train a recogniser with transformers' Trainer. A training can be killed at any moment and continued."""

import json
import logging
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.dataset import (
    Augmentation,
    LengthBucketSampler,
    SpeechDataset,
    collate,
    keep_usable,
)
from lact_kernels.asr.evaluation import error_rate
from lact_kernels.asr.files import written_whole
from lact_kernels.asr.manifest import Utterance, read_utterances
from lact_kernels.asr.model import LaCTASRBlock, LaCTForCTC, warn_if_never_updated
from lact_kernels.asr.pretrained import Recogniser, save_recogniser
from lact_kernels.asr.text import normalize_text, words_of

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SETTINGS = "training.json"
STATISTICS_UTTERANCES = 200  # for the mean and standard deviation of the features


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Options that change the result are saved, so that another training cannot be continued.

    Args:
        epochs: passes over the training utterances.
        batch_size: utterances of a step on one device.
        gradient_accumulation_steps: steps whose gradients are added up for an update.
        learning_rate: peak learning rate of AdamW, reached after `warmup_steps`; it decays as a cosine.
        warmup_steps, weight_decay, max_grad_norm: as in `transformers.TrainingArguments`.
        save_steps: updates between two checkpoints. With each, the development set is evaluated.
        logging_steps: updates between two lines of the log; it divides `save_steps`.
        join_seconds: join utterances of a speaker up to this length: see `SpeechDataset`.
        augmentation: of the training utterances; None for none.
        bf16: mixed precision with bfloat16.
        gradient_checkpointing: recompute blocks in the backward instead of keeping their activations.
        seed: of weights, order, augmentation and dropout.
        workers: processes that read and augment. They have no effect on the result.
        sequence_parallel: N devices share each recording: every one computes the blocks for its part. P
            devices are P / N such groups with a batch each, so that an update sees `batch_size *
            gradient_accumulation_steps * P / N` utterances. The development set is distributed to all P.
        fsdp: shard weights and optimizer state over the devices (FSDP2). It needs GPUs.
    """

    epochs: int = 20
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    save_steps: int = 500
    logging_steps: int = 50
    join_seconds: float = 0.0
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    workers: int = 1
    sequence_parallel: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            at_least = 0 if f.name in ("warmup_steps", "weight_decay", "seed", "workers") else 1
            if f.type is int and (type(value) is not int or value < at_least):
                raise ValueError(
                    f"{f.name} must be an integer of at least {at_least}, got {value!r}"
                )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"logging_steps must divide save_steps = {self.save_steps}, got {self.logging_steps}"
            )

    def trainer_arguments(self, out: Path, evaluate: bool) -> TrainingArguments:
        sharding = {"version": 2, "transformer_layer_cls_to_wrap": [LaCTASRBlock.__name__]}
        return TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=2 * self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            adam_beta2=0.98,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=self.save_steps,
            save_steps=self.save_steps,
            save_total_limit=2,
            load_best_model_at_end=evaluate,
            metric_for_best_model="wer" if evaluate else None,
            greater_is_better=False if evaluate else None,
            logging_steps=self.logging_steps,
            logging_first_step=True,
            bf16=self.bf16 and not self.fsdp,  # see `_SpeechTrainer`
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=self.workers,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=self.seed,
            report_to=["tensorboard"],
            disable_tqdm=not sys.stderr.isatty(),
            **({"gradient_checkpointing": True} if self.gradient_checkpointing else {}),
            **({"fsdp": True, "fsdp_config": sharding} if self.fsdp else {}),
        )


def train(
    out: str | Path,
    model: LaCTForCTC,
    tokenizer: PreTrainedTokenizer,
    train_set: Sequence[Utterance],
    dev_set: Sequence[Utterance] = (),
    options: TrainingOptions | None = None,
) -> Recogniser:
    """Train a recogniser, and save it in the folder `out` for `load_recogniser`.

    Checkpoints are kept in `out/checkpoints`, with the curves for TensorBoard. After a training was killed,
    the same call continues it from the last checkpoint, with the results it would have had. Ctrl-C and
    SIGTERM complete the step, save a checkpoint and raise KeyboardInterrupt.

    Processes that `torchrun` or `accelerate launch` has started train together. All of them make the same
    call, and the training is continued with the same number of them.

    Args:
        out: a folder, made if it is missing.
        model: trained in place: from `new_model`, or the model of a recogniser. If the mean and standard
            deviation of its features are not set, they are measured. With `fsdp` its weights stay sharded,
            and the recogniser that is returned has another model.
        tokenizer: from `lact_kernels.asr.text`, of the model's `vocab_size`.
        train_set: utterances that `usable` has selected, with normalised texts.
        dev_set: the same. The best checkpoint is chosen by its word error rate; if empty, the last one is.
        options: how to train.

    Returns:
        The recogniser.

    Raises:
        ValueError: there are no training utterances, `out` holds a training with other settings, or
            `processes` does not allow the options.
        OSError: no recording can be read.
        KeyboardInterrupt: the training was interrupted. The same call continues it.
    """
    out, options, config = Path(out), options or TrainingOptions(), model.config
    state = processes(options)
    if not train_set:
        raise ValueError("there are no utterances to train on")
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the model's vocab_size must be that of the tokenizer, {len(tokenizer)}, got"
            f" {config.vocab_size}"
        )
    dataset = SpeechDataset(
        train_set,
        tokenizer,
        sampling_rate=config.sampling_rate,
        augmentation=options.augmentation,
        join_seconds=options.join_seconds,
        seed=options.seed,
    )
    warn_if_never_updated(config, max(*(u.duration for u in train_set), options.join_seconds))
    checkpoint = _by_main(state, lambda: _prepare(out, _settings(model, options, train_set)))
    if not model.features.is_measured:
        _measure_features(model, dataset)
    evaluated = None
    if dev_set:
        evaluated = SpeechDataset(dev_set, tokenizer, sampling_rate=config.sampling_rate)
    words = words_of(u.text for u in train_set)
    trainer = _SpeechTrainer(
        model=model,
        args=options.trainer_arguments(out, evaluate=bool(dev_set)),
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=_WordErrorRate(tokenizer),
        preprocess_logits_for_metrics=_most_likely,
        autocast=options.bf16 and options.fsdp,
    )
    if (n := options.sequence_parallel) > 1:
        shape = state.num_processes // n, n
        mesh = init_device_mesh(state.device.type, shape, mesh_dim_names=("data", "sequence"))
        model.sequence_mesh = mesh["sequence"]
    with _Interruption(state.num_processes) as interruption:
        trainer.add_callback(interruption)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            model.sequence_mesh = None  # from here on, processes do not call it together
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step}, to be gone on with"
        )
    _share_buffers(model, state.num_processes)
    if dataset.num_broken:
        logger.warning("%d recordings could not be read, and were left out", dataset.num_broken)
    if options.fsdp:
        model = _whole(model)
    if trainer.is_world_process_zero():
        save_recogniser(out, model, tokenizer, words)
    return Recogniser(model.eval(), tokenizer, tuple(words))


def processes(options: TrainingOptions) -> PartialState:
    """The processes that train together: started by `torchrun` or `accelerate launch`, or this one alone.

    Raises:
        ValueError: the options need another number of processes, or GPUs.
    """
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)  # on a CPU it finds the other processes only if told so
    n = options.sequence_parallel
    if state.num_processes % n:
        raise ValueError(
            f"the number of processes must be a multiple of sequence_parallel = {n}, got"
            f" {state.num_processes}"
        )
    if options.fsdp and on_cpu:
        raise ValueError(
            "fsdp needs GPUs, and there is none: on a CPU Accelerate would pass it over in silence"
        )
    if options.fsdp and not state.use_distributed:
        raise ValueError("fsdp needs processes that torchrun or accelerate launch has started")
    return state


def new_model(config: LaCTASRConfig, seed: int = 0) -> LaCTForCTC:
    """A model with random weights from this seed, the same in every process."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `train` warns with the lengths of the utterances
        return LaCTForCTC(config)


def read_training_set(paths: Sequence[str | Path]) -> list[Utterance]:
    """Read the utterances of manifests and LibriSpeech folders, and normalise their texts."""
    utterances = [u for path in paths for u in read_utterances(path)]
    return [replace(u, text=normalize_text(u.text)) for u in utterances]


def usable(
    utterances: Sequence[Utterance],
    tokenizer: PreTrainedTokenizer,
    config: LaCTASRConfig,
    options: TrainingOptions,
) -> tuple[list[Utterance], dict[str, int]]:
    """`keep_usable` for a model of this configuration, at the highest speed of the augmentation."""
    speeds = options.augmentation.speeds if options.augmentation else None
    return keep_usable(
        utterances,
        tokenizer,
        config.seconds_per_frame * max(speeds or (1.0,)),
        max_seconds=config.max_utterance_seconds,
    )


def _settings(
    model: LaCTForCTC, options: TrainingOptions, train_set: Sequence[Utterance]
) -> dict[str, Any]:
    """Everything that decides the result, as JSON represents it."""
    settings = asdict(options)
    del settings["workers"]
    settings["config"] = model.config.to_diff_dict()
    settings["init"] = model.name_or_path or None
    settings["train_utterances"] = len(train_set)
    settings["train_seconds"] = round(sum(u.duration for u in train_set), 3)
    return json.loads(json.dumps(settings))


def _by_main(state: PartialState, function: Callable[[], Any]) -> Any:
    """Call the function on the main process. All processes return its result, or raise its exception."""
    answer = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    if state.num_processes > 1:
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _prepare(out: Path, settings: dict[str, Any]) -> str | None:
    """Make the folder, and find the checkpoint to continue from. Incomplete ones are removed."""
    file, checkpoints = out / SETTINGS, out / CHECKPOINTS
    if file.is_file():
        before = {"sequence_parallel": 1, "fsdp": False}  # of a version without these options
        before |= json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in settings.keys() | before if settings.get(k) != before.get(k)]
        if changed:
            raise ValueError(
                f"{out} holds a training with other settings ({', '.join(sorted(changed))}): go on with"
                " those, or give another folder"
            )
    checkpoints.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as text:
        json.dump(settings, text, indent=1)
    while (checkpoint := get_last_checkpoint(checkpoints)) is not None:
        try:  # a checkpoint is complete if it has this file, which is written last
            json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
            break
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return checkpoint


def _measure_features(model: LaCTForCTC, dataset: SpeechDataset) -> None:
    """Measure mean and standard deviation of the features, on augmented utterances spread over the set."""
    step = max(len(dataset) // STATISTICS_UTTERANCES, 1)
    model.features.measure(dataset[i]["input_values"] for i in range(0, len(dataset), step))


def _share_buffers(model: LaCTForCTC, num_processes: int) -> None:
    """Give all processes the batch-norm statistics of the main one. Each has those of its own batches."""
    if num_processes > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _whole(model: LaCTForCTC) -> LaCTForCTC:
    """A copy of a model with sharded weights that is whole on every process."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = new_model(model.config).to(model.device, model.dtype)
    whole.load_state_dict(state)
    return whole


class _SpeechTrainer(Trainer):
    """Trainer with batches of similar lengths, one for each group of ranks that share recordings.

    Args:
        autocast: to bfloat16. With FSDP, Trainer's own `bf16` would round weights and waveforms.
    """

    def __init__(self, *args, autocast: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self._autocast = autocast

    def compute_loss(self, *args, **kwargs):
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._autocast):
            return super().compute_loss(*args, **kwargs)

    @property
    def _sequence_parallel(self) -> int:
        mesh = self.model.sequence_mesh
        return 1 if mesh is None else mesh.size()

    def get_train_dataloader(self) -> DataLoader:
        loader, n = super().get_train_dataloader(), self._sequence_parallel
        if n > 1:
            shard = loader.batch_sampler  # Accelerate's, which distributes whole batches
            shard.num_processes //= n
            shard.process_index //= n
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self._sequence_parallel

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate other recordings on each process, with the buffers that the main process saves."""
        _share_buffers(self.model, self.args.world_size)
        mesh, self.model.sequence_mesh = self.model.sequence_mesh, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.model.sequence_mesh = mesh

    def _get_train_sampler(self, train_dataset=None) -> LengthBucketSampler:
        dataset = train_dataset or self.train_dataset
        lengths = [utterance.duration for utterance in dataset.utterances]
        sampler = LengthBucketSampler(lengths, self.args.train_batch_size, self.args.seed)
        self.add_callback(_Epochs(sampler))
        return sampler


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch, which Accelerate's wrappers may not pass on."""

    def __init__(self, sampler: LengthBucketSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class _Interruption(TrainerCallback):
    """Within it, Ctrl-C and SIGTERM end the training after the step, with a checkpoint; a second one at once.

    Whichever process gets the signal, all of them end after the same step.
    """

    def __init__(self, num_processes: int):
        self.asked = False
        # On gloo, so that asking the others does not wait for a GPU.
        self._group = dist.new_group(backend="gloo") if num_processes > 1 else None
        self._handlers = {}

    def __enter__(self):
        # Signal handlers work in no other thread.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("the training stops behind this step, and saves a checkpoint")

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(self.asked, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked:
            control.should_save = control.should_training_stop = True


def _most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


class _WordErrorRate:
    """Word error rate of greedy decoding, for the Trainer."""

    def __init__(self, tokenizer: PreTrainedTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, prediction) -> dict[str, float]:
        blank = self.tokenizer.pad_token_id
        tokens, labels = (
            torch.from_numpy(x) for x in (prediction.predictions, prediction.label_ids)
        )
        tokens, labels = (x.masked_fill(x < 0, blank) for x in (tokens, labels))
        hypotheses = self.tokenizer.batch_decode(tokens)
        references = self.tokenizer.batch_decode(labels, group_tokens=False)
        return {"wer": error_rate(references, hypotheses).rate}
