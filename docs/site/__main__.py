"""`python -m docs.site`: write the measured tables inside docs/*.md anew."""

from docs.site import recipes

for path, text in recipes.pages().items():
    path.write_text(text, encoding="utf-8")
