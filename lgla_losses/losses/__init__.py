"""The losses: LGLA from logits, from inputs of classifiers and over ranks; what it is compared with."""
