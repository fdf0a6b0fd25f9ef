"""From a config to a training that is ready to run: data, model, task, callbacks, and Lightning's trainer."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar
from pytorch_lightning.loggers import Logger, WandbLogger

from vlabs.checkpoints.initialize import initialize, keep_arithmetic, read_source
from vlabs.checkpoints.pretrained import check_there, report
from vlabs.data.module import IMAGE_SIZE, PreparedDataModule
from vlabs.data.prepared import read_answers
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.models.vlm import VisionLanguageModel
from vlabs.runs.config import plain, recorded, save_config
from vlabs.runs.environment import describe_environment, write_environment
from vlabs.runs.logging import csv_logger, remember_run_id
from vlabs.runs.record import Record, resumable
from vlabs.runs.trainer import make_trainer
from vlabs.tasks.base import Task
from vlabs.training.callbacks.checkpoints import KeepLast, WholeCheckpointIO
from vlabs.training.callbacks.gradients import FiniteGradients
from vlabs.training.callbacks.recording import Recorder
from vlabs.training.callbacks.resume import GoOn
from vlabs.training.pictures import as_before, choose, shown_to_checkpoint, shown_to_encoder
from vlabs.training.start import Last, make_start
from vlabs.training.words import EpochLine
from vlabs.utils.options import as_given, check_names
from vlabs.utils.ranks import is_rank_zero, say


@dataclass
class Training:
    """A run that is ready to start.

    Attributes:
        data, task: the data, and the task that is trained on them.
        trainer: Lightning's trainer, with all callbacks and loggers.
        best, last: the callbacks that keep the checkpoints.
        line: the callback that knows the best validation.
        resumed: the checkpoint to resume from; None for a new run.
        begin: writes the files of the run folder that describe the run.
    """

    data: PreparedDataModule
    task: Task
    trainer: pl.Trainer
    best: ModelCheckpoint
    last: KeepLast
    line: EpochLine
    resumed: Path | None
    begin: Callable[[], None]


def build(config: DictConfig, record: Record, resumed: Last | None = None) -> Training:
    """Build everything that a config names. Nothing is written before the run begins.

    Args:
        config: the config of `vlabs train`; sizes that depend on the data are filled in.
        record: the record of the run, whose folder gets config.yaml and environment.json.
        resumed: the checkpoint to resume from.

    Raises:
        UserError: parts do not fit each other or the resumed run, or cannot be built.
    """
    run_dir = record.folder
    # First the callbacks, so that a wrong option is reported before data are made, which may take minutes.
    callbacks = chosen_callbacks(config.get("callbacks") or OmegaConf.create(), config.trainer)
    if resumed is None:
        settle(config)
    given = copy.deepcopy(config)
    task, data = build_task(config, resumed)
    kept = recorded(given)
    loggers = build_loggers(config, record, resumed)
    best, last = build_checkpoints(run_dir, task.monitor, config.checkpoints)

    def begin() -> None:
        record.begin()
        if is_rank_zero():
            with resumable(run_dir):
                save_config(kept, run_dir / "config.yaml")
                found = describe_environment(data_sets(data))
                changed = write_environment(run_dir / "environment.json", found, going_on=resumed is not None)
                for logger in loggers:
                    if isinstance(logger, WandbLogger):
                        remember_run_id(logger)
            if changed:
                say(f"changed since this run began: {'; '.join(changed)}")

    line = EpochLine()
    trainer = make_trainer(
        config.trainer,
        callbacks=[
            best,
            last,
            line,
            GoOn(resumed.changed if resumed else None),
            FiniteGradients(config.max_bad_steps, last.path),
            *callbacks,
            Recorder(record, begin, plain(kept)),  # last, after all callbacks that may refuse the run
        ],
        logger=loggers,
        plugins=[WholeCheckpointIO()],
        default_root_dir=str(run_dir),
    )
    return Training(data, task, trainer, best, last, line, resumed.path if resumed else None, begin)


def build_task(config: DictConfig, resumed: Last | None = None) -> tuple[Task, PreparedDataModule]:
    """Build the task with its model, initialized from other weights if the config says so, and its data.

    Args:
        config, resumed: as in `build`.
    """
    if resumed is not None:
        return _build_resumed(config, resumed)
    settle(config)
    parts = [config.model.get(part) or {} for part in ("vision", "text")]
    check_there(parts[0].get("weights"), parts[1].get("name_or_path"), config.data.get("tokenizer"))
    data: PreparedDataModule = instantiate(config.data, _convert_="all")
    _check_kind(config, data)
    if config.init is None:
        shown = shown_to_encoder(config.model.get("vision") or {})
    else:
        header = read_source(config.init)[1]["vlabs"]
        shown = shown_to_checkpoint(f"init={config.init}", header)
        size = header["preprocessing"].get("image_size")
        if size and config.data.get("image_size", size) != size:
            say(
                f"images: {config.data.image_size} px, but init={config.init} was trained on {size} px, which "
                "data.image_size=null takes"
            )
        if config.data.get("tokenizer") is None:
            _take_tokenizer(data, header)
    say(choose(data, shown))
    model = _new_model(config, data)
    if said := report(model, config.init is not None):
        say(said)
    history: list[dict[str, Any]] = []
    if config.init is not None:
        initialized = initialize(model, config.init, data.preprocessing.names)
        history = initialized.history
        say(initialized.report())
    return _make_task(config, model, data, history), data


def settle(config: DictConfig) -> None:
    """Train what a run starts from, if necessary, and fill in the image size, if not set, from `init=`."""
    if config.init is not None and config.init_by:
        make_start(Path(config.init), list(config.init_by))
    if config.data.get("image_size", IMAGE_SIZE) is None:
        header = read_source(config.init)[1]["vlabs"] if config.init is not None else {"preprocessing": {}}
        config.data.image_size = header["preprocessing"].get("image_size") or IMAGE_SIZE


def _build_resumed(config: DictConfig, last: Last) -> tuple[Task, PreparedDataModule]:
    """`build_task` for a resumed run. Everything but the data comes from its checkpoint."""
    for name, (old, new) in last.changed.items():
        if _FIXED.fullmatch(name) and "drop" not in name:
            raise UserError(
                f"{name}={as_given(new)} cannot change within a run, which began with {as_given(old)}: leave it out, "
                "or start a new run (init=RUN takes its weights)"
            )
    for name, folder in [("dir", config.data.get("dir")), *(config.data.get("sets") or {}).items()]:
        if folder is not None and not Path(folder).is_dir():
            option = "data.dir" if name == "dir" else f"data.sets.{name}"
            raise UserError(f"{option}={folder}: the data of this run are not there: pass {option}=FOLDER")
    make_data = instantiate(config.data, _partial_=True, _convert_="all")
    data: PreparedDataModule = make_data(preprocessing=last.preprocessing)
    _check_kind(config, data)
    known = read_answers(data.dir) if isinstance(data, VQADataModule) else getattr(data, "labels", None)
    if known is not None and tuple(known) != data.preprocessing.names:
        raise UserError(
            f"data.dir={data.dir} has other answers than the data that this run began with: name those, or start a new "
            "run (init=RUN takes its weights)"
        )
    say(as_before(data))
    changed = [name for name in last.changed if name.startswith(("model.", "task.", "data."))]
    anew = any(name.startswith("model.") for name in changed)
    model = _new_model(config, data) if anew else last.model()
    if anew:
        keep_arithmetic(model, last.header.get("architecture"))
    task = _make_task(config, model, data, last.history)
    if (part := last.differs_from(task)) is not None:
        what = ", ".join(f"{name}={last.changed[name][1]} (was {last.changed[name][0]})" for name in changed)
        raise UserError(
            f"{what or 'config.yaml'}: the model or its trained parts do not fit {last.path} ({part}), which cannot "
            "change within a run: start a new run (init=RUN takes its weights)"
        )
    return task, data


# Options that cannot change within a run: they define the model, its trained parts, and the training texts.
_FIXED = re.compile(
    r"model\..*|task\.(_target_|name|freeze|lora\..*)|seed|init|init_by"
    r"|data\.(_target_|size|layout|phrases|image_size|max_length|tokenizer|image_mean|image_std"
    r"|interpolation|crop|crop_mode|seed)"
)


def _new_model(config: DictConfig, data: PreparedDataModule) -> Any:
    """Build the model that a config describes, with sizes that fit the data."""
    _fill_in_sizes(config, data)
    model = instantiate(config.model, _convert_="all")  # checkpoints record its arguments, which must be plain data
    if isinstance(model, VisionLanguageModel) or getattr(model, "text", None) is not None:
        _check_fit(model, data)
    return model


def _make_task(config: DictConfig, model: Any, data: PreparedDataModule, history: list[dict[str, Any]]) -> Task:
    # Partial, because Hydra would turn a dataclass among the arguments into a config.
    make_task = instantiate(config.task, _partial_=True, _convert_="all")
    check_names("task", config.task, make_task.func)  # which may be the user's own class
    identity = data.identity | data.extent() | {"history": history}
    task: Task = make_task(model=model, preprocessing=data.preprocessing, data=identity)
    task.wants(data)  # checks the data; Lightning asks again when the run begins
    return task


def data_sets(data: PreparedDataModule) -> list[dict[str, Any]]:
    """The identity of every prepared folder that is trained on."""
    identity = data.identity
    return list(identity.get("sets", [identity]))


def chosen_callbacks(config: DictConfig, trainer: DictConfig) -> list[Callback]:
    """Build the callbacks that the group `callbacks` names.

    Args:
        trainer: options of the group `trainer`, which may turn the progress bar off.
    """
    callbacks: list[Callback] = []
    for name, options in ((str(name), options) for name, options in config.items()):
        if options is None:
            continue
        callback = instantiate(options, _convert_="all")
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks.{name}: {options._target_} is not a callback of Lightning's")
        callbacks.append(callback)
    wants_bar = bool(trainer.get("enable_progress_bar"))
    return [callback for callback in callbacks if wants_bar or not isinstance(callback, ProgressBar)]


def build_checkpoints(run_dir: Path, monitor: str, often: DictConfig) -> tuple[ModelCheckpoint, KeepLast]:
    """Callbacks for best.ckpt (the weights with the best metric) and last.ckpt (all that a resumed run needs)."""
    minutes, steps = often.every_minutes, often.every_n_steps
    if minutes is not None and steps is not None:
        raise UserError("checkpoints: set only one of every_minutes and every_n_steps, and the other to null")
    best = ModelCheckpoint(
        run_dir / "checkpoints",
        filename="best",
        monitor=monitor,
        mode="max",
        save_weights_only=True,
        save_on_train_epoch_end=False,  # save right after a validation, while the weights are those that it measured
        enable_version_counter=False,
    )
    return best, KeepLast(run_dir / "checkpoints" / "last.ckpt", minutes, steps)


def build_loggers(config: DictConfig, record: Record, resumed: Last | None) -> list[Logger]:
    """The logger of metrics.csv, and the chosen logger."""
    step, validates = (resumed.step, resumed.validates) if resumed is not None else (None, False)
    loggers: list[Logger] = [csv_logger(record.folder, step, validates)]
    if config.logger.get("_target_") is None:
        return loggers
    logger = instantiate(config.logger, save_dir=str(record.folder))
    if isinstance(logger, WandbLogger) and is_rank_zero():
        logged = OmegaConf.to_container(config, resolve=True)
        assert isinstance(logged, dict)
        logged["variant"] = record.variant
        logger.experiment.config.update(logged, allow_val_change=True)
    return [*loggers, logger]


def _check_kind(config: DictConfig, data: PreparedDataModule) -> None:
    """Check that the data are of the kind that the task reads, and have texts if the model reads them."""
    task: type[Task] = get_class(config.task._target_)
    if not isinstance(data, task.reads):
        raise UserError(
            f"task={task.name} trains on {task.reads.holds}, but data.dir={config.data.get('dir')} holds {data.holds}"
        )
    if config.model.get("text") and not data.preprocessing.tokenizer:
        raise UserError(f"the model reads texts, but {data.dir} has none: pass model=classifier or model=segmenter")


def _take_tokenizer(data: PreparedDataModule, header: dict[str, Any]) -> None:
    """Use the tokenizer of the weights that a run starts from, if a text encoder is among them."""
    if "trained" not in header or "text" in header["trained"]:
        tokenizer = header["preprocessing"].get("tokenizer", "")
        if not tokenizer:
            return  # the checkpoint of a classifier
        data.preprocessing = dataclasses.replace(data.preprocessing, tokenizer=tokenizer)


def _fill_in_sizes(config: DictConfig, data: PreparedDataModule) -> None:
    """Fill in sizes in the model's config that depend on the data."""
    answers = len(data.preprocessing.names)
    with open_dict(config.model):
        parts: list[Any] = [config.model.get(part) or {} for part in ("text", "head", "vision", "decoder")]
        text, head, vision, decoder = parts
        if text.get("vocab_size", 0) is None:
            text.vocab_size = data.preprocessing.vocab_size
        for name in ("num_answers", "num_labels"):
            if head.get(name, 0) is None:
                if not answers:
                    raise UserError(f"{data.dir} has no answers to train on: prepare it again, from data with answers")
                head[name] = answers
            elif answers and name == "num_labels" and head.get(name, answers) != answers:
                raise UserError(f"model.head.{name}={head[name]}: {data.dir} has {answers}; pass null to take that")
        if head.get("vocab_size", 0) is None:
            head.vocab_size = text.get("vocab_size") or data.preprocessing.vocab_size
        for where, part in (("vision", vision), ("decoder", decoder)):
            if (given := part.get("num_classes", 0)) is None:
                part.num_classes = answers
            elif answers and given not in (0, answers):
                raise UserError(f"model.{where}.num_classes={given}: {data.dir} has {answers}; pass null to take that")


def _check_fit(model: Any, data: PreparedDataModule) -> None:
    """Check that the text encoder knows every token of the tokenizer, and has a position for each.

    If the model's ξ depends on the padding, its texts are padded to one length.
    """
    data.preprocessing = dataclasses.replace(data.preprocessing, pad_to_max_length=model.pads_to_fixed_length)
    # Token type 0 is the text, each image has one more.
    if data.pictures >= (types := getattr(model, "fusion", None) and model.fusion.token_type.num_embeddings or 99):
        raise UserError(f"model.fusion.pictures={types - 1}: the texts are about {data.pictures} images each")
    known = model.text.vocab_size
    if data.preprocessing.vocab_size > known:
        raise UserError(
            f"the tokenizer has {data.preprocessing.vocab_size} tokens, but the text encoder has {known}: "
            "pass data.tokenizer=DIR with the text encoder's own tokenizer"
        )
    if data.preprocessing.max_length > model.text.max_length:
        raise UserError(
            f"data.max_length={data.preprocessing.max_length} is more than the text encoder's {model.text.max_length}"
        )
