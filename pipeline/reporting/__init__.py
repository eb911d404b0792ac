"""What a person reads of a run when it has ended."""
