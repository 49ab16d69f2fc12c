"""The reference host loop (loop.mjs), its page, and the cases it is given. docs/host-loop.md explains it."""
