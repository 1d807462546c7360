"""What the compilers of older PyTorch can take; between the tested 2.6, 2.11 and 2.13 nothing is known."""

import torch

#: Stages of PyTorch's own layers, stacked, in one graph; and numbers that change without compiling anew.
TAKES_STAGES = CHANGES_NUMBERS = torch.__version__ >= "2.11"
#: Stages with layers of others, whose attributes older ones cannot list, stacked, in one graph.
TAKES_OWN_LAYERS = torch.__version__ >= "2.12"
