"""Saves a sharded model with its optimizer, each time to a new folder, and loads it."""

import json
import operator
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardemb.agree import all_or_none
from shardemb.allocator import give_freed_memory_back
from shardemb.env import Env, init_distributed
from shardemb.errors import RunError
from shardemb.optimizer import DENSE, FUSED, Optimizer
from shardemb.updates.faults import Fault, largest_of, raise_first
from shardemb.updates.settings import settings_of

_FORMAT = 2
_HEADER = "shardemb.json"
_PARTIAL = ".partial"
_OPTIMIZER = "optim"
_METADATA = ".metadata"  # torch's
_SCHEDULED = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""What torch's schedulers of learning rates add to parameter groups."""


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    env: Env | None = None,
) -> Path:
    """Writes a checkpoint: tables, their optimizer rows, dense parameters and their optimizer.

    The folder appears only when it is complete: a killed run leaves no broken one. Not in it are
    the states of a learning-rate scheduler and of random number generators.

    Args:
        path: A folder that does not exist yet.
        model: Of `shard_modules`.
        optimizer: Of `build_optimizer`.
        step: Steps done, which is also the position in the data.
        env: This process, as by `init_distributed()`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists.
        ValueError: `step` is negative.
        OSError: The folder cannot be made.
        RunError: It cannot be written, a rank does not see it, or another rank failed.
    """
    env = env or init_distributed()
    path = Path(path)
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}; give the number of steps done")
    partial = path.with_name(path.name + _PARTIAL)
    settings = _settings_of_all_ranks(optimizer, env)
    state = _model_and_fused_state(model, optimizer) | _dense_state(optimizer)
    with all_or_none(env, f"preparing the checkpoint folder {path}"):
        if env.is_main:
            if path.exists():
                raise FileExistsError(f"{path} exists; save each checkpoint to a new folder")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            header = {
                "format": _FORMAT,
                "step": step,
                "world_size": env.world_size,
                "settings": settings,
            }
            with open(partial / _HEADER, "w", encoding="utf-8") as file:
                file.write(json.dumps(header))
                os.fsync(file)
    try:
        dcp.save(state, storage_writer=FileSystemWriter(partial))
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise RunError(
            f"checkpoint {path} could not be written: {_first_cause(error)}; see to the disk, or "
            "save to another folder"
        ) from error
    with all_or_none(env, f"completing the checkpoint {path}"):
        if env.is_main:
            os.replace(partial, path)
    with all_or_none(env, f"looking at the checkpoint {path}"):
        if not (path / _HEADER).is_file():
            raise RunError(
                f"rank {env.rank} does not see {path}, which rank 0 wrote; save to a filesystem "
                "that all nodes share"
            )
    give_freed_memory_back()
    return path


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, *, env: Env | None = None
) -> int:
    """Reads a checkpoint into a model and its optimizer, in place.

    Args:
        path: A folder of `save_checkpoint`.
        model: Of `shard_modules`, with the tables of the checkpoint.
        optimizer: Of `build_optimizer`, with the optimizers of the checkpoint.
        env: This process, as by `init_distributed()`.

    Returns:
        The number of steps done.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is damaged, or it and the model or its optimizers differ; the
            message names the first difference.
        RunError: The checkpoint cannot be read, or another rank failed; on all ranks, when on any a
            row, a state of rows or a parameter that was read is not finite: the message names the
            first, and the model must not be trained on.
    """
    env = env or init_distributed()
    path = Path(path)
    tables_and_dense = _model_and_fused_state(model, optimizer)
    with all_or_none(env, f"reading the checkpoint {path}"):
        header = _read_header(path)
        stored = _read_metadata(path)
        _check_fits(path, tables_and_dense, stored)
        dense_state = _empty_dense_state(stored)
        settings = _settings_to_restore(path, optimizer, header["settings"])
    _check_nothing_unread(path, tables_and_dense, stored, env)
    try:
        dcp.load(tables_and_dense | dense_state, storage_reader=FileSystemReader(path))
    except (Exception, CheckpointException) as error:
        raise RunError(
            f"checkpoint {path} could not be read: {_first_cause(error)}; see to the disk, or "
            "load an older checkpoint"
        ) from error
    _check_finite(path, model, tables_and_dense)
    optimizer.load_dense_state(_by_parameter(dense_state))
    for group, saved in settings:
        group.update({key: _like(group.get(key), value) for key, value in saved.items()})
    optimizer.zero_grad()
    optimizer.rows.post_load_state_dict()
    give_freed_memory_back()
    return int(header["step"])


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps among the complete ones in a folder, or None.

    Args:
        folder: Where checkpoints are, each in a folder of its own.

    Returns:
        Its path.

    Raises:
        ValueError: A checkpoint is damaged or of another format.
    """
    paths = [path.parent for path in Path(folder).glob(f"*/{_HEADER}")]
    complete = [path for path in paths if not path.name.endswith(_PARTIAL)]
    return max(complete, key=lambda path: int(_read_header(path)["step"]), default=None)


def _model_and_fused_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The tables, their optimizer rows and the dense parameters, by flat names.

    Nested state of the fused optimizers fails where a rank owns no part of a table.
    """
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, entries in optimizer.rows.state_dict()["state"].items():
        for name, tensor in entries.items():
            state[f"{_OPTIMIZER}/{FUSED}/{parameter}/{name}"] = tensor
    return state


