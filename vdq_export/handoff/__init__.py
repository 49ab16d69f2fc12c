"""What a bundle for somebody else's toolchain carries beside its graphs."""
