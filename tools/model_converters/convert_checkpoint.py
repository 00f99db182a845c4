"""Take the backbone out of a checkpoint, into a small file under this package's names.

SRC is a checkpoint of the authors' public code, of a classifier, detector, segmentor or
pose estimator, or of a backbone: ClusTR, DualViT, LinGlo or STT. Nothing that is in it
is run. What is not complete is refused.

A .pth is what configs take:
    init_cfg=dict(type='Pretrained', checkpoint='DST.pth')
MMEngine, and so init_cfg and load_from, does not read .safetensors; this does:
    model.backbone.load_state_dict(safetensors.torch.load_file('DST.safetensors'))

Examples:
    python tools/model_converters/convert_checkpoint.py epoch_300.pth clustr-s.pth
    python tools/model_converters/convert_checkpoint.py public.pth b.safetensors --arch base
"""  # noqa: E501  commands are copied whole

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clustr_mm.files import read_checkpoint, shorten, write_whole
from clustr_mm.models import STT, ClusTR, DualViT, LinGlo, PyramidBackbone, checkpoint

#: Backbones and their archs by the long names.
KNOWN: dict[type[PyramidBackbone], Sequence[str]] = {
    ClusTR: ('tiny', 'small', 'base'),
    DualViT: ('small', 'base', 'large'),
    LinGlo: ('b0', 'b1', 'b2'),
    STT: ('s25',),
}

