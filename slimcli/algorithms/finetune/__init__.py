"""The finetune algorithm; see method.py."""
