"""What no denoising step changes leaves the graph that runs at each."""
