"""From any source of text to ``data/prepared``: packages, users' files, splits, the data card."""
