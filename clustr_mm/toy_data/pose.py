"""Where the keypoints of COCO-WholeBody lie on a drawn person."""

from __future__ import annotations

import numpy as np

from .drawing import Figure

BODY_NAMES = (
    'nose',
    *('left_eye', 'right_eye', 'left_ear', 'right_ear'),
    *('left_shoulder', 'right_shoulder', 'left_elbow', 'right_elbow'),
    *('left_wrist', 'right_wrist', 'left_hip', 'right_hip'),
    *('left_knee', 'right_knee', 'left_ankle', 'right_ankle'),
)
# Pairs of BODY_NAMES, counted from 1 as in COCO's annotation files.
BODY_SKELETON = (
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13)),
    *((6, 7), (6, 8), (7, 9), (8, 10), (9, 11), (2, 3), (1, 2), (1, 3)),
    *((2, 4), (3, 5), (4, 6), (5, 7)),
)

# How far down an arm or a leg a joint sits, from 0 at its upper to 1 at its
# lower end.
_SHOULDER, _ELBOW, _WRIST = 0.06, 0.47, 0.82
_HIP, _KNEE, _ANKLE = 0.04, 0.5, 0.9


def _ring(x: float, y: float, rx: float, ry: float, count: int) -> np.ndarray:
    """(count, 2): an ellipse from its left end on, over the top."""
    angle = 2 * np.pi * np.arange(count) / count
    return np.stack((x - rx * np.cos(angle), y - ry * np.sin(angle)), 1)


def _face() -> np.ndarray:
    """The 68 points of a face, (68, 2), in half axes of the head's ellipse.

    They run from the image's left to its right: jaw, eyebrows, nose, eyes
    and mouth, in the order of iBUG 300-W.
    """
    along = np.linspace(0, np.pi, 17)
    jaw = np.stack((-0.92 * np.cos(along), 1.02 * np.sin(along) - 0.1), 1)
    arch = np.linspace(0, np.pi, 5)
    brow = np.stack((-0.25 * np.cos(arch), -0.16 - 0.05 * np.sin(arch)), 1)
    brows = [brow + (x, 0) for x in (-0.43, 0.43)]
    bridge = [(0, y) for y in (0.0, 0.1, 0.2, 0.3)]
    nostrils = [(-0.16, 0.36), (-0.08, 0.39), (0, 0.41), (0.08, 0.39), (0.16, 0.36)]
    eyes = [_ring(x, 0, 0.16, 0.07, 6) for x in (-0.42, 0.42)]
    lips = [_ring(0, 0.65, 0.34, 0.13, 12), _ring(0, 0.65, 0.24, 0.05, 8)]
    return np.concatenate((jaw, *brows, bridge, nostrils, *eyes, *lips))


def _hand() -> np.ndarray:
    """The 21 points of a hand, (21, 2).

    The root, then thumb to little finger, each from its base to its tip. The
    first coordinate goes from 0 at the wrist to 1 at the arm's lower end, the
    second from -1 to 1 across the arm, with the thumb at 1.
    """
    points = [(0.0, 0.0)]
    points += [(along, 0.3 + 0.7 * along) for along in (0.15, 0.3, 0.45, 0.6)]
    for tip, across in ((0.9, 0.5), (0.95, 0.1), (0.9, -0.3), (0.8, -0.7)):
        points += [(along, across) for along in np.linspace(0.45, tip, 4)]
    return np.array(points)


_FACE = _face()
_HAND = _hand()
# Big toe, small toe and heel: height above the sole and, from -1 to 1 with the
# inner side at 1, place across it, both in halves of the sole's width.
_FOOT = np.array([(0.2, 0.6), (0.2, -0.6), (0.6, 0.0)])


def locate_keypoints(figure: Figure) -> dict[str, np.ndarray]:
    """The 133 keypoints of a person, as if nothing hid them.

    Left and right are the person's own: the person faces the viewer, so its
    left is on the image's right.

    Args:
        figure (Figure): The drawn person.

    Returns:
        dict[str, np.ndarray]: By the keys of COCO-WholeBody's annotations:
        ``keypoints`` (17, 2), ``foot_kpts`` (6, 2), ``face_kpts`` (68, 2),
        ``lefthand_kpts`` and ``righthand_kpts`` (21, 2); float64 (x, y) in
        fractions of the image's side.
    """
    face = np.array(figure.head) + _FACE * figure.head_axes
    nose, ears = face[30], face[[16, 0]]
    eyes = face[42:48].mean(0), face[36:42].mean(0)

    # Axes: own left and right; upper and lower end; x and y.
    arms, legs = np.array(figure.arms)[::-1], np.array(figure.legs)[::-1]

    def along(limbs: np.ndarray, part: float) -> np.ndarray:
        return (1 - part) * limbs[:, 0] + part * limbs[:, 1]

    joints = [along(arms, part) for part in (_SHOULDER, _ELBOW, _WRIST)]
    joints += [along(legs, part) for part in (_HIP, _KNEE, _ANKLE)]
    body = np.concatenate(([nose], eyes, ears, *joints))

    hands, feet = [], []
    for side, inwards in enumerate((-1, 1)):
        wrist, end = along(arms, _WRIST)[side], arms[side, 1]
        across = _HAND[:, 1:] * (0.85 * inwards * figure.hand, 0)
        hands.append(wrist + _HAND[:, :1] * (end - wrist) + across)
        sole = _FOOT[:, ::-1] * (inwards * figure.foot, -figure.foot)
        feet.append(legs[side, 1] + sole)
    return {
        'keypoints': body,
        'foot_kpts': np.concatenate(feet),
        'face_kpts': face,
        'lefthand_kpts': hands[0],
        'righthand_kpts': hands[1],
    }
