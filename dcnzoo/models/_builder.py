"""timm's builder, with weights that are verified before they are loaded."""

from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import resolve_pretrained_cfg
from torch import nn

from ..hub import fetch_pretrained


def build_model_with_cfg(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg=None,
    pretrained_cfg_overlay=None,
    cache_dir=None,
    **kwargs,
) -> nn.Module:
    """As timm's function of that name; what is downloaded is verified first, see `dcnzoo.hub.fetch`."""
    if pretrained:
        resolved = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        file = fetch_pretrained(resolved, cache_dir)
        if file is not None and not resolved.hf_hub_id:  # from a URL: timm would download it once more, unverified
            pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), 'file': str(file)}
    return timm_build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
