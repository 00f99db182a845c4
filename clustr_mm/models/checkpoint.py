"""Checkpoints of other origin: their names, and no silent misses."""

import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..files import read_checkpoint, unwrap

Names = Sequence[tuple[str, str]]

#: What checkpoints put before the names of a backbone.
WRAPPERS = re.compile(r'^(?:module\.|model\.|backbone\.)+')

#: Parameters of a block.
BLOCK = re.compile(r'stages\.\d+\.blocks\.\d+\.')


class MisfitError(RuntimeError):
    """Weights do not fit a backbone."""


def rename(key: str, names: Names) -> str:
    """Translate a key of a checkpoint to a backbone's own name.

    Prefixes such as 'module.' are taken off. ``names`` translates foreign names, as
    (regular expression, replacement). If the expression has a group, it is a number
    that counts from 1, and ``{}`` in the replacement is the same counted from 0.
    """
    name = WRAPPERS.sub('', key)
    for pattern, replacement in names:
        match = re.search(pattern, name)
        if match:
            number = int(match.group(1)) - 1 if match.re.groups else None
            own = replacement.format(number)
            name = name[: match.start()] + own + name[match.end() :]
    return name


def find_parameters(
    state_dict: Mapping[str, Any], names: Names, known: Any
) -> dict[str, str]:
    """Find a backbone's parameters in a state dict.

    Args:
        state_dict (Mapping): Weights under foreign or own names.
        names (Sequence[tuple[str, str]]): See :func:`rename`.
        known (Container[str]): The backbone's own names.

    Returns:
        dict[str, str]: For each own name that is there, the key.

    Raises:
        MisfitError: If two keys mean the same parameter.
    """
    found: dict[str, str] = {}
    for key, value in state_dict.items():
        name = rename(key, names)
        if name not in known or not isinstance(value, Tensor):
            continue
        if name in found:
            raise MisfitError(f'{found[name]} and {key} are both {name}')
        found[name] = key
    return found


def translate_names(
    module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """Rename a state dict, in place; the ``load_state_dict`` pre-hook of a backbone.

    Raises:
        MisfitError: If two keys mean the same parameter; or if parameters are missing,
            for a backbone that ``requires_all``.
    """
    if not prefix:
        unwrap(state_dict)
    mine = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    found = find_parameters(mine, module.public_names, module.state_dict())
    if module.requires_all:
        check_complete(module, mine, found)
    for key in found.values():
        del state_dict[prefix + key]
    for name, key in found.items():
        state_dict[prefix + name] = mine[key]


def check_complete(
    module: nn.Module, state_dict: Mapping[str, Any], found: Mapping[str, str]
) -> None:
    """Refuse weights that do not fit a backbone, ``found`` by :func:`find_parameters`.

    Parameters whose names begin with ``optional_names`` may be missing, if all are.

    Raises:
        MisfitError: If parameters are missing, have another shape, or stages have more
            blocks than the backbone.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in found]
    if missing == [name for name in own if name.startswith(module.optional_names)]:
        missing = []
    differing = [
        f'{name} {tuple(state_dict[key].shape)} instead of {tuple(own[name].shape)}'
        for name, key in found.items()
        if state_dict[key].shape != own[name].shape
    ]
    # A smaller variant finds all of its parameters in a larger one. Stages that this
    # backbone does not have are another matter: ``out_indices`` leaves them out.
    stages = {_first_parts(name, 2) for name in own}
    blocks = {_first_parts(name, 4) for name in own}
    surplus = [
        name
        for name in (rename(key, module.public_names) for key in state_dict)
        if BLOCK.match(name)
        and _first_parts(name, 2) in stages
        and _first_parts(name, 4) not in blocks
    ]
    if not (missing or differing or surplus):
        return
    matched = len(own) - len(missing) - len(differing)
    message = (
        f'the checkpoint does not fit this {type(module).__name__}: '
        f'{matched} of {len(own)} parameters match'
    )
    for what, which in [
        ('missing', missing),
        ('of other shape', differing),
        ('of more blocks', surplus),
    ]:
        if which:
            more = f', and {len(which) - 3} more' if len(which) > 3 else ''
            message += f'; {what}: {", ".join(which[:3])}{more}'
    raise MisfitError(message)


def check_readable(init_cfg: dict | Sequence[dict] | None) -> None:
    """Raise ValueError if a file named in ``init_cfg`` cannot be read."""
    for cfg in [init_cfg] if isinstance(init_cfg, dict) else init_cfg or ():
        path = Path(str(cfg.get('checkpoint'))).expanduser()
        try:
            if path.is_file():
                read_checkpoint(path)
        except ValueError as error:
            raise ValueError(f'checkpoint {str(path)!r} {error}') from None


def _first_parts(name: str, number: int) -> str:
    """The first components of a dotted name."""
    return '.'.join(name.split('.')[:number])


@WEIGHT_INITIALIZERS.register_module()
class RandomStart:
    """Leaves the weights as they are, and says so: ``init_cfg`` of a recipe that needs
    weights of a file, where none is named.

    Args:
        warning (str): What to say.
    """

    def __init__(self, warning: str) -> None:
        self.warning = warning

    def __call__(self, module: nn.Module) -> None:
        """Warn in the training's log."""
        print_log(self.warning, 'current', logging.WARNING)
