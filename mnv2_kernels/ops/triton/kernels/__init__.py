"""What runs on the GPU, in Triton's language, and what it knows when it is compiled."""
