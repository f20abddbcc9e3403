"""The pieces of the morning behind analysis.py, which does the arithmetic.

page.py     what the page says
picture.py  the pictures
parts.py    what git knows: what a change was made on, which parts of train.py it changed
"""
