"""Saves a sharded model with its optimizer, each time to a new folder, and loads it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from shardemb.agree import all_or_none
from shardemb.env import Env
from shardemb.optim.build import DENSE, FUSED

_FORMAT = 1
_HEADER = "shardemb.json"
_PARTIAL = ".partial"
_OPTIMIZER = "optim"


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: CombinedOptimizer, *, step: int, env: Env
) -> Path:
    """Writes a checkpoint.

    The folder appears only when it is complete: a killed run leaves no broken one.

    Args:
        path: A folder that does not exist yet.
        model: Of `shard_modules`.
        optimizer: Of `build_optimizer`.
        step: Steps done, which is also the position in the data.
        env: This process.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists.
        OSError: It cannot be written.
        RuntimeError: Another rank failed.
    """
    path = Path(path)
    partial = path.with_name(path.name + _PARTIAL)
    settings = _settings_of_all_ranks(optimizer, env)
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
            (partial / _HEADER).write_text(json.dumps(header))
    state = _model_and_fused_state(model, optimizer) | _dense_state(optimizer)
    dcp.save(state, storage_writer=FileSystemWriter(partial))
    with all_or_none(env, f"completing the checkpoint {path}"):
        if env.is_main:
            os.replace(partial, path)
    return path


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: CombinedOptimizer, *, env: Env
) -> int:
    """Reads a checkpoint into a model and its optimizer, in place.

    Args:
        path: A folder of `save_checkpoint`.
        model: Of `shard_modules`, with the tables of the checkpoint.
        optimizer: Of `build_optimizer`, with the optimizers of the checkpoint.
        env: This process.

    Returns:
        The number of steps done.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint and the model differ; the message names the first difference.
        RuntimeError: Another rank failed.
    """
    path = Path(path)
    tables_and_dense = _model_and_fused_state(model, optimizer)
    with all_or_none(env, f"reading the checkpoint {path}"):
        header = _read_header(path)
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        _check_fits(path, tables_and_dense, stored)
        dense_state = _empty_dense_state(stored)
        _check_settings(path, optimizer, header["settings"])
    dcp.load(tables_and_dense | dense_state, storage_reader=FileSystemReader(path))
    _restore_dense_state(optimizer, dense_state)
    for name, group in _parameter_groups(optimizer).items():
        group.update(header["settings"][name])
    optimizer.zero_grad()  # hands the learning rates on to the fused kernels
    return int(header["step"])


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps among the complete ones in a folder, or None."""
    found = [
        (int(_read_header(path.parent)["step"]), path.parent)
        for path in Path(folder).glob(f"*/{_HEADER}")
    ]
    complete = [(step, path) for step, path in found if not path.name.endswith(_PARTIAL)]
    return max(complete)[1] if complete else None


def _model_and_fused_state(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """The tables, their optimizer rows and the dense parameters, by flat names.

    Nested state of the fused optimizers fails where a rank owns no part of a table.
    """
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, entries in _part(optimizer, FUSED).state_dict()["state"].items():
        for name, tensor in entries.items():
            state[f"{_OPTIMIZER}/{FUSED}/{parameter}/{name}"] = tensor
    return state


def _dense_state(optimizer: CombinedOptimizer) -> dict[str, Any]:
    dense = _part(optimizer, DENSE)
    return {
        f"{_OPTIMIZER}/{DENSE}/{parameter}/{name}": torch.as_tensor(value)
        for parameter, tensor in dense.params.items()
        for name, value in dense.state.get(tensor, {}).items()
    }


def _empty_dense_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors for the dense optimizer's stored state; torch makes none before the first step."""
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(f"{_OPTIMIZER}/{DENSE}/") and isinstance(entry, TensorStorageMetadata)
    }


def _restore_dense_state(
    optimizer: CombinedOptimizer, dense_state: Mapping[str, torch.Tensor]
) -> None:
    dense = _part(optimizer, DENSE)
    for key, tensor in dense_state.items():
        parameter, name = key.removeprefix(f"{_OPTIMIZER}/{DENSE}/").rsplit("/", 1)
        weight = dense.params[parameter]
        # torch keeps the step count on the CPU, and moments beside their parameter
        dense.state.setdefault(weight, {})[name] = (
            tensor if name == "step" else tensor.to(weight.device)
        )


def _part(optimizer: CombinedOptimizer, key: str) -> KeyedOptimizer:
    """The fused or the dense part; an empty one where a model has no dense parameters."""
    return dict(optimizer.optimizers).get(key) or CombinedOptimizer([])


def _parameter_groups(optimizer: CombinedOptimizer, prefix: str = "") -> dict[str, dict[str, Any]]:
    """The parameter groups that a rank has, by the first parameter of each."""
    groups: dict[str, dict[str, Any]] = {}
    for key, part in optimizer.optimizers:
        if isinstance(part, CombinedOptimizer):
            groups |= _parameter_groups(part, f"{prefix}{key}/")
            continue
        name_of = {id(tensor): name for name, tensor in part.params.items()}
        for group in part.param_groups:
            groups[f"{prefix}{key}/{name_of[id(group['params'][0])]}"] = group
    return groups


def _settings_of_all_ranks(optimizer: CombinedOptimizer, env: Env) -> dict[str, dict[str, Any]]:
    """Learning rates and the like of every parameter group of any rank, as JSON can hold them."""
    mine = {
        name: {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for name, group in _parameter_groups(optimizer).items()
    }
    of_ranks: list[dict[str, dict[str, Any]]] = [{}] * env.world_size
    dist.all_gather_object(of_ranks, mine)
    return {name: settings for of_rank in of_ranks for name, settings in of_rank.items()}


def _read_header(path: Path) -> dict[str, Any]:
    if not (path / _HEADER).is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {_HEADER}")
    header: dict[str, Any] = json.loads((path / _HEADER).read_text())
    if header["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {header['format']}, this version of shardemb reads "
            f"{_FORMAT}"
        )
    return header


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
    unread = [name for name in stored if name.startswith("model/") and name not in state]
    if unread:
        raise ValueError(f"checkpoint {path} has {unread[0]!r}, which the model has not")


def _check_settings(path: Path, optimizer: CombinedOptimizer, saved: Mapping[str, Any]) -> None:
    missing = [name for name in _parameter_groups(optimizer) if name not in saved]
    if missing:
        raise ValueError(f"checkpoint {path} has no settings of the parameter group {missing[0]!r}")
