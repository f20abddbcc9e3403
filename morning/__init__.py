"""The pieces of the morning behind analysis.py, which does the arithmetic.

page.py     what the page says
picture.py  the pictures
parts.py    which parts of train.py were changed, by git
"""
