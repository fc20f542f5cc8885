"""Linear layers on `dcnzoo.ops.linear`, and the two-layer perceptron of the blocks."""

from torch import Tensor, nn

from ..ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, with products by oneDNN on the CPUs that gain by it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, with the parameters' names of timm's `Mlp`.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between the layers.
        act_layer: Activation.
        fc2_bias: Whether the second layer has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: type[nn.Module] = nn.GELU,
        fc2_bias: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim, bias=fc2_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to (..., dim)."""
        return self.fc2(self.act(self.fc1(x)))
