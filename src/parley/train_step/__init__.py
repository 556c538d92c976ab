"""The fused step: forward, backward and update of one LoRA step over packed conversations, by hand."""
