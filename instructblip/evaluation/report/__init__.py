"""What a person reads of an evaluation: its page, the paper's table with own rows, a comparison of two runs."""
