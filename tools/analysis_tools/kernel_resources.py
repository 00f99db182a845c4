"""What the search kernel takes of a GPU: registers, spills and shared memory.

Compiles it ahead of time for cards of every generation, as the clustering calls it,
and prints a table. No GPU is needed. Exit status 1 if numbers are spilled out of the
registers, or if a card has too little shared memory.

Example:
    kernel_resources.py --out docs/gpu.md
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import command_line, import_extra

from clustr_mm.files import write_whole

#: Shared memory in KiB of a block and of a multiprocessor, and warps of the latter,
#: by compute capability. From the CUDA C++ programming guide.
CARDS = {
    75: (64, 64, 32),
    80: (163, 164, 64),
    86: (99, 100, 48),
    89: (99, 100, 48),
    90: (227, 228, 64),
    100: (227, 228, 64),
}
CHANNELS = (64, 128, 256, 320)
#: Width, and whether there are limits: of neighbours, centres and peaks.
SEARCHES = ((8, False), (4, False), (4, True))

MARKERS = ('<!-- kernel table -->', '<!-- end of kernel table -->')


Row = dict[str, int | float | str]


def measure(capability: int, channels: int, width: int, has_limits: bool) -> Row:
    """Compile the kernel; what it takes, by the title of the table's column."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clustr_mm.ops.triton_search import _search_kernel, configuration

    constants = configuration(capability, channels, width, has_limits)
    options = {name: constants.pop(name) for name in ('num_warps', 'num_stages')}
    types = ['*fp32'] * 3 + ['*i64' if has_limits else '*fp32', '*i32', 'i32', 'i32']
    signature = dict(zip(_search_kernel.arg_names, types))
    signature.update(dict.fromkeys(constants, 'constexpr'))
    # Tensors start at multiples of 16 bytes; the numbers are not specialized.
    aligned = {(i,): [['tt.divisibility', 16]] for i in range(5)}
    source = ASTSource(_search_kernel, signature, constants, aligned)
    binary = triton.compile(source, GPUTarget('cuda', capability, 32), options)
    ptxas = knobs.nvidia.ptxas if capability < 100 else knobs.nvidia.ptxas_blackwell
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, 'kernel.ptx')
        ptx.write_text(binary.asm['ptx'])
        arch = f'-arch=sm_{capability}{"a" if capability >= 90 else ""}'
        command = [ptxas.path, '-v', arch, ptx, '-o', os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)

    registers = int(re.search(r'Used (\d+) registers', done.stderr)[1])
    spills = re.findall(r'(\d+) bytes spill', done.stderr)
    tensor_memory = getattr(binary.metadata, 'tmem_size', 0) or 0
    shared, warps = binary.metadata.shared, options['num_warps']
    _, shared_here, warps_here = CARDS[capability]
    programs = min(
        warps_here // warps,
        # A quarter of the processor has a quarter of its registers, by the eight.
        16384 // (-(-registers // 8) * 8 * 32) * 4 // warps,
        # From Ampere on the system keeps a KiB for itself.
        shared_here * 1024 // (shared + (1024 if capability >= 80 else 0)),
        512 // tensor_memory if tensor_memory else warps_here,
    )
    mma = re.search(r'wgmma\.mma_async|tcgen05\.mma|mma\.sync', binary.asm['ptx'])
    return {
        'sm': capability,
        'channels': channels,
        'width': width,
        'limits': 'yes' if has_limits else 'no',
        'blocks': 'x'.join(str(constants[n]) for n in ('BLOCK_Q', 'BLOCK_K', 'CHUNK')),
        'warps': warps,
        'registers': registers,
        'spill bytes': sum(map(int, spills)),
        'shared KiB': round(shared / 1024, 1),
        'warps per SM': programs * warps,
        'tensor cores': 'yes' if mma else 'no',
    }


def main() -> int:
    """Print the table, and write it where asked to."""
    parser = command_line('kernel_resources.py', __doc__)
    parser.add_argument('--out', type=Path, help='Markdown file with the two markers')
    args = parser.parse_args()
    # Kernels that are interpreted are not compiled.
    os.environ.pop('TRITON_INTERPRET', None)
    try:
        page = args.out.read_text() if args.out else ''.join(MARKERS)
        start, end = (page.index(marker) for marker in MARKERS)
        before, after = page[: start + len(MARKERS[0])], page[end:]
    except (OSError, ValueError) as error:
        parser.error(f'cannot put a table between {MARKERS}: {error}')
    try:
        rows = [measure(c, n, *s) for c in CARDS for n in CHANNELS for s in SEARCHES]
    except (ImportError, AttributeError) as error:
        parser.error(f'needs Triton, as new as 3.6: {error}')
    table = import_extra('tabulate').tabulate(rows, 'keys', 'pipe')
    print(table)
    if args.out:
        write_whole(args.out, f'\n{table}\n'.join((before, after)).encode())
    return int(not all(fits(row) for row in rows))


def fits(row: Row) -> bool:
    """Whether registers and the shared memory of the card are enough."""
    return not row['spill bytes'] and row['shared KiB'] <= CARDS[row['sm']][0]


if __name__ == '__main__':
    sys.exit(main())
