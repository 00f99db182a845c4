"""Finds checkpoints, the config of each, and says whether the two fit."""

import ast
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from ..files import read_checkpoint, shorten
from ..models import PyramidBackbone

#: Settings of a model that change nothing about what a checkpoint fits.
TRAINING_ONLY = ('_scope_', 'drop_path_rate', 'init_cfg', 'pretrained', 'with_cp')


def match_name(name: str, configs: Iterable[Path]) -> Path | None:
    """Find the config whose name a name is or begins with, the longest of them."""
    fitting = [
        config
        for config in configs
        if name.startswith(config.stem)
        and not name[len(config.stem) : len(config.stem) + 1].isalnum()
    ]
    return max(fitting, key=lambda config: len(config.stem), default=None)


def match_path(path: Path, configs: Sequence[Path]) -> Path | None:
    """Find the config that a checkpoint or one of its folders is named after."""
    names = (path.stem, *(folder.name for folder in path.absolute().parents))
    return next(filter(None, (match_name(name, configs) for name in names)), None)


def match_meta(meta: Mapping[str, Any], configs: Sequence[Path]) -> Path | None:
    """Find the config that a checkpoint says it was trained with.

    Args:
        meta (Mapping): What the runner stored beside the weights: the name of the
            experiment, and the text of the config, which is read, not run.
        configs (Sequence[Path]): Candidates.

    Returns:
        Path: The config of that name, or else the only one with the same model;
        None if there is none.
    """
    found = match_name(str(meta.get('experiment_name')), configs)
    if found is None:
        stored = _read_text(meta.get('cfg'))
        same = [
            config
            for config in configs
            # Reading a config takes most of a second.
            if stored.get('default_scope') == config.parent.name
            and stored.get('model') == _read_model(config)
        ]
        found = same[0] if len(same) == 1 else None
    return found


@cache
def _read_model(config: Path) -> Any:
    return _compare(Config.fromfile(config).model)


def _read_text(text: Any) -> dict[str, Any]:
    """The model and the toolbox of a config's text. Runs nothing of the text."""
    found = {}
    try:
        for statement in ast.parse(text).body:
            targets = getattr(statement, 'targets', ())
            name = getattr(targets[0], 'id', None) if len(targets) == 1 else None
            if name in ('default_scope', 'model'):
                found[name] = _compare(_evaluate(statement.value))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return {}
    return found


def _evaluate(node: ast.expr) -> Any:
    """The value of literals and of calls of ``dict`` with named arguments."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict' or node.args:
            raise ValueError(f'not a literal: {ast.unparse(node)}')
        return {item.arg: _evaluate(item.value) for item in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _evaluate(value)
            for key, value in zip(node.keys, node.values)
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item) for item in node.elts]
    return ast.literal_eval(node)


def _compare(value: Any) -> Any:
    """What of a model's config must agree for a checkpoint to be of this config."""
    if isinstance(value, Mapping):
        return {k: _compare(v) for k, v in value.items() if k not in TRAINING_ONLY}
    if isinstance(value, (list, tuple)):
        return [_compare(item) for item in value]
    return value


def find(folder: Path, configs: Sequence[Path]) -> list[Path]:
    """Search a folder and those in it, one checkpoint for each training.

    Args:
        folder (Path): Work dirs as ``mim train`` leaves them, or checkpoints that
            are named after their configs.
        configs (Sequence[Path]): The configs.

    Returns:
        list[Path]: Of each folder every file that is named after a config, and of
        the others the best one, or the last one, or the newest one.
    """
    groups: dict[Path, list[Path]] = {}
    found = []
    for file in sorted(folder.rglob('*.pth')):
        if not file.is_file():  # a link to what is gone
            continue
        if match_name(file.stem, configs):
            found.append(file)
        else:
            groups.setdefault(file.parent, []).append(file)
    found += [_pick(parent, files) for parent, files in groups.items()]
    return sorted(found)


def _pick(folder: Path, files: Sequence[Path]) -> Path:
    best = [file for file in files if file.name.startswith('best_')]
    last = folder / 'last_checkpoint'
    if not best and last.is_file():
        # The path in it is that of the machine that trained.
        named = Path(last.read_text(errors='replace').strip()).name
        best = [file for file in files if file.name == named]
    return max(best or files, key=lambda file: (_modified(file), file.name))


def _modified(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # a training deletes what it no longer keeps
        return 0


def load(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Read a checkpoint by the safe loader.

    Args:
        path (Path): The file.

    Returns:
        tuple: What the runner stored about the training, and the weights.

    Raises:
        ValueError: If that is not possible, in one line.
    """
    content = read_checkpoint(path)
    weights = {
        key.removeprefix('module.'): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError('holds no state dict')
    meta = content.get('meta')
    return meta if isinstance(meta, Mapping) else {}, weights


def check_fit(config: Config, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are those of a config's whole model, heads included.

    The runner only warns of a missing or different head and then tests random
    weights. Nothing is allocated.

    Args:
        config (Config): The config.
        weights (Mapping[str, Tensor]): What :func:`load` returned.

    Raises:
        ValueError: If they are not, in one line.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what models say of themselves when built
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that nothing is copied
            model = MODELS.build(config.model)
            for module in model.modules():
                if isinstance(module, PyramidBackbone):
                    module.requires_all = True
            keys = model.load_state_dict(dict(weights), strict=False)
    except Exception as error:
        raise ValueError(shorten(error)) from error
    finally:
        logging.disable(disabled)
    # As the runner does. The counter is of no use in a test.
    missing = [k for k in keys.missing_keys if not k.endswith('num_batches_tracked')]
    if missing:
        more = f', and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise ValueError(
            f'the checkpoint is not one of this {type(model).__name__}: missing: '
            f'{", ".join(missing[:3])}{more}'
        )
