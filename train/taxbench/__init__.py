"""The alignment tax in miniature: train, align and score a small model from scratch.

A tiny decoder learns eight tasks with checkable answers (`tasks`), is taught to follow
instructions, and is then aligned on preferences that know only about style. What alignment buys is
the reward (style of greedy answers); what it costs is capability (answers that are still right).
`demo` runs the comparison and writes a report; everything that trains goes through the same
decoder, losses, step and optimizers as the commands for real models.
"""
