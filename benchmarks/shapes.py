"""The shapes that the operator is measured on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One 3x3, stride 1 call of the operator, on a value map of batch x height x width x channels.

    Attributes:
        count: How many layers of the network have this shape.
    """

    batch: int
    height: int
    width: int
    channels: int
    groups: int
    count: int = 1

    @property
    def packed(self) -> int:
        """Channels of offset_mask: 27 a group, up to the next multiple of 8 as in the published layers."""
        return 8 * -(-27 * self.groups // 8)

    @property
    def name(self) -> str:
        return f'{self.batch}x{self.height}x{self.width}x{self.channels} G{self.groups}'


def zoo(batch: int) -> list[Shape]:
    """The layers of dcnv4_tiny on 224 x 224 images."""
    return [
        Shape(batch, 56, 56, 64, 4, count=4),
        Shape(batch, 28, 28, 128, 8, count=4),
        Shape(batch, 14, 14, 256, 16, count=18),
        Shape(batch, 7, 7, 512, 32, count=4),
    ]


PAPER = [
    Shape(64, 56, 56, 128, 4),
    Shape(64, 28, 28, 256, 8),
    Shape(64, 14, 14, 512, 16),
    Shape(64, 7, 7, 1024, 32),
    Shape(64, 14, 14, 768, 24),
    Shape(1, 200, 320, 128, 4),
    Shape(1, 64, 64, 768, 24),
]
"""The shapes of the DCNv4 paper's Table 2, and two maps of detectors."""
