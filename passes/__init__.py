"""Graph rewrites, one a file; the order is in vdq_export/pipeline.py."""
