"""The part of timm's contract that is the same for every architecture."""

from collections.abc import Iterator

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Backbone(nn.Module):
    """An image classifier whose body is a row of stages, each with a feature map at its end.

    A subclass defines `forward_features`, `forward_head` and the two methods without a body here, and sets `num_stages`
    to the number of stages that it has.
    """

    num_stages: int

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the stages' maps one after another, (N, C, H, W) each, computing them as they are asked for."""
        raise NotImplementedError

    def _forward_neck(self, previous: Tensor, x: Tensor) -> Tensor:
        """Maps the outputs of the last two stages to the map that is pooled."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond biases and other vectors."""
        return set()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the network and collects the maps of stages.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Stages to collect, in the order of `feature_info`: the last n for an int, those listed for a list,
                all for None.
            norm: Has no effect, each stage's map is as normalised as the next stage finds it.
            stop_early: Leave out what follows the last stage collected.
            output_fmt: Layout of the maps collected, 'NCHW' or 'NHWC'.
            intermediates_only: Return the list alone.

        Returns:
            What `forward_features` gives (the last stage's map, with `stop_early`) and the list of maps.

        Raises:
            ValueError: `output_fmt` is another layout.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        stop = max_index + 1 if stop_early else self.num_stages
        intermediates = []
        previous = x
        for i, feature in zip(range(stop), self._feature_maps(x), strict=False):
            previous, x = x, feature
            if i in take_indices:
                intermediates.append(x if output_fmt == 'NCHW' else x.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        if stop == self.num_stages:
            x = self._forward_neck(previous, x)
        return x, intermediates

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
