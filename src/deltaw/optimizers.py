"""``peft.optimizers`` under its name here."""

from .peft import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer"]
