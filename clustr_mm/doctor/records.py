"""Results of checks, and what is known about the errors behind them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OK, WARN, FAIL = 'ok', 'warn', 'fail'


@dataclass
class Check:
    """What one check has found.

    Attributes:
        name (str): What was looked at.
        status (str): 'ok', 'warn' or 'fail'.
        text (str): What was seen.
        hint (str, optional): What can be done about it.
    """

    name: str
    status: str
    text: str
    hint: str | None = None


#: What an error says, and the way round. Symptoms rather than versions: other
#: versions than the tested ones may do as well. The first that fits is taken.
HINTS = (
    (
        r'(?s)MMCV==.* incompatible',
        'the toolboxes want an older mmcv: pip install mmcv-lite==2.1.0',
    ),
    (
        r'(?s)MMEngine==.* incompatible',
        'the toolboxes want another mmengine: pip install mmengine==0.10.7',
    ),
    (
        r"'pkgutil' has no attribute 'ImpImporter'",
        "openmim's openxlab brought a setuptools that Python 3.12 cannot import: "
        'pip install --no-deps "setuptools>=69,<81"',
    ),
    (
        r'pkg_resources',
        'mmengine and mim need the pkg_resources of an older setuptools: '
        'pip install "setuptools<81"',
    ),
    (
        r'torchvision::|undefined symbol|PyTorch and torchvision'
        r"|partially initialized module 'torchvision'",
        'torch and torchvision are not a pair: install both at once from the same '
        'index, such as torch==2.11.0 torchvision==0.26.0',
    ),
    (
        r'mmcv\._ext',
        "mmcv has no compiled operators, and clustr_mm's stand-in was not asked: "
        'import clustr_mm first, or install it with pip once more',
    ),
    (
        r'numpy\.(dtype|ufunc) size changed|compiled (using|against) .*NumPy'
        r'|_ARRAY_API|numpy\.core\.multiarray failed to import',
        'something was built for another numpy than the installed one: '
        'pip install "numpy<2", or build it again with --no-build-isolation',
    ),
    (
        r"(module named '|import of )(ftfy|regex)\b",
        'mmsegmentation needs two packages that it does not install: '
        'pip install ftfy regex',
    ),
    (
        r"(module named '|import of )(chumpy|xtcocotools)\b",
        'mmpose needs packages that are built with: '
        'pip install --no-build-isolation chumpy xtcocotools',
    ),
    (
        r'libGL\.so|libgthread',
        'OpenCV wants system libraries for its windows; without them: '
        'pip install --force-reinstall --no-deps "opencv-python-headless<4.12"',
    ),
    (
        r'mmcv operator .* is not available',
        'compile mmcv for it: pip install --no-build-isolation mmcv==2.1.0',
    ),
    (
        r'(?i)unsupported global|weights_only',
        'import clustr_mm before loading; never switch weights_only off for files '
        'of others',
    ),
    (
        r'CUDA driver version is insufficient|no kernel image is available',
        'this torch was built for newer drivers or other GPUs',
    ),
)


def find_hint(error: BaseException) -> str | None:
    """Look up what is known about an error or what caused it.

    Args:
        error (BaseException): The error.

    Returns:
        str: The way round; None if there is none.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    # The innermost error is nearest to the matter.
    for cause in reversed(seen):
        for pattern, hint in HINTS:
            if re.search(pattern, str(cause)):
                return hint
    return None


def hide_paths(text: str) -> str:
    """Replace the places that say where and whose this machine is.

    Args:
        text (str): Any text.

    Returns:
        str: The same with '<env>' for Python's environment and '~' for the home.
    """
    places = [(sys.prefix, '<env>'), (sys.base_prefix, '<python>')]
    home = Path.home()
    if home != Path(home.anchor):
        places.append((str(home), '~'))
    # The longest first, as one may be inside another; only whole folders, lest
    # /usr is found in all words.
    for place, name in sorted(places, key=lambda item: -len(item[0])):
        text = re.sub(rf'{re.escape(place)}(?=[/\\\s:\'")]|$)', name, text)
    return text


def describe(error: BaseException, limit: int = 300) -> str:
    """Put an error on one line.

    Args:
        error (BaseException): The error.
        limit (int): Greatest length. Defaults to 300.

    Returns:
        str: Its type and message.
    """
    text = hide_paths(' '.join(f'{type(error).__name__}: {error}'.split()))
    return text if len(text) <= limit else f'{text[: limit - 3]}...'


def guarded(name: str, function: Callable[[], Check]) -> Check:
    """Run a check whose error is its result.

    Args:
        name (str): What is looked at.
        function (Callable): The check.

    Returns:
        Check: What it returns, or a failure with the error and a hint.
    """
    try:
        return function()
    # Packages that do not fit together raise whatever they like, or exit.
    except (Exception, SystemExit) as error:
        return Check(name, FAIL, describe(error), find_hint(error))
