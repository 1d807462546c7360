"""Networks of real families, made small, with the split point of each."""

from types import MappingProxyType
from typing import NamedTuple

import timm
import torch
import torchvision
import transformers

NEW_TORCH = torch.__version__ >= "2.11"


class Family(NamedTuple):
    library: str
    name: str
    at: str
    options: dict = MappingProxyType({})
    size: int = 64
    slow: bool = False

    @property
    def id(self):
        return f"{self.library}-{self.name}"


SMALL_VIT = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
SMALL_SWIN = {"img_size": 56, "embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4)}
SMALL_TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": 99, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
TOKENS |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
#: A Trainer of experts: on a CPU, and it tells nobody.
TRAINER = {"label_names": ["labels"], "remove_unused_columns": False, "report_to": [], "disable_tqdm": True}
TRAINER |= {"use_cpu": True, "dataloader_pin_memory": False}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
#: Bottlenecks of an eighth of the width; the blocks' outputs keep theirs.
NARROW = {"width_per_group": 8}
NARROW_TIMM = {"base_width": 8}

FAMILIES = [
    Family("torchvision", "resnet18", "layer4"),
    Family("torchvision", "resnet50", "layer3", NARROW, slow=True),
    Family("torchvision", "resnet152", "layer3", NARROW, slow=True),
    Family("torchvision", "resnext50_32x4d", "layer4.2", slow=True),
    Family("torchvision", "wide_resnet50_2", "layer4.1", slow=True),
    Family("torchvision", "regnet_y_400mf", "trunk_output.block4"),
    Family("torchvision", "convnext_tiny", "features.6", slow=True),
    Family("torchvision", "efficientnet_b0", "features.5", slow=True),
    Family("torchvision", "densenet121", "features.denseblock4.denselayer8", slow=True),
    Family("torchvision", "swin_t", "features.6", slow=True),
    Family("torchvision", "vit_b_16", "encoder.layers.encoder_layer_11", {"image_size": 64}, slow=True),
    Family("torchvision", "mobilenet_v3_small", "features.9"),
    Family("timm", "resnet18", "layer4"),
    Family("timm", "resnet50", "layer3", NARROW_TIMM),
    Family("timm", "resnet152", "layer3", NARROW_TIMM, slow=True),
    Family("timm", "resnext50_32x4d", "layer4.2", slow=True),
    Family("timm", "wide_resnet50_2", "layer4.1", slow=True),
    Family("timm", "seresnet50", "layer4", NARROW_TIMM, slow=True),
    Family("timm", "resnet50_gn", "layer4.2", slow=True),
    Family("timm", "regnety_004", "s4"),
    Family("timm", "convnext_atto", "stages.2"),
    Family("timm", "efficientnet_b0", "blocks.4"),
    Family("timm", "densenet121", "features.denseblock4.denselayer8"),
    Family("timm", "vit_tiny_patch16_224", "blocks.1", SMALL_VIT, 32),
    Family("timm", "swin_tiny_patch4_window7_224", "layers.2.blocks.1", SMALL_SWIN, 56),
    Family("transformers", "bert", "encoder.layer.1"),
    Family("transformers", "roberta", "encoder.layer.2"),
    Family("transformers", "distilbert", "transformer.layer.1", DISTILBERT),
    Family("transformers", "electra", "encoder.layer.1"),
    Family("transformers", "albert", "encoder.albert_layer_groups.0", {"embedding_size": 16}),
]
if NEW_TORCH:  # fx of 2.6 does not trace torch.arange of a size, which these call around their layers
    FAMILIES += [
        Family("transformers", "mpnet", "encoder.layer.1"),
        Family("transformers", "modernbert", "layers.1"),
    ]


def build(family):
    """The network, initialised as its library does it."""
    if family.library == "torchvision":
        return torchvision.models.get_model(family.name, **family.options)
    if family.library == "timm":
        return timm.create_model(family.name, **family.options)
    options = {**SMALL_TEXT, **TOKENS, **family.options}
    config = transformers.AutoConfig.for_model(family.name, **options)
    return transformers.AutoModel.from_config(config)


def inputs_of(family, dtype=torch.float64):
    """Four images, or five texts of which two are padded."""
    if family.library != "transformers":
        return (torch.randn(4, 3, family.size, family.size, dtype=dtype),)
    ids = torch.randint(3, 99, (5, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 7:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def without_randomness(model):
    """Its random layers draw nothing; the layers stay in train mode."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model
