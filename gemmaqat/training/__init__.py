"""Losses, the optimizer, pure training steps, the one loop, distillation and checkpoints."""
