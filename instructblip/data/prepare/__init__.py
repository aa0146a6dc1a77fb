"""From official files to shards, and what is asked of prepared shards."""
