"""`python -m docs.site`: write the measured tables inside docs/*.md, README.md and samples/README.md anew."""

from docs.site import readme, recipes

for path, made in {**recipes.pages(), **readme.pages()}.items():
    path.write_text(recipes.written(path.read_text(encoding="utf-8"), made), encoding="utf-8")
