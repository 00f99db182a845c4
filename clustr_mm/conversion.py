"""Takes the backbone out of a checkpoint of any origin, into a file of its own."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import check_safetensors, read_checkpoint, shorten, write_whole
from .models import ClusTR
from .models.checkpoint import WRAPPERS, check_complete, find_parameters

#: Variants by their long names.
ARCHS = ('tiny', 'small', 'base')

#: What a result may be called.
SUFFIXES = ('.pth', '.safetensors')

#: Entries with a second set of weights, and what to say about them.
AVERAGED = {
    'ema_state_dict': 'the entry ema_state_dict is ignored: the EMAHook of MMEngine '
    'writes the averaged weights, taken here, into state_dict, and the others there',
    'model_ema': 'the entry model_ema, averaged weights, is ignored',
    'state_dict_ema': 'the entry state_dict_ema, averaged weights, is ignored',
}


class _Stages(dict):
    """Claims to have every name inside a stage, known or not."""

    def __contains__(self, name: object) -> bool:
        return str(name).startswith('stages.')


@dataclass
class Conversion:
    """A backbone's parameters, and where they come from.

    Attributes:
        arch (str): 'tiny', 'small' or 'base'.
        weights (dict[str, Tensor]): Under this package's names, in its order.
        sources (dict[str, str]): The name that each of them had.
        left_out (list[str]): What else was there, parameters and other entries.
        notes (list[str]): What deserves a line of its own.
    """

    arch: str
    weights: dict[str, Tensor]
    sources: dict[str, str]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(value.numel() for value in self.weights.values())

    @property
    def renamed(self) -> list[str]:
        """Own names of the parameters that had others."""
        return [name for name, source in self.sources.items() if name != source]

    def report(self) -> str:
        """What was done, in a few lines."""
        dtypes = {str(v.dtype).removeprefix('torch.') for v in self.weights.values()}
        lines = [
            f'ClusTR-{self.arch}: {self.num_parameters:,} parameters in '
            f'{len(self.weights)} tensors of {", ".join(sorted(dtypes))}',
            f'{len(self.weights) - len(self.renamed)} names as they are, '
            f'{len(self.renamed)} renamed',
        ]
        if self.renamed:
            name = self.renamed[0]
            lines[-1] += f', such as {self.sources[name]} to {name}'
        groups = Counter(WRAPPERS.sub('', key).split('.')[0] for key in self.left_out)
        parts = [f'{g} ({n})' if n > 1 else g for g, n in groups.items()]
        lines.append(f'{len(self.left_out)} left out')
        if parts:
            lines[-1] += f': {shorten(", ".join(parts), 200)}'
        return '\n'.join(lines + self.notes)


def convert_checkpoint(
    source: Path, target: Path, arch: str = 'auto', overwrite: bool = False
) -> Conversion:
    """Write the backbone of a checkpoint to a file of its own.

    Args:
        source (Path): A checkpoint of this package, of a toolbox or of the public
            code: a backbone, or a model that has one.
        target (Path): A name that ends in '.pth', for a file that ``init_cfg``
            and ``load_from`` take, or in '.safetensors'.
        arch (str): 'tiny', 'small' or 'base' if nothing else is wanted, or
            'auto'. Defaults to 'auto'.
        overwrite (bool): Whether the target may be there. Defaults to False.

    Returns:
        Conversion: What was written.

    Raises:
        ValueError: If there is no such backbone in the source, or the target
            cannot be. Then the target is as it was.
        OSError: If reading or writing fails. Likewise.
    """
    check_target(source, target, overwrite)
    try:
        conversion = extract_backbone(read_checkpoint(source), arch)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    write_weights(conversion, target)
    return conversion


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse names that cannot be written to.

    Args:
        source (Path): What will be read.
        target (Path): What will be written.
        overwrite (bool): Whether the target may be there.

    Raises:
        ValueError: If the target is of an unknown kind, is there already, or is
            the source.
    """
    if target.suffix not in SUFFIXES:
        raise ValueError(f'{target}: the name must end in {" or ".join(SUFFIXES)}')
    if target.suffix == '.safetensors':
        check_safetensors()
    if not target.parent.is_dir():
        raise ValueError(f'{target}: there is no folder {target.parent}')
    if target.is_dir():
        raise ValueError(f'{target}: is a folder')
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target}: is the checkpoint to be read')
    # A link that leads nowhere does not exist, and would be replaced all the same.
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ValueError(f'{target}: is there already; --overwrite replaces it')


