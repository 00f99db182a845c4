"""Draw a small data set in the layout and format of a real one."""

import argparse

from clustr_mm.toy_data import TASKS, make_toy_data


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--task', default='ade20k', choices=TASKS, help='whose layout')
    parser.add_argument('--out', default='data/toy', help='folder that gets the data')
    parser.add_argument('--num-train', type=int, default=600, help='training images')
    parser.add_argument('--num-val', type=int, default=24, help='validation images')
    parser.add_argument('--size', type=int, default=112, help='height and width')
    parser.add_argument('--seed', type=int, default=0, help='other seed, other data')
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    try:
        root, drawn = make_toy_data(**vars(parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f'make_toy_data.py: {error}') from error
    print(f'{"drew" if drawn else "found"} {root}')


if __name__ == '__main__':
    main()
