"""The part of timm's contract that is the same for every architecture."""

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Backbone(nn.Module):
    """An image classifier whose body is a row of stages, each with a feature map at its end.

    A subclass defines `forward_head` and the two methods without a body here, and sets `num_stages` to the number of
    stages that it has.
    """

    num_stages: int

    def _forward_stages(self, x: Tensor, stop: int) -> list[Tensor]:
        """The maps of the first `stop` stages, (N, C, H, W) each."""
        raise NotImplementedError

    def _forward_neck(self, maps: list[Tensor]) -> Tensor:
        """Makes the map that is pooled from those of all stages."""
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
        if output_fmt != 'NCHW' and output_fmt != 'NHWC':
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got '{output_fmt}'")
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        maps = self._forward_stages(x, max_index + 1 if stop_early else self.num_stages)
        intermediates: list[Tensor] = []
        for i, feature in enumerate(maps):
            if i in take_indices:
                intermediates.append(feature if output_fmt == 'NCHW' else feature.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        return self._forward_neck(maps) if len(maps) == self.num_stages else maps[-1], intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (N, in_chans, H, W) to the map that is pooled, (N, num_features, H', W')."""
        return self._forward_neck(self._forward_stages(x, self.num_stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
