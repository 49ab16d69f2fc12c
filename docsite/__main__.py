"""`python -m docsite`: write the measured tables inside docs/*.md anew."""

from docsite import recipes

for path, text in recipes.pages().items():
    path.write_text(text, encoding="utf-8")
