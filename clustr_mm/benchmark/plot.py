"""Picture of time and memory over pixels."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from .runner import Row

STYLES = {'forward': '-', 'train': '--'}

#: Title, unit, section and attribute of each panel.
PANELS = (
    ('time', 'ms', 'backbones', 'milliseconds'),
    ('peak memory without imports', 'MiB', 'backbones', 'case_mib'),
    ('clustering of stage 1', 'ms', 'sweep', 'milliseconds'),
)


def draw(rows: Sequence[Row], about: dict[str, Any]) -> bytes | None:
    """Draw a panel for each quantity that was measured.

    Args:
        rows (Sequence[Row]): Results.
        about (dict): Has ``device_name`` and ``threads``, for the title.

    Returns:
        bytes | None: A PNG file; None if nothing was measured over pixels.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    panels = []
    for title, unit, section, attribute in PANELS:
        chosen = [row for row in rows if row.section == section]
        if any(getattr(row, attribute) for row in chosen):
            panels.append((title, unit, chosen, attribute))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.5 * len(panels), 5),
        squeeze=False,
        layout='constrained',
    )
    for axis, (title, unit, chosen, attribute) in zip(axes[0], panels):
        axis.set(title=title, xlabel='image, pixels', ylabel=unit)
        _draw_lines(axis, chosen, attribute)
        if chosen[0].section == 'sweep':
            _draw_guide(axis, chosen)
        _label_axes(axis, chosen)
        # The panels of a section have the same lines: one legend is enough.
        if attribute == 'milliseconds':
            axis.legend(fontsize='small', frameon=False)
    figure.suptitle(f'{about["device_name"]}, CPU threads: {about["threads"]}')
    file = BytesIO()
    figure.savefig(file, dpi=120, format='png')
    plt.close(figure)
    return file.getvalue()


def _draw_lines(axis: Any, rows: Sequence[Row], attribute: str) -> None:
    """A line for each name and mode; crosses on top where there is no number."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    failed = []
    for number, name in enumerate(dict.fromkeys(row.name for row in rows)):
        style = dict(color=f'C{number}')
        axis.plot([], [], label=name, **style)
        for mode in modes:
            line = [row for row in rows if (row.name, row.mode) == (name, mode)]
            line.sort(key=lambda row: row.pixels)
            points = [(row.pixels, getattr(row, attribute)) for row in line]
            points = [point for point in points if point[1]]
            if points:
                axis.plot(*zip(*points), STYLES[mode], marker='o', ms=4, **style)
            missing = [row.pixels for row in line if not getattr(row, attribute)]
            failed += [(pixels, number, style) for pixels in missing]
    for pixels, number, style in failed:
        height = 0.98 - 0.03 * number
        place = axis.get_xaxis_transform()
        axis.plot(pixels, height, 'x', transform=place, **style)
    if len(modes) > 1:
        for mode in modes:
            axis.plot([], [], STYLES[mode], color='grey', label=mode)
    if failed:
        axis.plot([], [], 'x', color='grey', label='did not run')


def _draw_guide(axis: Any, rows: Sequence[Row]) -> None:
    """What growing in proportion to the pixels looks like."""
    start, low = min((row.pixels, row.milliseconds) for row in rows if row.milliseconds)
    pixels = sorted({row.pixels for row in rows})
    axis.plot(
        pixels,
        [low * number / start for number in pixels],
        ':',
        color='grey',
        label='in proportion to pixels',
    )


def label_sizes(rows: Sequence[Row]) -> dict[int, str]:
    """Labels by number of pixels; sizes too close for two labels share one."""
    ticks: dict[int, str] = {}
    last = 0
    for pixels, text in sorted({(row.pixels, row.input) for row in rows}):
        if pixels > 1.15 * last:
            ticks[pixels] = text
            last = pixels
        else:
            ticks[last] += f'\n{text}'
    return ticks


def _label_axes(axis: Any, rows: Sequence[Row]) -> None:
    """Logarithmic axes with the sizes and round numbers as ticks."""
    from matplotlib import ticker

    axis.set_xscale('log')
    axis.set_yscale('log')
    ticks = label_sizes(rows)
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha='right')
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(y=0.12)
    axis.grid(alpha=0.3)
