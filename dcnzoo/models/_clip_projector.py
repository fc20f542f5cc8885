"""The head of the largest InternImage models: two stages' maps fused, pooled by attention, and classified."""

import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn


class ClipFusion(nn.Module):
    """Adds projections of the last two stages' maps at the resolution of the first of them.

    Args:
        in_chs: Channels of the last stage but one and of the last.
        out_chs: Channels of the sum.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_chs: tuple[int, int], out_chs: int = 1024, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fine = nn.Conv2d(in_chs[0], out_chs, 1, **dd)
        self.coarse = nn.Conv2d(in_chs[1], 4 * out_chs, 1, **dd)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps (N, C1, H, W) and (N, C2, ceil(H/2), ceil(W/2)) to (N, out_chs, H, W)."""
        coarse = self.shuffle(self.coarse(coarse))
        return self.fine(fine) + coarse[:, :, : fine.shape[2], : fine.shape[3]]


class AttentionPool(nn.Module):
    """Multi-head attention over a map's pixels, queried by their mean.

    Args:
        dim: Channels of the map.
        out_dim: Channels of the pooled vector.
        num_heads: Number of heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = LayerNorm(dim, **dd)
        self.norm_k = LayerNorm(dim, **dd)
        self.norm_v = LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, out_dim)."""
        x = x.flatten(2).transpose(1, 2)
        heads = (self.num_heads, -1)
        q = self.q(self.norm_q(x.mean(1, keepdim=True))).unflatten(-1, heads).transpose(1, 2)
        k = self.k(self.norm_k(x)).unflatten(-1, heads).transpose(1, 2)
        v = self.v(self.norm_v(x)).unflatten(-1, heads).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(1))


class ClipHead(nn.Module):
    """Attention pooling, LayerNorm, dropout and classifier.

    Args:
        in_features: Channels of the fused map.
        num_classes: Number of classes, 0 for no classifier.
        hidden_size: Channels of the pooled vector.
        num_heads: Heads of the attention.
        pool_type: 'avg' for attention pooling (its query is the average), '' to leave out pooling and norm.
        drop_rate: Dropout before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_size: int = 768,
        num_heads: int = 16,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.global_pool = AttentionPool(in_features, hidden_size, num_heads, **dd)
        self.norm = LayerNorm(hidden_size, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.in_features = in_features
        self.num_features = hidden_size
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, device=None, dtype=None) -> None:
        """Replaces the classifier, and takes the pooling away for good where `pool_type` is ''."""
        if pool_type not in (None, '', 'avg'):
            raise ValueError(f"global_pool of a clip projector must be 'avg' or '', got {pool_type!r}")
        taken_away = isinstance(self.global_pool, nn.Identity)
        if pool_type == 'avg' and taken_away:
            raise ValueError("global_pool 'avg' asks for the attention pooling that was taken away")
        if num_classes > 0 and (pool_type == '' or taken_away):
            raise ValueError(f'num_classes must be 0 without the attention pooling, got {num_classes}')
        if pool_type == '':
            self.global_pool, self.norm = nn.Identity(), nn.Identity()
            self.num_features = self.in_features
        dd = {'device': device, 'dtype': dtype}
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.fc(x)
