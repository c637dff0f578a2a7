"""The operations as `torch.library` ops: forward, backward, fake implementations."""
