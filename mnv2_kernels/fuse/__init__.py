"""Putting the fused block into models that exist: fuse, unfuse, explain."""
