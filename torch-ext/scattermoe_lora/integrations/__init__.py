"""What touches transformers and PEFT objects. Both are optional: they are imported only where their objects are."""
