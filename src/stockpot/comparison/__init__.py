"""What was forgotten and what was learned: paired tests on the items of two models.

``right_wrong`` and ``differences`` are the statistics, ``rows`` and ``verdict`` what is made of
them; ``recorded`` and ``models`` say where items come from.
"""
