"""Commands that are more than a call: each a function that ``pipeline.cli`` registers."""
