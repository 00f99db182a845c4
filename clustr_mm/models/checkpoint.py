"""Checkpoints of other origin: renaming on load, and no silent misses."""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

Names = Sequence[tuple[str, str]]

#: What checkpoints put before the names of a backbone.
WRAPPERS = re.compile(r'^(?:module\.|model\.|backbone\.)+')

#: Parameters of a block.
BLOCK = re.compile(r'stages\.\d+\.blocks\.\d+\.')

#: Entries of a checkpoint that hold the weights.
CONTAINERS = ('state_dict', 'model')


def accept_checkpoints(
    backbone: nn.Module, names: Names, optional: Sequence[str] = ()
) -> None:
    """Make a backbone load checkpoints of several origins, or fail aloud.

    On every ``load_state_dict`` (MMEngine's ``init_cfg``, ``load_from`` and
    ``resume`` included) parameter names are translated, wrappings such as
    ``module.``, ``backbone.``, ``{'model': ...}`` are seen through. A state
    dict without all parameters of the backbone is an error, and so is one with
    more blocks in a stage. Other keys that the backbone does not know are left
    to the caller's ``strict``.

    Args:
        backbone (nn.Module): The module.
        names (Sequence[tuple[str, str]]): Foreign names as (regular
            expression, replacement); if the expression has a group, it is a
            number from 1, and ``{}`` in the replacement is that less one.
        optional (Sequence[str]): What the names of parameters begin with that
            a state dict may lack, if it lacks all of them; they stay as they
            were. Defaults to none.
    """
    backbone._foreign_names = tuple(names)
    backbone._optional_names = tuple(optional)
    # The public method of this name came with torch 2.5.
    backbone._register_load_state_dict_pre_hook(_load_hook, with_module=True)


def translate(
    state_dict: Mapping[str, Any], known: Mapping[str, Any], names: Names
) -> dict[str, tuple[str, Tensor]]:
    """Find a backbone's parameters in a state dict.

    Args:
        state_dict (Mapping): Weights under foreign or own names.
        known (Mapping): Has the backbone's own names as keys.
        names (Sequence[tuple[str, str]]): See :func:`accept_checkpoints`.

    Returns:
        dict[str, tuple[str, Tensor]]: For each own name that was found, the
        name in ``state_dict`` and its value.
    """
    found = {}
    for key, value in state_dict.items():
        name = rename(key, names)
        if name in known and isinstance(value, Tensor):
            found[name] = (key, value)
    return found


def rename(key: str, names: Names) -> str:
    """A backbone's own name of a key of a state dict."""
    name = WRAPPERS.sub('', key)
    for pattern, replacement in names:
        name = re.sub(pattern, partial(_replace, replacement), name)
    return name


def _part(name: str, length: int) -> str:
    """The first components of a dotted name."""
    return '.'.join(name.split('.')[:length])


def _replace(replacement: str, match: 're.Match[str]') -> str:
    if match.re.groups:
        return replacement.format(int(match.group(1)) - 1)
    return replacement


def unwrap(state_dict: MutableMapping[str, Any]) -> None:
    """Lift the weights out of containers, in place."""
    for name in CONTAINERS:
        if isinstance(state_dict.get(name), Mapping):
            inner = state_dict.pop(name)
            state_dict.update(inner)
            unwrap(state_dict)


def _load_hook(
    module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """Rename a state dict to the backbone's names, in place, and check it."""
    if not prefix:
        unwrap(state_dict)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mine = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    found = translate(mine, own, module._foreign_names)
    missing = [name for name in own if name not in found]
    kept = [name for name in own if name.startswith(module._optional_names)]
    if missing == kept:
        missing = []
    else:
        kept = []
    differing = [
        f'{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}'
        for name, (_, value) in found.items()
        if value.shape != own[name].shape
    ]
    # A smaller variant finds all of its parameters in a larger one. Stages that this
    # backbone does not have are another matter: ``out_indices`` leaves them out.
    stages = {_part(name, 2) for name in own}
    blocks = {_part(name, 4) for name in own}
    surplus = [
        name
        for name in (rename(key, module._foreign_names) for key in mine)
        if BLOCK.match(name)
        and _part(name, 2) in stages
        and _part(name, 4) not in blocks
    ]
    if missing or differing or surplus:
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
        raise RuntimeError(message)
    for key, _ in found.values():
        del state_dict[prefix + key]
    for name, (_, value) in found.items():
        state_dict[prefix + name] = value
    for name in kept:
        state_dict[prefix + name] = own[name].detach()


def _parent_hook(
    parent: nn.Module,
    state_dict: MutableMapping[str, Any],
    prefix: str,
    *_: Any,
    child: str,
) -> None:
    """Give a backbone inside ``parent`` the weights that lack its prefix."""
    backbone = getattr(parent, child, None)
    if not hasattr(backbone, '_foreign_names'):
        return
    if not prefix:
        unwrap(state_dict)
    inside = f'{prefix}{child}.'
    if any(key.startswith(inside) for key in state_dict):
        return
    own = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    for name, (key, value) in translate(
        state_dict, own, backbone._foreign_names
    ).items():
        del state_dict[key]
        state_dict[inside + name] = value


def _on_registration(parent: nn.Module, name: str, module: Any) -> None:
    """Watch for backbones that become part of a model.

    ``load_from`` hands a child only the keys under its own prefix, so weights
    without one (a bare backbone or classifier) must be seen by the parent.
    """
    if hasattr(module, '_foreign_names'):
        parent._register_load_state_dict_pre_hook(
            partial(_parent_hook, child=name), with_module=True
        )


register_module_module_registration_hook(_on_registration)
