"""What the CPU implementations of two families or more use; importing it, at the first launch, tunes the allocator."""

from .heap import keep_freed

keep_freed()
