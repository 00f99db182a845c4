"""Count parameters and multiply-adds of backbones and of whole models.

Stock counters see neither the products of attention nor the distances of the
clustering; here they have columns of their own. "Layers" are linear layers and
convolutions. Weights are random, and nothing is downloaded.

Examples:
    python tools/get_flops.py tiny small base --shape 224 224
    python tools/get_flops.py clustr-s clustr-s-w224 pvtv2-b2 --shape 800 1344
    python tools/get_flops.py configs/mmdet/retinanet_clustr-s_fpn_1x_coco.py
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from clustr_mm.benchmark.backbones import presets
from clustr_mm.files import write_whole
from clustr_mm.flops import count_flops, load_model, to_markdown


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='+',
        metavar='CONFIG|ARCH',
        help=f'tiny, small, base, a preset ({", ".join(presets())}), or a config file',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        default=[224, 224],
        metavar='PIXELS',
        help='height and width of the image, or one number for both (224)',
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help='count only the backbone of a config, not the whole model',
    )
    parser.add_argument('--out', type=Path, help='write the counts here, as JSON')
    args = parser.parse_args()
    if len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, got {args.shape}')
    return args


def main() -> None:
    """Run the tool."""
    args = parse_args()
    if args.out and not args.out.parent.is_dir():
        raise SystemExit(f'get_flops.py: there is no folder {args.out.parent}')
    rows = []
    for given in args.models:
        try:
            name, model = load_model(given, whole=not args.backbone)
            rows.append(count_flops(model, args.shape[0], args.shape[-1], name))
        except ValueError as error:
            raise SystemExit(f'get_flops.py: {error}') from error
    print(to_markdown(rows), end='')
    if args.out:
        text = json.dumps([asdict(row) for row in rows], indent=2) + '\n'
        write_whole(args.out, text.encode())


if __name__ == '__main__':
    main()
