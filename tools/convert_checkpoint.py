"""Take the backbone out of a checkpoint, into a small file under this package's names.

SRC is a checkpoint of the authors' public code, of a classifier, detector, segmentor or
pose estimator, or of a backbone. It is read by torch's safe loader, which runs nothing
that is in it. What is no complete ClusTR-tiny, -small or -base is refused.

A .pth is what configs take:
    init_cfg=dict(type='Pretrained', checkpoint='DST.pth')
MMEngine, and so init_cfg and load_from, does not read .safetensors; this does:
    model.backbone.load_state_dict(safetensors.torch.load_file('DST.safetensors'))

Examples:
    python tools/convert_checkpoint.py epoch_300.pth clustr-s.pth
    python tools/convert_checkpoint.py public.pth clustr-s.safetensors --arch small
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from clustr_mm.conversion import ARCHS, convert_checkpoint


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
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
        choices=('auto', *ARCHS),
        help='refuse any other than this; by default it is found out',
    )
    add('--overwrite', action='store_true', help='replace DST if it is there')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Raises:
        SystemExit: With a line that says why, if it cannot be done.
    """
    args = parse_args(argv)
    try:
        conversion = convert_checkpoint(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f'convert_checkpoint.py: {error}') from error
    print(conversion.report())
    print('wrote', args.target)


if __name__ == '__main__':
    main()
