"""A model folder on disk, both ways: headers, index, shards, staging, manifest."""
