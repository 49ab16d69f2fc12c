"""What changed between two graphs or two bundles."""
