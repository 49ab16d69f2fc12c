"""Everything that looks at data to choose numbers."""