def _dense_state(optimizer: Optimizer) -> dict[str, Any]:
    return {
        f"{_OPTIMIZER}/{DENSE}/{parameter}/{name}": torch.as_tensor(value)
        for parameter, tensor in optimizer.dense_parameters.items()
        for name, value in optimizer.state.get(tensor, {}).items()
    }


def _empty_dense_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors for the dense optimizer's stored state; torch makes none before the first step."""
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(f"{_OPTIMIZER}/{DENSE}/") and isinstance(entry, TensorStorageMetadata)
    }


def _by_parameter(dense_state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The dense optimizer's state by the names of parameters."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in dense_state.items():
        parameter, name = key.removeprefix(f"{_OPTIMIZER}/{DENSE}/").rsplit("/", 1)
        state.setdefault(parameter, {})[name] = tensor
    return state


def _parameter_groups(optimizer: Optimizer) -> list[tuple[list[str], dict[str, Any]]]:
    """The parameter groups, the same on every rank, each with the names of its parameters."""
    groups: list[tuple[list[str], dict[str, Any]]] = [
        ([f"{FUSED}.{key}"], group) for key, group in optimizer.rows.named_groups
    ]
    name_of = {id(tensor): f"{DENSE}.{name}" for name, tensor in optimizer.dense_parameters.items()}
    dense = optimizer.param_groups[len(groups) :]
    return groups + [
        ([name_of[id(tensor)] for tensor in group["params"]], group) for group in dense
    ]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and the like of a parameter, as JSON gives them back."""
    return {key: _as_json(value) for key, value in settings_of(group).items()}


def _like(held: Any, saved: Any) -> Any:
    """A setting as JSON gave it back, of the type that the group has."""
    return tuple(saved) if isinstance(held, tuple) else saved


def _as_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_as_json(one) for one in value]
    return value.item() if isinstance(value, (torch.Tensor, np.generic)) else value


def _settings_of_all_ranks(optimizer: Optimizer, env: Env) -> dict[str, dict[str, Any]]:
    """The settings of every parameter that any rank has."""
    with all_or_none(env, "reading the optimizer's settings"):
        mine = {
            name: _settings(group)
            for names, group in _parameter_groups(optimizer)
            for name in names
        }
    of_ranks: list[dict[str, dict[str, Any]]] = [{}] * env.world_size
    dist.all_gather_object(of_ranks, mine)
    return {name: settings for of_rank in of_ranks for name, settings in of_rank.items()}


def _settings_to_restore(
    path: Path, optimizer: Optimizer, saved: Mapping[str, dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For every parameter group of this rank, the settings that its parameters were saved with.

    Raises:
        ValueError: The checkpoint has none, or others than one group can have.
    """
    found = []
    for names, group in _parameter_groups(optimizer):
        for name in names:
            if name not in saved:
                raise ValueError(f"checkpoint {path} has no optimizer settings of {name!r}")
            kinds = [one.get("optimizer") for one in (saved[name], group)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"checkpoint {path}: {name!r} was trained by {kinds[0]}, the model's table has "
                    f"{kinds[1]}; load it into the optimizer it was saved from"
                )
            differ = (set(saved[name]) ^ set(group)) - {"params"} - _SCHEDULED
            if differ:
                raise ValueError(
                    f"checkpoint {path}: the optimizer of {name!r} was saved with other settings, "
                    f"they differ in {min(differ)!r}; load it into the optimizer it was saved from"
                )
            if saved[name] != saved[names[0]]:
                raise ValueError(
                    f"checkpoint {path} has different optimizer settings for {names[0]!r} and "
                    f"{name!r}, which share one parameter group here; give them one optimizer"
                )
        found.append((group, saved[names[0]]))
    return found


def _check_nothing_unread(
    path: Path, state: Mapping[str, Any], stored: Mapping[str, Any], env: Env
) -> None:
    """Refuses a checkpoint of more optimizer state than the ranks ask for together.

    Raises:
        ValueError: There is more.
    """
    wanted: list[set[str]] = [set()] * env.world_size
    dist.all_gather_object(wanted, set(state))
    fused = {name for name in stored if name.startswith(f"{_OPTIMIZER}/{FUSED}/")}
    unread = fused.difference(*wanted)
    if unread:
        raise ValueError(
            f"checkpoint {path} has {min(unread)!r}, for which the model's optimizer has no "
            "place; load it into the optimizer it was saved from"
        )


def _read_header(path: Path) -> dict[str, Any]:
    if not (path / _HEADER).is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {_HEADER}")
    try:
        header = json.loads((path / _HEADER).read_text(encoding="utf-8"))
    except ValueError:
        header = None
    if not isinstance(header, dict) or not {"format", "step", "settings"} <= set(header):
        raise ValueError(_damaged(path, f"its {_HEADER} is not as it was written"))
    if header["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {header['format']}, this version of shardemb reads "
            f"{_FORMAT}"
        )
    settings = header["settings"]
    is_typed = (
        type(header["step"]) is int
        and isinstance(settings, dict)
        and all(isinstance(of_one, dict) for of_one in settings.values())
    )
    if not is_typed:
        raise ValueError(_damaged(path, f"its {_HEADER} is not as it was written"))
    return header


def _read_metadata(path: Path) -> dict[str, Any]:
    """What torch wrote down of each tensor.

    Raises:
        ValueError: It is not there, or is something else.
        OSError: It cannot be read.
    """
    try:
        stored: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    except FileNotFoundError as error:
        raise ValueError(_damaged(path, f"it has no {_METADATA}")) from error
    except OSError:
        raise
    except Exception as error:  # a pickle of anything may raise anything
        raise ValueError(_damaged(path, f"its {_METADATA} is not as it was written")) from error
    return stored


def _damaged(path: Path, how: str) -> str:
    return (
        f"checkpoint {path} is damaged: {how}; remove the folder, and an older checkpoint is the "
        "latest"
    )


def _first_cause(error: BaseException) -> str:
    """What the first rank that failed met, in one line; torch gives the tracebacks of all."""
    who = ""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        who = f"rank {rank}: "
    lines = str(error).strip().splitlines()
    return f"{who}{type(error).__name__}" + (f": {lines[0]}" if lines else "")


def _check_fits(path: Path, state: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    for name, tensor in state.items():
        if name not in stored:
            raise ValueError(
                f"checkpoint {path} has no {name!r}; load it into the model and the optimizers "
                "that it was saved from"
            )
        shape = tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape
        if list(shape) != list(stored[name].size):
            raise ValueError(
                f"checkpoint {path} has {name!r} of shape {list(stored[name].size)}, the model of "
                f"{list(shape)}"
            )
        if name.startswith("model/"):
            _check_dtype(path, name, tensor, stored[name])
    unread = [name for name in stored if name.startswith("model/") and name not in state]
    if unread:
        raise ValueError(f"checkpoint {path} has {unread[0]!r}, which the model does not have")


def _check_finite(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuses rows, states of rows and parameters that are not finite. On all ranks together.

    Raises:
        RunError: One is not, on any rank.
    """
    parameters = {f"model/{name}" for name, _ in model.named_parameters()}
    found = (
        _fault_of_blocks(name, tensor)
        for name, tensor in state.items()
        if name in parameters or name.startswith(f"{_OPTIMIZER}/")  # buffers may hold anything
    )
    fault = next((one for one in found if one is not None), None)
    rest = "the model holds it now and is not to be trained"
    raise_first([fault], where=f"checkpoint {path}", rest=rest)


def _fault_of_blocks(name: str, tensor: Any) -> Fault | None:
    """The first value that is not finite of what this rank has of a tensor, if there is one."""
    blocks = [(0, tensor)]
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        blocks = [(shard.metadata.shard_offsets[0], shard.tensor) for shard in shards]
    for first_row, block in blocks:
        if all(torch.isfinite(one) for one in largest_of({name: block})):
            continue
        bad = (~torch.isfinite(block)).nonzero()[0]
        where = f"row {first_row + int(bad[0])} of " if len(bad) else ""
        value = float(block[tuple(bad)])
        return Fault(
            f"{where}{name!r} is {value}, on rank {dist.get_rank()}",
            way_out="load an older checkpoint",
        )
    return None


def _check_dtype(path: Path, name: str, tensor: Any, stored: TensorStorageMetadata) -> None:
    """Refuses to round or widen values unasked.

    Raises:
        ValueError: The checkpoint holds another dtype.
    """
    is_sharded = isinstance(tensor, ShardedTensor)  # of which this rank may have nothing
    dtype = tensor.metadata().tensor_properties.dtype if is_sharded else tensor.dtype
    if dtype != stored.properties.dtype:
        held, wanted = (str(one).removeprefix("torch.") for one in (stored.properties.dtype, dtype))
        raise ValueError(
            f"checkpoint {path} has {name!r} of {held}, the model of {wanted}; build the model "
            f"with {held}, which for a table is the dtype of its TableConfig"
        )