#: Entries with a second set of weights.
AVERAGED = ('ema_state_dict', 'model_ema', 'state_dict_ema')


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise ValueError for names that cannot be written to."""
    if target.suffix not in ('.pth', '.safetensors'):
        raise ValueError(f'{target}: the name must end in .pth or .safetensors')
    if target.suffix == '.safetensors' and not importlib.util.find_spec('safetensors'):
        raise ValueError(f'{target}: pip install safetensors for files of this kind')
    if not target.parent.is_dir():
        raise ValueError(f'{target}: there is no folder {target.parent}')
    if target.is_dir():
        raise ValueError(f'{target}: is a folder')
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target}: is the checkpoint to be read')
    # A link that leads nowhere does not exist, and would be replaced all the same.
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ValueError(f'{target}: is there already; --overwrite replaces it')


@functools.cache
def make_empty(cls: type[PyramidBackbone], arch: str) -> PyramidBackbone:
    """A backbone on the meta device, the same for all that are converted."""
    with torch.device('meta'):
        return cls(arch)


def find_backbone(
    content: Mapping[str, Any],
) -> tuple[PyramidBackbone, str, dict[str, str]]:
    """Find out which backbone the weights are of.

    Args:
        content (Mapping): Weights under any names, and other entries.

    Returns:
        tuple: The backbone, on the meta device; its arch; for each of its parameters
        that is there, the key.

    Raises:
        ValueError: If it is none of those that are known, or not all of it.
    """
    best, found = 0.0, None
    for cls, archs in KNOWN.items():
        names = [checkpoint.rename(key, cls.public_names) for key in content]
        inside = sum(name.startswith('stages.') for name in names)
        for arch in archs:
            model = make_empty(cls, arch)
            own = model.state_dict()
            sources = checkpoint.find_parameters(content, cls.public_names, own)
            matching = sum(content[k].shape == own[n].shape for n, k in sources.items())
            # A small arch may have no parameter that a larger one has not.
            share = matching / max(len(own), inside)
            if share > best:
                surplus = {n for n in names if n.startswith('stages.')} - own.keys()
                best, found = share, (model, arch, sources, surplus)
    if found is None:
        some = shorten(', '.join(content) or 'nothing', 100)
        raise ValueError(f'holds no backbone of this package, but {some}')
    model, arch, sources, surplus = found
    title = f'{type(model).__name__}-{arch}'
    try:
        checkpoint.check_complete(model, content, sources)
    except RuntimeError as error:
        raise ValueError(f'is no {title}: {shorten(error)}') from error
    if surplus:
        some = shorten(', '.join(sorted(surplus)), 200)
        raise ValueError(f'is no {title}, which has no {some}')
    return model, arch, sources


def take_weights(
    model: PyramidBackbone, content: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, Tensor]:
    """Copy the weights of a backbone, under its names and in its order.

    Raises:
        ValueError: If some have no values that a file can keep.
    """
    weights = {}
    for name, own in model.state_dict().items():
        if name not in sources:  # what a classifier need not have
            continue
        value = content[sources[name]].detach()
        fits = value.is_floating_point() == own.is_floating_point()
        if not fits or value.is_meta or value.layout is not torch.strided:
            kind = f'{value.layout}, {value.dtype}, on {value.device}'
            raise ValueError(f'{name} holds no numbers of the right kind ({kind})')
        # What was loaded may be a small part of a large memory, or shared, and either
        # would be written as such.
        weights[name] = value.clone(memory_format=torch.contiguous_format)
    return weights


def describe(
    parameters: Sequence[Tensor], sources: Mapping[str, str], content: Mapping[str, Any]
) -> str:
    """What was taken, renamed and left out, in a few lines."""
    dtypes = sorted({str(value.dtype).removeprefix('torch.') for value in parameters})
    renamed = [name for name, key in sources.items() if name != key]
    left_out = [key for key in content if key not in sources.values()]
    groups = Counter(checkpoint.WRAPPERS.sub('', key).split('.')[0] for key in left_out)
    parts = ', '.join(f'{g} ({n})' if n > 1 else g for g, n in groups.items())
    lines = [
        f'{sum(value.numel() for value in parameters):,} parameters in '
        f'{len(sources)} tensors of {", ".join(dtypes)}',
        f'{len(sources) - len(renamed)} names as they are, {len(renamed)} renamed'
        + (f', such as {sources[renamed[0]]} to {renamed[0]}' if renamed else ''),
        f'{len(left_out)} left out' + (f': {shorten(parts, 200)}' if parts else ''),
    ]
    lines += [
        f'the entry {entry}, a second set of weights, is ignored; what the EMAHook '
        'of MMEngine averaged is in state_dict'
        for entry in AVERAGED
        if entry in content
    ]
    return '\n'.join(lines)


def convert_checkpoint(
    source: Path, target: Path, arch: str = 'auto', overwrite: bool = False
) -> str:
    """Write the backbone of a checkpoint to a file of its own.

    Args:
        source (Path): A backbone, or a model that has one.
        target (Path): A name that ends in '.pth' or '.safetensors'.
        arch (str): What it must be, or 'auto'. Defaults to 'auto'.
        overwrite (bool): Whether the target may be there. Defaults to False.

    Returns:
        str: What was done, in a few lines.

    Raises:
        ValueError: If there is no such backbone in the source, or the target cannot
            be. Then the target is as it was.
        OSError: If reading or writing fails. Likewise.
    """
    check_target(source, target, overwrite)
    try:
        content = read_checkpoint(source)
        model, actual, sources = find_backbone(content)
        title = f'{type(model).__name__}-{actual}'
        if arch not in (actual, 'auto'):
            raise ValueError(f'is {title}, not {arch!r}')
        weights = take_weights(model, content, sources)
    # A name that is there twice is a RuntimeError.
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{source}: {error}') from error
    if target.suffix == '.safetensors':
        from safetensors.torch import save

        data = save(weights, dict(format='pt', arch=actual))
    else:
        buffer = io.BytesIO()
        torch.save(dict(state_dict=weights), buffer)
        data = buffer.getbuffer()
    write_whole(target, data)
    parameters = [weights[n] for n, _ in model.named_parameters() if n in weights]
    return f'{title}: {describe(parameters, sources, content)}\nwrote {target}'


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint; say why and exit if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog='convert_checkpoint.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('source', type=Path, metavar='SRC', help='.pth or any other name, .safetensors')
    add('target', type=Path, metavar='DST', help='.pth, or .safetensors')
    add(
        '--arch',
        default='auto',
        choices=['auto', *dict.fromkeys(sum(KNOWN.values(), ()))],
        help='refuse any other than this; by default it is found out',
    )
    add('--overwrite', action='store_true', help='replace DST if it is there')
    try:
        print(convert_checkpoint(**vars(parser.parse_args(argv))))
    except (ValueError, OSError) as error:
        raise SystemExit(f'convert_checkpoint.py: {error}') from error


if __name__ == '__main__':
    main()
