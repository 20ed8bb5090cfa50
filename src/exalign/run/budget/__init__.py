"""What a recipe would cost, worked out before it is run: parameters, bytes, tokens, operations, hours, and what fits.

Nothing here measures: every number is a formula of the recipe, the architecture and the assumptions that are printed.
"""
