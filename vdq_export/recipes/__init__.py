"""Named recipes as TOML files; read by vdq_export.recipe."""