def extract_backbone(content: Mapping[str, Any], arch: str = 'auto') -> Conversion:
    """Find a backbone among the parameters of a model.

    Args:
        content (Mapping): A state dict, perhaps with other entries.
        arch (str): What it must be, or 'auto'. Defaults to 'auto'.

    Returns:
        Conversion: Copies of the parameters, and what is to be said of them.

    Raises:
        ValueError: If this is not exactly one of the known backbones.
    """
    if arch not in (*ARCHS, 'auto'):
        raise ValueError(f'arch must be one of {[*ARCHS, "auto"]}, got {arch!r}')
    try:
        sources = find_parameters(content, ClusTR.public_names, _Stages())
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    found = {name: (key, content[key]) for name, key in sources.items()}
    actual = find_arch(found, content)
    if arch not in (actual, 'auto'):
        raise ValueError(f'is ClusTR-{actual}, not ClusTR-{arch}')

    with torch.device('meta'):
        model = ClusTR(actual)
    own = model.state_dict()
    unknown = [name for name in found if name not in own]
    if unknown:
        raise ValueError(
            f'is no ClusTR-{actual}: it has parameters that this one has not: '
            f'{shorten(", ".join(unknown), 200)}'
        )
    for name, (_, value) in found.items():
        if (
            not value.is_floating_point()
            or value.is_meta
            or value.layout is not torch.strided
        ):
            kind = f'{value.layout}, {value.dtype}, on {value.device}'
            raise ValueError(f'{name} holds no floating-point numbers ({kind})')
    try:
        check_complete(model, content, sources)
    except RuntimeError as error:
        raise ValueError(f'is no ClusTR-{actual}: {shorten(error)}') from error
    used = {source for source, _ in found.values()}
    return Conversion(
        actual,
        # Copies: what was loaded may be a small part of a large memory, or shared,
        # and either would be written as such.
        {n: found[n][1].detach().clone(memory_format=torch.contiguous_format)
         for n in own},
        {name: found[name][0] for name in own},
        [key for key in content if key not in used],
        [note for entry, note in AVERAGED.items() if entry in content],
    )  # fmt: skip


def find_arch(names: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Tell a variant by its number of blocks.

    Args:
        names (Mapping): Has names of parameters of stages as keys.
        content (Mapping): Has all names in the checkpoint, for the message.

    Returns:
        str: The arch. Nothing else has been checked.

    Raises:
        ValueError: If no variant has these blocks.
    """
    depths: dict[int, int] = {}
    for name in names:
        block = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name)
        if block:
            stage, number = map(int, block.groups())
            depths[stage] = max(depths.get(stage, 0), number + 1)
    if not depths:
        some = shorten(', '.join(content) or 'nothing', 100)
        raise ValueError(f'holds no ClusTR backbone, but {some}')
    known = {arch: ClusTR.arch_zoo[arch]['depths'] for arch in ARCHS}
    for arch, expected in known.items():
        if depths == dict(enumerate(expected)):
            return arch
    listed = '; '.join(f'{a} has {_join(depths)}' for a, depths in known.items())
    # In the file's own numbers, of which there may be any.
    stages, counts = zip(*sorted(depths.items()), strict=True)
    raise ValueError(
        f'is no ClusTR of a known arch: its stages {_join(stages)} have '
        f'{_join(counts)} blocks; {listed}'
    )


def _join(numbers: Iterable[int]) -> str:
    return shorten(', '.join(map(str, numbers)), 60)


def write_weights(conversion: Conversion, path: Path) -> None:
    """Write the parameters to a file, all or nothing.

    Args:
        conversion (Conversion): Has the parameters.
        path (Path): The file, replaced if it is there.

    Raises:
        OSError: If it cannot be written. Then it is as it was.
    """
    if path.suffix == '.safetensors':
        from safetensors.torch import save

        data = save(conversion.weights, dict(format='pt', arch=conversion.arch))
    else:
        buffer = io.BytesIO()
        torch.save(dict(state_dict=conversion.weights), buffer)
        data = buffer.getbuffer()
    write_whole(path, data)
