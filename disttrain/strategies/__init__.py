"""DDP and FSDP as Lightning strategies."""
