"""Model cards: the README.md of a model's folder, which the Hugging Face Hub shows."""

import timm
from timm.models._hub import generate_readme
from torch import nn

from .macs import count_macs

CITATIONS = {
    'arXiv:2401.06197': """@inproceedings{xiong2024dcnv4,
  title     = {Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications},
  author    = {Xiong, Yuwen and Li, Zhiqi and Chen, Yuntao and Wang, Feng and Zhu, Xizhou and Luo, Jiapeng and
               Wang, Wenhai and Lu, Tong and Li, Hongsheng and Qiao, Yu and Lu, Lewei and Zhou, Jie and Dai, Jifeng},
  booktitle = {CVPR},
  year      = {2024}
}""",
    'arXiv:2211.05778': """@inproceedings{wang2023internimage,
  title     = {InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author    = {Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and
               Hu, Xiaowei and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle = {CVPR},
  year      = {2023}
}""",
    'arXiv:2306.14525': """@inproceedings{han2024parameternet,
  title     = {ParameterNet: Parameters Are All You Need for Large-scale Visual Pretraining of Mobile Networks},
  author    = {Han, Kai and Wang, Yunhe and Guo, Jianyuan and Wu, Enhua},
  booktitle = {CVPR},
  year      = {2024}
}""",
}

CLASSIFIER_USAGE = """```python
import dcnzoo, timm

model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: a PIL image
```

```python
import dcnzoo
from transformers import pipeline

classify = pipeline('image-classification', model='FOLDER')
```
"""

BACKBONE_USAGE = """These are the weights of a backbone, without a classifier:

```python
import dcnzoo, timm

backbone = timm.create_model('local-dir:FOLDER', pretrained=True)
maps = backbone(images)  # one map per stage
```
"""


def card_in_repository(card: str, repo_id: str) -> str:
    """A folder's card whose examples load from the repository instead."""
    return card.replace('local-dir:FOLDER', f'hf-hub:{repo_id}').replace("model='FOLDER'", f"model='{repo_id}'")


def model_card(
    name: str,
    model: nn.Module,
    *,
    backbone: bool = False,
    license: str | None = None,
    made: str | None = None,
    origin: dict[str, str] | None = None,
    metrics: dict[str, str] | None = None,
) -> str:
    """Writes a model card.

    Args:
        name: What the card is headed with.
        model: Made by `timm.create_model`; it may be on the meta device.
        backbone: It has no classifier.
        license: Of the weights, as the Hub names it.
        made: How the weights came to be.
        origin: Where they came from: facts by name.
        metrics: Figures by name, as somebody stated them.
    """
    # what the package itself registered: a folder's own description of its weights need not tell the papers
    registered = timm.get_pretrained_cfg(model.pretrained_cfg['architecture']) or model.default_cfg
    cfg = registered if isinstance(registered, dict) else registered.to_dict()
    papers = cfg.get('paper_ids') or ()
    papers = [papers] if isinstance(papers, str) else list(papers)
    size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    params = sum(parameter.numel() for parameter in model.parameters())
    details = {
        'Architecture': f'{model.pretrained_cfg["architecture"]}, {type(model).__name__}'
        + (', backbone without classifier' if backbone else f', {model.num_classes} classes'),
        'Size': {
            'Parameters (M)': f'{params / 1e6:.2f}',
            'Multiply-accumulates (G)': f'{count_macs(model, size) / 1e9:.2f}',
            'Image size': ' x '.join(str(side) for side in size),
        },
        'Licence': license or 'not stated',
    }
    if papers:
        details['Papers'] = [f'https://arxiv.org/abs/{paper.removeprefix("arXiv:")}' for paper in papers]
    if origin:
        details['Origin'] = origin
    details['How made'] = made or 'not stated'
    if metrics:
        details['Metrics, as stated by whoever made this folder; they were not measured by dcnzoo'] = metrics
    return generate_readme(
        {
            'tags': ['image-feature-extraction' if backbone else 'image-classification', 'timm', 'dcnzoo']
            + ([] if backbone else ['transformers']),
            'license': license or 'unknown',
            'description': 'Needs the package dcnzoo, which registers the architecture with timm.',
            'details': details,
            'usage': BACKBONE_USAGE if backbone else CLASSIFIER_USAGE,
            'citation': [CITATIONS[paper] for paper in papers if paper in CITATIONS],
        },
        name,
        task_name='image-feature-extraction' if backbone else 'image-classification',
    )
