"""The tensor that stands for scores, and tensors that share its memory."""
