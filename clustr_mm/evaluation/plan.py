"""What to evaluate, checked before anything is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..files import shorten
from .checkpoints import check_fit, find, load, match_meta, match_path
from .datasets import missing_data
from .runs import Job, Row

TOOLBOXES = ('mmdet', 'mmpose', 'mmpretrain', 'mmseg')


@dataclass
class Plan:
    """What to evaluate and what not.

    Attributes:
        jobs (list[Job]): Evaluations whose checks have passed.
        rows (list[Row]): Checkpoints that cannot be evaluated.
        reasons (dict[str, str]): For names of configs, why they cannot be.
        strays (list[str]): Checkpoints found that belong to no config.
    """

    jobs: list[Job] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)


def find_configs(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Find configs.

    Args:
        folder (Path): Folder of configs, with one folder for each toolbox.
        names (Sequence[str], optional): Files, or names of configs in the folder.
            By default all but those on toy data.

    Returns:
        list[Path]: The configs.

    Raises:
        ValueError: If there is no such config.
    """
    known = [file for box in TOOLBOXES for file in sorted((folder / box).glob('*.py'))]
    if names is None:
        return [config for config in known if 'toy' not in config.stem]
    configs = []
    for name in names:
        found = [config for config in known if name in (config.stem, config.name)]
        config = Path(name) if Path(name).is_file() else next(iter(found), None)
        if config is None:
            raise ValueError(
                f'--configs must be files or names of configs of {folder}, got {name!r}'
            )
        if config.absolute().parent.name not in TOOLBOXES:
            raise ValueError(
                f'a config must lie in a folder named {", ".join(TOOLBOXES)}, got '
                f'{name!r}'
            )
        configs.append(config.absolute())
    return list(dict.fromkeys(configs))


def make_plan(
    paths: Sequence[Path],
    configs: Sequence[Path],
    only: bool,
    work_dir: Path,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Find checkpoints and their configs, and check that they can be evaluated.

    Args:
        paths (Sequence[Path]): Checkpoints, and folders of checkpoints.
        configs (Sequence[Path]): The configs.
        only (bool): Whether the user has named these configs: then checkpoints of
            others are passed over, and if it is one config, every checkpoint given
            as a file is tested with it.
        work_dir (Path): Gets a folder for each evaluation.
        overrides (Mapping, optional): Changes of the configs.
        progress (Callable): Is told what is checked. Defaults to nothing.

    Returns:
        Plan: What to evaluate.
    """
    plan = Plan()
    seen, folders = set(), set()
    for path in paths:
        explicit = path.is_file()
        always = configs[0] if explicit and only and len(configs) == 1 else None
        for checkpoint in [path] if explicit else find(path, configs):
            if checkpoint.resolve() in seen:
                continue
            seen.add(checkpoint.resolve())
            progress(f'checking {checkpoint}')
            config, error, missing = _examine(
                checkpoint, always, configs, overrides or {}
            )
            if config and missing:
                plan.reasons[config.stem] = missing
            if not config and not error and explicit:
                error = 'belongs to no config; name its config by --configs'
            if error and (config or explicit or not only):
                plan.rows.append(_row(checkpoint, config, error))
            elif config and not missing:
                folder = _free(work_dir / config.stem / checkpoint.stem, folders)
                folders.add(folder)
                plan.jobs.append(Job(config, checkpoint, folder))
            elif not config and not only:
                plan.strays.append(str(checkpoint))
    return plan


def _examine(
    checkpoint: Path,
    path: Path | None,
    configs: Sequence[Path],
    overrides: Mapping[str, Any],
) -> tuple[Path | None, str | None, str | None]:
    """Find a checkpoint's config, what is wrong, and which data is missing."""
    path = path or match_path(checkpoint, configs)
    missing = None
    try:
        meta, weights = load(checkpoint)
        path = path or match_meta(meta, configs)
        if path:
            config = Config.fromfile(path)
            config.merge_from_dict(dict(overrides))
            missing = missing_data(config)
            check_fit(config, weights)
    # A config is a program, which can fail in any way.
    except Exception as error:
        return path, shorten(error), missing
    return path, None, missing


def _row(checkpoint: Path, config: Path | None, error: str) -> Row:
    """The row of a checkpoint that cannot be evaluated."""
    if config is None:
        return Row('', '', str(checkpoint), error=error)
    task = Job(config, checkpoint, checkpoint).task
    return Row(config.stem, task.title, str(checkpoint), error=error)


def _free(folder: Path, taken: set[Path]) -> Path:
    """A folder of this name, numbered if two checkpoints share it."""
    free, number = folder, 1
    while free in taken:
        number += 1
        free = folder.with_name(f'{folder.name}-{number}')
    return free
