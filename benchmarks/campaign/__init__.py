"""The campaign on a GPU machine: steps with bounds, whose results survive a kill. Standard library only.

Nothing here imports torch or fastfilm: the package is built by the campaign's first steps, and a step that dies
takes nothing with it.
"""
